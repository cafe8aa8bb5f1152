"""
Cost of ranking films for a user: `Scorer` and `Recommender` against a forward per candidate and against `generate`.

```bash
python benchmarks/scoring.py --titles titles.txt                                # CPU, float32, a quarter of an hour on two cores
python benchmarks/scoring.py --titles titles.txt --device cuda --dtype bfloat16
```

Every measurement is a process of its own, which makes its peak memory its own. It loads the model, does the work once on
another user, and then measures. The variants take turns, and a time is the median over all rounds. The floor is the bare
model on the same unique tokens: the prompt, and what the candidates do not have in common. It projects all of them on the
vocabulary, which the scorer does for those of the candidates only.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


# Candidates that a forward each is measured on; more of them cost as much each
MOST_FORWARDS = 50
NEW_TOKENS = 20
NAMES = {
    "floor": "floor",
    "scorer": "Scorer",
    "forwards": "a forward per candidate",
    "exact": "Recommender, exact",
    "beam": "Recommender, beam search",
    "generate": f"generate, {NEW_TOKENS} new tokens",
}


class Bench:
    """The model, the films and two users: one to warm up on, one to measure."""

    def __init__(self, options: argparse.Namespace):
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from trl_dmpo import Recommender

        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        titles = options.titles.read_text(encoding="utf-8").splitlines()
        self.recommender = Recommender(model.to(options.device), tokenizer, titles, "next_item(domain='film')")
        self.model, self.tokenizer, self.device = self.recommender.scorer.model, tokenizer, options.device
        generator = np.random.default_rng(0)
        shuffled = [titles[place] for place in generator.permutation(len(titles))]
        self.histories = [self._history(shuffled, options.prompt), self._history(shuffled[::-1], options.prompt)]
        answers = [self.recommender.answers[place] for place in generator.permutation(len(titles))]
        self.answers = answers[: options.candidates]

    def _history(self, titles: list[str], tokens: int) -> list[str]:
        """As many films as make a prompt of `tokens` tokens or a few more."""
        for count in range(1, len(titles)):
            if len(self._ids(self.recommender.prompts([titles[:count]])[0])) >= tokens:
                return titles[:count]
        raise ValueError(f"`--titles`: {len(titles)} titles do not make a prompt of {tokens} tokens. Give more.")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def prompt(self, user: int) -> str:
        return self.recommender.prompts([self.histories[user]])[0]

    def prompt_tokens(self) -> int:
        return len(self._ids(self.prompt(1)))

    def unique_tokens(self) -> int:
        from trl_dmpo.ranking.token_tree import token_trees
        from trl_dmpo.ranking.tokens import Completions

        row = Completions(self.answers, self.tokenizer).behind(self.prompt(1))
        return len(row.prompt) - 1 + len(token_trees(row.completions, sum(map(len, row.completions)) + 1)[0].ids)

    def floor(self, user: int) -> None:
        import torch

        from trl_dmpo.ranking.token_budget import TokenBudget

        left, most = self.unique_tokens(), TokenBudget(self.model).tokens
        with torch.no_grad():
            while left:
                ids = torch.randint(3, self.model.config.vocab_size, (1, min(left, most)), device=self.device)
                self.model(input_ids=ids, use_cache=False)
                left -= ids.size(1)

    def scorer(self, user: int) -> None:
        self.recommender.scorer.score([self.prompt(user)], self.answers)

    def forwards(self, user: int) -> None:
        import torch

        prompt = self.prompt(user)
        with torch.no_grad():
            for answer in self.answers[:MOST_FORWARDS]:
                ids = torch.tensor([self._ids(prompt + answer)], device=self.device)
                logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()

    def exact(self, user: int) -> None:
        self.recommender.recommend([self.histories[user]], k=10)

    def beam(self, user: int) -> None:
        self.recommender.recommend([self.histories[user]], k=10, method="beam")

    def generate(self, user: int) -> None:
        ids = self.tokenizer(self.prompt(user), return_tensors="pt").to(self.device)
        self.model.generate(**ids, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


def measure(options: argparse.Namespace) -> dict:
    """One measurement, in this process."""
    import torch

    bench = Bench(options)
    work: Callable[[int], None] = getattr(bench, options.variant)
    work(0)
    seconds = [timed(work, options.device) for _ in range(options.repeats)]
    if options.variant == "forwards":
        share = max(options.candidates / MOST_FORWARDS, 1)
        seconds = [second * share for second in seconds]
    on_gpu = options.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "prompt_tokens": bench.prompt_tokens(),
        "unique_tokens": bench.unique_tokens(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
    }


def timed(work: Callable[[int], None], device: str) -> float:
    start = now(device)
    work(1)
    return now(device) - start


def now(device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def run_child(variant: str, candidates: int, options: argparse.Namespace) -> dict:
    quick = variant == "generate" or (candidates <= MOST_FORWARDS and variant != "forwards")
    command = [sys.executable, __file__, "--variant", variant, "--candidates", str(candidates)]
    command += ["--repeats", str(options.repeats if quick else 1)]
    for name in ("model", "titles", "prompt", "device", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"{variant} of {candidates} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    films = len(options.titles.read_text(encoding="utf-8").splitlines())
    variants = [(name, count) for count in options.counts for name in ("floor", "scorer", "forwards")]
    variants += [("floor", films), ("exact", films), ("beam", films), ("generate", films)]
    runs: dict[tuple[str, int], list[dict]] = {variant: [] for variant in variants}
    for index in track(range(options.rounds * len(variants)), "Measuring"):
        variant = variants[index % len(variants)]
        runs[variant].append(run_child(*variant, options))

    results = [
        {
            "variant": name,
            "candidates": count,
            "seconds": statistics.median(second for run in found for second in run["seconds"]),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in found),
            "unique_tokens": found[0]["unique_tokens"],
            "all_seconds": [second for run in found for second in run["seconds"]],
        }
        for (name, count), found in runs.items()
    ]
    first = runs[variants[0]][0]
    settings = {name: getattr(options, name) for name in ("dtype", "rounds", "repeats")}
    settings |= {
        "model": Path(options.model).name,
        "films": films,
        **{name: first[name] for name in ("device", "prompt_tokens")},
    }
    if options.output is not None:
        options.output.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    Console(width=110).print(table(results, settings))


def table(results: list[dict], settings: dict):
    from rich.table import Table

    out = Table(
        title=f"{settings['model']}, a prompt of {settings['prompt_tokens']} tokens, {settings['dtype']}, "
        f"{settings['device']}"
    )
    for column in ("", "films", "seconds", "to the floor", "forwards to this", "unique tokens", "peak GB"):
        out.add_column(column, justify="right" if column else "left")
    by = {(result["variant"], result["candidates"]): result for result in results}
    for (variant, count), result in by.items():
        floor, forwards = by["floor", count]["seconds"], by.get(("forwards", count))
        out.add_row(
            NAMES[variant],
            str(count),
            f"{result['seconds']:.3f}",
            f"{result['seconds'] / floor:.2f}" if variant != "generate" else "",
            f"{forwards['seconds'] / result['seconds']:.1f}" if forwards else "",
            str(result["unique_tokens"]) if variant != "generate" else "",
            f"{result['peak_bytes'] / 1e9:.2f}",
        )
    return out


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--titles", type=Path, required=True, help="the catalogue: text, a film a line")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 1000], help="numbers of candidates")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of the prompt, or a few more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of a process, of what is quick")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--variant", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--candidates", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    if options.variant is None:
        compare(options)
    else:
        print(json.dumps(measure(options)))
