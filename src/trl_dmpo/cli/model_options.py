"""How a command loads models."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelOptions:
    """
    Parameters:
        model_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: as saved.
        attn_implementation (`str`, *optional*):
            Which attention to use.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with a model.
        device (`str`, *optional*):
            Where to compute: `"cuda"`, `"cuda:1"`, `"cpu"`. By default on the accelerator that there is.
    """

    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Under which type to load a model; 'auto' as it was saved.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Which attention to use, such as 'sdpa'."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code that comes with a model from the Hub."}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Where to compute: 'cuda', 'cuda:1', 'cpu'. By default an accelerator, if any."},
    )

    def loading(self) -> dict[str, Any]:
        """What is the same for all models that are loaded, as [`~trl_dmpo.ranking.models.load_model`] takes it."""
        names = ("dtype", "attn_implementation", "trust_remote_code", "device")
        return {name: getattr(self, name) for name in names}
