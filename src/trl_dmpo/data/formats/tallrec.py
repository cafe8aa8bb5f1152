"""TALLRec: whether a user likes an item, answered by Yes. or No."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .records import Outcome, Unusable, as_answer, as_prompt, convert_each, get, others


LOOKS = "TALLRec (instruction, input, output: Yes. or No.)"

_ANSWERS = [("Yes.", "No."), ("Yes", "No")]


def recognise(record: Mapping[str, Any]) -> bool:
    return {"instruction", "input", "output"} <= record.keys() and _find_answers(record["output"]) is not None


def read(records: Sequence[Mapping[str, Any]], notes: Counter[str], chat: bool = False) -> Iterator[Outcome]:
    """One row a record: the answer that was not given is rejected."""
    return convert_each(records, lambda record: _convert(record, chat))


def _convert(record: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    instruction, given, chosen = (get(record, column) for column in ("instruction", "input", "output"))
    answers = _find_answers(chosen)
    if answers is None:
        raise Unusable("neither Yes. nor No.", "output", f"the answer is {chosen!r}; make it Yes. or No.")
    if chat:
        prompt = as_prompt(f"{instruction}\n{given}", chat)
        candidates = [as_answer(answer, chat) for answer in answers]
    else:
        prompt = _join(instruction, given)
        candidates = list(answers)
    place = answers.index(chosen.strip())
    return {
        "prompt": prompt,
        "chosen": candidates[place],
        "rejected": [candidates[1 - place]],
        "candidates": candidates,
        **others(record, "instruction", "input", "output"),
    }


def _join(instruction: str, given: str) -> str:
    """Alpaca's prompt, which TALLRec takes over. It ends with a line break, so that answers begin without a space."""
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    )


def _find_answers(output: Any) -> tuple[str, str] | None:
    return next((pair for pair in _ANSWERS if isinstance(output, str) and output.strip() in pair), None)
