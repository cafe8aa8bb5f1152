"""
What it costs to prepare data: `trl-dmpo prepare` on a made-up log of 20 million interactions, from CSV to parquet, and the
same rows the plain pandas way on a tenth of it.

```bash
python benchmarks/prepare.py --output benchmarks/prepare.json
```

The log has 138,000 users, whose numbers of interactions are log-normal, and 27,000 items of Zipf popularity, in the order
of time. The command makes three leave-one-out rows per user, for training, validation and test, with K = 15 negatives by
popularity that the user never liked and up to 20 titles in the prompt, and writes them as `preference`, `sft` and `ranking`,
the last with 99 more negatives. "training rows" is one row per user: what the pandas way makes.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


USERS, ITEMS = 138_000, 27_000
TITLES = (
    ("Silent", "Last", "Red", "Lost", "Golden", "Second", "Hidden", "Broken"),
    ("River", "Night", "Garden", "Signal"),
)


def make_log(folder: Path, interactions: str, seed: int = 0) -> None:
    """`ratings.csv` and `items.csv`; users, items and interactions in the proportions of MovieLens-20M."""
    count = int(interactions)
    folder.mkdir()
    import polars as pl

    users = max(100, USERS * count // 20_000_000)
    rng = np.random.default_rng(seed)
    activity = rng.lognormal(0.0, 1.0, users)
    weights = 1 / np.arange(1, ITEMS + 1)
    rng.shuffle(weights)
    pairs = np.empty(0, np.int64)
    while len(pairs) < count:
        more = int((count - len(pairs)) * 1.5) + 1000
        user = np.searchsorted(np.cumsum(activity) / activity.sum(), rng.random(more))
        item = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(more))
        pairs = np.unique(np.concatenate([pairs, user * ITEMS + item]))
    pairs = rng.permutation(pairs)[:count]
    frame = pl.DataFrame(
        {
            "user_id": (pairs // ITEMS + 1).astype(np.int32),
            "item_id": (pairs % ITEMS + 1).astype(np.int32),
            "rating": rng.choice(
                [1.0, 2.0, 3.0, 3.5, 4.0, 4.5, 5.0], len(pairs), p=[0.08, 0.1, 0.2, 0.1, 0.27, 0.1, 0.15]
            ),
            "timestamp": np.sort(rng.integers(8 * 10**8, 15 * 10**8, len(pairs))),
        }
    )
    frame.write_csv(folder / "ratings.csv")
    words = [f"{first} {second}" for first in TITLES[0] for second in TITLES[1]]
    titles = [f"{words[number % len(words)]} {number} ({1950 + number % 70})" for number in range(1, ITEMS + 1)]
    pl.DataFrame({"item_id": range(1, ITEMS + 1), "title": titles}).write_csv(folder / "items.csv")


def prepare_with_pandas(folder: Path, target: str, num_negatives: int = 15, max_history: int = 20) -> None:
    """Training rows as published repositories make them: a frame in memory, and a Python loop over users."""
    import pandas as pd

    rng = np.random.default_rng(0)
    titles = pd.read_csv(folder / "items.csv").set_index("item_id")["title"].to_dict()
    log = pd.read_csv(folder / "ratings.csv")
    log = log[log["rating"] > 3].sort_values(["user_id", "timestamp"])
    counts = log["item_id"].value_counts()
    items, weights = counts.index.to_numpy(), counts.to_numpy() / counts.sum()
    rows = []
    for user, group in log.groupby("user_id"):
        taken = group["item_id"].tolist()
        if len(taken) < 4:
            continue
        liked, history, chosen = set(taken), taken[:-3][-max_history:], taken[-3]
        rejected: list[int] = []
        while len(rejected) < num_negatives:
            drawn = rng.choice(items, size=4 * num_negatives, p=weights)
            rejected += [item for item in dict.fromkeys(drawn) if item not in liked and item not in rejected]
        rejected = rejected[:num_negatives]
        listed = "\n".join(f"- {titles[item]}" for item in history)
        rows.append(
            {
                "prompt": f"A user has chosen these items, oldest first:\n{listed}\n\nWhich item will the user choose next?",
                "chosen": f" {titles[chosen]}",
                "rejected": [f" {titles[item]}" for item in rejected],
                "user_id": user,
            }
        )
    pd.DataFrame(rows).to_parquet(target)


def prepare_training_rows(folder: Path, target: str) -> None:
    """One row per user, as `preference` and `sft`."""
    from trl_dmpo.data import BuildConfig, load_interactions
    from trl_dmpo.data.plan import make_plan
    from trl_dmpo.data.save import save_dataset

    plan = make_plan(load_interactions(folder), BuildConfig(), splits=("train",))
    save_dataset([plan], Path(target), options={})


def measure(command: list[str]) -> dict[str, float]:
    """Wall-clock seconds and peak memory of a process of its own, in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    seconds = time.perf_counter() - start
    shutil.rmtree(command[-1], ignore_errors=True)
    return {"seconds": seconds, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


# In a process of its own each, so that its time and memory are known
WAYS = {"log": make_log, "pandas": prepare_with_pandas, "rows": prepare_training_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    for way in WAYS:
        parser.add_argument(f"--{way}", nargs=2, metavar=("FOLDER", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for way, run in WAYS.items():
        if getattr(options, way):
            folder, target = getattr(options, way)
            return run(Path(folder), target)
    with tempfile.TemporaryDirectory() as name:
        whole, tenth = Path(name, "whole"), Path(name, "tenth")
        here = [sys.executable, __file__]
        for folder, size in ((whole, options.interactions), (tenth, options.interactions // 10)):
            subprocess.run([*here, "--log", str(folder), str(size)], check=True)
        prepare = [str(Path(sys.executable).with_name("trl-dmpo")), "prepare"]
        commands = {
            "trl-dmpo prepare, all splits": [*prepare, "--source", str(whole), "--output_dir"],
            "training rows": [*here, "--rows", str(whole)],
            "training rows of a tenth": [*here, "--rows", str(tenth)],
            "training rows of a tenth, pandas": [*here, "--pandas", str(tenth)],
        }
        runs: dict[str, list[dict[str, float]]] = {what: [] for what in commands}
        for number in range(options.rounds):
            for place, (what, command) in enumerate(commands.items()):
                runs[what].append(measure([*command, f"{name}/out-{number}-{place}"]))
                print(what, runs[what][-1], flush=True)
    medians = {
        what: {key: float(np.median([run[key] for run in each])) for key in each[0]} for what, each in runs.items()
    }
    for what, median in medians.items():
        print(f"{what:<34} {median['seconds']:8.1f} s {median['peak_gb']:6.2f} GB")
    if options.output:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {"interactions": options.interactions, "machine": machine, "medians": medians, "runs": runs}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
