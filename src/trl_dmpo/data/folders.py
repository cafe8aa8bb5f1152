"""Folders that a command writes: whole, or not there, and never over what somebody else put there."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class FolderKind(NamedTuple):
    """
    What a folder holds.

    Args:
        name (`str`):
            What to call it: `"a prepared dataset"`.
        marker (`str`):
            A file that every folder of this kind has, and no other.
        option (`str`, *optional*, defaults to `"output_dir"`):
            What a user names the folder by, for errors.
        only (`tuple[str, ...]`, *optional*):
            All files that such a folder has. One with others is not replaced, nor taken for one. By default they are not known.
    """

    name: str
    marker: str
    option: str = "output_dir"
    only: tuple[str, ...] = ()


def check_folder(folder: Path, kind: FolderKind, overwrite: bool) -> None:
    """
    Raise if writing to `folder` would destroy what is there.

    Args:
        folder (`Path`):
            Where to write. It must not be there, or be empty, or with `overwrite` be of this kind.
        kind ([`FolderKind`]):
            What is to be written.
        overwrite (`bool`):
            Whether to replace one of this kind.

    Raises:
        `FileExistsError`: there is something else, or something of this kind that is not to be replaced.
    """
    if folder.resolve() == Path.cwd() or folder.is_mount():
        where = "the folder that you are in" if folder.resolve() == Path.cwd() else "a mount point"
        raise FileExistsError(f"`{kind.option}`: {folder} is {where}, which cannot be replaced. Name a folder in it.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not _is_of(kind, folder):
        raise FileExistsError(f"`{kind.option}`: {folder} is there and is not {kind.name}. Choose another folder.")
    if not overwrite:
        raise FileExistsError(
            f"`{kind.option}`: {folder} holds {kind.name}. Choose another folder, or set `overwrite_output_dir`."
        )


def _is_of(kind: FolderKind, folder: Path) -> bool:
    if not (folder / kind.marker).is_file():
        return False
    return not kind.only or {path.name for path in folder.iterdir()} <= set(kind.only)


@contextmanager
def written_aside(folder: Path, kind: FolderKind, overwrite: bool) -> Iterator[Path]:
    """
    A folder to write to, which takes the place of `folder` at the end, and goes if anything fails.

    Args:
        folder, kind, overwrite:
            As of [`check_folder`], which is asked before and after.

    Yields:
        `Path`: an empty folder beside `folder`.
    """
    check_folder(folder, kind, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    aside, old = temporary / "new", temporary / "old"
    try:
        aside.mkdir()
        yield aside
        check_folder(folder, kind, overwrite)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary)
