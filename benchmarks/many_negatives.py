"""
What many rejected answers do to a recommender: losses against K, on MovieLens-100K and a small model trained on it.

```bash
python benchmarks/many_negatives.py --log ml-100k/ --output benchmarks/many_negatives.json --plot docs/images/many_negatives.png
```

Half an hour on one core. `--log` is a folder that `load_interactions` reads. Each seed has a split of its own, and with it its
users, negatives, base model, and rows to train on. What is done is kept in `--work`: a run that was stopped goes on where it
was, and several processes, each with `--seeds` of its own, can share the work; the last call, with all of them, makes the
figures.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from quality.models import quiet, run


ASSETS = Path(os.environ.get("TRL_DMPO_ASSETS", Path.home() / ".cache" / "trl-dmpo-assets"))
CANDIDATES = 19  # beside the right one
CHOSEN = 3  # films of a training row, the next that the user liked
DATA = {
    "split": "user(validation=0.1, test=0.3, per_user=3)",
    "negatives": "uniform",
    "num_negatives": 19,
    "ranking_negatives": CANDIDATES,
    "prompt": r"template(prompt='{history}\n', separator='\n')",
    "min_history": 10,
    "max_history": 10,
    "train_targets": -1,
}
SHAPE = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = 2000
BASE = {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "max_steps": 800}
ROWS = 240
COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00"]  # told apart by the colour-blind, too
TINY = {
    "DATA": DATA | {"min_history": 3, "max_history": 3},
    "SHAPE": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "VOCABULARY": 300,
    "BASE": BASE | {"max_steps": 20},
    "ROWS": 16,
}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"loss_type": ["sft"]},
    "dmpo": {"loss_type": ["dmpo"]},
    "dmpo+sft": {"loss_type": ["dmpo", "sft"], "loss_weights": [1.0, 1.0]},
    "DynamicPO-DMPO": {
        "loss_type": ["dmpo"],
        "negative_selection": "boundary",
        "dynamic_beta": True,
    },
    "sdpo": {"loss_type": ["sdpo"]},
    "mult_dpo": {"loss_type": ["mult_dpo"]},
}


class Bench:
    """Data and base model of a seed."""

    def __init__(self, options: argparse.Namespace, seed: int):
        from trl_dmpo.data import build_dataset
        from trl_dmpo.ranking.rows import load_ranking_rows

        self.options, self.seed = options, seed
        log = load_log(options)
        data = build_dataset(log, seed=seed, **DATA)
        self.rows, self.validation = data["train"], data["validation"]
        ranking = build_dataset(log, configuration="ranking", seed=seed, **DATA)["test"]
        self.test = load_ranking_rows(list(ranking))
        self.tokenizer = make_tokenizer(log.items["title"].to_list())
        made_from = [SHAPE, VOCABULARY, BASE, seed, self.rows["prompt"][:], self.validation["prompt"][:]]
        self.folder = options.work / f"base-{seed}-{hash_of(made_from)}"

    def base(self):
        """The model that all runs of this seed begin with; trained by the first of them."""
        from transformers import AutoModelForCausalLM

        if not self.folder.exists():
            unfinished = self.folder.with_suffix(f".{os.getpid()}")
            train_base(self.rows, self.validation, self.tokenizer, unfinished, self.seed)
            unfinished.rename(self.folder)
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def run(self, method: str, k: int) -> dict:
        """Train one model, and what became of the answers."""
        start = time.perf_counter()
        model = self.base()
        if method != "start":
            train(model, self.tokenizer, training_rows(self.rows, k, self.seed), self.arguments(method))
        trained = time.perf_counter()
        return {
            **self.evaluate(model),
            "seconds": {"training": trained - start, "evaluation": time.perf_counter() - trained},
        }

    def arguments(self, method: str) -> dict[str, Any]:
        options = self.options
        return METHODS[method] | {"beta": options.beta, "learning_rate": options.learning_rate, "seed": self.seed}

    def evaluate(self, model) -> dict:
        """Of each held-out row: its user, whether the right film came first, and log-probabilities."""
        from trl_dmpo import Scorer
        from trl_dmpo.ranking.evaluate import score_rows
        from trl_dmpo.ranking.metrics import pad_candidates, ranking_metrics

        scorer = Scorer(model, self.tokenizer)
        scores, chosen = pad_candidates(score_rows(scorer, self.test), self.test.labels)
        trained_on = training_rows(self.rows, 1, self.seed)
        learnt = scorer.score(trained_on["prompt"][:], trained_on["chosen"][:])
        return {
            "user": self.test.columns["user_id"],
            "hit_rate@1": ranking_metrics(scores, chosen, [1])["hit_rate@1"].tolist(),
            "chosen": scores[chosen].tolist(),
            "others": scores[~chosen].reshape(len(scores), -1).mean(1).tolist(),
            "trained_on": float(np.mean([each.mean() for each in learnt])),
        }


def load_log(options: argparse.Namespace):
    from trl_dmpo.data import load_interactions

    if not options.tiny:
        return load_interactions(options.log)
    import polars as pl

    from trl_dmpo.data.log import make_log

    generator = np.random.default_rng(0)
    taken = [(user, film, time) for user in range(40) for time, film in enumerate(generator.permutation(40)[:12])]
    films = pl.DataFrame({"item_id": range(40), "title": [f"Film {number}" for number in range(40)]})
    taken = pl.DataFrame(taken, schema=["user_id", "item_id", "timestamp"], orient="row")
    return make_log(taken, films, source="made up", domain="film")


def make_tokenizer(titles: list[str]):
    """A line break ends a title, in prompts as in completions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["\n", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(titles, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n", pad_token="<pad>")


def train_base(rows, validation, tokenizer, folder: Path, seed: int) -> None:
    """A model of the training users' histories, as it is where it predicts those of the validation users best."""
    import torch
    from transformers import (
        DataCollatorForLanguageModeling,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainingArguments,
    )

    def histories(rows):
        def tokenized(row):
            return tokenizer(f"{row['prompt']}{row['chosen']}\n")

        return rows.map(tokenized, remove_columns=rows.column_names)

    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=1)
    args = TrainingArguments(
        str(folder / "checkpoints"),
        **BASE,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=0.1,
        save_steps=0.1,
        save_total_limit=1,
        load_best_model_at_end=True,
        **quiet(seed),
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        args,
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        histories(rows),
        histories(validation),
    )
    run(trainer)
    trainer.save_model(str(folder))


def training_rows(rows, k: int, seed: int):
    """The same prompts and chosen films for every K, and of the rejected ones the first K."""
    from datasets import Dataset

    users = rows["user_id"][:]
    # The rows of a user are in the order of time
    starts = [row for row in range(len(rows) - CHOSEN + 1) if users[row] == users[row + CHOSEN - 1]]
    if len(starts) < ROWS:
        raise ValueError(
            f"The log has {len(starts)} training rows with {CHOSEN} films to choose, {ROWS} are needed: take a larger one."
        )
    drawn = np.random.default_rng(seed).choice(starts, ROWS, replace=False).tolist()
    return Dataset.from_list(
        [
            {
                "prompt": rows[row]["prompt"],
                "chosen": rows[row : row + CHOSEN]["chosen"],
                "rejected": rows[row]["rejected"][:k],
            }
            for row in drawn
        ]
    )


def train(model, tokenizer, rows, arguments: dict[str, Any]) -> None:
    from trl_dmpo import DMPOConfig, DMPOTrainer

    arguments |= {"per_device_train_batch_size": 4, "num_train_epochs": 1, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        args = DMPOConfig(folder, **arguments | quiet(arguments["seed"]))
        run(DMPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer))


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def sweep(options: argparse.Namespace) -> dict[tuple[int, str, int], dict]:
    """All runs, those that are missing made now, by seed, method and K."""
    from rich.progress import track

    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "runs.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = {run["key"]: run for run in map(json.loads, lines)}
    cases = [("start", 1), ("sft", 1)] + [(name, k) for k in options.ks for name in options.methods if name != "sft"]
    found = {}
    for seed in options.seeds:
        bench = Bench(options, seed)
        for method, k in track(cases, f"Seed {seed}"):
            key = hash_of(
                [bench.folder.name, DATA, ROWS, CHOSEN, k, bench.arguments(method) if method != "start" else None]
            )
            if key not in done:
                done[key] = {"key": key, "seed": seed, "method": method, "k": k, **bench.run(method, k)}
                with file.open("a", encoding="utf-8") as runs:
                    runs.write(json.dumps(done[key]) + "\n")
            found[seed, method, k] = done[key]
    return found


def summarise(runs: dict[tuple[int, str, int], dict], seeds: list[int]) -> list[dict]:
    """The figures of each method and K over the rows of all seeds, with intervals over users."""
    from trl_dmpo.ranking.intervals import bootstrap_means, paired_tests

    def rows_of(method: str, k: int) -> dict[str, np.ndarray]:
        of_seeds = [runs[seed, method, k] for seed in seeds]
        return {name: np.concatenate([run[name] for run in of_seeds]) for name in ("hit_rate@1", "chosen", "others")}

    users = np.concatenate([runs[seed, "start", 1]["user"] for seed in seeds])
    start, sft = rows_of("start", 1), rows_of("sft", 1)
    results = []
    for method, k in dict.fromkeys((method, k) for _, method, k in runs):
        rows = rows_of(method, k)
        hits = {"hit_rate@1": rows["hit_rate@1"]}
        changes = {f"{name}_change": rows[name] - start[name] for name in ("chosen", "others")}
        against = {
            name: paired_tests(hits, {"hit_rate@1": other["hit_rate@1"]}, users)["hit_rate@1"]
            for name, other in (("start", start), ("sft", sft))
        }
        means = bootstrap_means(hits | changes, users)
        results.append(
            {
                "method": method,
                "k": k,
                **{name: estimate._asdict() for name, estimate in means.items()},
                **{f"to_{name}": test.difference._asdict() | {"p": test.p_value} for name, test in against.items()},
                "seeds": [of_seed(runs[seed, method, k], runs[seed, "start", 1]) for seed in seeds],
            }
        )
    return results


def of_seed(run: dict, start: dict) -> dict:
    return {
        "seed": run["seed"],
        "hit_rate@1": float(np.mean(run["hit_rate@1"])),
        "chosen_change": float(np.mean(run["chosen"]) - np.mean(start["chosen"])),
        "trained_on_change": run["trained_on"] - start["trained_on"],
    }


def tables(results: list[dict]) -> str:
    """In Markdown: a line for each method, a column for each K."""
    ks = sorted({result["k"] for result in results})
    by = {(result["method"], result["k"]): result for result in results}
    # The last is what a figure is compared with, which is itself no line of the table
    figures = [
        ("hit rate@1", "hit_rate@1", "{value:.3f} ({low:.3f} to {high:.3f})", None),
        ("hit rate@1 less that of `sft`", "to_sft", "{value:+.3f} ({low:+.3f} to {high:+.3f})", "sft"),
        (
            "log-probability of the right film, change",
            "chosen_change",
            "{value:+.2f} ({low:+.2f} to {high:+.2f})",
            "start",
        ),
        ("that of the others, change", "others_change", "{value:+.2f} ({low:+.2f} to {high:+.2f})", "start"),
    ]
    lines = []
    for title, name, form, compared_with in figures:
        lines += ["", f"| {title} | " + " | ".join(f"K = {k}" for k in ks) + " |", "|---|" + "--:|" * len(ks)]
        for method in dict.fromkeys(method for method, _ in by):
            if method != compared_with:
                cells = [form.format(**by[method, k][name]) if (method, k) in by else "" for k in ks]
                lines.append(f"| {method}{', without K' * (method in ('start', 'sft'))} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def plot(results: list[dict], file: Path) -> None:
    """Both figures against K: a line through the means, and a bar from the lowest seed to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    titles = {
        "hit_rate@1": f"Hit rate@1 among {CANDIDATES + 1} films, held-out users",
        "chosen_change": "Change of the right film's log-probability (nats)",
    }
    by_method: dict[str, list[dict]] = {}
    for result in results:
        by_method.setdefault(result["method"], []).append(result)
    lines = {name: by_method.pop(name) for name in ("start", "sft")}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for (method, (result,)), style in zip(lines.items(), (":", "--"), strict=True):
            panel.axhline(result[name]["value"], color="black", linestyle=style, label=method)
        for place, (method, of_method) in enumerate(by_method.items()):
            values = np.array([result[name]["value"] for result in of_method])
            seeds = np.array([[seed[name] for seed in result["seeds"]] for result in of_method])
            spread = np.maximum([values - seeds.min(1), seeds.max(1) - values], 0)  # rounding may put it below
            # Beside one another, so that bars do not hide each other
            ks = np.array([result["k"] for result in of_method]) + 0.15 * (place - len(by_method) / 2)
            panel.errorbar(ks, values, spread, color=COLOURS[place], marker="osD^v"[place], capsize=2, label=method)
        panel.set(title=title, xlabel="K, rejected films of a row", xticks=sorted({each["k"] for each in results}))
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(file, dpi=130)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--log", type=Path, default=ASSETS / "ml-100k", help="the log, in a form that is read")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 3, 5, 10, 15, 19], help="numbers of rejected films")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--work", type=Path, default=Path("build/many_negatives"), help="folder for what is done")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--plot", type=Path, help="file for the plot, as PNG")
    parser.add_argument(
        "--tiny", action="store_true", help="made-up data and a thin model, to see that the script runs"
    )
    options = parser.parse_args(arguments)
    if not all(1 <= k <= DATA["num_negatives"] for k in options.ks):
        parser.error(
            f"--ks: {options.ks}, but a row has {DATA['num_negatives']} rejected films. Give numbers from 1 to that."
        )
    return options


def main(options: argparse.Namespace) -> None:
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if options.tiny:
        globals().update(TINY)
    results = summarise(sweep(options), options.seeds)
    settings = {name: getattr(options, name) for name in ("beta", "learning_rate", "seeds")}
    settings |= {"data": DATA, "shape": SHAPE, "base": BASE, "rows": ROWS, "chosen": CHOSEN}
    if options.output is not None:
        found = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 5))
        options.output.write_text(json.dumps({"settings": settings, "results": found}, indent=1) + "\n")
    if options.plot is not None:
        plot(results, options.plot)
    print(tables(results))


if __name__ == "__main__":
    main(parse())
