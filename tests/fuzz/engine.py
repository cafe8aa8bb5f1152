"""Atheris: inputs that take branches not taken before are kept in a folder and varied."""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import FunctionType

from tests.fuzz.generate import Bytes


def run(
    step: Callable[[Random], None], count_rows: Callable[[], int], tell: Callable[[], str], modules: Sequence[str]
) -> None:
    """
    Calls `step` until it has tried so many rows as the first argument of the program says, and prints what `tell` returns.

    An input at which it raises is written into the folder that the second argument names, and ends the program with an error:
    `step(Bytes(Path(...).read_bytes()))` raises again.
    """
    import atheris

    count, corpus = int(sys.argv[1]), Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    for name in modules:
        for function in vars(sys.modules[name]).values():
            if isinstance(function, FunctionType) and function.__module__ == name:
                atheris.instrument_func(function)  # in place
    start, told = time.monotonic(), [0]

    def try_bytes(data: bytes) -> None:
        step(Bytes(data))
        if count_rows() >= told[-1] + 10_000:
            told.append(count_rows())
            print(f"{tell()}; {time.monotonic() - start:.0f} s", flush=True)
        if count_rows() >= count:
            print(f"{tell()}; {time.monotonic() - start:.0f} s", flush=True)
            os._exit(0)

    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            "-max_len=4096",
            "-len_control=0",
            "-rss_limit_mb=0",
            "-timeout=300",
            f"-artifact_prefix={corpus}/crash-",
        ],
        try_bytes,
    )
    atheris.Fuzz()


def quiet() -> None:
    """What is logged of a bad row is wanted once, not by the million."""
    import datasets

    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
