"""An evaluation as one HTML file, for the one who decides."""

from .examples import example_rows
from .page import write_report


__all__ = ["example_rows", "write_report"]
