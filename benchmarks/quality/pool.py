"""All stages of experiments, made by several processes."""

import logging
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .experiment import Experiment


@contextmanager
def make_pool(folder: Path, data: tuple[Path, ...], processes: int) -> Iterator[ProcessPoolExecutor]:
    """
    Processes that make stages.

    Args:
        folder (`Path`):
            Where stages are kept.
        data (`tuple[Path, ...]`):
            Where data is looked for.
        processes (`int`):
            How many. Each has its share of the cores.
    """
    workers = {
        "max_workers": processes,
        # Threads of torch do not survive a fork
        "mp_context": multiprocessing.get_context("spawn"),
        "initializer": begin,
        "initargs": (folder, data, max((os.cpu_count() or 1) // processes, 1)),
    }
    with ProcessPoolExecutor(**workers) as pool:
        yield pool


def run_all(pool: ProcessPoolExecutor, experiment: Experiment, folder: Path, data: tuple[Path, ...]) -> None:
    """Make all stages that are missing: starts, then what settings are chosen by, then the rest."""
    from .training import Runner

    runner = Runner(experiment, folder, data)
    arms = experiment.expand()
    starts = [("start", arm.start, seed) for arm in arms for seed in experiment.seeds]
    tuned = dict.fromkeys(experiment.methods[arm.method].get("like", arm.method) for arm in arms if arm.method)
    trials = [("trial", method, trial) for method in tuned for trial in runner.trials(method)]
    runs = [("run", arm.name, seed) for seed in experiment.seeds for arm in arms]
    runs += [("baseline", name, seed) for seed in experiment.seeds for name in experiment.baselines]
    runs += [("explain", arm.name, seed) for seed in experiment.seeds for arm in experiment.explained()]
    for title, jobs in (("starts", starts), ("choosing", [job for job in trials if job[2]]), ("runs", runs)):
        run_jobs(pool, experiment, title, list({repr(job): job for job in jobs}.values()))


def run_jobs(pool: ProcessPoolExecutor, experiment: Experiment, title: str, jobs: list[tuple]) -> None:
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
        shown = progress.add_task(f"{experiment.name}: {title}", total=len(jobs))
        running = [pool.submit(work, experiment, job) for job in jobs]
        try:
            for done in as_completed(running):
                done.result()
                progress.advance(shown)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_make_runner: Callable[[Experiment], Any]
_runners: dict[str, Any] = {}


def begin(folder: Path, data: tuple[Path, ...], threads: int) -> None:
    """What a process does first."""
    global _make_runner
    threading.Thread(target=_end_with_parent, daemon=True).start()
    be_quiet()
    import torch

    from .training import Runner

    torch.set_num_threads(threads)
    _make_runner = partial(Runner, work=folder, folders=data)


def _end_with_parent() -> None:
    # Or a killed run goes on to the end of its stages, beside the next one
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def be_quiet() -> None:
    """Nothing but the bars of this module on the screen."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def work(experiment: Experiment, job: tuple) -> None:
    """Make what is missing of a job's stages."""
    if experiment.name not in _runners:
        _runners[experiment.name] = _make_runner(experiment)
    runner = _runners[experiment.name]
    kind, name, value = job
    arms = {arm.name: arm for arm in experiment.expand()}
    if kind == "start":
        runner.start(name, value)
    elif kind == "trial":
        runner.value_of(name, value)
    elif kind == "run":
        runner.run(arms[name], value)
    elif kind == "baseline":
        runner.baseline(name, value)
    else:
        runner.explain(arms[name], value)
