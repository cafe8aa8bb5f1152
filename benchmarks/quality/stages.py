"""Work that is kept: a stage that exists is not run again."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any


STAGE = "stage.json"


class Stages:
    """
    A folder of finished stages, each in a folder that is named by all that it was made from.

    Args:
        folder (`Path`):
            Where they are kept. Several processes may share it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str, made_from: Mapping[str, Any]) -> Path:
        """Where a stage is, or will be."""
        return self.folder / f"{name}-{hash_of(made_from)}"

    def get(self, name: str, made_from: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Path:
        """
        A stage, made if it is not there.

        Args:
            name (`str`):
                What kind of stage.
            made_from (`Mapping`):
                Plain values: all settings, and the hashes of what it reads.
            make (`Callable[[Path], Mapping]`):
                Makes it in an empty folder; what it returns is kept in `stage.json`, beside `made_from`, the seconds that it
                took, and the versions of what made it: these are no part of its name.

        Returns:
            `Path`: its folder.
        """
        path = self.path(name, made_from)
        if path.exists():
            return path
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        start = time.perf_counter()
        found = make(unfinished)
        about = {"made_from": made_from, "seconds": time.perf_counter() - start, "versions": versions()}
        text = json.dumps(about | dict(found), indent=1)
        (unfinished / STAGE).write_text(text, encoding="utf-8")
        try:
            unfinished.rename(path)
        except OSError:
            # Another process was as quick
            if not path.exists():
                raise
            shutil.rmtree(unfinished)
        return path


@cache
def versions() -> dict[str, str]:
    """Of the libraries that figures depend on, and the commit of this project where it is known."""
    found = {name: version(name) for name in ("trl-dmpo", "trl", "transformers", "torch", "peft")}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found | ({"commit": git.stdout.strip()} if git.returncode == 0 else {})


def read_stage(folder: Path) -> dict[str, Any]:
    """What `stage.json` says."""
    return json.loads((folder / STAGE).read_text(encoding="utf-8"))


def hash_of(value: Any) -> str:
    """Of plain values, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
