"""Whether a row can be evaluated, and in one form what it may say in several."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from ..data.formats.records import Unusable
from ..data.schema import as_list, find_fault, find_problem, is_message_list, is_several


def convert_row(row: Any) -> dict[str, Any]:
    """
    A row with its candidates in one list.

    Args:
        row (`Mapping`):
            A row with `prompt`, and `candidates` and `label`, `candidates` and `chosen`, or `chosen` and `rejected`.

    Returns:
        `dict[str, Any]`: the row with `prompt`, `candidates` and `label`, and where items have ids `candidate_ids`.

    Raises:
        [`~trl_dmpo.data.formats.records.Unusable`]: it cannot be evaluated.
    """
    if not isinstance(row, Mapping):
        raise Unusable("no named values", "row", f"it is of type {type(row).__name__}; mend it")
    for name, value in row.items():
        if (fault := find_fault({name: value})) is not None:
            raise Unusable("unreadable", str(name), f"it {fault}")
    if row.get("prompt") is None:
        raise Unusable("no value", "prompt", "there is none; fill it in or remove the row")
    if not isinstance(row.get("user_id"), str | Real | None):
        detail = f"expected a string or a number, got {type(row['user_id']).__name__}; mend it"
        raise Unusable("wrong type", "user_id", detail)
    for name in ("tools", "chat_template_kwargs"):
        if row.get(name):
            raise Unusable("not supported", name, "it changes the prompt, and is not handed on; leave it out")
    listed = row.get("candidates") is not None or row.get("chosen") is None
    if not listed and (problem := find_problem({"rejected": None, **row})):
        raise Unusable(*problem)
    if not listed and is_several(row["chosen"]):
        raise Unusable(
            "several chosen", "chosen", "one chosen answer is ranked among the rejected; make a row of each of them"
        )
    candidates = _candidates(row) if listed else [row["chosen"], *as_list(row["rejected"])]
    label = _label(row, candidates) if listed else 0
    chosen, rejected = candidates[label], candidates[:label] + candidates[label + 1 :]
    problem = find_problem({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    if problem is not None:
        raise Unusable(problem.reason, "candidates", f"beside the chosen one, {problem.detail}")
    return {**row, "candidates": candidates, "label": label, **_candidate_ids(row, candidates, label)}


def _candidates(row: Mapping[str, Any]) -> list:
    candidates = row.get("candidates")
    if not isinstance(candidates, list) or is_message_list(candidates):
        raise Unusable("no candidates", "candidates", "there is no list of them; fill it in or remove the row")
    if len(candidates) < 2:
        told = "it lists none" if not candidates else f"it lists {candidates[0]!r} alone"
        raise Unusable("no candidates", "candidates", f"{told}; give at least two, or remove the row")
    return candidates


def _label(row: Mapping[str, Any], candidates: list) -> int:
    """The place of the chosen one."""
    if row.get("label") is None:
        chosen = row.get("chosen")
        if chosen not in candidates:
            told = "there is neither a `label` nor a `chosen` one" if chosen is None else f"{chosen!r} is not listed"
            raise Unusable("chosen not among the candidates", "candidates", f"{told}; add it or remove the row")
        return candidates.index(chosen)
    label = row["label"]
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(candidates):
        raise Unusable(
            "chosen not among the candidates",
            "label",
            f"{label!r} is no place among {len(candidates)} candidates, counted from 0; mend it or remove the row",
        )
    if row.get("chosen") not in (None, candidates[label]):
        raise Unusable(
            "chosen and label differ",
            "label",
            f"it points to {candidates[label]!r}, but `chosen` is {row['chosen']!r}; mend it or remove the row",
        )
    return label


def _candidate_ids(row: Mapping[str, Any], candidates: list, label: int) -> dict[str, list]:
    """The ids of the candidates, if they have any, in their order."""
    ids = _ids(row, "candidate_ids")
    if ids is None and row.get("candidates") is None and (rejected := _ids(row, "rejected_ids")) is not None:
        ids = [row.get("chosen_id"), *rejected]
    if ids is None:
        return {}
    if len(ids) != len(candidates):
        raise Unusable(
            "ids do not match",
            "candidate_ids",
            f"there are {len(ids)} ids for {len(candidates)} candidates; mend it or remove the row",
        )
    if row.get("chosen_id") not in (None, ids[label]):
        raise Unusable(
            "chosen not among the candidates",
            "chosen_id",
            f"{row['chosen_id']!r} was chosen, but `label` points to {ids[label]!r}; mend it or remove the row",
        )
    return {"candidate_ids": ids}


def _ids(row: Mapping[str, Any], column: str) -> list | None:
    ids = row.get(column)
    if ids is not None and not (isinstance(ids, list) and all(isinstance(each, str | Real | None) for each in ids)):
        raise Unusable("ids do not match", column, "it is no list of strings or numbers; mend it or remove the row")
    return ids
