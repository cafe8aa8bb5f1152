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
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple


# Of relevance, which becomes single precision: beyond it, it would be infinite
_LARGEST = 3.4e38

# Far below the depth at which Python, Arrow and templates give up
_DEEPEST = 50

# What is said of each row by its own columns, or decides on the form of what the template is asked for
_NOT_FOR_TEMPLATES = (
    "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
)  # fmt: skip


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
    return not any(message.get("tool_calls") or not _is_empty(message.get("content")) for message in completion)


def _is_empty(content: str | list | None) -> bool:
    return not content or (isinstance(content, str) and not content.strip())


def _key(completion: Any) -> str:
    return completion if isinstance(completion, str) else json.dumps(completion, sort_keys=True, default=str)


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # nested too deeply, or of a type of the user's
        return f"a {type(value).__name__}"
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
    return _find_missing(row) or _find_malformed(row) or _find_repeated(row) or _find_misfit_of_template(row)


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
        if isinstance(row[column], list) and not row[column]:
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
        if (fault := _fault_of_completion(value)) is not None:
            return Problem("unreadable", column, f"{what} {fault}")
        if column != "prompt" and _is_blank(value):
            return Problem("blank completion", column, f"{what} is blank; fill it in or remove it")
        if _kind(value) != _kind(chosen[0]):
            return Problem(
                "text and messages mixed",
                column,
                f"{what} is {_kind(value)}, but `chosen` is {_kind(chosen[0])}; use one of the two throughout a row",
            )
    return None


def _fault_of_completion(value: str | list) -> str | None:
    for place, message in enumerate([] if isinstance(value, str) else value):
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str | list | None):
            return f"has {_show(content)} for the `content` of message {place}; make it a string"
        if not isinstance(calls, list | None):
            return f"has {_show(calls)} for the `tool_calls` of message {place}; make it a list"
        if content is None and all(each is None for name, each in message.items() if name != "role"):
            return f"has nothing in message {place} but its role; give it `content`, or remove it"
    return find_fault(value)


def find_fault(value: Any, depth: int = 0) -> str | None:
    """
    Why a value of a row can be put neither into JSON nor into a table.

    Args:
        value (`Any`):
            The value of a column, or a part of it.
        depth (`int`, *optional*, defaults to `0`):
            In how many lists and dictionaries it is.

    Returns:
        `str` or `None`: what it has and what to do, to go on from its name.

    Example:

    ```python
    >>> from trl_dmpo.data.schema import find_fault

    >>> find_fault(["Amélie", {"year": 2001}]) is None
    True
    >>> find_fault(["Am\\ud83clie"])
    'has half a surrogate pair, which no encoding has; read the text again in the encoding it was written in'
    ```
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "has half a surrogate pair, which no encoding has; read the text again in the encoding it was written in"
        return None
    if hasattr(value, "__array__") and not isinstance(value, Real):
        return f"has a value of type {type(value).__name__}; make it a list"
    if not isinstance(value, Mapping | list | tuple):
        return None
    if depth == _DEEPEST:
        return f"is nested more than {_DEEPEST} levels deep; make it plain"
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                return f"has {_show(name)} for a name; make it a string"
        value = [*value, *value.values()]
    return next((fault for each in value if (fault := find_fault(each, depth + 1)) is not None), None)


def _find_misfit_of_template(row: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the columns that go to the chat template, which text does not have."""
    if isinstance(as_list(row["chosen"])[0], str):
        return None
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        return Problem("wrong type", "tools", f"it is {_show(tools)}; expected a list of tools, or one as JSON")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        return Problem("wrong type", "tools", f"it is {_show(tools)}; expected a list of tools, or one as JSON")
    if options is not None and not isinstance(options, Mapping):
        column = "chat_template_kwargs"
        return Problem(
            "wrong type", column, f"it is {_show(options)}; expected a dictionary of the template's arguments"
        )
    for column, value in (("tools", tools), ("chat_template_kwargs", options)):
        if (fault := find_fault(value)) is not None:
            return Problem("wrong type", column, f"it {fault}")
    for name in options or {}:
        if name in _NOT_FOR_TEMPLATES:
            column = "chat_template_kwargs"
            return Problem("wrong type", column, f"`{name}` is no argument of the template; leave it out")
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
    return isinstance(value, Real) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST  # type: ignore[operator]
