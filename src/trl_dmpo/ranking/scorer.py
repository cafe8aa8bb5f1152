"""Exact log-probabilities of many completions of a prompt, which is computed once."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..data.schema import is_message_list
from ..trainer.sharing import (
    REFUSALS,
    Measurement,
    compare_layouts,
    compute_dtype,
    refused,
    rounding_error,
    sharing_obstacle,
)
from .forward import TREE_TOKENS, score_repeated, score_shared
from .token_budget import TokenBudget
from .token_tree import TokenTree, token_trees
from .tokens import Completions, Encoded, window_of


logger = logging.getLogger(__name__)

# What errors call a prompt
PROMPT_NAMES = "prompts[{}]".format


class Scorer:
    """
    Scores completions of prompts by their log-probabilities: exact, without generation, and never invalid.

    A prompt is computed once, whatever the number of its completions, and what these have in common from their start is
    computed once, too. This is exact or it does not happen: a rule on the kind of model and a comparison on the first
    prompts decide; where the answer is no, the prompt is run once for every completion, and a warning says why.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model, on any device and of any floating-point type.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prefix_sharing (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether to compute a prompt once: `"auto"`, `True` (an error where it is not exact) or `False`.
        max_tokens (`int`, *optional*):
            Tokens of a forward pass. By default as many as the free memory holds, up to where more gain nothing. Either
            way, when memory does not suffice, it is halved and the work goes on.
        dtype (`torch.dtype`, *optional*):
            Type that the model computes in, which says what is noise. Will default to that of its weights; under autocast
            it is another one.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from trl_dmpo import Scorer

    >>> name = "Qwen/Qwen3-0.6B"
    >>> scorer = Scorer(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))  # doctest: +SKIP
    >>> scorer.score(["Watched: Alien. Next:"], [" Aliens", " Heat"])  # doctest: +SKIP
    [tensor([-11.8125, -15.1250])]
    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prefix_sharing: bool | str = "auto",
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        if prefix_sharing not in (True, False, "auto"):
            raise ValueError(f"`prefix_sharing` must be 'auto', True or False, got {prefix_sharing!r}.")
        self.model, self.tokenizer = model, tokenizer
        self.prefix_sharing = prefix_sharing
        self.dtype = dtype or model.dtype
        self._budget = TokenBudget(model, max_tokens)
        self._shares: bool | None = None if prefix_sharing else False

    def score(
        self,
        prompts: Sequence[str | list[dict]],
        candidates: Sequence[Any],
        normalize: str = "sum",
        progress: Callable[[int], None] | None = None,
        names: Callable[[int], str] = PROMPT_NAMES,
    ) -> list[torch.Tensor]:
        """
        Log-probabilities of candidates as completions of prompts.

        The tokens are those of training: after a prompt of text, the EOS token ends a candidate and is scored with it; a
        chat template ends messages itself. The scores do not depend on what else is scored, but for noise of the model's
        type, and but for this: a tokenizer may merge the end of a prompt with the beginning of a candidate, and then all
        candidates of this prompt are taken to begin with the merged token. A warning tells.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                N prompts, text or messages.
            candidates (`Sequence`):
                One list of candidates for all prompts, or N lists; each candidate is text or messages, as the prompts
                are.
            normalize (`str`, *optional*, defaults to `"sum"`):
                `"sum"` over the tokens of a candidate, in nats, or their `"mean"`.
            progress (`Callable[[int], None]`, *optional*):
                Called with the number of prompts that have been scored since the last call.
            names (`Callable[[int], str]`, *optional*):
                From the number of a prompt to what errors call it. By default `"prompts[3]"`.

        Returns:
            `list[torch.Tensor]`: N tensors, float32 on the CPU, a score for each candidate in the order given.

        Raises:
            `ValueError`: a prompt has no candidates, or an empty or repeated one; it is longer than the model's window; it
            is a chat and the tokenizer has no chat template; or the model gives NaN.
        """
        found: dict[int, torch.Tensor] = {}
        for index, scores in self.stream(prompts, candidates, normalize, names):
            found[index] = scores
            if progress is not None:
                progress(1)
        return [found[index] for index in range(len(found))]

    def stream(
        self,
        prompts: Sequence[str | list[dict]],
        candidates: Sequence[Any],
        normalize: str = "sum",
        names: Callable[[int], str] = PROMPT_NAMES,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """
        What [`~Scorer.score`] returns, prompt by prompt, for scores that would not all fit into the memory.

        Args:
            prompts, candidates, normalize, names:
                As of [`~Scorer.score`].

        Yields:
            `tuple[int, torch.Tensor]`: the number of a prompt, and its scores. The longest prompts come first; all have been
            checked before.
        """
        if normalize not in ("sum", "mean"):
            raise ValueError(f"`normalize` must be 'sum' or 'mean', got {normalize!r}.")
        prompts, lists = list(prompts), _as_lists(prompts, candidates)
        self._check(prompts, lists, names)
        rows = self._encode(prompts, lists, names)
        with self._computing():
            shares = self._decide(rows)
        for index, logps in self._score_all(rows, shares):
            yield index, _reduce(logps, rows[index], normalize, names(index))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The model without dropout and gradients, and then in the mode that it was in."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def _check(self, prompts: Sequence[Any], lists: Sequence[Sequence[Any]], names: Callable[[int], str]) -> None:
        checked: set[tuple[int, bool]] = set()
        for index, (prompt, candidates) in enumerate(zip(prompts, lists, strict=True)):
            is_chat = is_message_list(prompt)
            if not (is_chat or isinstance(prompt, str)):
                raise ValueError(f"{names(index)} is {type(prompt).__name__}, expected text or a list of messages.")
            if is_chat and self.tokenizer.chat_template is None:
                raise ValueError(
                    f"{names(index)} is a chat, but the tokenizer has no chat template. Give prompts of plain text, or "
                    "the tokenizer of a chat model."
                )
            if (id(candidates), is_chat) not in checked:
                _check_candidates(candidates, names(index), is_chat)
                checked.add((id(candidates), is_chat))

    def _encode(
        self, prompts: Sequence[Any], lists: Sequence[Sequence[Any]], names: Callable[[int], str]
    ) -> list[Encoded]:
        window = window_of(self.model)
        completions: dict[int, Completions] = {}
        rows = []
        for index, (prompt, candidates) in enumerate(zip(prompts, lists, strict=True)):
            behind = completions.setdefault(id(candidates), Completions(candidates, self.tokenizer))
            try:
                row = behind.behind(prompt)
            except ValueError as error:
                raise ValueError(f"{names(index)}: {error}") from error
            longest = max(map(len, row.completions))
            if not row.prompt:
                raise ValueError(f"{names(index)} has no tokens. Begin with the BOS token, or with any text.")
            if window is not None and len(row.prompt) + longest > window:
                raise ValueError(
                    f"{names(index)} has {len(row.prompt)} tokens and its longest candidate {longest}, but the model's "
                    f"window is {window}. Shorten the prompt, for instance its history."
                )
            rows.append(row)
        return rows

    def _decide(self, rows: list[Encoded]) -> bool:
        """Whether prompts are shared: by the kind of model, then by comparison, once, on the first prompts that can tell."""
        if self._shares is None and any(len(row.completions) > 1 for row in rows):
            self._shares = self._find_out(rows)
        # A single completion shares its prompt with none
        return bool(self._shares)

    def _find_out(self, rows: list[Encoded]) -> bool:
        reason = sharing_obstacle(self.model)
        if reason is None:
            measured = self._measure(rows)
            reason = None if measured.exact else f"on the first prompts, {measured.describe()}"
        if reason is None:
            return True
        if self.prefix_sharing is True:
            raise ValueError(
                f"`prefix_sharing=True`, but sharing prompts is not exact here: {reason}. Set `prefix_sharing='auto'` to "
                "run the prompt once for every completion instead."
            )
        logger.warning(f"Prompts are not shared, each is run once for every completion: {reason}.")
        return False

    def _measure(self, rows: list[Encoded]) -> Measurement:
        several = [row for row in rows if len(row.completions) > 1]
        together = [Encoded(row.prompt, row.completions[:4]) for row in several[:2]]
        alone = [Encoded(row.prompt, [completion]) for row in together for completion in row.completions]

        def flat(score: Callable, chosen: list[Encoded]) -> torch.Tensor:
            logps = self._budget.spend(lambda tokens: score(self.model, chosen, tokens))
            pairs = zip(chosen, logps, strict=True)
            return torch.cat(
                [each[: len(ids)] for row, rows in pairs for ids, each in zip(row.completions, rows, strict=True)]
            )

        repeated = flat(score_repeated, alone)
        try:
            with rounding_error(self.model, self.dtype):
                perturbed = flat(score_repeated, alone)
            shared = flat(score_shared, together)
            # One at a time: what a mask hides must not pass for noise
            unshared = torch.cat([flat(score_shared, [row]) for row in alone])
        except REFUSALS as error:
            return refused(error)
        return compare_layouts(shared, unshared, perturbed, repeated, self.dtype)

    def _score_all(self, rows: list[Encoded], shares: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """Log-probabilities of tokens: rows of like length together, and fewer at a time when memory does not suffice."""
        trees: dict[tuple[int, int], list[TokenTree]] = {}

        def trees_of(size: int, completions: list[list[int]]) -> list[TokenTree]:
            key = id(completions), size
            if key not in trees:
                trees[key] = token_trees(completions, size)
            return trees[key]

        def score_longest(tokens: int) -> tuple[list[int], list[torch.Tensor]]:
            group = left[-max(tokens // len(rows[left[-1]].prompt), 1) :]
            chosen = [rows[index] for index in group]
            if shares:
                return group, score_shared(self.model, chosen, tokens, partial(trees_of, min(tokens, TREE_TOKENS)))
            return group, score_repeated(self.model, chosen, tokens)

        left = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt))
        while left:
            with self._computing():
                group, logps = self._budget.spend(score_longest)
            left = left[: -len(group)]
            yield from zip(group, logps, strict=True)


def _as_lists(prompts: Sequence[Any], candidates: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """A list of candidates for each prompt."""
    if isinstance(prompts, str) or is_message_list(prompts):
        raise ValueError("`prompts` is a single prompt. Give a list of prompts.")
    if len(candidates) and (isinstance(candidates[0], str) or is_message_list(candidates[0])):
        return [candidates] * len(prompts)
    candidates = list(candidates)  # lists that stay the same objects, which a column of a dataset does not promise
    if len(candidates) != len(prompts):
        raise ValueError(
            f"There are {len(prompts)} prompts and {len(candidates)} lists of candidates. Give one list for all prompts, or "
            "one for each."
        )
    return candidates


def _check_candidates(candidates: Sequence[Any], name: str, is_chat: bool) -> None:
    if not len(candidates):
        raise ValueError(f"{name} has no candidates.")
    seen = set()
    for place, candidate in enumerate(candidates):
        if not (is_message_list(candidate) if is_chat else isinstance(candidate, str)):
            expected = "a list of messages" if is_chat else "text"
            raise ValueError(
                f"Candidate {place} of {name} is {type(candidate).__name__}, expected {expected}, as the prompt."
            )
        text = repr(candidate) if is_chat else candidate
        content = candidate if isinstance(candidate, str) else "".join(str(each["content"]) for each in candidate)
        if not content.strip():
            raise ValueError(f"Candidate {place} of {name} is empty.")
        if text in seen:
            raise ValueError(f"Candidate {place} of {name} is there twice: {candidate!r}.")
        seen.add(text)


def _reduce(logps: torch.Tensor, row: Encoded, normalize: str, name: str) -> torch.Tensor:
    if logps.isnan().any():
        raise ValueError(
            f"The model gives NaN for the candidates of {name}: its weights are not finite, or its type "
            f"overflows. Load it in bfloat16 or float32."
        )
    sums = logps.double().sum(1)
    if normalize == "mean":
        sums /= torch.tensor([len(completion) for completion in row.completions])
    return sums.float()


def trained_scorer(trainer: Any) -> Scorer:
    """A scorer of the model that a [`DMPOTrainer`] trains, as it is at the time."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    dtype = compute_dtype(model, trainer.accelerator.mixed_precision)
    return Scorer(model, trainer.processing_class, dtype=dtype)
