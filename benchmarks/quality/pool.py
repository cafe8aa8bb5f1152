"""All stages of experiments, made by several processes."""

import logging
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .experiment import Experiment


if TYPE_CHECKING:
    from .training import Runner

# What to do, of what, and with which seed or settings
Job = tuple[str, str, Any]


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
    """Make all stages that are missing, each as soon as those that it needs are there."""
    from trl_dmpo.cli.progress import progress_bar
    from trl_dmpo.cli.screen import Screen

    from .training import Runner

    waiting, done, running = plan(Runner(experiment, folder, data)), set(), {}
    with progress_bar(experiment.name, len(waiting), Screen()) as advance:
        try:
            while waiting or running:
                for job in [job for job, needed in waiting.items() if needed <= done]:
                    del waiting[job]
                    running[pool.submit(work, experiment, job)] = job
                for finished in wait(running, return_when=FIRST_COMPLETED).done:
                    finished.result()
                    done.add(running.pop(finished))
                    advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def plan(runner: "Runner") -> dict[Job, set[Job]]:
    """
    The jobs of an experiment, and those that each needs: no two that run at once make the same stage.

    Args:
        runner ([`~benchmarks.quality.training.Runner`]):
            Of the experiment.

    Returns:
        `dict[Job, set[Job]]`: starts first, then what settings are chosen by, then the rest, seed by seed.
    """
    experiment, jobs = runner.experiment, {}
    arms = experiment.expand()
    starts, trials = product(dict.fromkeys(arm.start for arm in arms), experiment.seeds), {}
    jobs |= {("start", name, seed): set() for name, seed in starts}
    tuned_with = ("start", *runner.tuned_with())
    for arm in arms:
        method = experiment.methods.get(arm.method, {}).get("like", arm.method)
        if method and method not in trials:
            trials[method] = [("trial", method, tuple(trial.items())) for trial in runner.trials(method) if trial]
            jobs |= {tuned_with: set()} | {job: {tuned_with} for job in trials[method]}
    for seed in experiment.seeds:
        for arm in arms:
            method = experiment.methods.get(arm.method, {}).get("like", arm.method)
            jobs["run", arm.name, seed] = {("start", arm.start, seed), *trials.get(method, ())}
        jobs |= {("baseline", name, seed): set() for name in experiment.baselines}
        jobs |= {("explain", arm.name, seed): {("run", arm.name, seed)} for arm in experiment.explained()}
    return jobs


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


def work(experiment: Experiment, job: Job) -> None:
    """Make what is missing of a job's stages."""
    if experiment.name not in _runners:
        _runners[experiment.name] = _make_runner(experiment)
    runner = _runners[experiment.name]
    kind, name, value = job
    arms = {arm.name: arm for arm in experiment.expand()}
    if kind == "start":
        runner.start(name, value)
    elif kind == "trial":
        runner.value_of(name, dict(value))
    elif kind == "run":
        runner.run(arms[name], value)
    elif kind == "baseline":
        runner.baseline(name, value)
    else:
        runner.explain(arms[name], value)
