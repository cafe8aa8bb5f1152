"""Answers that a model writes itself, and `generate` without settings that a model was shipped with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from trl.data_utils import _tokenize

from .scorer import PROMPT_NAMES
from .token_budget import TokenBudget
from .tokens import window_of


_ABSENT = object()


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """
    Within, `model.generate` does what its arguments say and nothing else, without dropout.

    What is not given to `generate` is read from `model.generation_config`, even where a `generation_config` is given, and
    many models are shipped with one that samples, or forces and suppresses tokens. Within, it is empty. Afterwards all is as
    it was.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.

    Raises:
        `ValueError`: the model cannot generate.
    """
    if not getattr(model, "can_generate", lambda: False)() or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is no causal language model that `generate` serves. Score its answers instead, "
            "which needs no generation."
        )
    # PEFT hands the configuration of the wrapper on to the model within, and leaves it there
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [vars(owner).get("generation_config", _ABSENT) for owner in owners]
    was_training = model.training
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        model.train(was_training)
        for owner, config in zip(owners, before, strict=True):
            if config is _ABSENT:
                vars(owner).pop("generation_config", None)
            else:
                owner.generation_config = config


def pad_left(sequences: Sequence[list[int]], device: Any) -> dict[str, torch.Tensor]:
    """
    Sequences as a batch that ends where each of them ends.

    Args:
        sequences (`Sequence[list[int]]`):
            Token ids of B prompts, of up to T tokens.
        device (`torch.device`):
            Where to put the batch.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask`, int64 of shape (B, T). Padding is token 0, which the
        mask hides.

    Example:

    ```python
    >>> from trl_dmpo.ranking.generation import pad_left

    >>> pad_left([[5, 6, 7], [8]], "cpu")["attention_mask"]
    tensor([[1, 1, 1],
            [0, 0, 1]])
    ```
    """
    width = max(map(len, sequences))
    ids = [[0] * (width - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    max_new_tokens: int = 32,
    progress: Callable[[int], None] | None = None,
    names: Callable[[int], str] = PROMPT_NAMES,
) -> list[str]:
    """
    What the model answers by itself: the likeliest token, again and again. The published way to evaluate; see [`Scorer`] for
    one that never gives an invalid answer.

    Nothing of a `generation_config` that the model was shipped with is used, but for the tokens that end a text.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence`):
            N prompts, texts or message lists.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Where an answer is cut off that does not end.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of prompts done since the last call.
        names (`Callable[[int], str]`, *optional*):
            From the number of a prompt to what errors call it. By default `"prompts[3]"`.

    Returns:
        `list[str]`: N answers, without the prompt and without special tokens.

    Raises:
        `ValueError`: the model cannot generate, or a prompt is empty or leaves no room for an answer.
    """
    ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    check_lengths(model, ids, max_new_tokens, names)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=0,
    )
    answers = [""] * len(ids)

    def answer(rows: list[int]) -> None:
        batch = pad_left([ids[row] for row in rows], model.device)
        made = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        for row, text in zip(rows, _decode(tokenizer, made.tolist(), config.eos_token_id), strict=True):
            answers[row] = text

    with plain_generation(model):
        in_batches(model, range(len(ids)), lambda row: len(ids[row]) + max_new_tokens, answer, progress)
    return answers


def in_batches(
    model: Any,
    rows: Sequence[int],
    size: Callable[[int], int],
    work: Callable[[list[int]], None],
    progress: Callable[[int], None] | None = None,
    budget: TokenBudget | None = None,
) -> None:
    """
    Do some work for all rows, for as many at a time as the memory holds, and for fewer after it did not suffice.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        rows (`Sequence[int]`):
            The rows. Those of like size are worked on together: padding is work too.
        size (`Callable[[int], int]`):
            From a row to its number of tokens.
        work (`Callable[[list[int]], None]`):
            What is done for some rows.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of rows done since the last call.
        budget ([`~trl_dmpo.ranking.token_budget.TokenBudget`], *optional*):
            How many tokens there may be at a time. By default what the memory holds.
    """
    budget = budget or TokenBudget(model)
    # The largest first: if the memory does not suffice, that shows at once
    left = sorted(rows, key=size, reverse=True)

    def work_on_some(tokens: int) -> int:
        some = left[: max(1, tokens // size(left[0]))]
        work(some)
        return len(some)

    while left:
        done = budget.spend(work_on_some)
        left = left[done:]
        if progress is not None:
            progress(done)


def tokenize_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a prompt, a text or messages, as the trainer has them."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    return list(_tokenize(tokenizer, prompt, add_generation_prompt=True)["input_ids"])


def check_lengths(
    model: Any, ids: Sequence[list[int]], max_new_tokens: int, names: Callable[[int], str] = PROMPT_NAMES
) -> None:
    """Raise `ValueError` if a prompt is empty, or with `max_new_tokens` more does not fit into the model's window."""
    window = window_of(model)
    for index, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"{names(index)} has no tokens. Begin with the BOS token, or with any text.")
        if window is not None and len(prompt) + max_new_tokens > window:
            raise ValueError(
                f"{names(index)} has {len(prompt)} tokens, and with {max_new_tokens} of an answer it does not fit into the "
                f"model's window of {window}. Shorten the history."
            )


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    """The tokens that end a text: what a chat ends a turn with is in the model's configuration only."""
    shipped = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(shipped if isinstance(shipped, list) else [shipped])]
    return sorted({end for end in ends if end is not None}) or None


def _decode(tokenizer: Any, rows: list[list[int]], ends: list[int] | None) -> list[str]:
    """The texts before the first token that ends each row. What follows it is padding."""
    first = [next((place for place, token in enumerate(row) if token in (ends or ())), len(row)) for row in rows]
    texts = [row[:length] for row, length in zip(rows, first, strict=True)]
    return tokenizer.batch_decode(texts, skip_special_tokens=True)
