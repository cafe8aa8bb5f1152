"""Plots of the results of an experiment."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .experiment import Experiment


COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # told apart by the colour-blind, too
REFERENCES = ["#000000", "#888888"]


def plot_arms(arms: Mapping[str, Any], metric: str, title: str, file: Path) -> None:
    """
    A line for each arm: the mean and, of models, the difference from what they are compared with, where there is one. With
    intervals over users, and a dot for each seed.
    """
    # Beside popularity, no difference of models would be seen
    models = [name for name, arm in arms.items() if "difference" in arm and "model" in arm["stages"][0]]
    compared = dict.fromkeys(re.split(r", \w+=", arms[name]["against"])[0] for name in models)
    figure, panels = _figure((12 if compared else 9, 1 + 0.32 * len(arms)), columns=2 if compared else 1)
    for place, (name, arm) in enumerate(reversed(arms.items())):
        seeds = [each[metric] for each in arm["seeds"]]
        _estimate(panels[0], place, arm["metrics"][metric], seeds)
        if name in models:
            others = [each[metric] for each in arms[arm["against"]]["seeds"]]
            changes = [seed - other for seed, other in zip(seeds, others, strict=True)]
            _estimate(panels[1], place, arm["difference"][metric], changes)
    panels[0].set_yticks(range(len(arms)), list(arms)[::-1])
    labels = [metric, f"{metric}\nless that of {' or '.join(compared)}\non the same rows"]
    for panel, label in zip(panels, labels, strict=False):
        panel.set_xlabel(label)
        panel.grid(axis="x", color="#dddddd")
    for panel in panels[1:]:
        panel.axvline(0, color="#000000", linewidth=1)
        panel.locator_params(axis="x", nbins=6)
    panels[0].set_ylim(-1, len(arms))
    figure.suptitle(f"{title}; 95% intervals over users, seeds in grey", x=0.01, ha="left")
    _save(figure, file)


def _estimate(panel: Any, place: int, estimate: Mapping[str, float], seeds: Sequence[float]) -> None:
    panel.plot(seeds, [place] * len(seeds), "o", color="#bbbbbb", markersize=4)
    if "low" in estimate:
        panel.plot([estimate["low"], estimate["high"]], [place] * 2, color=COLOURS[1])
    panel.plot(estimate["value"], place, "o", color=COLOURS[1])


def plot_against(
    results: Mapping[str, Any], experiment: Experiment, option: str, metric: str, title: str, file: Path
) -> None:
    """
    For each method a line of differences from what it is compared with, against an option of the rows, with intervals over
    users. Arms that differ in other options, too, or are compared with another method, are left out; the start is a level.
    """
    lines: dict[str, list[tuple[Any, Mapping[str, float]]]] = {}
    levels: dict[str, float] = {}
    method_of = {arm.name: arm.method for arm in experiment.expand()}
    against = {name: method_of.get(each.get("against")) for name, each in results["arms"].items()}
    arms = [arm for arm in experiment.expand() if against.get(arm.name) == experiment.evaluate["baseline"]]
    methods = [arm.method for arm in arms if _varies(arms, arm.method, option)]
    # More rows are those of more targets of a user
    given = {"rows", "train_targets"} if option == "rows" else {option}
    others = {key for arm in arms if arm.method in methods for key in arm.rows if key not in given}
    usual = {key: _usual([arm.rows.get(key) for arm in arms if arm.method in methods]) for key in others}
    for arm in arms:
        estimate = results["arms"][arm.name]["difference"][metric]
        if arm.method is None:
            # Of one number of rows it is no level of the others
            levels |= {"start": estimate["value"]} if option != "rows" else {}
        elif arm.method in methods and all(arm.rows.get(key) == value for key, value in usual.items()):
            lines.setdefault(arm.method, []).append((arm.rows[option], estimate))
    figure, (panel,) = _figure((8, 4.8))
    levels = {experiment.evaluate["baseline"]: 0.0, **levels}
    for colour, (name, level) in zip(itertools.cycle(REFERENCES), levels.items(), strict=False):
        panel.axhline(level, color=colour, linestyle="--", linewidth=1.2, label=name)
    values_of = sorted({value for points in lines.values() for value, _ in points})
    for number, (name, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        # Beside one another, so that intervals do not hide each other
        places = [values_of.index(value) + (number - (len(lines) - 1) / 2) * 0.05 for value, _ in points]
        values = [estimate["value"] for _, estimate in points]
        spread = [[value - each["low"] for value, (_, each) in zip(values, points, strict=True)]]
        spread += [[each["high"] - value for value, (_, each) in zip(values, points, strict=True)]]
        panel.errorbar(places, values, spread, color=COLOURS[number], marker="o", capsize=2, label=name)
    panel.set_xticks(range(len(values_of)), [f"{value:,}" for value in values_of])
    panel.set_xlabel(option)
    panel.set_ylabel(f"{metric}, less that of {experiment.evaluate['baseline']} on the same rows")
    panel.set_title(title, loc="left")
    panel.grid(axis="y", color="#dddddd")
    figure.legend(loc="outside right upper", frameon=False)
    _save(figure, file)


def _varies(arms: Sequence[Any], method: str | None, option: str) -> bool:
    return method is not None and len({str(arm.rows.get(option)) for arm in arms if arm.method == method}) > 1


def _usual(values: Sequence[Any]) -> Any:
    return max(values, key=lambda value: sum(each == value for each in values))


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, _ = pyplot.subplots(ncols=columns, sharey=True, figsize=size, layout="constrained")
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, figure.axes


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
