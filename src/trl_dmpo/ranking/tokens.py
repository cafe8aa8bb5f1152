"""
Token ids of many completions behind a prompt, as training has them, without tokenizing the prompt for each.

What a tokenizer makes of a completion depends on the end of the prompt only. So the end alone is tokenized with each
completion, and for two of them the result is compared with that of the whole text; where they differ, every whole text
is tokenized.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers.utils import logging as transformers_logging
from trl.data_utils import common_prefix_length

from ..trainer.tokenization import tokenize_row


# Characters of a prompt that surely hold what a tokenizer may merge with the completion
_END = 12
# The completions that are compared
_SAMPLES = (0, -1)


class Encoded(NamedTuple):
    """
    Token ids of a prompt and its completions.

    Args:
        prompt (`list[int]`):
            The prompt, up to where the first completion parts from it.
        completions (`list[list[int]]`):
            The completions, with the token that ends them.
    """

    prompt: list[int]
    completions: list[list[int]]


def window_of(model: Any) -> int | None:
    """
    How many tokens a model can take at most.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.

    Returns:
        `int` or `None`: its positions, less those of the virtual tokens of an adapter; `None` if it has no limit.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    return positions - (getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0)


class Completions:
    """
    Some completions, as token ids behind any prompt.

    Args:
        texts (`Sequence[str]` or `Sequence[list[dict]]`):
            The completions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Example:

    ```python
    >>> from transformers import AutoTokenizer  # doctest: +SKIP
    >>> Completions([" Heat", " Big"], AutoTokenizer.from_pretrained("gpt2")).behind("Next:")  # doctest: +SKIP
    Encoded(prompt=[10019, 25], completions=[[12308, 50256], [4403, 50256]])
    ```
    """

    def __init__(self, texts: Sequence[Any], tokenizer: Any):
        self.texts, self.tokenizer = texts, tokenizer
        self._rendered: list[str] | None = None
        self._behind: dict[str, tuple[int, list[list[int]]]] = {}

    def behind(self, prompt: str | list[dict]) -> Encoded:
        """
        Token ids of the prompt and of the completions, those that training has.

        Where the end of the prompt is one that was there before, the list of completions is the same object.

        Args:
            prompt (`str` or `list[dict]`):
                The prompt.

        Returns:
            [`Encoded`]
        """
        if len(self.texts) > 2 and (text := self._render(prompt)) is not None:
            # A chat template brings its own special tokens
            encoded = self._behind_end(text, add_special_tokens=isinstance(prompt, str))
            if encoded is not None:
                return encoded
        first, *others = self.texts
        row = {"prompt": prompt, "chosen": first, "rejected": others}
        ids = tokenize_row(row, self.tokenizer, self.tokenizer.eos_token)
        return Encoded(ids["prompt_ids"], [ids["chosen_ids"], *ids["rejected_ids"]])

    def _render(self, prompt: str | list[dict]) -> str | None:
        """The prompt as text, and in `_rendered` what follows it; `None` if that depends on the prompt."""
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            self._rendered = self._rendered or [text if text.endswith(eos) else text + eos for text in self.texts]
            return prompt
        text = self._apply_template(prompt, add_generation_prompt=True)
        if self._rendered is None:
            whole = [self._apply_template(prompt + messages) for messages in self.texts]
            if all(each.startswith(text) for each in whole):
                self._rendered = [each[len(text) :] for each in whole]
        is_same = self._rendered is not None and all(
            self._apply_template(prompt + self.texts[place]) == text + self._rendered[place] for place in _SAMPLES
        )
        return text if is_same else None

    def _apply_template(self, messages: list[dict], **kwargs) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    def _behind_end(self, prompt: str, add_special_tokens: bool) -> Encoded | None:
        """`None` if this prompt has no end that stands for all of it."""
        assert self._rendered is not None
        start = max(prompt.rfind(space, 0, max(len(prompt) - _END, 0)) for space in " \n")
        if start <= 0:
            return None
        end = prompt[start:]
        if end not in self._behind:
            self._behind[end] = self._tokenize_behind(end)
        dropped, completions = self._behind[end]
        if not all(completions):
            return None
        texts = [prompt, *(prompt + self._rendered[place] for place in _SAMPLES)]
        whole, *samples = self._tokenize(texts, add_special_tokens=add_special_tokens)
        ids = whole[: len(whole) - dropped]
        return Encoded(ids, completions) if samples == [ids + completions[place] for place in _SAMPLES] else None

    def _tokenize_behind(self, end: str) -> tuple[int, list[list[int]]]:
        """How many tokens of the prompt's end merge with a completion, and the completions from there."""
        assert self._rendered is not None
        ids, *sequences = self._tokenize([end, *(end + text for text in self._rendered)], add_special_tokens=False)
        length = min(common_prefix_length(ids, sequence) for sequence in sequences)
        if length < len(ids):
            transformers_logging.get_logger(__name__).warning_once(
                "The tokenizer merges the end of a prompt with the beginning of a completion. All completions of this prompt "
                "are then scored from the merged token on. To avoid it, end prompts where a token ends, as before a space."
            )
        return len(ids) - length, [sequence[length:] for sequence in sequences]

    def _tokenize(self, texts: list[str], **kwargs) -> list[list[int]]:
        return self.tokenizer(text=texts, **kwargs)["input_ids"]
