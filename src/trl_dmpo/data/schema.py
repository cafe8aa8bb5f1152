"""
The contract of a row, stated and checked here and nowhere else.

| column | type | meaning |
|---|---|---|
| `prompt` | `str` or list of messages; may be absent, then it is what all completions begin with | the context x |
| `chosen` | `str` or list of messages; or a `list` of one or several of them, for a row with several chosen | y_w |
| `rejected` | `list` of K >= 1 of them, K may differ from row to row; a bare one is K = 1 | y_1..y_K |
| `relevance` | optional, for losses that use it: a number for each of the chosen, then for each of the rejected | s |

Extra columns are kept and ignored, but for `tools` and `chat_template_kwargs`, which go to the chat template.
"""

import json
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """
    Why a row cannot be trained on.

    Args:
        reason (`str`):
            A few words to count by, the same for all rows with this problem.
        column (`str`):
            The column at fault.
        detail (`str`):
            What is wrong with this row, and what to do.
    """

    reason: str
    column: str
    detail: str


def is_message_list(value: Any) -> bool:
    """Whether `value` is a list of messages, each a mapping with a `role`."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)
    )


def as_list(completions: Any) -> list:
    """`chosen` or `rejected` as a list of completions: a bare string, or a bare list of messages, is a list of one."""
    return [completions] if isinstance(completions, str) or is_message_list(completions) else completions


def is_several(chosen: Any) -> bool:
    """Whether `chosen` is a list of completions: it begins with one. A list that begins with none is no completion either."""
    return (
        isinstance(chosen, list) and not is_message_list(chosen) and len(chosen) > 0 and _kind(chosen[0]) is not None
    )


def _kind(completion: Any) -> str | None:
    if isinstance(completion, str):
        return "text"
    return "messages" if is_message_list(completion) else None


def _is_blank(completion: Any) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(
        message.get("tool_calls")
        or (content.strip() if isinstance(content := message.get("content"), str) else content)
        for message in completion
    )


def _key(completion: Any) -> str:
    return completion if isinstance(completion, str) else json.dumps(completion, sort_keys=True, default=str)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def find_problem(row: Mapping[str, Any]) -> Problem | None:
    """
    The first reason why `row` breaks the contract.

    Args:
        row (`Mapping[str, Any]`):
            A row, as read from the user's file.

    Returns:
        [`Problem`] or `None`: `None` if the row can be trained on.

    Example:

    ```python
    >>> from trl_dmpo.data.schema import find_problem

    >>> find_problem({"prompt": "Seen: Alien. Next:", "chosen": " Aliens", "rejected": [" Heat", " Aliens"]})
    Problem(reason='chosen among rejected', column='rejected', detail="entry 1 is the chosen completion ' Aliens'; remove it")
    >>> find_problem({"prompt": "Seen: Alien. Next:", "chosen": " Aliens", "rejected": [" Heat", " Big"]}) is None
    True
    ```
    """
    return _find_missing(row) or _find_malformed(row) or _find_repeated(row)


def _find_missing(row: Mapping[str, Any]) -> Problem | None:
    for column in ("chosen", "rejected"):
        if column not in row:
            have = ", ".join(sorted(map(str, row)))
            return Problem("missing column", column, f"there is no such column, only: {have}; rename or add it")
        if row[column] is None:
            return Problem("no value", column, "the value is None; fill it in or remove the row")
    if "prompt" in row and row["prompt"] is None:
        return Problem("no value", "prompt", "the value is None; fill it in, or leave the column out of all rows")
    if not isinstance(row["rejected"], (str, list)):
        name = type(row["rejected"]).__name__
        return Problem("wrong type", "rejected", f"expected a list of completions, got {name}; make it a list")
    for column in ("chosen", "rejected"):
        if row[column] == []:
            return Problem(f"no {column}", column, f"the list is empty; give at least one {column} completion")
    return None


def _find_malformed(row: Mapping[str, Any]) -> Problem | None:
    # What is no list of completions is named as it is
    chosen = row["chosen"] if is_several(row["chosen"]) else [row["chosen"]]
    what = "entry {}" if is_several(row["chosen"]) else "the completion"
    named = [("chosen", what.format(index), completion) for index, completion in enumerate(chosen)]
    named += [("rejected", f"entry {index}", completion) for index, completion in enumerate(as_list(row["rejected"]))]
    if "prompt" in row:
        named.append(("prompt", "the prompt", row["prompt"]))
    for column, what, value in named:
        if value is None:
            return Problem("no value", column, f"{what} is None; fill it in or remove it")
        if _kind(value) is None:
            return Problem(
                "wrong type",
                column,
                f"{what} is {_show(value)}; expected a string, or a list of messages with `role` and `content`",
            )
        if column != "prompt" and _is_blank(value):
            return Problem("blank completion", column, f"{what} is blank; fill it in or remove it")
        if _kind(value) != _kind(chosen[0]):
            return Problem(
                "text and messages mixed",
                column,
                f"{what} is {_kind(value)}, but `chosen` is {_kind(chosen[0])}; use one of the two throughout a row",
            )
    return None


def _find_repeated(row: Mapping[str, Any]) -> Problem | None:
    chosen: dict[str, int] = {}
    for column in ("chosen", "rejected"):
        seen: dict[str, int] = {}
        for index, completion in enumerate(as_list(row[column])):
            key = _key(completion)
            if key in chosen:
                return Problem(
                    "chosen among rejected",
                    "rejected",
                    f"entry {index} is the chosen completion {_show(completion)}; remove it",
                )
            if key in seen:
                return Problem(
                    f"repeated {column}",
                    column,
                    f"entries {seen[key]} and {index} are both {_show(completion)}; keep one of them",
                )
            seen[key] = index
        chosen = chosen or seen
    return None


def find_relevance_problem(row: Mapping[str, Any], required: bool = False) -> Problem | None:
    """
    Why the column `relevance` of `row`, which has no other problem, cannot be used.

    Args:
        row (`Mapping[str, Any]`):
            A row that keeps the contract.
        required (`bool`, *optional*, defaults to `False`):
            Whether it must be there.

    Returns:
        [`Problem`] or `None`.

    Example:

    ```python
    >>> from trl_dmpo.data.schema import find_relevance_problem

    >>> find_relevance_problem({"chosen": " Aliens", "rejected": [" Heat", " Big"], "relevance": [5, 3]})
    Problem(reason='relevance of the wrong length', column='relevance', detail='it has 2 entries for 1 chosen and 2 rejected completions; give one number for each, the chosen first')
    ```
    """
    relevance = row.get("relevance")
    if relevance is None:
        if not required:
            return None
        return Problem(
            "no relevance", "relevance", "the loss needs it; give one number a completion, the chosen first"
        )
    if not isinstance(relevance, list) or not all(map(_is_finite, relevance)):
        return Problem("wrong type", "relevance", f"it is {_show(relevance)}; expected a list of finite numbers")
    chosen, rejected = len(as_list(row["chosen"])), len(as_list(row["rejected"]))
    if len(relevance) != chosen + rejected:
        return Problem(
            "relevance of the wrong length",
            "relevance",
            f"it has {len(relevance)} entries for {chosen} chosen and {rejected} rejected completions; give one number for "
            "each, the chosen first",
        )
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
