"""The command `trl-dmpo`. Nothing heavy is imported before a sub-command runs, so that `--help` answers at once."""

import argparse
import sys
from importlib import import_module

from trl_dmpo import __version__


# One module of this package each, with a function `run` from arguments to an exit code
COMMANDS = {
    "prepare": "make a dataset of chosen and rejected items from an interaction log",
    "train": "train a model on chosen and rejected completions, on your data",
    "evaluate": "how well models rank, with intervals, and compared on the same rows",
    "recommend": "the best items of a catalogue, for a user or for a file of users",
    "demo": "train a tiny recommender on made-up data, in minutes, without a network",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command itself; a sub-command parses what follows its name."""
    parser = argparse.ArgumentParser(
        prog="trl-dmpo", description="Direct Multi-Preference Optimization: one chosen answer against K rejected ones."
    )
    parser.add_argument("--version", action="version", version=f"trl-dmpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    parser.epilog = "`trl-dmpo COMMAND --help` lists the options of a command."
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the sub-command that `argv` names; returns the exit code."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        if rest:
            parser.error(f"unknown option {rest[0]}")
        parser.print_help()
        return 0
    return import_module(f"trl_dmpo.cli.{args.command}").run(rest)


if __name__ == "__main__":
    sys.exit(main())
