"""What an experiment file says, checked."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml


SECTIONS = {
    "starts": ("shape", "vocab_size", "model", "lora", "texts", "train"),
    "tune": ("metric", "test", "rows", "seed", "start"),
    "evaluate": ("metrics", "baseline", "generate", "plot", "rescore", "short", "contrasts"),
    "explain": ("start", "test", "users", "candidates", "min_history", "counts", "draws", "methods", "budget"),
}


class Arm(NamedTuple):
    """
    One way to train, run with every seed.

    Args:
        name (`str`):
            What tables call it.
        method (`str`, *optional*):
            A key of `methods`; without one, nothing is trained after the start.
        start (`str`):
            A key of `starts`.
        rows (`dict`):
            Options of the rows of its preference stage.
        tests (`str`, *optional*, defaults to `""`):
            Score only the test sets whose names contain it.
    """

    name: str
    method: str | None
    start: str
    rows: dict[str, Any]
    tests: str = ""


@dataclass
class Experiment:
    """
    An experiment, as its file has it.

    Args:
        title (`str`):
            One line.
        data (`dict`):
            `kind`, a key of [`~benchmarks.quality.data.TASKS`], and its options.
        starts (`dict[str, dict]`):
            From names to models to begin with: options of [`~benchmarks.quality.training.make_start`].
        arms (`list[dict]`):
            `method`, `start`, `rows` and `tests`; where one of the first two, or an option of `rows`, is a list, there is an
            arm for each.
        methods (`dict[str, dict]`, *optional*):
            From names to options of [`~trl_dmpo.DMPOConfig`]. Under `tune`, lists to choose from, by the validation rows; under
            `like`, another method whose choice is taken over; under `against`, a method to compare with in the place of
            `evaluate.baseline`.
        training (`dict`, *optional*):
            Options of [`~trl_dmpo.DMPOConfig`] of all methods.
        tune (`dict`, *optional*):
            How to choose: `metric`, `test` (which of the validation sets), `rows` (options of the rows), `seed` and `start`.
        evaluate (`dict`):
            `metrics` to show; `baseline`, the method that others are compared with; `generate`, the most tokens of answers that
            models are to give by themselves, too; `plot`, options of the rows to plot against; `rescore`,
            whether to rank by log-ratios and by log-probabilities of a token, too; `short`, to compare the rows with a history
            of fewer items, too; `contrasts`, what else is to be compared: from
            an option of the rows, or `method`, to two values, for all arms that differ in it alone.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            Seeds of the training rows, of their negatives and of the training.
        baselines (`list[str]`, *optional*):
            Of [`~benchmarks.quality.baselines`], for a log.
        explain (`dict`, *optional*):
            Options of [`~benchmarks.quality.faithfulness.measure_faithfulness`], for a log; `test`, the set of which `users`
            with a history of `min_history` are taken; and `start`, to explain only arms that begin with it.
        name (`str`, *optional*):
            That of the file.
    """

    title: str
    data: dict[str, Any]
    starts: dict[str, dict[str, Any]]
    arms: list[dict[str, Any]]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baselines: list[str] = field(default_factory=list)
    explain: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def expand(self) -> list[Arm]:
        """All arms, those of lists one by one."""
        found: dict[str, Arm] = {}
        for entry in self.arms:
            unknown = entry.keys() - {"method", "start", "rows", "tests"}
            if unknown:
                raise ValueError(
                    f"`arms` of {self.name} have no option {sorted(unknown)[0]!r}: method, start, rows, tests."
                )
            options = {f"rows.{name}": value for name, value in entry.get("rows", {}).items()}
            options = {"method": entry.get("method"), "start": entry.get("start", next(iter(self.starts)))} | options
            for values in itertools.product(
                *(each if isinstance(each, list) else [each] for each in options.values())
            ):
                arm = self._arm(dict(zip(options, values, strict=True)))._replace(tests=entry.get("tests", ""))
                found[arm.name] = arm
        return list(found.values())

    def explained(self) -> list[Arm]:
        """The arms whose recommendations are explained."""
        start = self.explain.get("start")
        return [arm for arm in self.expand() if self.explain and start in (None, arm.start)]

    def _arm(self, options: dict[str, Any]) -> Arm:
        method, start = options.pop("method"), options.pop("start")
        if start not in self.starts:
            raise ValueError(
                f"An arm of {self.name} has the start {start!r}, but there are: {', '.join(self.starts)}."
            )
        if method is not None and method not in self.methods:
            raise ValueError(
                f"An arm of {self.name} has the method {method!r}, but there are: {', '.join(self.methods)}."
            )
        rows = {name.removeprefix("rows."): value for name, value in options.items()}
        told = [f"{name}={value}" for name, value in rows.items()]
        told += [f"start={start}"] if len(self.starts) > 1 else []
        return Arm(", ".join([method or "start", *told]), method, start, rows)


def load_experiment(file: Path, tiny: bool = False) -> Experiment:
    """
    Read an experiment.

    Args:
        file (`Path`):
            YAML with the fields of [`Experiment`], and `tiny`, in which what differs for a trial of a minute stands.
        tiny (`bool`, *optional*, defaults to `False`):
            Whether to take it.

    Raises:
        `ValueError`: a field is unknown or missing.
    """
    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    smaller = options.pop("tiny", None)
    if tiny:
        if smaller is None:
            raise ValueError(f"{file} has no section `tiny`.")
        options = _replaced(options, smaller)
    known = [each.name for each in fields(Experiment) if each.name != "name"]
    for name in options.keys() - set(known):
        raise ValueError(f"{file} has the field {name!r}, but there are only: {', '.join(known)}.")
    for name in ("title", "data", "starts", "arms", "evaluate"):
        if name not in options:
            raise ValueError(f"{file} has no {name!r}.")
    sections = {name: options.get(name, {}) for name in ("evaluate", "explain", "tune")}
    sections |= {f"starts.{name}": start for name, start in options["starts"].items()}
    for name, section in sections.items():
        known = SECTIONS[name.partition(".")[0]]
        for option in section.keys() - set(known):
            raise ValueError(f"`{name}` of {file} has the option {option!r}, but there are only: {', '.join(known)}.")
    if options.get("baselines") and not {"test", "metric"} <= options.get("tune", {}).keys():
        raise ValueError(
            f"{file} has `baselines`: `tune.test` and `tune.metric` have to say what chooses their settings."
        )
    return Experiment(**options, name=file.stem)


def _replaced(options: Any, smaller: Any) -> Any:
    """`options` with what `smaller` has in its place; of sections, field by field."""
    if isinstance(options, Mapping) and isinstance(smaller, Mapping):
        return {**options, **{name: _replaced(options.get(name), value) for name, value in smaller.items()}}
    return smaller
