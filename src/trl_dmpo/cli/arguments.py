"""Options of `trl-dmpo train`, and which of what was given is for `accelerate launch`."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command_parser
from trl import TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .errors import one_line_errors


class TrainParser(TrlParser):
    """
    [`~trl.TrlParser`] that tells options of `accelerate launch` from mistakes, and says in one line what is wrong.

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses whose fields are the options.
        prog (`str`, *optional*):
            Name of the program, for the help.
    """

    def __init__(self, dataclass_types: Iterable[type], prog: str | None = None):
        # The full usage names hundreds of options before it comes to the error
        usage = "%(prog)s --model_name_or_path MODEL --dataset_name DATASET [--config FILE.yaml] [options]"
        super().__init__(dataclass_types, prog=prog, usage=usage, allow_abbrev=False)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[Any, ...]:
        """
        The dataclasses, for a script that was launched already: options of `accelerate launch` may stand in a
        configuration file, which serves both, but not on the command line.
        """
        parsed, launch_args = self.parse_with_launch_args(args, **kwargs)
        if launch_args:
            self.exit(2, f"error: {launch_args[0]} belongs to `accelerate launch`; use `trl-dmpo train` instead.\n")
        return parsed

    def parse_with_launch_args(
        self, args: Iterable[str] | None = None, include_config: bool = False
    ) -> tuple[tuple[Any, ...], list[str]]:
        """
        The dataclasses, and the options for `accelerate launch`.

        Args:
            args (`Iterable[str]`, *optional*):
                What was given. Will default to the command line.
            include_config (`bool`, *optional*, defaults to `False`):
                Whether to return the options for `accelerate launch` in the configuration file too.
        """
        with one_line_errors():
            *parsed, in_config, on_command_line = super().parse_args_and_config(
                _separate_config(sys.argv[1:] if args is None else args),
                return_remaining_strings=True,
                separate_remaining_strings=True,
            )
            in_config = _without_booleans(in_config)
            self._refuse_unknown([*in_config, *on_command_line])
        return tuple(parsed), [*(in_config if include_config else []), *on_command_line]

    def _refuse_unknown(self, launch_args: list[str]) -> None:
        script = "script.py"
        args, unknown = launch_command_parser().parse_known_args([*resolve_launch_config(launch_args), script])
        unknown = unknown or [name for name in [args.training_script] if name != script]
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            close = get_close_matches(unknown[0].partition("=")[0], options, n=1)
            hint = f" Did you mean {close[0]}?" if close else " `--help` lists the options."
            raise ValueError(f"Unknown option {unknown[0]}.{hint}")


def resolve_launch_config(launch_args: list[str]) -> list[str]:
    """`launch_args` with `--accelerate_config`, a file or a name that TRL knows, as accelerate's `--config_file`."""
    return [str(arg) for arg in resolve_accelerate_config_argument(launch_args)]


def _separate_config(args: Iterable[str]) -> list[str]:
    """`--config=FILE` as two arguments, the only form that TRL reads; an error if the file is missing or not YAML."""
    separated = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in separated:
        _check_yaml(*separated[separated.index("--config") + 1 :][:1])
    return separated


def _check_yaml(path: str | None = None) -> None:
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(f"`--config` needs a YAML file; there is no file {path or 'named'}.")
    try:
        yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"`--config`: {path} is not YAML: {' '.join(str(error).split())}") from error


def _without_booleans(config_args: list[str]) -> list[str]:
    """Options and values from a YAML file; accelerate's flags take no value."""
    values: dict[str, list[str] | None] = {"True": [], "False": None}
    pairs = zip(config_args[::2], config_args[1::2], strict=True)
    found = [(name, values.get(value, [value])) for name, value in pairs]
    return [arg for name, value in found if value is not None for arg in (name, *value)]
