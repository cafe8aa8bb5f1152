"""
Runs trainings of `cases.py` one after the other in one process group, and writes what came of each.

`worker.py MODEL OUT NAME...`: a NAME such as `full`, or `full@2` for two micro-batches a step.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerCallback

from tests.distributed import cases
from tests.distributed.cases import CASES, build_trainer
from tests.trainer.helpers import perturb
from trl_dmpo.trainer import dmpo_trainer
from trl_dmpo.trainer.sharing import measure_sharing, refused


# What depends on the clock, on the number of batches, or, as the padding does, on the rows that are in one
NOT_COMPARED = ("runtime", "per_second", "total_flos", "model_preparation_time", "epoch", "tokens/padding")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of it, of which FSDP and ZeRO-3 give each process a part."""
    with gathered([tensor]):
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gathered(parameters: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager:
    if not is_deepspeed():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def is_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def start_deepspeed() -> None:
    """As accelerate does on GPUs only."""
    import deepspeed

    # Gloo instead of kernels that are compiled on the spot
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    cases.DTYPE = torch.float32  # ZeRO has no float64


class Recorder(TrainerCallback):
    """Keeps the gradients of each step, and at last the weights."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.tensors[f"gradient of step {state.global_step}: {name}"] = whole(parameter.grad)

    def on_train_end(self, args, state, control, model, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.tensors[f"weight: {name}"] = whole(parameter)


def fails_in_the_second_process(*args):
    measured = measure_sharing(*args)
    second = PartialState().process_index == 1
    return refused(ValueError("not on this process")) if second else measured


def compared(log: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in log.items() if not name.endswith(NOT_COMPARED)}


def run_case(name: str, accumulation: int, model_path: str, out: Path) -> dict[str, Any]:
    recorder, processes = Recorder(), PartialState().num_processes
    trainer = build_trainer(
        CASES[name],
        model_path,
        AutoTokenizer.from_pretrained(model_path),
        str(out),
        processes,
        accumulation,
        callbacks=[recorder],
    )
    with gathered(trainer.model.parameters()):
        perturb(trainer.model)
    error = None
    try:
        trainer.train()
    except FloatingPointError as raised:
        error = str(raised)
    if PartialState().is_main_process:
        save_file(recorder.tensors, out / "tensors.safetensors")
    return {
        "engine": trainer.accelerator.distributed_type.value,
        "processes": processes,
        "log": [compared(log) for log in trainer.state.log_history],
        "error": error,
        "shares": trainer._sharing_is_exact,
        "found": next((c.found for c in trainer.callback_handler.callbacks if hasattr(c, "found")), None),
    }


def main(model_path: str, out: str, *runs: str) -> None:
    if is_deepspeed():
        start_deepspeed()
    state = PartialState(cpu=True)
    for run in runs:
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            # Accelerate shards a model on GPUs and the like only
            state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        folder = Path(out, run)
        folder.mkdir(parents=True, exist_ok=True)
        name, _, accumulation = run.partition("@")
        probe = fails_in_the_second_process if name.startswith("probe fails") else measure_sharing
        with patch.object(dmpo_trainer, "measure_sharing", probe):
            results = gather_object([run_case(name, int(accumulation or 1), model_path, folder)])
        if state.is_main_process:
            (folder / "result.json").write_text(json.dumps(results))
        AcceleratorState._reset_state()
        GradientState._reset_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
