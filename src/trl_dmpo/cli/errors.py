"""What the user got wrong is one line on the screen, not a traceback."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error in what the user gave as one line, and exit with code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Let a terminated process remove what it has written aside, as it does after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
