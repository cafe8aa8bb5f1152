"""What precomputed log-probabilities of a reference depend on, and whether a file of them is whole."""

import copy
import hashlib
import json
import os
from dataclasses import fields
from typing import Any

import pyarrow as pa
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, is_caching_enabled
from datasets.fingerprint import Hasher

from .collator import DataCollatorForMultiPreference


logger = get_logger(__name__)

# Of the collator: without effect on evaluation, or exact, so that only noise differs
_WITHOUT_EFFECT = ("prefix_sharing", "trunk_column", "max_trunk_length", "num_negatives", "seed")


def hash_model(model: torch.nn.Module) -> str:
    """
    Hash of the weights that a reference computes with, as far as this process has them.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reference. Of a PEFT model it is the adapter named "ref", if there is one, or no adapter: the weights of the
            adapter that is trained, which are random, do not count.

    Returns:
        `str`: hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if is_peft_model(model) and _is_trained(model, name):
            continue
        # DeepSpeed ZeRO-3 leaves the parameter itself empty
        tensor = getattr(tensor, "ds_tensor", tensor).data.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _is_trained(model: Any, name: str) -> bool:
    """Whether a weight of a PEFT model is one of the adapter, or of a copy that it trains, and not of the reference."""
    of_adapter = model.base_model.prefix in name or ".modules_to_save." in name
    return of_adapter and ".ref." not in name


def describe_reference(model: Any, mixed_precision: str) -> str:
    """
    What beside its weights changes the log-probabilities of a reference.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reference.
        mixed_precision (`str`):
            What accelerate runs it in.

    Returns:
        `str`: JSON of the configuration of the model, of a reference adapter if there is one, and of what they run in.
    """
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # a copy of the folder has the same weights
    adapter = model.peft_config.get("ref") if is_peft_model(model) else None
    described = {
        "config": config,
        "adapter": adapter and {**adapter.to_dict(), "base_model_name_or_path": None},
        "attention": model.config._attn_implementation,
        "mixed_precision": mixed_precision,
    }
    return json.dumps(described, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def describe_collator(collator: DataCollatorForMultiPreference) -> str:
    """The kind and the settings of a collator, as far as they change the tokens that a reference sees."""
    settings = {
        field.name: getattr(collator, field.name)
        for field in fields(collator)
        if field.compare and field.name not in _WITHOUT_EFFECT
    }
    kind = type(collator)
    return f"{kind.__module__}.{kind.__qualname__} {json.dumps(settings, sort_keys=True, default=str)}"


def discard_broken(dataset: Dataset, model_hash: str) -> None:
    """
    Remove a file of log-probabilities that is not whole, as a full disk or a copy that broke off leaves it.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        model_hash (`str`):
            Of the reference and its settings, from which TRL makes the name of the file.
    """
    path = dataset._get_cache_file_path(Hasher.hash((dataset._fingerprint, model_hash)))
    if not os.path.exists(path):
        return
    try:
        found = Dataset.from_file(path)
        found.data.validate(full=True)
        # A file may end between two batches of rows, and look like a shorter one
        broken = None if len(found) == len(dataset) else f"it has {len(found)} rows of {len(dataset)}"
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        broken = f"{type(error).__name__}: {error}"
    if broken is not None:
        logger.warning(f"The precomputed reference log-probabilities in {path} are computed anew: {broken}.")
        os.remove(path)


def with_one_cache(dataset: Dataset) -> Dataset:
    """
    `dataset`, for the cached files of which all processes look in the same place.

    Of one in memory each process has a temporary folder of its own, where it would not find what the main process writes.
    """
    if dataset.cache_files and is_caching_enabled():
        return dataset
    [path] = broadcast_object_list([dataset._get_cache_file_path("")])
    dataset = copy.copy(dataset)
    dataset._get_cache_file_path = lambda fingerprint: path
    return dataset
