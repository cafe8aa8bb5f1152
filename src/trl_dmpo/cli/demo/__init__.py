"""`trl-dmpo demo`: a recommender in minutes, from made-up data and random weights to a table of what DMPO changes."""

import argparse
import json
import os
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from .catalogue import Rows
    from .report import Estimate

# Fewest and most: below, there is too little to learn from; above, it takes long
BOUNDS = {"users": (100, 20_000), "items": (100, 400), "num_negatives": (1, 49), "seed": (0, 2**32 - 1)}
MAX_HELD_OUT_USERS = 400  # and no more than there are to train on


def make_parser() -> argparse.ArgumentParser:
    """The parser of the sub-command."""
    parser = argparse.ArgumentParser(
        prog="trl-dmpo demo",
        description="Make up a catalogue and users, train a tiny recommender with SFT, then with DMPO, and compare.",
    )
    parser.add_argument("--users", type=int, default=1500, help="users to train on (default: %(default)s)")
    parser.add_argument("--items", type=int, default=150, help="titles in the catalogue (default: %(default)s)")
    parser.add_argument(
        "--num_negatives", type=int, default=8, help="titles passed over, for each choice (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, help="where to keep models and results.json (default: nowhere)")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, within their bounds."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must be from {low} to {high}, got {getattr(args, name)}")
    if args.output_dir is not None and args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir must be a folder, and {args.output_dir} is a file")
    return args


def run(argv: list[str]) -> int:
    """Run the sub-command; returns the exit code."""
    args = parse(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trl-dmpo-") as temporary:
        demonstrate(args, args.output_dir or Path(temporary))
    kept = f" Models and results are in {args.output_dir}." if args.output_dir else ""
    print(f"Done in {time.monotonic() - start:.0f} s.{kept} For data of your own: trl-dmpo train --help")
    return 0


def set_up_libraries() -> None:
    """Import the libraries that take long, and have them speak only of errors."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports: nothing here needs the Hub
    import datasets
    import torch
    import transformers

    # Deprecations among the libraries, and the bars of steps that take no time
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # A model this small gains nothing from more threads, and with one the numbers do not depend on how many there are
    torch.set_num_threads(1)
    import_module("trl_dmpo.trainer.dmpo_trainer")


def demonstrate(args: argparse.Namespace, folder: Path) -> None:
    """Make the data, train, and show and write what came out."""
    from rich.console import Console

    from .catalogue import SLATE_SIZE, make_rows

    console = Console()
    with console.status("Loading libraries"):
        set_up_libraries()
    from .report import recommendations_table, results_table, summarize

    held_out_users = min(MAX_HELD_OUT_USERS, args.users)
    with console.status("Making up users"):
        rows = make_rows(args.users, held_out_users, args.items, args.num_negatives, args.seed)
    console.print(
        f"{args.items} made-up titles; {args.users} users to train on, each shown {SLATE_SIZE} titles at a time to "
        f"pick one. SFT learns from what they picked, DMPO also from {args.num_negatives} of the titles passed over."
    )
    logps = _train_and_score(rows, folder, args.seed, console)
    results = summarize(logps, args.seed)
    console.print(results_table(results, held_out_users, SLATE_SIZE))
    console.print(recommendations_table(rows.held_out[:3], logps["DMPO"][:3]))
    options = {name: getattr(args, name) for name in BOUNDS} | {"held_out_users": held_out_users}
    _write_results(folder / "results.json", options, results)


def _train_and_score(rows: "Rows", folder: Path, seed: int, console: "Console") -> dict[str, "np.ndarray"]:
    """Log-probabilities of the held-out candidates by model."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .training import make_dmpo_trainer, random_scores, score, train_sft

    columns = TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        train_sft(rows.sft, folder / "sft", seed, progress)
        trainer = make_dmpo_trainer(folder / "sft", rows, folder / "dmpo", seed, progress)
        logps = {"random": random_scores(rows.held_out, seed), "SFT": score(trainer)}
        trainer.train()
        logps["DMPO"] = score(trainer)
        trainer.save_model()
    return logps


def _write_results(path: Path, options: dict[str, int], results: dict[str, dict[str, "Estimate"]]) -> None:
    estimates = {
        model: {metric: estimate._asdict() for metric, estimate in columns.items()}
        for model, columns in results.items()
    }
    path.write_text(json.dumps({"options": options, "results": estimates}, indent=2) + "\n")
