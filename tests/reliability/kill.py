"""
Kills trainings and resumes them, and compares what comes of it with the same training that nobody killed.

    python tests/reliability/kill.py --rounds 20 --output kill.json

Each round starts a training, kills it (`random`: all processes, or one first, at a random moment; `saving`: in the middle of
writing a file of a checkpoint; `sigterm`: SIGTERM at a random moment; `worker`: a worker of the data loader, where there is
one, upon which the training fails), starts it again until it ends, and compares weights,
optimizer, schedule, random state, the rows and negatives of every batch, and the log, all bit by bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerState


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.reliability.training import CASES, Job, differences, read_batches, save_model, train
from trl_dmpo.trainer.checkpoints import find_fault


HOWS = ("random", "saving", "sigterm", "worker")
_HANGS = 600  # after so many seconds
# By a process of a checkpoint: `training_args.bin`, optimizer, schedule, random state, `trainer_state.json`
_WRITES = 5


def die_in_save(count: int) -> None:
    """Make this process kill itself when it has written half of the so manieth file."""
    save, save_state, calls = torch.save, TrainerState.save_to_json, iter(range(1, count + 1))

    def half(path: str) -> None:
        if next(calls, count) == count:
            os.truncate(path, os.path.getsize(path) // 2)
            os.killpg(0, signal.SIGKILL)

    def save_and_die(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        half(path)

    def save_state_and_die(self, path):
        save_state(self, path)
        half(path)

    torch.save, TrainerState.save_to_json = save_and_die, save_state_and_die


def wait_for_batch(job: Job, folder: Path, count: int) -> None:
    """Wait until the first process has come to its so manieth batch."""
    path = folder / f"batches-0-{job.attempt}.jsonl"
    while job.wait(0.002) is None and not job.codes:
        if path.exists() and path.read_text().count("\n") >= count:
            return


def kill(job: Job, how: str, folder: Path, batches: int, generator: random.Random) -> list[int] | None:
    """Kill a training, unless it ends before; the exit codes."""
    if how == "saving":
        while (codes := job.wait(0.01)) is None and not job.codes:
            pass
    else:
        # By batches, for the speed of a machine varies, and then somewhere between two of them
        if generator.random() < 0.9:
            wait_for_batch(job, folder, generator.randrange(batches))
        codes = job.wait(generator.uniform(0, 0.5))
    if codes is not None and not any(codes):
        return codes
    if how == "sigterm":
        job.send(signal.SIGTERM, with_workers=generator.random() < 0.5)
        return job.wait(_HANGS)
    if how == "worker":
        rank = generator.randrange(len(job.pids))
        kill_worker(job, rank)
        wait_for_end(job, rank)
    if len(job.pids) > 1 and generator.random() < 0.5:
        job.send(signal.SIGKILL, generator.randrange(len(job.pids)))
        time.sleep(generator.uniform(0, 0.5))
    job.send(signal.SIGKILL)
    return job.wait(_HANGS)


def kill_worker(job: Job, rank: int) -> None:
    """Kill what a process has forked, as soon as it has."""
    while job.wait(0.002) is None and not job.codes:
        for child in psutil.Process(job.pids[rank]).children():
            child.kill()
            return


def wait_for_end(job: Job, rank: int) -> None:
    end = time.monotonic() + _HANGS
    while job.wait(0.01) is None and job.pids[rank] not in job.codes and time.monotonic() < end:
        pass


def play(case: str, how: str, processes: int, model: str, reference: Path, folder: Path, seed: int):
    """One round: what happened, and what was lost."""
    generator = random.Random(seed)
    work, log = partial(train, CASES[case], model, folder), folder.with_suffix(".log")
    kills, half_written, codes = 0, 0, None
    batches = sum(map(len, read_batches(reference)[0, 0].values()))
    planned = 2 if generator.random() < 0.3 else 1
    while True:
        target = work if kills == planned else partial(_start, work, how, generator.randrange(2**31))
        job = Job(processes, target, log, kills)
        if kills == planned:
            codes = job.wait(_HANGS)
            job.send(signal.SIGKILL)
            break
        codes = kill(job, how, folder, batches, generator)
        if codes is not None and not any(codes):
            if kills or differences(folder, reference):
                break
            shutil.rmtree(folder)  # it was killed too late: the round begins again
            continue
        kills += 1
        half_written += any(find_fault(path) is not None for path in folder.glob("checkpoint-*"))
    lost = differences(folder, reference) if codes == [0] * processes else [f"exit codes {codes}"]
    return {
        "case": case,
        "how": how,
        "processes": processes,
        "seed": seed,
        "kills": kills,
        "half_written": half_written,
        "attempts": len({attempt for _, attempt in read_batches(folder)}),
        "lost": lost,
    }


def _start(work: Any, how: str, seed: int) -> None:
    if how == "saving":
        die_in_save(random.Random(seed + int(os.environ.get("RANK", 0))).randint(1, 3 * _WRITES))
    work()


def measure(cases: list[str], hows: list[str], counts: list[int], rounds: int, seed: int, folder: Path) -> list[dict]:
    model = save_model(folder / "model")
    found = []
    for case in cases:
        for processes in counts:
            reference = folder / f"{case}-{processes}"
            job = Job(processes, partial(train, CASES[case], model, reference), reference.with_suffix(".log"))
            codes = job.wait(_HANGS)
            if codes != [0] * processes:
                raise RuntimeError(
                    f"{case} with {processes} processes failed unkilled:\n{job.log.read_text()[-3000:]}"
                )
            for how in hows:
                if how == "worker" and not CASES[case].options.get("dataloader_num_workers"):
                    continue
                for number in range(rounds):
                    place = folder / f"{case}-{processes}-{how}-{number}"
                    found.append(play(case, how, processes, model, reference, place, seed + number))
                    print(json.dumps(found[-1]), flush=True)
                    if not found[-1]["lost"]:
                        shutil.rmtree(place)
    return found


def tabulate(rounds: list[dict]) -> str:
    lines = [
        "| training | processes | killed | rounds | kills | saving cut short | lost something |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for each in rounds:
        groups.setdefault((each["case"], each["processes"], each["how"]), []).append(each)
    for group, members in groups.items():
        sums = (sum(member[name] for member in members) for name in ("kills", "half_written"))
        cells = [*group, len(members), *sums, sum(bool(member["lost"]) for member in members)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--how", nargs="+", choices=HOWS, default=list(HOWS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where to work, and to leave the trainings that lost something.")
    parser.add_argument("--output", type=Path, help="JSON file for all rounds.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rounds = measure(args.cases, args.how, args.processes, args.rounds, args.seed, folder)
    print(tabulate(rounds))
    if args.output is not None:
        args.output.write_text(json.dumps(rounds, indent=2) + "\n")
    return int(any(each["lost"] for each in rounds))


if __name__ == "__main__":
    sys.exit(main())
