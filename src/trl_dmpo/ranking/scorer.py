"""Exact log-probabilities of many completions of a prompt."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..trainer.layout import Candidate, repeated_layout
from ..trainer.tokenization import tokenize_row


class Scorer:
    """Scores completions of prompts (the plain path, one row a completion)."""

    def __init__(self, model: Any, tokenizer: Any, prefix_sharing: str | bool = "auto", max_tokens: int | None = None):
        self.model = model.eval()
        self.tokenizer = tokenizer

    def score(
        self,
        prompts: Sequence[Any],
        candidates: Sequence[Any],
        normalize: str = "sum",
        progress: Callable[[int], None] | None = None,
    ) -> list[torch.Tensor]:
        common = isinstance(candidates[0], str) or (isinstance(candidates[0], list) and isinstance(candidates[0][0], dict))
        lists = [candidates] * len(prompts) if common else candidates
        scores = []
        for prompt, answers in zip(prompts, lists, strict=True):
            first, *others = answers
            row = {"prompt": prompt, "chosen": first, "rejected": others}
            ids = tokenize_row(row, self.tokenizer, self.tokenizer.eos_token)
            tokens = [ids["chosen_ids"], *ids["rejected_ids"]]
            scores.append(torch.cat([self._score(ids["prompt_ids"], tokens[i : i + 64], normalize) for i in range(0, len(tokens), 64)]))
            if progress is not None:
                progress(1)
        return scores

    @torch.no_grad()
    def _score(self, prompt: list[int], completions: list[list[int]], normalize: str) -> torch.Tensor:
        batch = repeated_layout([[Candidate(prompt, completion)] for completion in completions], 0)
        device = self.model.device
        logits = self.model(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
        ).logits[:, :-1]
        targets = batch["targets"].to(device)
        logps = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        sums = logps.masked_fill(targets < 0, 0).sum(1)
        return (sums if normalize == "sum" else sums / (targets >= 0).sum(1)).cpu()
