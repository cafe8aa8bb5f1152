"""A model to score with, or an adapter on its base model, and the tokenizer that belongs to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file


_LORA_MATRICES = {"lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B"}


def load_model(
    name: str | Path,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    option: str = "model_name_or_path",
) -> tuple[Any, Any]:
    """
    A causal language model and its tokenizer, ready to score.

    Args:
        name (`str` or `Path`):
            Folder or name on the Hub of a model, or of a PEFT adapter, which is put on the base model that it names.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: as saved.
        attn_implementation (`str`, *optional*):
            Which attention to use, such as `"sdpa"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
        device (`str`, *optional*):
            Where to put the model: `"cuda"`, `"cuda:1"`, `"cpu"`. Will default to the accelerator that there is, else the CPU.
        option (`str`, *optional*, defaults to `"model_name_or_path"`):
            What errors call `name`.

    Returns:
        `tuple`: the model, in evaluation mode, and the tokenizer: the adapter's own, or that of its base model if it has none.

    Raises:
        `FileNotFoundError`: there is no such folder.
        `ValueError`: what is there is no causal language model and no adapter of one, or its files cannot be read.
    """
    name, on = _resolve(name, option), _device(device)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    with _named(name, option):
        base = _adapter(name, revision)
    auto = AutoModelForCausalLM if base is None else AutoPeftModelForCausalLM
    with _named(name, option, base):
        model = auto.from_pretrained(name, revision=revision, **options)
        tokenizer = _load_tokenizer(name, revision, base, trust_remote_code)
    return model.to(on).eval(), tokenizer


def unify_lora(model: Any) -> Any:
    """
    Put the LoRA matrices of a model into the type of its weights, in place, to score with it, and return it.

    PEFT has them in float32, for training; beside weights in half precision that slows each of their layers down. Other
    adapters, of which some are near 1 and would lose by it, stay as they are.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in _LORA_MATRICES & set(layer.adapter_layer_names):
                getattr(layer, name).to(model.dtype)
    return model


def check_model(name: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """
    Raise what [`load_model`] would raise for lack of a model, or of the base of an adapter, without loading it.

    Args:
        name, revision, trust_remote_code:
            As of [`load_model`].
    """
    option = "model_name_or_path"
    name = _resolve(name, option)
    with _named(name, option):
        base = _adapter(name, revision)
    where, revision = (name, revision) if base is None else (base.base_model_name_or_path, base.revision)
    with _named(name, option, base):
        AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)


def _adapter(name: str, revision: str | None) -> PeftConfig | None:
    """The configuration of an adapter, if `name` is one."""
    if find_adapter_config_file(name, revision=revision) is None:
        return None
    return PeftConfig.from_pretrained(name, revision=revision)


@contextmanager
def _named(name: str, option: str, base: PeftConfig | None = None) -> Iterator[None]:
    """Say which model it was that could not be loaded."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        what, hint = name, ""
        if base is not None:
            what = f"{name}, an adapter of {base.base_model_name_or_path},"
            hint = " If its base model is elsewhere, say where in its adapter_config.json."
        if "trust_remote_code" in str(error):
            hint = f" If you have read it and trust it, set `trust_remote_code`.{hint}"
        raise ValueError(f"`{option}`: {what} cannot be loaded: {_first_line(error)}{hint}") from error


def _resolve(name: str | Path, option: str) -> str:
    """A folder that is there, or a name that may be on the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"`{option}`: {path} holds no model: it has neither config.json nor adapter_config.json.")
        return str(path)
    if path.exists():
        raise ValueError(f"`{option}`: {path} is a file; give the folder of a model, or its name on the Hub.")
    if path.is_absolute() or len(path.parts) > 2 or str(name).startswith("."):
        raise FileNotFoundError(f"`{option}`: there is no folder {path}.")
    return str(name)


def _load_tokenizer(name: str, revision: str | None, base: PeftConfig | None, trust_remote_code: bool) -> Any:
    """The tokenizer in `name`, or if that is an adapter without one, that of its base model."""
    if base is not None:
        own = cached_file(
            name, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if own is None:
            name, revision = base.base_model_name_or_path, base.revision
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such device, or PyTorch was built without it
        raise ValueError(f"`device`: {device!r} cannot be used: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
