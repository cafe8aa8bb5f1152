"""Several completions of one prompt, each with a score: the best is chosen, the others are rejected."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .records import Outcome, Unusable, as_answer, as_prompt, convert_each, get, others


LOOKS = "scored completions (UltraFeedback's instruction, completions; or prompt, completions, scores)"


def recognise(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("completions"), list) and ("scores" in record or "instruction" in record)


def read(
    records: Sequence[Mapping[str, Any]], notes: Counter[str], chat: bool = False, ties: str = "drop"
) -> Iterator[Outcome]:
    """One row a record."""
    return convert_each(records, lambda record: _convert(record, notes, chat, ties == "keep"))


def _convert(record: Mapping[str, Any], notes: Counter[str], chat: bool, keep_ties: bool) -> dict[str, Any]:
    prompt, answers, scores = _take_apart(record)
    scored = _distinct(answers, scores, notes)
    if len(scored) < 2:
        raise Unusable("fewer than two answers", "completions", f"it has {len(scored)} with a score; remove the row")
    best, best_score = max(scored, key=lambda each: each[1])
    rejected = [answer for answer, score in scored if score < best_score or (keep_ties and answer is not best)]
    if not rejected:
        raise Unusable("all answers are ties", "completions", "no score is lower than the best; remove the row")
    tied = len(scored) - 1 - len(rejected)
    if tied:
        notes["answers left out, as good as the best"] += tied
    if chat or "scores" not in record:
        if not all(isinstance(text, str) for text in (prompt, best, *rejected)):
            raise Unusable("not text", "prompt", "`chat=True` makes messages of a text prompt and texts; leave it out")
        prompt, best, *rejected = as_prompt(prompt, chat), *(as_answer(text, chat) for text in (best, *rejected))
    return {
        **({} if prompt is None else {"prompt": prompt}),
        "chosen": best,
        "rejected": rejected,
        **others(record, "prompt", "instruction", "completions", "scores"),
    }


def _take_apart(record: Mapping[str, Any]) -> tuple[Any, list[Any], list[Any]]:
    """The prompt, `None` if it is implicit, the answers and their scores."""
    completions = get(record, "completions", list)
    if "scores" in record:
        scores = get(record, "scores", list)
        if len(scores) != len(completions):
            detail = f"{len(scores)} scores for {len(completions)} completions; mend it"
            raise Unusable("scores do not fit the completions", "scores", detail)
        return record.get("prompt"), completions, scores
    if not all(isinstance(each, Mapping) and isinstance(each.get("response"), str) for each in completions):
        raise Unusable("wrong type", "completions", "expected `response` and `overall_score` in each; mend it")
    texts = [each["response"].strip() for each in completions]
    return get(record, "instruction"), texts, [each.get("overall_score") for each in completions]


def _distinct(answers: list[Any], scores: list[Any], notes: Counter[str]) -> list[tuple[Any, float]]:
    """The answers that have a text and a score, each once, with the best of its scores."""
    best: dict[str, tuple[Any, float]] = {}
    for answer, score in zip(answers, map(_as_number, scores), strict=True):
        key = json.dumps(answer, sort_keys=True, default=str)
        if score is None:
            notes["answers left out, without a score"] += 1
        elif isinstance(answer, str) and not answer.strip():
            notes["answers left out, blank"] += 1
        elif key in best:
            notes["answers given twice, kept once with the better score"] += 1
            best[key] = (answer, max(score, best[key][1]))
        else:
            best[key] = (answer, score)
    return list(best.values())


def _as_number(score: Any) -> float | None:
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number
