"""From `--dataset_name` to splits: a name on the Hub, a folder, or a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.formats.files import read_records


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ScriptArguments

    from trl_dmpo import DMPOConfig

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig") -> dict[str, Any]:
    """
    The splits that the options name, by their names.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            Says which dataset, and whether to stream it.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            A mixture of datasets, which only a configuration file can give.

    Raises:
        `ValueError`: no dataset is given, two are, or it cannot be read.
        `FileNotFoundError`: there is no such file or dataset.
    """
    from trl import get_dataset

    name = script_args.dataset_name
    if bool(dataset_args.datasets) == bool(name):
        raise ValueError("Give a dataset: either `--dataset_name`, or `datasets` in the configuration file.")
    if not name:
        return get_dataset(dataset_args)
    return _load_path(Path(name).expanduser(), script_args) or _load_by_name(name, script_args)


def _load_path(path: Path, script_args: "ScriptArguments") -> dict[str, Any] | None:
    """The splits in a local file or folder; `None` if `path` looks like a name on the Hub."""
    if path.is_file():
        return {script_args.dataset_train_split: _load_file(path, script_args.dataset_streaming)}
    if path.is_dir():
        return _load_folder(path, script_args)
    looks_local = path.suffix in _BUILDERS or path.is_absolute() or len(path.parts) > 2
    if looks_local:
        raise FileNotFoundError(f"`dataset_name`: there is no file or folder {path}.")
    return None


def _load_file(path: Path, streaming: bool) -> Any:
    if path.suffix not in _BUILDERS:
        raise ValueError(
            f"`dataset_name`: {path} is not of a kind that can be read. It is one of: {', '.join(_BUILDERS)}; or a "
            "folder of such files, or one written by `save_to_disk`."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"`dataset_name`: {path} is empty.")
    return _load(_BUILDERS[path.suffix], data_files=str(path), split="train", streaming=streaming)


def _load_folder(path: Path, script_args: "ScriptArguments") -> dict[str, Any]:
    from datasets import Dataset, load_from_disk

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _load_by_name(str(path), script_args)
    loaded = load_from_disk(str(path))
    splits = {script_args.dataset_train_split: loaded} if isinstance(loaded, Dataset) else loaded
    if script_args.dataset_streaming:
        return {name: split.to_iterable_dataset() for name, split in splits.items()}
    return splits


def _load_by_name(name: str, script_args: "ScriptArguments") -> dict[str, Any]:
    return _load(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def _load(path: str, **kwargs) -> Any:
    """[`~datasets.load_dataset`], with errors that say which dataset it is about."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetBuildError

    try:
        return load_dataset(path, **kwargs)
    except (DatasetBuildError, ValueError) as error:
        if path == "json" and "data_files" in kwargs:
            read_records(Path(kwargs["data_files"]))  # says in which line, if a line is broken
        raise ValueError(
            f"The dataset {kwargs.get('data_files', path)} cannot be read: {error.__cause__ or error}"
        ) from error


def select_splits(
    splits: dict[str, Any], script_args: "ScriptArguments", training_args: "DMPOConfig"
) -> tuple[Any, Any]:
    """The split to train on, and the one to evaluate on or `None`."""
    train, test = script_args.dataset_train_split, script_args.dataset_test_split
    have = ", ".join(splits)
    if train not in splits:
        raise ValueError(
            f"There is no split {train!r} to train on, only: {have}. Set `--dataset_train_split` to one of them."
        )
    if training_args.eval_strategy == "no":
        return _not_empty(splits, train), None
    if test not in splits:
        raise ValueError(
            f"`eval_strategy={str(training_args.eval_strategy.value)!r}` needs a split to evaluate on, but there is "
            f"no {test!r}, only: {have}. Set `--dataset_test_split` to another, give a folder with train.jsonl and "
            "test.jsonl as `--dataset_name`, or leave out `--eval_strategy`."
        )
    return _not_empty(splits, train), _not_empty(splits, test)


def _not_empty(splits: dict[str, Any], name: str) -> Any:
    if getattr(splits[name], "num_rows", None) == 0:  # a stream does not know
        raise ValueError(f"The split {name!r} has no rows.")
    return splits[name]
