"""All stages of an experiment, made by several processes."""

import logging
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .experiment import Experiment


def run_all(experiment: Experiment, folder: Path, data: tuple[Path, ...], processes: int) -> None:
    """Make all stages that are missing: starts, then what settings are chosen by, then the rest."""
    from .training import Runner

    runner = Runner(experiment, folder, data)
    arms = experiment.expand()
    starts = [("start", arm.start, seed) for arm in arms for seed in experiment.seeds]
    tuned = dict.fromkeys(experiment.methods[arm.method].get("like", arm.method) for arm in arms if arm.method)
    trials = [("trial", method, trial) for method in tuned for trial in runner.trials(method)]
    runs = [("run", arm.name, seed) for seed in experiment.seeds for arm in arms]
    runs += [("baseline", name, seed) for seed in experiment.seeds for name in experiment.baselines]
    runs += [("explain", arm.name, seed) for seed in experiment.seeds for arm in arms if experiment.explain]
    workers = {
        "max_workers": processes,
        # Threads of torch do not survive a fork
        "mp_context": multiprocessing.get_context("spawn"),
        "initializer": begin,
        "initargs": (experiment, folder, data, max((os.cpu_count() or 1) // processes, 1)),
    }
    with ProcessPoolExecutor(**workers) as pool:
        for title, jobs in (("starts", starts), ("choosing", [job for job in trials if job[2]]), ("runs", runs)):
            run_jobs(pool, f"{experiment.name}: {title}", list({repr(job): job for job in jobs}.values()))


def run_jobs(pool: ProcessPoolExecutor, title: str, jobs: list[tuple]) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        shown = progress.add_task(title, total=len(jobs))
        running = [pool.submit(work, job) for job in jobs]
        try:
            for done in as_completed(running):
                done.result()
                progress.advance(shown)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_runner: Any = None


def begin(experiment: Experiment, folder: Path, data: tuple[Path, ...], threads: int) -> None:
    """What a process does first."""
    global _runner
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    import datasets
    import torch
    import transformers

    from .training import Runner

    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    _runner = Runner(experiment, folder, data)


def work(job: tuple) -> None:
    """Make what is missing of a job's stages."""
    kind, name, value = job
    arms = {arm.name: arm for arm in _runner.experiment.expand()}
    if kind == "start":
        _runner.start(name, value)
    elif kind == "trial":
        _runner.value_of(name, value)
    elif kind == "run":
        _runner.run(arms[name], value)
    elif kind == "baseline":
        _runner.baseline(name, value)
    else:
        _runner.explain(arms[name], value)
