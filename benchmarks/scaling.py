"""
How a training step scales: with K, the prompt's length, the model's size and the number of processes.

```bash
python benchmarks/scaling.py --output benchmarks/scaling.json --plot docs/images/scaling.png
python benchmarks/scaling.py --device cuda --dtype bfloat16 --output benchmarks/scaling_gpu.json --plot docs/images/scaling_gpu.png
```

The first takes 25 minutes on two cores: after `--minutes` it starts nothing more. What is measured is kept in `--output`, run
by run: called again, it goes on where it was.

Every measurement is a process of its own, which makes its peak memory its own, and trains a Llama with random weights
through `DMPOTrainer`, one row a step and process, optimizer included, without its first step. The variants take turns, and a
time is the median over all steps of all rounds. The floor is that of `step_cost.py`: the bare model over the same unique
tokens, without an optimizer. The fit is `seconds = a + b * tokens + c * pairs`, none of them below zero, where `tokens` are
those of the layout and `pairs` those of positions that its attention computes.
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
from types import SimpleNamespace

import numpy as np
import step_cost


COMPLETION = 9
LLAMA = {"max_position_embeddings": 8192, "tie_word_embeddings": True}
# Hidden size, that of the MLP, layers, heads, heads of keys and values, vocabulary
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "10M": (256, 768, 9, 4, 4, 8192),
    "35M": (512, 1408, 10, 8, 8, 8192),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "360M": (960, 2560, 32, 15, 5, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}
UNTIED = ("8B",)
# Of weights, gradients, optimizer and reference only the weights fit on one card
LORA = ("8B",)
# Dense, in bfloat16, by a part of the name of a device
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}
COLOURS = {"repeated": "#d55e00", "shared": "#0072b2", "shared, flex": "#009e73", "floor": "#000000"}
FIGURES = {"k": "K, rejected answers of a row", "prompt": "tokens of the prompt", "size": "parameters"}


def shape_of(size: str, attention: str) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    *numbers, vocabulary = SIZES[size]
    shape = {**LLAMA, **dict(zip(names, numbers, strict=True)), "vocab_size": vocabulary}
    return shape | {"tie_word_embeddings": size not in UNTIED, "attn_implementation": attention}


def points(options: argparse.Namespace) -> list[dict]:
    """What is measured, each once, though several figures may show it."""
    gpu = options.device == "cuda"
    base = {"size": "tiny" if options.tiny else "135M" if gpu else "10M", "k": 3, "prompt": 100, "processes": 1}
    base["threads"] = 0 if gpu else os.cpu_count() or 1
    series = [{"k": k} for k in options.ks] + [{"prompt": length} for length in options.prompts]
    sizes = ["tiny"] if options.tiny else options.sizes or (["135M", "1B", "8B"] if gpu else list(SIZES)[1:5])
    series += [{"size": size} | ({"k": 15, "prompt": 300} if gpu else {}) for size in sizes]
    kinds = [("repeated", "sdpa"), ("shared", "sdpa"), ("floor", "sdpa")]
    if gpu:
        kinds.insert(2, ("shared", "flex_attention"))
    found = [
        {**base, **changed, "variant": variant, "attention": attention}
        for changed in series
        for variant, attention in kinds
        if variant != "floor" or {**base, **changed}["size"] not in LORA
    ]
    if not gpu:
        alone = {**base, "prompt": options.prompts[1 % len(options.prompts)], "variant": "shared", "attention": "sdpa"}
        found += [
            {**alone, "processes": processes, "threads": threads} for processes, threads in [(1, 1), (1, 2), (2, 1)]
        ]
        found += [{**base, "variant": "forward", "attention": name} for name in ("sdpa", "flex_attention")]
    return [point for index, point in enumerate(found) if point not in found[:index]]


def tokens_and_pairs(point: dict) -> tuple[int, int]:
    """Tokens of a row in the layout, and pairs of positions for which its attention computes a score."""
    if point["variant"] == "repeated":
        width = point["prompt"] + COMPLETION
        return (point["k"] + 1) * width, (point["k"] + 1) * width**2
    tokens = point["prompt"] - 1 + (point["k"] + 1) * COMPLETION
    return tokens, tokens**2


def model_flops(point: dict) -> float:
    """Floating-point operations that a step needs: those of the unique tokens, whatever the layout computes beside them."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = SIZES[point["size"]]
    weights = layers * hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * mlp)
    prompt, answers = point["prompt"] - 1, point["k"] + 1
    scored = answers * COMPLETION
    tokens = prompt + scored
    pairs = prompt * (prompt + 1) / 2 + scored * prompt + answers * COMPLETION * (COMPLETION + 1) / 2
    forward = 2 * weights * tokens + 2 * hidden * vocabulary * scored + 4 * layers * hidden * pairs
    # Policy and reference, and backward to the activations and, of weights that are trained, to these
    return forward * (3 if point["size"] in LORA else 4)


def measure(point: dict, options: argparse.Namespace) -> dict:
    """One measurement, in this process."""
    import torch

    if point["threads"]:
        torch.set_num_threads(point["threads"])
    torch.manual_seed(0)
    # What it makes models of
    step_cost.SHAPE = shape_of(point["size"], point["attention"])
    step = SimpleNamespace(
        **point, completion=COMPLETION, steps=options.steps, device=options.device, dtype=options.dtype, tiny=False
    )
    if point["variant"] == "forward":
        return {"forwards": measure_forwards(step, options), "device": device_name(options.device)}
    if point["variant"] == "floor":
        seconds, _ = step_cost.measure_floor(step)
    else:
        seconds = measure_trainer(step)
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes(options.device),
        "device": device_name(options.device),
    }


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"


def peak_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_trainer(step: SimpleNamespace) -> list[float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    from trl_dmpo import DMPOConfig, DMPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(step_cost.now(step.device))

    steps, clock = step.steps + 1, Clock()
    lora = step.size in LORA
    policy, reference = step_cost.make_model(step), None if lora else step_cost.make_model(step)
    rows = step_cost.make_rows(step, steps * step.processes, policy.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        args = DMPOConfig(
            folder,
            per_device_train_batch_size=1,
            max_steps=steps,
            max_length=None,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=step.device == "cpu",
            ddp_backend="gloo" if step.processes > 1 else None,
            gradient_checkpointing=False,
            disable_tqdm=True,
            prefix_sharing=step.variant == "shared",
        )
        DMPOTrainer(
            policy,
            reference,
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=step_cost.make_tokenizer(policy.config.vocab_size),
            callbacks=[clock],
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        ).train()
    return [end - start for start, end in itertools.pairwise(clock.ends)]


def measure_forwards(step: SimpleNamespace, options: argparse.Namespace) -> list[dict]:
    """Forward passes of shared rows of some widths, the lengths in turn, without those that compile."""
    import torch

    from trl_dmpo.trainer.attention import tree_attention_mask
    from trl_dmpo.trainer.layout import Candidate, shared_layout

    model = step_cost.make_model(step).eval()
    grid = [(width, k) for k in (3, 15, 63) for width in options.widths if width > (k + 1) * COMPLETION]
    times: dict[tuple[int, int], list[float]] = {place: [] for place in grid}
    for _ in range(options.steps + 2):
        for width, k in grid:
            answers = torch.randint(3, model.config.vocab_size, (k + 1, COMPLETION)).tolist()
            prompt = torch.randint(3, model.config.vocab_size, (width - (k + 1) * COMPLETION + 1,)).tolist()
            batch = shared_layout([[Candidate(prompt, answer) for answer in answers]], 0)
            start = step_cost.now(step.device)
            mask = tree_attention_mask(batch, model.config, model.dtype)
            with torch.no_grad():
                model.base_model(batch["input_ids"], mask, batch["position_ids"], use_cache=False)
            times[width, k].append(step_cost.now(step.device) - start)
    # The first two rounds may compile, one length and then any
    return [{"width": width, "k": k, "seconds": found[2:]} for (width, k), found in times.items()]


def run_child(point: dict, options: argparse.Namespace) -> dict:
    launcher = [sys.executable]
    if point["processes"] > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={point['processes']}"]
    steps = 1 if tokens_and_pairs(point)[0] > 4000 and point["variant"] != "forward" else options.steps
    command = [*launcher, __file__, "--point", json.dumps(point), "--steps", str(steps)]
    command += ["--device", options.device, "--dtype", options.dtype, "--widths", *map(str, options.widths)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if point["threads"]:
        environment["OMP_NUM_THREADS"] = str(point["threads"])
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [line for line in run.stdout.splitlines() if line.startswith('{"')]
    if run.returncode != 0 or not found:
        # What does not fit is a finding, not the end of the night
        if "OutOfMemoryError" in run.stderr or run.returncode == -9:
            return {"error": "out of memory"}
        raise RuntimeError(f"{point} failed:\n{run.stderr[-2000:]}")
    return json.loads(found[0])


def sweep(options: argparse.Namespace) -> list[dict]:
    """All runs, those in `--output` included, which is written after each."""
    from rich.progress import track

    settings = {"completion": COMPLETION, "dtype": options.dtype, "device": options.device}
    runs: list[dict] = []
    if options.output.exists():
        stored = json.loads(options.output.read_text())
        if stored["settings"] != settings:
            raise SystemExit(f"--output: {options.output} holds figures of {stored['settings']}, not of {settings}.")
        runs = stored["runs"]
    done = [(run["point"], run["round"]) for run in runs]
    planned = itertools.product(range(options.rounds), points(options))
    waiting = [(point, number) for number, point in planned if (point, number) not in done]
    if options.device == "cpu":
        print("Flex attention is measured in forward passes only: it has no backward pass on the CPU.", flush=True)
    start = time.monotonic()
    for index, (point, number) in enumerate(track(waiting, "Measuring")):
        if time.monotonic() - start > 60 * options.minutes:
            print(
                f"{len(waiting) - index} of {len(waiting)} runs are left after {options.minutes} minutes: call again."
            )
            break
        runs.append({"point": point, "round": number, **run_child(point, options)})
        unfinished = options.output.with_suffix(".part")
        unfinished.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
        unfinished.replace(options.output)
    return runs


def summarise(runs: list[dict]) -> list[dict]:
    """A line for each point: medians over rounds, and what follows from them."""
    results = []
    by_point: dict[str, list[dict]] = {}
    for run in runs:
        by_point.setdefault(json.dumps(run["point"]), []).append(run)
    for text, found in by_point.items():
        point = json.loads(text)
        measured = [run for run in found if "seconds" in run]
        if point["variant"] == "forward" or not measured:
            continue
        seconds = statistics.median(second for run in measured for second in run["seconds"])
        tokens, pairs = tokens_and_pairs(point)
        device = measured[0]["device"]
        peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device), None)
        results.append(
            {
                **point,
                "seconds": seconds,
                "peak_bytes": statistics.median(run["peak_bytes"] for run in measured),
                "rounds": len(measured),
                "tokens": tokens,
                "pairs": pairs,
                "tokens_per_second": tokens * point["processes"] / seconds,
                "tflops": model_flops(point) * point["processes"] / seconds / 1e12,
                "mfu": model_flops(point) / seconds / 1e12 / peak if peak else None,
                "device": device,
            }
        )
    return results


def label(result: dict) -> str:
    return "shared, flex" if result["attention"] == "flex_attention" else result["variant"]


def fit(results: list[dict]) -> dict:
    """Least squares of relative errors, without terms that would be below zero."""
    seconds = np.array([result["seconds"] for result in results])
    terms = np.array([[1, result["tokens"], result["pairs"]] for result in results]) / seconds[:, None]
    best, error = np.zeros(3), np.inf
    for used in itertools.product([False, True], repeat=3):
        columns = np.flatnonzero(used)
        found, *_ = np.linalg.lstsq(terms[:, columns], np.ones(len(results)), rcond=None)
        residual = np.square(terms[:, columns] @ found - 1).sum()
        if len(columns) and (found >= 0).all() and residual < error:
            best, error = np.zeros(3), residual
            best[columns] = found
    off = np.abs(terms @ best - 1)
    return {"a": best[0], "b": best[1], "c": best[2], "median_error": np.median(off), "largest_error": off.max()}


def alike(results: list[dict]) -> list[dict]:
    """Those of the model that K and the prompt's length vary for, one process on all threads."""
    (size, threads) = (results[0]["size"], results[0]["threads"])
    return [each for each in results if (each["size"], each["threads"], each["processes"]) == (size, threads, 1)]


def series(results: list[dict], name: str) -> dict[str, list[dict]]:
    """By variant, the results of points that differ from another in `name` alone, in its order."""
    others = [other for other in ("size", "k", "prompt", "processes", "threads") if other != name]
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault(tuple(result[other] for other in others), []).append(result)
    # The one that varies most
    widest = max(groups.values(), key=lambda group: len({result[name] for result in group}))
    found: dict[str, list[dict]] = {}
    order = list(SIZES).index if name == "size" else float
    for result in sorted(widest, key=lambda each: order(each[name])):
        found.setdefault(label(result), []).append(result)
    return found


def tables(runs: list[dict], results: list[dict]) -> str:
    """In Markdown."""
    lines = []
    for name, title in FIGURES.items():
        lines += ["", f"| {title} | variant | seconds | to the floor | tokens/s | TFLOP/s | MFU | peak GB |"]
        lines.append("|--:|---|--:|--:|--:|--:|--:|--:|")
        found = series(results, name)
        floor = {result[name]: result["seconds"] for result in found.get("floor", [])}
        for kind, of_kind in found.items():
            for each in of_kind:
                ratio = f"{each['seconds'] / floor[each[name]]:.2f}" if each[name] in floor else ""
                mfu = f"{each['mfu']:.1%}" if each["mfu"] is not None else ""
                lines.append(
                    f"| {each[name]} | {kind} | {each['seconds']:.3f} | {ratio} | {each['tokens_per_second']:,.0f} | "
                    f"{each['tflops']:.3g} | {mfu} | {each['peak_bytes'] / 1e9:.2f} |"
                )
    lines += ["", "| processes | threads of each | seconds | tokens/s |", "|--:|--:|--:|--:|"]
    for each in sorted(process_results(results), key=lambda each: (each["processes"], each["threads"])):
        lines.append(
            f"| {each['processes']} | {each['threads']} | {each['seconds']:.3f} | {each['tokens_per_second']:,.0f} |"
        )
    lines += [
        "",
        "| fit | a, ms | b, µs a token | c, ns a pair | median error | largest |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, found in fits(results).items():
        lines.append(
            f"| {kind} | {found['a'] * 1e3:.1f} | {found['b'] * 1e6:.1f} | {found['c'] * 1e9:.2f} | "
            f"{found['median_error']:.0%} | {found['largest_error']:.0%} |"
        )
    lines += ["", "| tokens of a row | K | SDPA, ms | flex, ms | SDPA / flex |", "|--:|--:|--:|--:|--:|"]
    for (width, k), seconds in forward_times(runs).items():
        sdpa, flex = seconds["sdpa"] * 1e3, seconds["flex_attention"] * 1e3
        lines.append(f"| {width} | {k} | {sdpa:.1f} | {flex:.1f} | {sdpa / flex:.2f} |")
    failed = [run["point"] for run in runs if "error" in run]
    return "\n".join(lines[1:] + [f"\nOut of memory: {point}" for point in failed])


def process_results(results: list[dict]) -> list[dict]:
    """One row a process, on processes and threads of several numbers; not on a GPU."""
    several = [result for result in results if result["processes"] > 1]
    if not several:
        return []
    (like,) = several
    same = ("size", "k", "prompt", "variant", "attention")
    return [result for result in results if all(result[name] == like[name] for name in same)]


def fits(results: list[dict]) -> dict[str, dict]:
    """By variant, where there are more figures than terms."""
    by_kind: dict[str, list[dict]] = {}
    for result in alike(results):
        by_kind.setdefault(label(result), []).append(result)
    return {kind: fit(found) for kind, found in by_kind.items() if len(found) > 3}


def forward_times(runs: list[dict]) -> dict[tuple[int, int], dict[str, float]]:
    """By tokens of a row and K, the median seconds of a forward pass with each kind of attention."""
    times: dict[tuple[int, int], dict[str, list[float]]] = {}
    for run in runs:
        for each in run.get("forwards", []):
            of_place = times.setdefault((each["width"], each["k"]), {})
            of_place.setdefault(run["point"]["attention"], []).extend(each["seconds"])
    medians = {
        place: {name: statistics.median(found) for name, found in each.items()} for place, each in times.items()
    }
    return {place: each for place, each in sorted(medians.items()) if len(each) == 2}


def plot(results: list[dict], file: Path) -> None:
    """Seconds above, peak memory below, on logarithmic axes; the fit as a line through the points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(13, 7.5), layout="constrained", sharex="col")
    fitted = fits(results)
    for column, (name, title) in enumerate(FIGURES.items()):
        found = series(results, name)
        for (kind, of_kind), marker in zip(found.items(), "osD^", strict=False):
            places = [list(SIZES).index(each[name]) if name == "size" else each[name] for each in of_kind]
            style = {"color": COLOURS[kind], "marker": marker, "label": kind}
            seconds = [each["seconds"] for each in of_kind]
            is_fitted = kind in fitted and name != "size"
            panels[0, column].plot(places, seconds, linestyle="" if is_fitted else ":", **style)
            if is_fitted:
                a, b, c = (fitted[kind][term] for term in "abc")
                model = [a + b * each["tokens"] + c * each["pairs"] for each in of_kind]
                panels[0, column].plot(places, model, color=COLOURS[kind], linewidth=1)
            panels[1, column].plot(places, [each["peak_bytes"] / 1e9 for each in of_kind], linestyle=":", **style)
        for panel in panels[:, column]:
            panel.set_yscale("log")
            panel.grid(alpha=0.3, which="both")
            if name != "size":
                panel.set_xscale("log")
            ticks = sorted({each[name] for of_kind in found.values() for each in of_kind}, key=str)
            panel.set_xticks([list(SIZES).index(tick) if name == "size" else tick for tick in ticks], map(str, ticks))
            panel.minorticks_off() if name == "size" else panel.tick_params(axis="x", which="minor", labelbottom=False)
        panels[0, column].set_title("seconds of a step" if column == 0 else "")
        panels[1, column].set_xlabel(title)
        panels[1, column].set_title("peak memory, GB" if column == 0 else "")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=130)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 3, 7, 15, 31, 63], help="numbers of rejected answers")
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 300, 1000, 2000, 4000], help="their tokens")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="shapes of models")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process; one, if they are long")
    parser.add_argument("--minutes", type=float, default=25, help="after these, nothing more is started")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--output", type=Path, help="file for what is measured, as JSON; an existing one is gone on with"
    )
    parser.add_argument("--plot", type=Path, help="file for the plot, as PNG")
    parser.add_argument("--tiny", action="store_true", help="a model of two thin layers, to see that the script runs")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.point is None and options.output is None:
        parser.error("--output: give a file, such as benchmarks/scaling.json. What is measured is kept there.")
    return options


def main(options: argparse.Namespace) -> None:
    if options.point is not None:
        print(json.dumps(measure(options.point, options)), flush=True)
        return
    runs = sweep(options)
    results = summarise(runs)
    print(tables(runs, results))
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main(parse())
