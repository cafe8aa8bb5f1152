"""Prompts that list their candidates: where the list is, and the same prompt with another order."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .mentions import Mention, find_mentions
from .rows import as_text


# More than this stands between no two entries of a list
_WIDEST_GAP = 40
_FEATURES = re.compile(r" \((?:[^()\n]|\([^()\n]*\))*\)")
_LABEL = re.compile(r"(?<![^\W_])(?:\d{1,3}|[A-Za-z])(?![^\W_])")


class Listing:
    r"""
    A prompt that lists its candidates, one after the other, each once, with the same between any two of them.

    Numbers and single letters between them ("1.", "(B)") stay where they are when the order changes; what stands in
    parentheses behind a title ("Heat (Action, Crime)") moves with it. Titles elsewhere in the prompt, such as in the history,
    are left alone: of several such lists, the last is meant.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, text or messages.
        candidates (`Sequence`):
            The candidates, text or messages. The prompt lists what they say, without space around it.

    Raises:
        `ValueError`: the prompt does not list them.

    Example:

    ```python
    >>> from trl_dmpo.ranking.listing import Listing

    >>> listing = Listing("Seen: Heat. Which next: (A) Red Heat, (B) Big, (C) Babe? Answer:", [" Big", " Red Heat", " Babe"])
    >>> listing.order
    [1, 0, 2]
    >>> listing.write([2, 0, 1])
    'Seen: Heat. Which next: (A) Babe, (B) Big, (C) Red Heat? Answer:'
    ```
    """

    def __init__(self, prompt: Any, candidates: Sequence[Any]) -> None:
        titles = [as_text(candidate).strip() for candidate in candidates]
        self._messages = None if isinstance(prompt, str) else list(prompt)
        texts = {0: prompt} if self._messages is None else _texts_of(self._messages)
        for self._message, text in reversed(texts.items()):
            entries = _find_list(text, titles)
            if entries:
                break
        else:
            raise ValueError(
                f"its prompt does not list its {len(titles)} candidates, each once, one after the other, with the same "
                "between any two of them. Only such prompts can be asked in other orders"
            )
        self.order = [entry.title for entry in entries]
        ends = [0, *(entry.end for entry in entries)]
        starts = [*(entry.start for entry in entries), len(text)]
        self._between = [text[end:start] for end, start in zip(ends, starts, strict=True)]
        self._labels = {entry.title: text[entry.start : entry.end] for entry in entries}

    def write(self, order: Sequence[int]) -> Any:
        """
        The prompt with its candidates in another order.

        Args:
            order (`Sequence[int]`):
                Which candidate is listed first, second, and so on.

        Returns:
            `str` or `list[dict]`: the prompt, of the kind that it was.
        """
        first, *others = self._between
        pieces = [label for i, after in zip(order, others, strict=True) for label in (self._labels[i], after)]
        text = first + "".join(pieces)
        if self._messages is None:
            return text
        messages = list(self._messages)
        messages[self._message] = {**messages[self._message], "content": text}
        return messages


def _texts_of(messages: list[dict]) -> dict[int, str]:
    return {i: message["content"] for i, message in enumerate(messages) if isinstance(message.get("content"), str)}


def _find_list(text: str, titles: list[str]) -> list[Mention]:
    """The entries of the last list of all the titles, in its order; empty if there is none."""
    starting = defaultdict(list)
    for mention in find_mentions(text, titles):
        starting[mention.start].append(mention)
    ahead: set[int] = set()
    for start in sorted(starting, reverse=True):
        ahead.update(mention.title for mention in starting[start])
        # No list of all begins where some are not ahead
        for mention in starting[start] if len(ahead) == len(titles) else ():
            entries = _complete(text, starting, mention, len(titles))
            if entries:
                *others, last = entries
                # Behind the last one, parentheses may be part of the sentence
                has_features = any(entry.end - entry.start > len(titles[entry.title]) for entry in others)
                return [*others, _with_features(text, last) if has_features else last]
    return []


def _complete(text: str, starting: dict[int, list[Mention]], first: Mention, count: int) -> list[Mention]:
    """Entries from `first` on that hold each title once, with like gaps; empty if there are none."""
    paths: list[tuple[list[Mention], str | None]] = [([first], None)]
    while paths:
        path, gap = paths.pop()
        if len(path) == count:
            return path
        *before, last = path
        entry = _with_features(text, last)
        listed = {each.title for each in path}
        # What is tried first, the nearest and of these the longest, goes last onto the stack
        for start in range(entry.end + _WIDEST_GAP, entry.end, -1):
            if start in starting and gap in (None, found := _LABEL.sub("#", text[entry.end : start])):
                new = [mention for mention in reversed(starting[start]) if mention.title not in listed]
                paths += [([*before, entry, mention], found) for mention in new]
    return []


def _with_features(text: str, entry: Mention) -> Mention:
    features = _FEATURES.match(text, entry.end)
    if features is None or _LABEL.fullmatch(features[0][2:-1]):
        return entry
    return entry._replace(end=features.end())
