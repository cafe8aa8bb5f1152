"""From rows to a tokenizer, a fine-tuned language model, and one trained further with DMPO."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from rich.progress import Progress, TaskID
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from trl_dmpo import DMPOConfig, DMPOTrainer

from .catalogue import Rows


VOCAB_SIZE = 1024


class ProgressBar(TrainerCallback):
    """A line of a rich progress display for a training, and one for each prediction."""

    def __init__(self, progress: Progress, name: str):
        self.progress, self.name = progress, name
        self.task: TaskID | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task(f"{self.name}: training", total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        assert self.task is not None  # training has begun
        self.progress.update(self.task, completed=state.global_step)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.task is None or self.progress.tasks[self.task].finished:
            name = self.name if state.global_step else "SFT"  # what DMPO starts from
            self.task = self.progress.add_task(f"{name}: ranking for held-out users", total=len(eval_dataloader))
        self.progress.advance(self.task)


def train_tokenizer(rows: list[dict]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the titles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["chosen"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A small language model with random weights."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _common_options(folder: Path, seed: int) -> dict:
    return {
        "output_dir": str(folder),
        "seed": seed,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_eval_batch_size": 8,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _show_progress(trainer: Trainer, progress: Progress, name: str) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar(progress, name))


def train_sft(rows: list[dict], folder: Path, seed: int, progress: Progress) -> None:
    """Train a model to continue histories as users did, and save it in `folder`."""
    tokenizer = train_tokenizer(rows)
    args = SFTConfig(
        num_train_epochs=8,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        completion_only_loss=False,  # a model from nothing learns from the histories, too
        **_common_options(folder, seed),
    )
    dataset = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    trainer = SFTTrainer(build_model(tokenizer, seed), args, train_dataset=dataset, processing_class=tokenizer)
    _show_progress(trainer, progress, "SFT")
    trainer.train()
    trainer.save_model(str(folder))


def make_dmpo_trainer(sft_folder: Path, rows: Rows, folder: Path, seed: int, progress: Progress) -> DMPOTrainer:
    """A trainer around the model in `sft_folder`, not yet trained."""
    args = DMPOConfig(
        loss_type=["dmpo", "sft"],
        loss_weights=[1.0, 1.0],
        beta=1.0,
        learning_rate=5e-4,
        num_train_epochs=1,
        per_device_train_batch_size=32,
        **_common_options(folder, seed),
    )
    trainer = DMPOTrainer(
        str(sft_folder),
        args=args,
        train_dataset=Dataset.from_list(rows.dmpo),
        eval_dataset=Dataset.from_list(rows.held_out),
        compute_metrics=lambda prediction: {},  # has the trainer collect the predictions
    )
    _show_progress(trainer, progress, "DMPO")
    return trainer


def score(trainer: DMPOTrainer) -> np.ndarray:
    """Log-probabilities of the completions of each held-out row, (rows, C), the chosen one first."""
    return trainer.predict(trainer.eval_dataset).predictions


def random_scores(rows: list[dict], seed: int) -> np.ndarray:
    """Scores of a recommender that knows nothing, (rows, C)."""
    return np.random.default_rng(seed).normal(size=(len(rows), 1 + len(rows[0]["rejected"])))
