"""From rows of contract 1 to token ids, and what happens to rows that break it."""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging as transformers_logging
from trl.data_utils import _tokenize, common_prefix_length, extract_prompt

from ..data.schema import Problem, as_list, find_problem, is_several
from .row_checks import Needs, find_loss_problem


logger = get_logger(__name__)

# While a dataset is prepared, why a row cannot be tokenized; a name that no column of the user's has
_PROBLEM = "__problem__"


class Untokenizable(ValueError):
    """A row that keeps the contract, but that the tokenizer or its chat template can make nothing of."""

    def __init__(self, reason: str, column: str, detail: str):
        super().__init__(f"column {column!r}: {detail}")
        self.problem = Problem(reason, column, detail)


def split_implicit_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    `row` with an explicit prompt: the longest beginning that all its completions have in common.

    Example:

    ```python
    >>> from trl_dmpo.trainer.tokenization import split_implicit_prompt

    >>> split_implicit_prompt({"chosen": "Next: Aliens", "rejected": ["Next: Heat", "Next: Big"]})
    {'chosen': ' Aliens', 'rejected': [' Heat', ' Big'], 'prompt': 'Next:'}
    ```
    """
    if "prompt" in row:
        return dict(row)
    chosen, rejected = as_list(row["chosen"]), as_list(row["rejected"])
    first, *others = chosen + rejected
    length = min(_common_length(first, completion) for completion in others)
    return {
        **row,
        "prompt": first[:length],
        "chosen": [each[length:] for each in chosen] if is_several(row["chosen"]) else first[length:],
        "rejected": [completion[length:] for completion in rejected],
    }


def _common_length(first: Any, second: Any) -> int:
    # Where they differ from the start on, TRL 1.16 looks at the end of the first for the space before the difference
    return len(extract_prompt({"chosen": first, "rejected": second})["prompt"]) if first[0] == second[0] else 0


def tokenize_row(
    row: Mapping[str, Any], processing_class: PreTrainedTokenizerBase | ProcessorMixin, eos_token: str
) -> dict[str, Any]:
    """
    Token ids of the prompt and of each completion of a row.

    The completions start where the tokens of the prompt alone and those of prompt and completion part, for the
    completion where they part first: a tokenizer may merge across the end of the prompt.

    Args:
        row (`Mapping[str, Any]`):
            A row without problems.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        eos_token (`str`):
            Ends a completion that is text and does not end with it. Chat templates end messages themselves.

    Returns:
        `dict` with `prompt_ids` (`list[int]`), `chosen_ids` (`list[int]`, or `list[list[int]]` where `chosen` is a list of
        completions) and `rejected_ids` (`list[list[int]]`).

    Raises:
        [`Untokenizable`]: a `ValueError`. The chat template does not take a message, or of a completion nothing is left.
    """
    row = split_implicit_prompt(row)
    prompt, chosen = row["prompt"], as_list(row["chosen"])
    completions = [*chosen, *as_list(row["rejected"])]
    if isinstance(prompt, str):
        completions = [text if text.endswith(eos_token) else text + eos_token for text in completions]
    prompt_ids, *sequences = _encode(processing_class, row, completions)

    length = min(common_prefix_length(prompt_ids, sequence) for sequence in sequences)
    if length < len(prompt_ids):
        # Unlike that of accelerate, this logger also works outside of training
        transformers_logging.get_logger(__name__).warning_once(
            "The tokenized prompt is not a prefix of the tokenized prompt+completion, usually because tokens merge "
            "across the boundary or because the chat template renders the prompt alone differently. The completions "
            "start where they part, and this end of the prompt is left out of the training sequence: "
            f"{processing_class.decode(prompt_ids[length:])!r}. To avoid it, end the prompt on a token boundary, for "
            "instance without a trailing space. This warning is shown once, but it likely applies to other rows too."
        )
    completion_ids = [sequence[length:] for sequence in sequences]
    if not all(completion_ids):
        raise Untokenizable(
            "no tokens",
            "chosen" if completion_ids.index([]) < len(chosen) else "rejected",
            "a completion has no tokens of its own: the tokenizer or chat template renders prompt and completion like the "
            f"prompt alone, {_shorten(processing_class.decode(prompt_ids))!r}. Use a chat template that renders assistant "
            "messages, or remove the row",
        )
    chosen_ids = completion_ids[: len(chosen)]
    return {
        "prompt_ids": prompt_ids[:length],
        "chosen_ids": chosen_ids if is_several(row["chosen"]) else chosen_ids[0],
        "rejected_ids": completion_ids[len(chosen) :],
    }


def _encode(processing_class: Any, row: Mapping[str, Any], completions: list) -> list[list[int]]:
    """Token ids of the prompt alone, then of the prompt with each of the completions."""
    prompt, count = row["prompt"], len(as_list(row["chosen"]))
    wholes = [prompt + completion for completion in completions]
    columns = ["chosen" if place < count else "rejected" for place in range(len(wholes))]
    if isinstance(prompt, str):
        return _encode_all(
            lambda texts: processing_class(text=texts)["input_ids"], [prompt, *wholes], ["prompt", *columns]
        )
    options = row.get("chat_template_kwargs") or {}
    _see_to_markers(processing_class, wholes, options)
    tools = row.get("tools")
    render = partial(
        _render, processing_class, tools=json.loads(tools) if isinstance(tools, str) else tools, **options
    )
    alone = _encode_all(partial(render, add_generation_prompt=True), [prompt], ["prompt"])
    return [*alone, *_encode_all(render, wholes, columns)]


def _render(processing_class: Any, conversations: list[list[dict]], **kwargs) -> list[list[int]]:
    if isinstance(processing_class, ProcessorMixin):
        return [_tokenize(processing_class, messages, **kwargs)["input_ids"] for messages in conversations]
    # What `_tokenize` does for one, for all at once: the tokenizer works on them in parallel
    return processing_class.apply_chat_template(conversations, tokenize=True, return_dict=True, **kwargs)["input_ids"]


def _encode_all(encode: Callable, inputs: list, columns: list[str]) -> list[list[int]]:
    """`encode` of `inputs`; where it fails, of one after the other, to say which of the row's columns it does not take."""
    try:
        return encode(inputs)
    except Exception:  # a template is a program of the model's: it may raise anything
        for each, column in zip(inputs, columns, strict=True):
            try:
                encode([each])
            except Exception as error:
                told = f"{type(error).__name__}: {_shorten(str(error))}"
                raise Untokenizable(
                    "refused by the tokenizer",
                    column,
                    f"the tokenizer or its chat template raises {told}; mend or remove it",
                ) from error
        raise


def _see_to_markers(processing_class: Any, conversations: list[list[dict]], options: Mapping[str, Any]) -> None:
    """Warn of messages whose text the tokenizer takes for its own markers, as TRL lets it."""
    if options.get("sanitize_control_tokens"):
        if "sanitize_control_tokens" not in inspect.signature(processing_class.apply_chat_template).parameters:
            raise ValueError(
                "`chat_template_kwargs` has `sanitize_control_tokens`, which this transformers does not know. Upgrade it, or "
                "leave the argument out."
            )
        return
    text = "\n".join(str(message.get("content")) for messages in conversations for message in messages)
    tokens = getattr(processing_class, "tokenizer", processing_class).added_tokens_decoder.values()
    if found := next((token.content for token in tokens if token.special and token.content in text), None):
        transformers_logging.get_logger(__name__).warning_once(
            f"A message has the text {found!r}, which the tokenizer takes for its special token, so that it may end the turn or "
            "begin another. If that is not meant, remove it from the text, or give the rows `chat_template_kwargs` with "
            "`sanitize_control_tokens=True`. This warning is shown once, but it may apply to other rows too."
        )


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:200]}...{text[-97:]}"


def check_row(row: Mapping[str, Any], needs: Needs) -> Problem | None:
    """As [`~data.schema.find_problem`], also for what is left behind an implicit prompt and for what the losses need."""
    problem = find_problem(row)
    if problem is None and "prompt" not in row:
        problem = _find_problem_of_split(split_implicit_prompt(row))
    return problem or find_loss_problem(row, needs)


def _find_problem_of_split(row: Mapping[str, Any]) -> Problem | None:
    if row["prompt"] == []:
        detail = "not all its conversations begin with the same message; add the column `prompt`, or such a message"
        return Problem("no prompt", "chosen", detail)
    return find_problem(row)


def describe(problem: Problem, name: str, index: int) -> str:
    """One line that says where the problem is and what to do."""
    return f"{name}[{index}], column {problem.column!r}: {problem.detail}"


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    name: str,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    eos_token: str,
    config: Any,
    needs: Needs,
) -> Dataset | IterableDataset:
    """
    Check and tokenize a dataset of rows of contract 1.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `chosen`, `rejected` and, optionally, `prompt`.
        name (`str`):
            Name of the split, for messages.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        eos_token (`str`):
            Token that ends a completion.
        config ([`DMPOConfig`]):
            `on_invalid_row`, and `dataset_num_proc`, which is not for a stream. Rows whose prompt fills `max_length` are
            dropped if truncation keeps the start: nothing of a completion would be left.
        needs ([`~trainer.row_checks.Needs`]):
            What the losses need of a row.

    Returns:
        The dataset with the columns `row_index` (place in the dataset given), `prompt_ids`, `chosen_ids` and
        `rejected_ids` added, without the rows dropped.

    Raises:
        `ValueError`: a row breaks the contract and `on_invalid_row="raise"`, or no row is left. A stream raises when the
        row is reached.
    """
    tokenize = partial(tokenize_row, processing_class=processing_class, eos_token=eos_token)
    keeps_start = config.max_length is not None and config.truncation_mode == "keep_start"
    max_prompt_length = config.max_length - 1 if keeps_start else None
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, name, tokenize, max_prompt_length, config.on_invalid_row, needs)

    num_proc = config.dataset_num_proc
    found = dataset.map(
        partial(_problem_column, needs=needs),
        remove_columns=dataset.column_names,
        # Without it, the type is that of the first rows, which mostly have no problem
        features=Features({"problem": List(Value("string"))}),
        num_proc=num_proc,
        desc=f"Checking {name} dataset",
    )["problem"]
    problems = {index: Problem(*problem) for index, problem in enumerate(found) if problem is not None}
    keep = [index for index in range(len(dataset)) if index not in problems]
    if problems:
        dataset = _without(dataset, name, problems, keep, config.on_invalid_row)
    dataset = dataset.map(
        lambda row, index: _tokenize_at(tokenize, row, keep[index], needs),
        with_indices=True,
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    found = dataset.select_columns(_PROBLEM)[_PROBLEM]
    problems = {keep[place]: Problem(*problem) for place, problem in enumerate(found) if problem[0]}
    dataset = dataset.remove_columns(_PROBLEM)
    if problems:
        fine = [place for place, problem in enumerate(found) if not problem[0]]
        dataset = _without(dataset, name, problems, fine, config.on_invalid_row)
    if max_prompt_length is None:
        return dataset
    fitting = dataset.filter(
        lambda prompt_ids: len(prompt_ids) <= max_prompt_length,
        input_columns="prompt_ids",
        num_proc=num_proc,
        desc=f"Dropping fully truncated examples from {name} dataset",
    )
    if len(fitting) < len(dataset):
        message = (
            f"{name}: {len(dataset) - len(fitting)} of {len(dataset)} rows dropped: the prompt alone has more than "
            f"{max_prompt_length} tokens, so that truncation to `max_length` leaves nothing of the completions."
        )
        if len(fitting) == 0:
            raise ValueError(f"{message} No row is left; raise `max_length` or shorten the prompts.")
        logger.warning(message)
    return fitting


def _tokenize_at(tokenize: Callable, row: Mapping[str, Any], index: int, needs: Needs) -> dict[str, Any]:
    # A column of this name that no loss reads may hold anything
    unread = {"relevance": None} if "relevance" in row and not needs.relevance else {}
    try:
        return {"row_index": index, **tokenize(row), **unread, _PROBLEM: [""] * 3}
    except Untokenizable as error:
        # Of the types that the other rows have, by the first of which Arrow goes
        none = {"prompt_ids": [0], "chosen_ids": [[0]] if is_several(row["chosen"]) else [0], "rejected_ids": [[0]]}
        return {"row_index": index, **none, **unread, _PROBLEM: list(error.problem)}


def _problem_column(row: Mapping[str, Any], needs: Needs) -> dict[str, Any]:
    return {"problem": check_row(row, needs)}


def _without(
    dataset: Dataset, name: str, problems: dict[int, Problem], keep: list[int], on_invalid_row: str
) -> Dataset:
    counts = Counter(problem.reason for problem in problems.values())
    summary = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if on_invalid_row == "raise":
        first = min(problems)
        raise ValueError(
            f"{describe(problems[first], name, first)}. In all, {len(problems)} of {len(dataset)} rows cannot be trained "
            f"on: {summary}. To leave them out, set `on_invalid_row='drop'`."
        )
    if not keep:
        raise ValueError(f"{name}: no row is left, all {len(dataset)} were dropped: {summary}.")
    logger.warning(f"{name}: {len(problems)} of {len(dataset)} rows dropped: {summary}.")
    return dataset.select(keep)


class _DropCount:
    """Counts the rows dropped from a stream and logs at each power of ten: a stream has no end to log at."""

    def __init__(self, name: str):
        self.name = name
        self.counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        self.counts[reason] += 1
        count = self.counts[reason]
        if count == 10 ** (len(str(count)) - 1):
            logger.warning(f"{self.name}: {count} rows dropped so far: {reason}.", main_process_only=False)


def _prepare_stream(dataset, name, tokenize, max_prompt_length, on_invalid_row, needs) -> IterableDataset:
    dropped = _DropCount(name)

    def prepare(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        problem = check_row(row, needs)
        if problem is not None:
            return {"row_index": index, _PROBLEM: list(problem)}
        return _tokenize_at(tokenize, row, index, needs)

    def is_fine(row: Mapping[str, Any]) -> bool:
        problem = Problem(*row[_PROBLEM])
        if not problem.reason:
            return True
        if on_invalid_row == "raise":
            raise ValueError(
                f"{describe(problem, name, row['row_index'])}. To leave out such rows, set `on_invalid_row='drop'`."
            )
        dropped.add(problem.reason)
        return False

    def fits(row: Mapping[str, Any]) -> bool:
        if max_prompt_length is None or len(row["prompt_ids"]) <= max_prompt_length:
            return True
        dropped.add(f"the prompt alone has more than {max_prompt_length} tokens")
        return False

    dataset = dataset.map(prepare, with_indices=True).filter(is_fine).remove_columns(_PROBLEM)
    return dataset.filter(fits)
