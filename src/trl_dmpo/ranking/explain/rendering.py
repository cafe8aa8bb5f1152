"""An explanation on the terminal."""

import math
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text


if TYPE_CHECKING:
    from .counterfactual import Counterfactual
    from .explanation import Explanation
    from .grounding import Sentence


_WIDTH = 20
_PARTS = " ▏▎▍▌▋▊▉"


def render(explanation: "Explanation") -> Group:
    """
    An explanation for `rich`: a bar for each item of the history, the counterfactual, and the sentence with what it made up.

    Args:
        explanation ([`Explanation`]):
            What to show.

    Returns:
        [`~rich.console.Group`]
    """
    parts: list[Table | Text] = [_headline(explanation), _table(explanation)]
    if explanation.counterfactual is not None:
        parts.append(Text(describe_counterfactual(explanation)))
    if explanation.sentence is not None:
        parts += _sentence_lines(explanation.sentence)
    return Group(*parts)


def describe_counterfactual(explanation: "Explanation") -> str:
    """
    The counterfactual in words.

    Args:
        explanation ([`Explanation`]):
            One with a counterfactual.

    Returns:
        `str`: a sentence or two.
    """
    found: Counterfactual | None = explanation.counterfactual
    if found is None:
        raise ValueError("there is no counterfactual. Give `explain` a `budget` above 0.")
    others = "" if found.among is None else f" among the {found.among} best items"
    if found.removed is None:
        if found.proven:
            return f"Whatever is left out of the history, the first recommendation stays the same{others}."
        return f"No set of items changes the first recommendation{others}, as far as was tried: {found.tried} sets."
    titles = [explanation.history[place] for place in found.removed]
    told = f"Without {_join(titles)}, {found.title} would come first."
    if len(titles) == 1:
        return told
    if found.proven:
        return f"{told} No smaller set of items changes the first recommendation{others}."
    return f"{told} A smaller set of items may do: {found.tried} sets were tried, not all."


def _headline(explanation: "Explanation") -> Text:
    line = Text("Why ")
    line.append(explanation.item, style="bold")
    line.append(" rather than ").append(explanation.runner_up, style="bold")
    return line.append(
        f": log-odds {explanation.log_odds:+.2f} ({explanation.log_odds_without_history:+.2f} without a history)"
    )


def _table(explanation: "Explanation") -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    largest = max(abs(explanation.attributions).max(), 1e-12)
    for title, value in zip(explanation.history, explanation.attributions.tolist(), strict=True):
        bar = Text(_bar(abs(value) / largest), style="green" if value > 0 else "red")
        table.add_row(Text(title), Text(f"{value:+.2f}"), bar)
    return table


def _bar(share: float) -> str:
    eighths = math.ceil(share * _WIDTH * 8) if share > 0 else 0
    return "█" * (eighths // 8) + _PARTS[eighths % 8].strip()


def _sentence_lines(sentence: "Sentence") -> list[Text]:
    lines = [Text(f"The model says: {sentence.text}", style="italic")]
    if sentence.unknown:
        unknown = _join([f'"{title}"' for title in sentence.unknown])
        lines.append(Text(f"In neither the history nor the catalogue: {unknown}", style="yellow"))
    return lines


def _join(titles: list[str]) -> str:
    *others, last = titles
    return f"{', '.join(others)} and {last}" if others else last
