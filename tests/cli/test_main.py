import subprocess
import sys

import pytest

from trl_dmpo import __version__
from trl_dmpo.cli import main as cli


HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "numpy", "rich"}


def test_nothing_heavy_is_imported_before_a_command_runs():
    code = (
        "import sys; from trl_dmpo.cli.main import make_parser; make_parser().format_help(); "
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(done.stdout.split())


def test_help_names_every_command(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in cli.COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert capsys.readouterr().out == printed


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"trl-dmpo {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "invalid choice: 'trian' (choose from"),
        (["--verbose"], "unknown option --verbose"),
    ],
)
def test_a_mistake_is_named_with_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert message in capsys.readouterr().err


def test_the_arguments_of_a_command_reach_it_untouched(monkeypatch):
    from trl_dmpo.cli import train

    given = []
    monkeypatch.setattr(train, "run", lambda argv: given.append(argv) or 0)
    argv = ["--config", "a.yaml", "--version", "-h", "--loss_type", "dmpo", "sft", "stray"]
    assert cli.main(["train", *argv]) == 0
    assert given == [argv]
