"""
Checkpoints that a killed training goes on from as if nothing had happened.

What transformers saves, and when a folder of it is whole, is taken as it is. Here is what it leaves out: values since the
last log, the state of a moving reference, which folders are whole, and SIGTERM.
"""

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from .metrics import MeanMetrics


if TYPE_CHECKING:
    from .dmpo_trainer import DMPOTrainer

logger = get_logger(__name__)

STATE_NAME = "dmpo_state.json"
REFERENCE_NAME = "ref_model"
# Which people may edit, and of which a training reads nothing, or all at once
_TEXT = (".json", ".jsonl", ".jinja", ".md", ".txt")


def find_checkpoint(wanted: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """
    The folder to resume from.

    Args:
        wanted (`str` or `Path` or `bool`, *optional*):
            As `Trainer.train` takes it: a folder, or `True` for the last whole checkpoint in `output_dir`. `"true"` and
            `"false"` are what the command line makes of a bool.
        output_dir (`str` or `Path`):
            Where checkpoints are saved.

    Returns:
        `str`, or `None` to start from the beginning.

    Raises:
        `ValueError`: there is no such checkpoint, or it is not whole; the message says what is missing.
    """
    named = {"none": None, "false": False, "true": True}.get(str(wanted).lower(), wanted)
    if named is None or named is False:
        return None
    if named is not True:
        fault = find_fault(Path(named))
        if fault is not None:
            raise ValueError(f"Cannot resume from {named}: {fault}. {_advice(Path(named).parent)}")
        return str(named)
    faults: dict[Path, str] = {}
    for folder in _checkpoints(Path(output_dir)):
        fault = find_fault(folder)
        if fault is None:
            for other, why in faults.items():
                logger.warning(f"{other} is passed over: {why}. The training resumes from {folder}.")
            return str(folder)
        faults[folder] = fault
    if not faults:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but there is no checkpoint in {output_dir}. Leave it out to start from the "
            "beginning."
        )
    listed = "; ".join(f"{folder}: {fault}" for folder, fault in faults.items())
    raise ValueError(f"`resume_from_checkpoint=True`, but no checkpoint in {output_dir} is whole. {listed}.")


def find_fault(folder: Path) -> str | None:
    """Why a training cannot be resumed from `folder`, or `None` if it can."""
    if not folder.is_dir():
        return "there is no such folder"
    state = folder / TRAINER_STATE_NAME
    if not state.is_file():
        return f"it has no {TRAINER_STATE_NAME}, which is written last: it was not saved to the end"
    for path in (state, folder / STATE_NAME):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None  # saved by another trainer
        except ValueError:
            return f"its {path.name} is cut short"
    for name, size in found["files"].items():
        if not (folder / name).is_file():
            return f"its {name} is missing"
        if (folder / name).stat().st_size != size:
            return f"its {name} has {(folder / name).stat().st_size} bytes instead of {size}"
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, the last first."""
    paths = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in paths.items() if step.isdigit()), key=lambda p: int(paths[p]), reverse=True)


def _advice(folder: Path) -> str:
    whole = next((path for path in _checkpoints(folder) if find_fault(path) is None), None)
    if whole is None:
        return f"There is no whole checkpoint in {folder}."
    return f"The last whole checkpoint is {whole}: give it as `resume_from_checkpoint`."


class _WorkerInit:
    """
    `worker_init_fn` of a data loader, whose workers live on when all processes of a job are sent SIGTERM.

    They can still be terminated: by a second one, and by one when the training is over, since at the end of a process that
    failed, each worker is sent one and waited for.
    """

    def __init__(self, before: Any, is_over: torch.Tensor):
        self.before, self.is_over = before, is_over

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        if self.before is not None:
            self.before(worker_id)

    def _handle(self, number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        if self.is_over:
            os.kill(os.getpid(), number)


class Checkpoints(TrainerCallback):
    """
    Saves and restores what makes a resumed training the one that was not killed.

    The trainer calls it around training, saving and each batch; as a callback, it is told of steps and logs.

    Args:
        trainer ([`DMPOTrainer`]):
            Trainer whose checkpoints these are.
    """

    def __init__(self, trainer: "DMPOTrainer"):
        self.trainer = trainer
        self._carried: torch.Tensor | None = None  # the loss since the last log before the checkpoint
        self._unlogged: torch.Tensor | float = 0.0
        self._asked_to_stop = self._stops = self._postponed = self._was_over = False
        self._saved_step = -1
        self._is_over = torch.ones((), dtype=torch.bool).share_memory_()  # for workers of data loaders

    def find(self, wanted: str | Path | bool | None) -> str | None:
        """The folder to resume from, the same in all processes."""
        found: list[Any] = [None, None]
        if self.trainer.accelerator.is_main_process:
            try:
                found[0] = find_checkpoint(wanted, self.trainer.args.output_dir)
            except ValueError as error:
                found[1] = str(error)
        broadcast_object_list(found)
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around training: SIGTERM saves, and an error says where to go on."""
        self._saved_step = -1
        self._asked_to_stop = self._stops = self._postponed = False
        # Last, so that other callbacks have done their part of a checkpoint before SIGTERM ends the training
        self.trainer.callback_handler.callbacks.sort(key=lambda callback: callback is self)
        if self.trainer.args.sync_ref_model and _is_spread(self.trainer):
            logger.warning(
                "Checkpoints of this training cannot be resumed from: `sync_ref_model=True` moves the reference, which is not "
                "saved under FSDP and DeepSpeed ZeRO-3."
            )
        self._is_over.fill_(False)
        with self._sigterm_handled():
            try:
                yield
            except Exception as error:
                if self.trainer.state.global_step > 0:
                    stopped = f"The training stopped after step {self.trainer.state.global_step}."
                    error.add_note(f"{stopped} {_advice(Path(self.trainer.args.output_dir))}")
                raise
            finally:
                self._is_over.fill_(True)

    @contextlib.contextmanager
    def _sigterm_handled(self) -> Iterator[None]:
        args = self.trainer.args
        before = signal.getsignal(signal.SIGTERM)
        unclaimed = before is signal.SIG_DFL and args.save_strategy != SaveStrategy.NO
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or not (unclaimed or args.enable_jit_checkpoint):
            if args.enable_jit_checkpoint:
                logger.warning(
                    "SIGTERM does not save a checkpoint: a thread cannot handle it that is not the main one."
                )
            yield
            return
        # Repeated ones change nothing: `torchrun` passes on what a job's processes have each been sent already
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        self._asked_to_stop = True

    def protect_workers(self, dataloader: Any) -> Any:
        """`dataloader`, whose workers outlive a SIGTERM that is sent to all processes of a job."""
        if dataloader.num_workers > 0:
            # Within the one that accelerate makes of it
            inner = getattr(dataloader, "base_dataloader", dataloader)
            if not isinstance(inner.worker_init_fn, _WorkerInit):  # persistent ones come again
                inner.worker_init_fn = _WorkerInit(inner.worker_init_fn, self._is_over)
        return dataloader

    def with_carried(self, loss: torch.Tensor) -> torch.Tensor:
        """What a batch adds to the loss of the next log."""
        if self._carried is not None:
            # First of all, as it would have been: in another order, the sum rounds otherwise
            loss, self._carried = self._carried.to(loss.device) + loss, None
        self._unlogged = self._unlogged + loss.detach()
        return loss

    @contextlib.contextmanager
    def saving(self, trial: Any) -> Iterator[None]:
        """Around all that is saved: the folder is not whole until `TRAINER_STATE_NAME` is written, which comes last."""
        folder = Path(self.trainer._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.trainer.state.global_step}")
        try:
            if self.trainer.args.should_save and folder.exists():
                # Of a training that was killed or went another way: with files of this one, it would seem whole
                shutil.rmtree(folder)
            self.trainer.accelerator.wait_for_everyone()
            yield
        except Exception as error:
            raise RuntimeError(
                f"The checkpoint {folder} could not be saved: {error} ({_free(folder)}). Earlier checkpoints are as they "
                "were. If the disk is full, free some of it or keep fewer checkpoints (`save_total_limit`)."
            ) from error

    def finish(self, folder: Path) -> None:
        """Save what transformers leaves out, when all else but `TRAINER_STATE_NAME` is saved by this process."""
        trainer = self.trainer
        if trainer.args.should_save:
            if trainer.rejected_pools is not None:
                trainer.rejected_pools.save(folder)
            if trainer.args.sync_ref_model and not _is_spread(trainer):
                trainer.accelerator.unwrap_model(trainer.ref_model).save_pretrained(folder / REFERENCE_NAME)
        # All processes come here: then their files are written
        unlogged = torch.as_tensor(self._unlogged, dtype=torch.float32, device=trainer.accelerator.device)
        losses = trainer.accelerator.gather(unlogged.reshape(1)).tolist()
        if not trainer.args.should_save:
            return
        state = {
            "losses": losses,
            "logged_step": trainer._globalstep_last_logged,
            "metrics": trainer._metrics["train"],
            "num_tokens": trainer._total_train_tokens,
            "shares_prompts": trainer._sharing_is_exact,
            "files": _sizes(folder),
        }
        (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        if trainer.args.save_total_limit is not None:
            # They would count, and by their number even take the place of a whole one
            for other in _checkpoints(folder.parent):
                if other != folder and find_fault(other) is not None:
                    logger.warning(f"{other} is removed, to keep to `save_total_limit`: {find_fault(other)}.")
                    shutil.rmtree(other, ignore_errors=True)

    def restore(self, folder: Path) -> None:
        """Restore what `finish` has saved."""
        trainer = self.trainer
        if not (folder / STATE_NAME).is_file():
            logger.warning(
                f"{folder} has no {STATE_NAME}: it was saved by another trainer, or with `save_only_model`. `num_tokens` "
                "starts at 0, the next log has no values from before the checkpoint, and what the folder lacks is not restored."
            )
            return
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        losses = state["losses"]
        if len(losses) == trainer.args.world_size:
            loss = losses[trainer.args.process_index]
        else:
            loss = sum(losses) / len(losses)
            logger.warning(
                f"{folder} was saved by {len(losses)} processes, and {trainer.args.world_size} resume from it: random "
                "numbers such as those of dropout differ from those of a training that goes on with as many."
            )
        trainer._globalstep_last_logged = state["logged_step"]
        if trainer.state.global_step < trainer.state.max_steps:
            self._carried = torch.tensor(loss)
            # The summary at the end is of the steps since
            trainer._total_loss_scalar -= sum(losses) / len(losses)
        else:
            self._was_over = trainer.control.should_training_stop = True
            trainer._load_rng_state(str(folder))  # else restored with the first step, which does not come
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(state["metrics"])
        trainer._total_train_tokens = state["num_tokens"]
        if state["shares_prompts"] is False and trainer._train_collator.prefix_sharing:
            trainer._stop_sharing(f"that is what the training has found that {folder} is of")
        if trainer.args.sync_ref_model:
            self._restore_reference(folder / REFERENCE_NAME)

    def _restore_reference(self, folder: Path) -> None:
        if _is_spread(self.trainer) or not folder.is_dir():
            raise ValueError(
                f"There is no reference model in {folder}, which `sync_ref_model=True` has moved: it is saved with checkpoints "
                "where each process has the whole of it, not under FSDP or DeepSpeed ZeRO-3. Start from the beginning."
            )
        reference = self.trainer.accelerator.unwrap_model(self.trainer.ref_model)
        saved = type(reference).from_pretrained(folder, dtype=reference.dtype)
        reference.load_state_dict(saved.state_dict())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # Of a training that failed, or that `auto_find_batch_size` has broken off
        self._carried, self._unlogged, self._was_over = None, 0.0, False
        self.trainer._running["train"] = MeanMetrics()
        if state.global_step > 0:
            self.restore(Path(str(self.trainer.resumed_from)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if "loss" in kwargs["logs"]:
            self._unlogged = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        by_epoch = IntervalStrategy.EPOCH in (args.logging_strategy, args.eval_strategy)
        # The epoch's log and evaluation come first, which a training resumed from here would not make up for
        self._postponed = control.should_save and by_epoch and _epoch_ends(state)
        asked = torch.tensor([self._asked_to_stop], device=self.trainer.accelerator.device)
        self._stops = bool(self.trainer.accelerator.gather(asked).any())  # after the same step in all processes
        control.should_save = control.should_save and not self._postponed
        control.should_training_stop = control.should_training_stop or self._stops

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._carried is not None:  # an epoch without a batch
            logger.warning(
                f"The stream had begun anew before step {state.global_step}, and begins anew now: the rows that come next are "
                "its first, not those that would have come had the training not been interrupted."
            )
        # With "best", an evaluation decides whether to save
        if self._stops and (not _epoch_ends(state) or args.save_strategy == SaveStrategy.BEST):
            control.should_log = control.should_evaluate = False
        if self._was_over:
            control.should_log = control.should_evaluate = control.should_save = False
            return
        is_saved = self._saved_step == state.global_step
        control.should_save = control.should_save or self._postponed or (self._stops and not is_saved)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._saved_step = state.global_step
        if not self._stops:
            return
        self.trainer.accelerator.wait_for_everyone()
        logger.warning(
            f"SIGTERM: a checkpoint of step {state.global_step} is saved in {args.output_dir}, and the training ends."
        )
        raise SystemExit(128 + signal.SIGTERM)


def _epoch_ends(state: TrainerState) -> bool:
    return state.epoch == int(state.epoch)


def _is_spread(trainer: "DMPOTrainer") -> bool:
    """Whether no process has the whole reference model."""
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.is_fsdp_enabled or zero3


def _sizes(folder: Path) -> dict[str, int]:
    """Sizes of the files that cannot be read in part without being noticed too late."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in _TEXT)
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def _free(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**30:.1f} GiB are free there"
