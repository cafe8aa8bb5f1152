"""
What it costs to train on ten targets of a user: the prompt repeated, shared by the answers of a row, or by the rows of a user.

```bash
python benchmarks/trunks.py --log ml-100k/ --output benchmarks/trunks.json
python benchmarks/trunks.py --log ml-100k/ --shapes 135M --rounds 1 --layouts star trunk floor
python benchmarks/trunks.py --log ml-100k/ --shapes small 135M --device cuda --dtype bfloat16
```

The rows are of MovieLens-100K, ten of each user, with histories of 11 to 20 films, and a batch has those of one user. All
layouts get the same batches. The question stands in front of the history (`before`) or behind it (`behind`), where each row
has a copy of its own. A time is that of a training step through the trainer, optimizer included, for each row: the median
over the steps of all rounds, in which the layouts take turns, without the first step of each. The floor is the bare model on
the same unique tokens: a forward, loss and backward of the policy over all of them and a forward of the reference, without
an optimizer.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


ASSETS = Path(os.environ.get("TRL_DMPO_ASSETS", Path.home() / ".cache" / "trl-dmpo-assets"))
TARGETS = 10
DATA = {"negatives": "uniform", "num_negatives": 15, "min_history": 11, "max_history": 20, "train_targets": -1}
QUESTIONS = {
    "before": r"template(prompt='Which movie will a user watch next? Answer with its title only. "
    r"Watched so far, oldest first: {history}.\nNext movie:', separator='; ')",
    "behind": "next_item(wording='semicolons')",
}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4},
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
LAYOUTS = ("repeated", "star", "trunk", "floor")


def load_log(options: argparse.Namespace) -> Any:
    from trl_dmpo.data import load_interactions

    if "tiny" not in options.shapes:
        return load_interactions(options.log)
    import polars as pl

    from trl_dmpo.data.log import make_log

    generator = np.random.default_rng(0)
    taken = [(user, film, time) for user in range(8) for time, film in enumerate(generator.permutation(60)[:24])]
    films = pl.DataFrame({"item_id": range(60), "title": [f"Film {number}" for number in range(60)]})
    taken = pl.DataFrame(taken, schema=["user_id", "item_id", "timestamp"], orient="row")
    return make_log(taken, films, source="made up", domain="film")


def load_tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if "tiny" not in options.shapes:
        return AutoTokenizer.from_pretrained(options.tokenizer)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"Film {number}" for number in range(60)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_rows(log: Any, question: str, users: int) -> list[dict]:
    """The first ten targets of some users: the histories of a user start with the same film."""
    from trl_dmpo.data import build_dataset

    rows = build_dataset(log, seed=0, prompt=QUESTIONS[question], **DATA)["train"]
    of_users: dict[Any, list[dict]] = {}
    for row in rows.select_columns(["user_id", "prompt", "chosen", "rejected"]):
        of_users.setdefault(row["user_id"], []).append(row)
    enough = [of_user[:TARGETS] for of_user in of_users.values() if len(of_user) >= TARGETS]
    if len(enough) < users:
        raise ValueError(
            f"The log has {len(enough)} users with {TARGETS} targets, {users} are needed: take a larger one."
        )
    chosen = np.random.default_rng(0).choice(len(enough), users, replace=False)
    return [row for user in chosen for row in enough[user]]


class Bench:
    """What each layout costs, for a shape of the model and a number of rejected answers."""

    def __init__(self, options: argparse.Namespace, shape: str, k: int, rows: list[dict], tokenizer: Any, folder: str):
        self.options, self.shape, self.tokenizer, self.folder = options, shape, tokenizer, folder
        self.rows = [{**row, "rejected": row["rejected"][:k]} for row in rows]
        self.policy, self.reference = self.model(), self.model()
        self.trainers = {layout: self.trainer(layout) for layout in options.layouts if layout != "floor"}
        self.tokens = {layout: self.count(trainer) for layout, trainer in self.trainers.items()}
        self.tokens["floor"] = self.tokens["trunk"]
        self.seconds: dict[str, list[float]] = {layout: [] for layout in options.layouts}

    def model(self) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPES[self.shape], vocab_size=len(self.tokenizer), tie_word_embeddings=True, bos_token_id=None
        )
        return LlamaForCausalLM(config).to(self.options.device, getattr(torch, self.options.dtype))

    def trainer(self, layout: str) -> Any:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from transformers import PrinterCallback

        from trl_dmpo import DMPOConfig, DMPOTrainer

        class InOrder(DMPOTrainer):
            def _get_train_sampler(self, train_dataset=None):
                return SequentialSampler(train_dataset)

        args = DMPOConfig(
            self.folder,
            prefix_sharing=layout != "repeated",
            trunk_column="user_id" if layout == "trunk" else None,
            per_device_train_batch_size=TARGETS,
            max_steps=self.steps(layout) + 1,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=self.options.device == "cpu",
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        dataset = Dataset.from_list(self.rows)
        trainer = InOrder(self.policy, self.reference, args, train_dataset=dataset, processing_class=self.tokenizer)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def steps(self, layout: str) -> int:
        return 1 if layout == "repeated" else self.options.steps  # they take minutes

    def count(self, trainer: Any) -> list[tuple[int, int]]:
        """Of each batch, its tokens without padding and with it."""
        return [
            (int(batch["attention_mask"].sum()), batch["attention_mask"].numel())
            for batch in trainer.get_train_dataloader()
        ]

    def run(self, layout: str) -> None:
        if layout == "floor":
            self.seconds[layout] += self.run_floor()
            return
        clock = make_clock(self.options.device)
        trainer = self.trainers[layout]
        trainer.add_callback(clock)
        trainer.train()
        trainer.remove_callback(clock)
        self.seconds[layout] += [end - start for start, end in itertools.pairwise(clock.ends)]

    def run_floor(self) -> list[float]:
        import torch

        times = []
        self.policy.train()
        for tokens, _ in self.tokens["floor"][: self.options.steps + 1]:
            ids = torch.randint(len(self.tokenizer), (1, tokens), device=self.options.device)
            start = now(self.options.device)
            self.policy.zero_grad(set_to_none=True)
            self.policy(ids, labels=ids, use_cache=False).loss.backward()
            with torch.no_grad():
                self.reference(ids, use_cache=False)
            times.append(now(self.options.device) - start)
        return times[1:]

    def result(self, layout: str) -> dict[str, Any]:
        tokens, positions = np.array(self.tokens[layout]).mean(0) / TARGETS
        return {
            "layout": layout,
            "tokens": float(tokens),
            "with_padding": float(tokens if layout == "floor" else positions),
            "seconds": statistics.median(self.seconds[layout]) / TARGETS,
            "all_seconds": [seconds / TARGETS for seconds in self.seconds[layout]],
        }


def now(device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def make_clock(device: str) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(now(device))

    return Clock()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    from rich.progress import track

    log, tokenizer = load_log(options), load_tokenizer(options)
    results = []
    for shape, question in itertools.product(options.shapes, options.questions):
        rows = make_rows(log, question, options.steps + 1)
        for k in options.ks:
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(options, shape, k, rows, tokenizer, folder)
                for layout in track(options.rounds * options.layouts, f"{shape}, question {question}, K = {k}"):
                    bench.run(layout)
            common = {"shape": shape, "question": question, "k": k}
            results += [{**common, **bench.result(layout)} for layout in options.layouts]
    return results


def table(results: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    from rich.table import Table

    out = Table(title=f"A training step, for each row: {settings['device']}, {settings['dtype']}")
    for column in ("model", "question", "K", "layout", "tokens", "with padding", "ms", "star to it: tokens", "time"):
        out.add_column(column, justify="left" if column in ("model", "question", "layout") else "right")
    stars = {
        (result["shape"], result["question"], result["k"]): result for result in results if result["layout"] == "star"
    }
    for result in results:
        star = stars[result["shape"], result["question"], result["k"]]
        out.add_row(
            result["shape"],
            result["question"],
            str(result["k"]),
            result["layout"],
            f"{result['tokens']:.1f}",
            f"{result['with_padding']:.1f}",
            f"{1000 * result['seconds']:.1f}",
            f"{star['tokens'] / result['tokens']:.2f}",
            f"{star['seconds'] / result['seconds']:.2f}",
            end_section=result["layout"] == "floor",
        )
    return out


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--log", type=Path, default=ASSETS / "ml-100k", help="the log, in a form that is read")
    parser.add_argument("--tokenizer", default=str(ASSETS / "SmolLM2-135M-Instruct"), help="folder or name of one")
    parser.add_argument("--shapes", nargs="+", default=["small"], choices=SHAPES, help="shapes of the model")
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--ks", type=int, nargs="+", default=[3, 15], help="numbers of rejected films")
    parser.add_argument(
        "--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="'star' and 'trunk' are always among them"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args(arguments)
    options.layouts = [layout for layout in LAYOUTS if layout in {"star", "trunk", *options.layouts}]
    if not all(1 <= k <= DATA["num_negatives"] for k in options.ks):
        parser.error(
            f"--ks: {options.ks}, but a row has {DATA['num_negatives']} rejected films. Give numbers from 1 to that."
        )
    if "tiny" in options.shapes and options.shapes != ["tiny"]:
        parser.error("--shapes: 'tiny' is to see that the script runs, on made-up data. Give it alone.")
    return options


def main(options: argparse.Namespace) -> None:
    import datasets
    import torch
    import transformers
    from rich.console import Console

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    settings = {name: getattr(options, name) for name in ("dtype", "rounds", "steps")}
    settings |= {"device": device, "targets": TARGETS, "data": DATA, "prompts": QUESTIONS, "shapes": SHAPES}
    results = measure(options)
    if options.output is not None:
        options.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    Console(width=110).print(table(results, settings))


if __name__ == "__main__":
    main(parse())
