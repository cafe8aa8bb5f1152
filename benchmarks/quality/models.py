"""Where a preference stage starts from: a small language model made from scratch, or one that somebody trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def make_tokenizer(titles: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of titles. A line break ends a title, in prompts as in completions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["\n", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(titles, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n", pad_token="<pad>")


def make_model(tokenizer: Any, shape: Mapping[str, int], seed: int) -> Any:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(**shape, **special, vocab_size=len(tokenizer), tie_word_embeddings=True))


def train_language_model(
    model: Any, tokenizer: Any, texts: Any, validation: Any, arguments: Mapping[str, Any], seed: int, folder: Path
) -> dict[str, Any]:
    """
    Next-token training on whole texts, keeping the weights at which the completions of the validation rows are likeliest.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            What to train, in place.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        texts, validation ([`~datasets.Dataset`]):
            Rows with `prompt` and `chosen`.
        arguments (`Mapping`):
            Those of [`~transformers.TrainingArguments`].
        seed (`int`):
            Seed of the order of the rows.
        folder (`Path`):
            For checkpoints.

    Returns:
        `dict`: `curve`, pairs of epoch and loss of the validation completions, in nats a token; and `best`, the lowest.
    """
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    args = TrainingArguments(
        str(folder),
        **{"eval_strategy": "steps", "eval_steps": 0.05, "save_steps": 0.05, "save_total_limit": 1}
        | {"load_best_model_at_end": True, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.1}
        | dict(arguments)
        | quiet(seed),
    )
    trainer = Trainer(
        model,
        args,
        DataCollatorForSeq2Seq(tokenizer),
        _tokenized(texts, tokenizer, only_completion=False),
        _tokenized(validation, tokenizer, only_completion=True),
    )
    run(trainer)
    losses = [(log["epoch"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log]
    return {"curve": losses, "best": min(losses, key=lambda each: each[1])}


def _tokenized(rows: Any, tokenizer: Any, only_completion: bool) -> list[dict[str, list[int]]]:
    found = []
    for prompt, chosen in zip(rows["prompt"][:], rows["chosen"][:], strict=True):
        prompt_ids, ids = tokenizer(prompt).input_ids, tokenizer(f"{prompt}{chosen}{tokenizer.eos_token}").input_ids
        hidden = len(prompt_ids) if only_completion else 0
        found.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return found


def quiet(seed: int) -> dict[str, Any]:
    """Arguments of a training whose progress is shown by whoever runs it."""
    return {
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def run(trainer: Any) -> None:
    """Train without a word."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
