"""Choices written as text: `leave_last_n(n=2)`, `0.5 * popularity + 0.5 * disliked`. The same on the command line, in YAML and in Python."""

import ast
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any


def parse_choice(
    text: Any, choices: Mapping[str, type], option: str, defaults: Mapping[str, Any] | None = None
) -> Any:
    """
    The object that `text` describes, one of a few kinds.

    Args:
        text (`Any`):
            A name of `choices`, or a call of one with keyword arguments. What is not a string is returned as it is.
        choices (`Mapping[str, type]`):
            Dataclasses by their names.
        option (`str`):
            What is being chosen, for errors.
        defaults (`Mapping[str, Any]`, *optional*):
            Arguments that are not given.

    Returns:
        `Any`: an instance of one of `choices`.

    Raises:
        `ValueError`: there is no such choice, or it takes no such argument.

    Example:

    ```python
    >>> from trl_dmpo.data.spec import parse_choice
    >>> from trl_dmpo.data.splits import SPLITS

    >>> parse_choice("leave_last_n(n=2)", SPLITS, "split")
    LeaveLastN(n=2)
    ```
    """
    return _make(_parse(text, option), choices, option, defaults) if isinstance(text, str) else text


def parse_mixture(text: Any, choices: Mapping[str, type], option: str) -> Any:
    """
    The object that `text` describes, or what it mixes, each with its share.

    Args:
        text (`Any`):
            As of [`parse_choice`], or a sum of such, each times its share. What is not a string is returned as it is.
        choices (`Mapping[str, type]`):
            Dataclasses by their names.
        option (`str`):
            What is being chosen, for errors.

    Returns:
        `Any`: an instance of one of `choices`, or a list of `(share, instance)`.

    Raises:
        `ValueError`: there is no such choice, it takes no such argument, or a part has no share.

    Example:

    ```python
    >>> from trl_dmpo.data.negatives import NEGATIVES
    >>> from trl_dmpo.data.spec import parse_mixture

    >>> parse_mixture("0.25 * disliked + 0.75 * popularity(power=0.5)", NEGATIVES, "negatives")
    [(0.25, Disliked()), (0.75, Popularity(power=0.5))]
    ```
    """
    if not isinstance(text, str):
        return text
    tree = _parse(text, option)
    if not isinstance(tree, ast.BinOp):
        return _make(tree, choices, option)
    parts: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        parts.insert(0, tree.right)
        tree = tree.left
    return [_part(part, choices, option) for part in [tree, *parts]]


def _parse(text: str, option: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"`{option}`: {text!r} cannot be read. Write a name, or name(option=value).") from error


def _part(tree: ast.expr, choices: Mapping[str, type], option: str) -> tuple[float, Any]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult) and isinstance(tree.left, ast.Constant):
        share = tree.left.value
        if isinstance(share, int | float) and share > 0:
            return share, _make(tree.right, choices, option)
    raise ValueError(f"`{option}`: {ast.unparse(tree)!r} has no share. Write 0.5 * name + 0.5 * name.")


def _make(tree: ast.expr, choices: Mapping[str, type], option: str, defaults: Mapping[str, Any] | None = None) -> Any:
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    name = ast.unparse(call.func)
    if name not in choices:
        close = get_close_matches(name, choices, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"`{option}`: there is no {name!r}, only: {', '.join(choices)}.{hint}")
    known = [field.name for field in fields(choices[name])]
    given = {str(keyword.arg): _value(keyword.value, name, option) for keyword in call.keywords}
    wrong = [argument for argument in given if argument not in known]
    if call.args or wrong:
        what = f"no {wrong[0]!r}" if wrong else "keyword arguments only"
        raise ValueError(f"`{option}`: {name} takes {what}; it takes: {', '.join(known) or 'nothing'}.")
    needed = [
        field.name for field in fields(choices[name]) if field.default is MISSING and field.default_factory is MISSING
    ]
    missing = [argument for argument in needed if argument not in given]
    if missing:
        raise ValueError(f"`{option}`: {name} needs {missing[0]!r}. Write {name}({missing[0]}=...).")
    try:
        return choices[name](**{**(defaults or {}), **given})
    except TypeError as error:
        raise ValueError(f"`{option}`: {name}: {error}") from error


def _value(tree: ast.expr, name: str, option: str) -> Any:
    try:
        return ast.literal_eval(tree)
    except (ValueError, TypeError):
        raise ValueError(
            f"`{option}`: {ast.unparse(tree)!r} in {name} is not a value. Put text into quotation marks."
        ) from None
