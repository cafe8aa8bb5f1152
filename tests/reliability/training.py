"""
A small training that writes down every batch that it computes, to be killed, resumed and compared with one that was not.

It runs in processes forked from one that has imported everything: a start costs a second. They are killed as any other.
"""

import contextlib
import hashlib
import json
import os
import random
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tqdm.asyncio
import tqdm.auto
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_dmpo import DMPOConfig, DMPOTrainer
from trl_dmpo.ranking.self_play import SelfPlayCallback
from trl_dmpo.trainer.checkpoints import find_fault


TITLES = ["Alien", "Aliens", "Heat", "Red Heat", "Big", "Babe", "Léon", "Se7en", "Fargo", "Jaws", "Up", "Tron"]

# 27 rows in batches of 2 are 14 batches: by threes, an epoch of 5 steps, and in two processes of 3, of which the last is a
# short one. Nothing divides anything: logs, checkpoints and epochs end at different steps
_OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 3,
    "learning_rate": 5e-3,
    "logging_steps": 4,
    "save_steps": 2,
    "save_total_limit": 2,
    "disable_dropout": False,
    "num_negatives": 2,
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


class Case(NamedTuple):
    """
    What a training is like.

    Args:
        options (`dict`):
            Changes to the options of `DMPOConfig`.
        lora (`bool`, *optional*, defaults to `False`):
            Whether to train an adapter, with dropout of its own.
        self_play_every (`int`, *optional*):
            Find negatives anew after every so many steps.
    """

    options: dict[str, Any]
    lora: bool = False
    self_play_every: int | None = None


CASES = {
    "full": Case({"save_total_limit": 1}),
    "lora": Case({"dataloader_num_workers": 1, "loss_type": ["dmpo", "sft"]}, lora=True),
    "self_play": Case({"num_negatives": None, "save_steps": 1}, self_play_every=4),
    "epochs": Case({"logging_strategy": "epoch", "eval_strategy": "epoch", "save_steps": 3}),
    "moving_reference": Case({"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5}),
}


class RecordingTrainer(DMPOTrainer):
    """Appends the step and a digest of each batch that it computes to a file, at once."""

    record: Any = None

    def _compute_loss(self, model, inputs, return_outputs):
        if self.record is not None and self.model.training:
            line = {
                "step": self.state.global_step,
                "rows": inputs["row_index"].tolist(),
                "ids": digest(inputs["input_ids"]),
            }
            self.record.write(json.dumps(line) + "\n")
            self.record.flush()
        return super()._compute_loss(model, inputs, return_outputs)


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def save_model(folder: Path) -> str:
    """A tiny model with dropout, and a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", "<|pad|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        attention_dropout=0.2,
        initializer_range=0.3,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_rows(count: int = 27) -> list[dict[str, Any]]:
    rows, generator = [], random.Random(0)
    for index in range(count):
        watched, chosen, *rejected = generator.sample(TITLES, 6 - index % 2)
        prompt = f"User {index} has watched {watched}. Next:"
        rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": [f" {title}" for title in rejected]})
    return rows


def build_trainer(case: Case, model: str, folder: Path, **options: Any) -> RecordingTrainer:
    rows = options.pop("train_dataset", None) or Dataset.from_list(make_rows())
    changed = _OPTIONS | case.options | options
    trainer = RecordingTrainer(
        model,
        args=DMPOConfig(str(folder), **changed),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)) if "eval_strategy" in changed else None,
        peft_config=LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear") if case.lora else None,
    )
    if case.self_play_every is not None:
        trainer.add_callback(SelfPlayCallback(trainer, every=case.self_play_every))
    return trainer


def is_resumable(folder: Path) -> bool:
    return any(find_fault(path) is None for path in folder.glob("checkpoint-*"))


def train(case: Case, model: str, folder: Path, **options: Any) -> None:
    """Train, from the last whole checkpoint if there is one, and write down what has come of it."""
    trainer = build_trainer(case, model, folder, **options)
    rank = trainer.args.process_index
    folder.mkdir(parents=True, exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    attempt = int(os.environ.get("ATTEMPT", 0))
    with open(folder / f"batches-{rank}-{attempt}.jsonl", "w") as trainer.record:
        trainer.train(resume_from_checkpoint=is_resumable(folder))
    (folder / f"result-{rank}.json").write_text(json.dumps(describe(trainer)))


def describe(trainer: DMPOTrainer) -> dict[str, Any]:
    """All that a resumed training must have in common with one that was not killed."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    states = trainer.optimizer.state_dict()["state"]
    numpy_state = np.random.get_state()
    return {
        "weights": digest(*model.state_dict().values()),
        "reference": trainer.ref_model
        and digest(*trainer.accelerator.unwrap_model(trainer.ref_model).state_dict().values()),
        "optimizer": digest(*(states[key][name] for key in sorted(states) for name in sorted(states[key]))),
        "schedule": trainer.lr_scheduler.state_dict()["_last_lr"],
        "random": [
            digest(torch.get_rng_state()),
            str(numpy_state[2]),
            digest(torch.from_numpy(numpy_state[1].copy())),
        ],
        "python_random": hashlib.sha256(repr(random.getstate()).encode()).hexdigest()[:16],
        "steps": trainer.state.global_step,
        "flos": trainer.state.total_flos,
        # The last one is the summary of a call of `train`
        "logs": [_without_timings(logs) for logs in trainer.state.log_history[:-1]],
    }


def _without_timings(logs: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in logs.items() if not name.endswith(("_runtime", "_per_second"))}


def read_batches(folder: Path) -> dict[tuple[int, int], dict[int, list]]:
    """By process and attempt, the batches of each step."""
    found: dict[tuple[int, int], dict[int, list]] = {}
    for path in sorted(folder.glob("batches-*.jsonl")):
        _, rank, attempt = path.stem.split("-")
        steps = found.setdefault((int(rank), int(attempt)), {})
        for line in path.read_text().splitlines():
            try:
                batch = json.loads(line)
            except ValueError:
                continue  # cut by the kill
            steps.setdefault(batch["step"], []).append((batch["rows"], batch["ids"]))
    return found


def differences(folder: Path, reference: Path) -> list[str]:
    """What the training in `folder` has not in common with that in `reference`."""
    found = []
    for path in sorted(reference.glob("result-*.json")):
        ours, theirs = (json.loads((place / path.name).read_text()) for place in (folder, reference))
        found += [f"{path.stem}: {name}" for name in theirs if ours[name] != theirs[name]]
    whole = {rank: steps for (rank, _), steps in read_batches(reference).items()}
    for (rank, attempt), steps in read_batches(folder).items():
        for step, batches in steps.items():
            expected = whole[rank][step]
            if batches != (expected if step < max(steps) else expected[: len(batches)]):
                found.append(f"batches of process {rank}, attempt {attempt}, step {step}")
    return found


class Job:
    """
    A training in one or several processes.

    Args:
        processes (`int`):
            How many, connected by gloo.
        target (`Callable`):
            What each of them does.
        log (`Path`):
            File for what they print.
        attempt (`int`, *optional*, defaults to `0`):
            How often this training was killed before.
    """

    def __init__(self, processes: int, target: Any, log: Path, attempt: int = 0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.attempt = log, attempt
        self.pids = [self._fork(rank, processes, port, target) for rank in range(processes)]
        self.codes: dict[int, int] = {}

    def _fork(self, rank: int, processes: int, port: int, target: Any) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setpgid(0, 0)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["ATTEMPT"] = str(self.attempt)
            # Forked processes share the lock of tqdm, which one that is killed may leave locked
            for bar in (tqdm.tqdm, tqdm.asyncio.tqdm, tqdm.auto.tqdm):
                bar.set_lock(threading.RLock())
            if processes > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ.update({name: str(value) for name, value in places.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
            target()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def send(self, number: int, *ranks: int, with_workers: bool = True) -> None:
        """Send a signal to some processes, or to all, and to the workers of their data loaders."""
        for rank in ranks or range(len(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if with_workers else os.kill)(self.pids[rank], number)

    def wait(self, seconds: float) -> list[int] | None:
        """The exit codes, negative that of a signal, or `None` if not all have ended by then."""
        end = time.monotonic() + seconds
        while True:
            for pid in self.pids:
                if pid not in self.codes:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    self.codes.update({pid: os.waitstatus_to_exitcode(status)} if ended else {})
            if len(self.codes) == len(self.pids):
                return [self.codes[pid] for pid in self.pids]
            if time.monotonic() > end:
                return None
            time.sleep(0.005)
