"""The screen, on which titles and names from data are text and nothing else."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from trl_dmpo.ranking.report.text import clean


class Screen(Console):
    """
    A console that reads no markup, and shows the control characters of foreign text instead of sending them: a title must not
    clear a terminal, rename its window or write to its clipboard.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, markup=False, emoji=False)

    def render_str(self, text: str, **kwargs: Any) -> Text:
        """A string as text, which is measured in this form."""
        return super().render_str(clean(text), **kwargs)

    def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
        """What a renderable is made of, its styles aside, which are no part of the text."""
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=clean(segment.text))
