"""What self-play has to know of a training set, and whether it can have it."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from ..data.schema import as_list, is_message_list
from ..losses import GRADED_LOSSES
from ..trainer.dmpo_trainer import DMPOTrainer
from .callback import is_spread
from .mentions import find_mentions, longest_mentions
from .rows import as_text


class Survey(NamedTuple):
    """
    What is to know of a training set.

    Args:
        completions (`dict[str, Any]`):
            From what they say to its completions, each once.
        liked (`dict[Any, set[str]]`):
            From a user to what the chosen completions of all its rows say.
        most_rejected (`int`):
            How many rejected completions a row has at most.
        lists_candidates (`bool`):
            Whether every prompt names the chosen completion.
    """

    completions: dict[str, Any]
    liked: dict[Any, set[str]]
    most_rejected: int
    lists_candidates: bool


def survey_rows(rows: Dataset) -> Survey:
    completions: dict[str, Any] = {}
    liked: dict[Any, set[str]] = defaultdict(set)
    most_rejected, lists_candidates = 0, True
    for row in rows:
        chosen, rejected = as_list(row["chosen"]), as_list(row["rejected"])
        for completion in chosen + rejected:
            completions.setdefault(text_of(completion), completion)
        texts = [text_of(completion) for completion in chosen]
        liked[user_of(row)].update(texts)
        most_rejected = max(most_rejected, len(rejected))
        lists_candidates = lists_candidates and bool(find_mentions(as_text(row["prompt"]), texts))
    return Survey(completions, liked, most_rejected, lists_candidates)


def text_of(completion: Any) -> str:
    return as_text(completion).strip()


def user_of(row: dict[str, Any]) -> Any:
    """Whose row it is. A row without a user has those of the same prompt to itself."""
    return as_text(row["prompt"]) if row.get("user_id") is None else row["user_id"]


def named_in(prompt: str, texts: Sequence[str]) -> set[str]:
    """What a prompt names: in one with "Red Heat" that is not "Heat", too."""
    there = [text for text in texts if text in prompt]
    return {there[mention.title] for mention in longest_mentions(find_mentions(prompt, there))}


def columns_of(dataset: Dataset, trunk_column: str | None = None) -> Dataset:
    columns = ["row_index", "prompt", "chosen", "rejected", "user_id", trunk_column]
    return dataset.select_columns([column for column in dict.fromkeys(columns) if column in dataset.column_names])


def check_trainer(trainer: DMPOTrainer) -> None:
    if not isinstance(trainer, DMPOTrainer):
        raise TypeError(f"`trainer` must be a `DMPOTrainer`, got `{type(trainer).__name__}`.")
    if not isinstance(trainer.train_dataset, Dataset):
        raise ValueError(
            f"SelfPlayCallback finds answers for all rows before they are trained on: `train_dataset` must be a `Dataset`, "
            f"got `{type(trainer.train_dataset).__name__}`."
        )
    if trainer.args.precompute_ref_log_probs:
        raise ValueError(
            "The reference of answers that are found in training cannot be precomputed. Leave out "
            "`precompute_ref_log_probs`."
        )
    if "plackett_luce" in trainer.loss_types:
        raise ValueError(
            "The loss 'plackett_luce' takes the rejected completions of a row to be in order of preference, which answers "
            "of the model are not. Use another `loss_type` with SelfPlayCallback."
        )
    graded = sorted(GRADED_LOSSES.intersection(trainer.loss_types))
    if graded and "relevance" in trainer.train_dataset.column_names:
        raise ValueError(
            f"The loss {graded[0]!r} takes from the column 'relevance' how good each completion of a row is, and nothing "
            "there is about answers of the model. Remove the column, or use another `loss_type` with SelfPlayCallback."
        )
    if is_spread(trainer):
        raise ValueError(
            "SelfPlayCallback needs the whole model in one process, but it is spread over several, by FSDP, DeepSpeed ZeRO-3 "
            "or tensor parallelism."
        )
    _check_columns(trainer.train_dataset.column_names)


def _check_columns(columns: Sequence[str]) -> None:
    if "prompt" not in columns:
        raise ValueError(
            "The training set has no column 'prompt', so that the prompt is what the completions of a row begin with, which "
            "moves with them. Give an explicit `prompt` to use SelfPlayCallback."
        )
    for column in ("tools", "chat_template_kwargs"):
        if column in columns:
            raise ValueError(
                f"The training set has the column {column!r}, which answers are scored without. Remove it to use "
                "SelfPlayCallback."
            )


def check_answers(answers: Sequence[Any], completions: dict[str, Any]) -> dict[str, Any]:
    """From what they say to the answers, each once."""
    if isinstance(answers, str) or is_message_list(answers):
        raise ValueError("`answers` is a single answer. Give a list of answers.")
    example = next(iter(completions.values()))
    is_one = (lambda answer: isinstance(answer, str)) if isinstance(example, str) else is_message_list
    checked: dict[str, Any] = {}
    for number, answer in enumerate(answers):
        if not is_one(answer) or not text_of(answer):
            raise ValueError(
                f"`answers[{number}]` is {answer!r}, expected a completion like those of the rows, such as {example!r}."
            )
        checked.setdefault(text_of(answer), answer)
    if not any(text in completions and as_text(completions[text]) == as_text(checked[text]) for text in checked):
        raise ValueError(
            f"None of the {len(checked)} `answers` is a completion of the training set. Write them as the rows have them, "
            f"such as {example!r}, with the same space around them."
        )
    return checked
