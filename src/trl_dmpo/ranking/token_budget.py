"""How many tokens a forward pass may have."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Where more tokens at a time gain nothing: two cores are busy with some hundred, a GPU with some thousand
_MOST = {"cpu": 2048}
_MOST_ELSEWHERE = 16384
_FEWEST = 64
# Of the free memory; the rest is for what is not counted
_SHARE = 0.5


class TokenBudget:
    """
    How many tokens a forward pass may have: rows times columns.

    At first as many as the free memory holds, by the model's shape, up to where more gain nothing; after every time that
    the memory did not suffice, half as many.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        max_tokens (`int`, *optional*):
            The number to start with.

    Raises:
        `ValueError`: `max_tokens` is not positive.
    """

    def __init__(self, model: Any, max_tokens: int | None = None):
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}.")
        self.tokens = max_tokens or _find(model)
        self._warned = False

    def spend(self, work: Callable[[int], Result]) -> Result:
        """
        Do some work within the budget, and again with half of it for as long as memory does not suffice.

        Args:
            work (`Callable[[int], Result]`):
                What to do, given the number of tokens that a forward pass may have.

        Returns:
            What `work` returns.

        Raises:
            Whatever `work` raises. Want of memory only if there is nothing left to halve.
        """
        while True:
            try:
                return work(self.tokens)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.tokens <= _FEWEST:
                    raise
            self._halve()

    def _halve(self) -> None:
        self.tokens //= 2
        if not self._warned:
            logger.warning(
                f"Out of memory: scoring goes on with {self.tokens} tokens at a time, and with fewer if it must. To start "
                "with fewer, set `max_tokens`."
            )
            self._warned = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that memory did not suffice, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


def _find(model: Any) -> int:
    most = _MOST.get(model.device.type, _MOST_ELSEWHERE)
    fitting = int(_SHARE * _free_bytes(model.device)) // _bytes_per_token(model)
    return max(min(most, fitting), _FEWEST)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # What PyTorch holds and does not use is free, too
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available


def _bytes_per_token(model: Any) -> int:
    """What a token needs at the same time as others: logits, keys and values, and the activations of one layer."""
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    hidden = config.hidden_size
    # As the LM head gives them, and once more where the model scales or caps them
    logits = 2 * config.vocab_size * size
    # The cache, and the copy of it with the new tokens
    keys_and_values = 2 * 2 * config.num_hidden_layers * hidden * size
    activations = (8 * hidden + 3 * (getattr(config, "intermediate_size", None) or 4 * hidden)) * size
    return logits + keys_and_values + activations
