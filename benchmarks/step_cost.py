"""
Cost of a training step: `DPOTrainer` on one pair against `DMPOTrainer` on one prompt with K rejected completions.

```bash
python benchmarks/step_cost.py                                # CPU, float32, half an hour on two cores
python benchmarks/step_cost.py --device cuda --dtype bfloat16
```

Every measurement is a process of its own, which makes its peak memory its own. It trains a Llama of SmolLM2-135M's shape
with random weights through the trainer, optimizer included, and leaves out its first step. The variants take turns, and
a time is the median over all steps of all rounds. The floor is the bare model on the same unique tokens: a forward, loss
and backward of the policy over all of them and a forward of the reference, without an optimizer.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
TINY = {**SHAPE, "hidden_size": 72, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048}


def measure(options: argparse.Namespace) -> dict:
    """One measurement, in this process."""
    import torch

    torch.manual_seed(0)
    if options.variant == "floor":
        seconds, tokens = measure_floor(options)
    else:
        seconds, tokens = measure_trainer(options)
    peak = (
        torch.cuda.max_memory_allocated()
        if options.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"seconds": seconds, "peak_bytes": peak, "tokens": tokens, "device": device}


def make_model(options: argparse.Namespace):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(TINY if options.tiny else SHAPE), bos_token_id=0, eos_token_id=0, pad_token_id=1)
    return LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype))


def make_tokenizer(vocab_size: int):
    """One word, one token: the lengths are exact."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<eos>", "<pad>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(special)}
    vocabulary |= {f"w{index}": index for index in range(len(special), vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def make_rows(options: argparse.Namespace, count: int, vocab_size: int) -> list[dict]:
    import numpy as np

    generator = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"w{index}" for index in generator.integers(3, vocab_size, length))

    def completion() -> str:
        return f" {text(options.completion - 1)} <eos>"

    return [
        {"prompt": text(options.prompt), "chosen": completion(), "rejected": [completion() for _ in range(options.k)]}
        for _ in range(count)
    ]


def measure_floor(options: argparse.Namespace) -> tuple[list[float], int]:
    import torch

    policy, reference = make_model(options), make_model(options)
    tokens = options.prompt - 1 + (options.k + 1) * options.completion
    times = []
    for _ in range(options.steps + 1):
        ids = torch.randint(3, policy.config.vocab_size, (1, tokens), device=options.device)
        start = now(options.device)
        policy.zero_grad(set_to_none=True)
        policy(ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            reference(ids, use_cache=False)
        times.append(now(options.device) - start)
    return times[1:], tokens


def now(device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def measure_trainer(options: argparse.Namespace) -> tuple[list[float], int]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from trl_dmpo import DMPOConfig, DMPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(now(options.device))

    steps, clock = options.steps + 1, Clock()
    policy, reference = make_model(options), make_model(options)
    tokenizer = make_tokenizer(policy.config.vocab_size)
    rows = make_rows(options, steps, policy.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "per_device_train_batch_size": 1,
            "max_steps": steps,
            "logging_steps": steps,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": options.device == "cpu",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        if options.variant == "dpo":
            rows = [{**row, "rejected": row["rejected"][0]} for row in rows]
            trainer_class, args = DPOTrainer, DPOConfig(**common)
        else:
            trainer_class, args = DMPOTrainer, DMPOConfig(**common, prefix_sharing=options.variant == "shared")
        dataset = Dataset.from_list(rows)
        trainer = trainer_class(
            policy, reference, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock]
        )
        trainer.train()
    ends = clock.ends
    return [end - start for start, end in itertools.pairwise(ends)], trainer._total_train_tokens // steps


def run_child(variant: str, k: int, options: argparse.Namespace) -> dict:
    steps = 1 if variant == "repeated" and k > 3 else options.steps  # they take minutes
    command = [sys.executable, __file__, "--variant", variant, "--k", str(k), "--steps", str(steps)]
    for name in ("prompt", "completion", "device", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.tiny:
        command.append("--tiny")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"{variant}, K = {k}, failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    variants = [("dpo", 1)] + [(name, k) for k in options.ks for name in ("repeated", "shared", "floor")]
    runs: dict[tuple[str, int], list[dict]] = {variant: [] for variant in variants}
    for index in track(range(options.rounds * len(variants)), "Measuring"):
        variant = variants[index % len(variants)]
        runs[variant].append(run_child(*variant, options))

    results = [
        {
            "variant": name,
            "k": k,
            "seconds": statistics.median(second for run in found for second in run["seconds"]),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in found),
            "tokens": found[0]["tokens"],
            "all_seconds": [second for run in found for second in run["seconds"]],
        }
        for (name, k), found in runs.items()
    ]
    settings = {name: getattr(options, name) for name in ("prompt", "completion", "dtype", "rounds", "steps")}
    settings["device"] = runs["dpo", 1][0]["device"]
    if options.output is not None:
        options.output.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    Console(width=110).print(table(results, settings))


def table(results: list[dict], settings: dict):
    from rich.table import Table

    by = {(result["variant"], result["k"]): result for result in results}
    pair = by["dpo", 1]["seconds"]
    out = Table(
        title=f"A step on one prompt of {settings['prompt']} tokens, completions of {settings['completion']}, "
        f"{settings['dtype']}, {settings['device']}"
    )
    for column in ("trainer", "K", "seconds", "to DPOTrainer", "to the floor", "tokens", "peak GB"):
        out.add_column(column, justify="left" if column == "trainer" else "right")
    names = {
        "dpo": "DPOTrainer",
        "repeated": "DMPOTrainer, repeated",
        "shared": "DMPOTrainer, shared",
        "floor": "floor",
    }
    for (variant, k), result in by.items():
        floor = by.get(("floor", k), {}).get("seconds")
        out.add_row(
            names[variant],
            str(k),
            f"{result['seconds']:.3f}",
            f"{result['seconds'] / pair:.2f}",
            f"{result['seconds'] / floor:.2f}" if floor else "",
            str(result["tokens"]),
            f"{result['peak_bytes'] / 1e9:.2f}",
        )
    return out


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 3, 7, 15], help="numbers of rejected completions")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=9, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a model of two thin layers, to see that the script runs")
    parser.add_argument("--variant", choices=["dpo", "repeated", "shared", "floor"], help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    if options.variant is None:
        compare(options)
    else:
        print(json.dumps(measure(options)))
