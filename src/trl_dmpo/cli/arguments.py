"""Options of `trl-dmpo train`, and which of what was given is for `accelerate launch`."""

import sys
from collections.abc import Iterable
from typing import Any

from accelerate.commands.launch import launch_command_parser
from trl import TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .errors import one_line_errors
from .options import separate_config, unknown_option


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
                separate_config(sys.argv[1:] if args is None else args),
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
            raise unknown_option(self, unknown[0])


def resolve_launch_config(launch_args: list[str]) -> list[str]:
    """`launch_args` with `--accelerate_config`, a file or a name that TRL knows, as accelerate's `--config_file`."""
    return [str(arg) for arg in resolve_accelerate_config_argument(launch_args)]


def _without_booleans(config_args: list[str]) -> list[str]:
    """Options and values from a YAML file; accelerate's flags take no value."""
    values: dict[str, list[str] | None] = {"True": [], "False": None}
    pairs = zip(config_args[::2], config_args[1::2], strict=True)
    found = [(name, values.get(value, [value])) for name, value in pairs]
    return [arg for name, value in found if value is not None for arg in (name, *value)]
