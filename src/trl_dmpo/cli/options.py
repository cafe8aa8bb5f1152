"""Options on the command line and in a configuration file: what all sub-commands have in common."""

from argparse import ArgumentParser
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import yaml


def separate_config(args: Iterable[str]) -> list[str]:
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


def unknown_option(parser: ArgumentParser, name: str) -> ValueError:
    """An error that names an option that is none, and the one that was probably meant."""
    options = [option for action in parser._actions for option in action.option_strings]
    close = get_close_matches(name.partition("=")[0], options, n=1)
    hint = f" Did you mean {close[0]}?" if close else " `--help` lists the options."
    return ValueError(f"Unknown option {name}.{hint}")
