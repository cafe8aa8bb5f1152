"""Seeing a collapse in the logs: the likelihood of the chosen completion falls, and the accuracy with it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

# By noise alone, an accuracy seems to fall this many standard errors in fewer than 1 of 20 runs of 1,000 logs
_STANDARD_ERRORS = 8

_REMEDIES = (
    "add 'sft' to `loss_type`; set `negative_selection='boundary'`; use `loss_type='sdpo'`; draw fewer negatives "
    "(`num_negatives`); try another `beta`, a larger one first; lower `learning_rate`"
)


class _Series:
    """Moving means of a logged value; of several names the first counts, from the log on in which it appears."""

    def __init__(self, names: tuple[str, ...], window: int):
        self.names = (*[f"eval_{name}" for name in names], *names)
        self.window = window
        self._start(None)

    def _start(self, name: str | None) -> None:
        self.name = name
        self.steps: list[int] = []
        self.values: list[float] = []
        self.means: list[float] = []
        self.deviations = 0.0

    def add(self, logs: Mapping[str, Any], step: int) -> None:
        known = self.names if self.name is None else self.names[: self.names.index(self.name) + 1]
        name = next((name for name in known if name in logs), None)
        if name is None:
            return
        if name != self.name:
            self._start(name)
        # One value a step: the log names the metrics of several evaluation sets alike
        if step in self.steps[-1:] or not math.isfinite(logs[name]):
            return
        self.steps.append(step)
        self.values.append(logs[name])
        if len(self.values) >= self.window:
            self.means.append(fmean(self.values[-self.window :]))
        if len(self.values) > 2:
            before, value, after = self.values[-3:]
            # Noise alone takes a value away from the middle of its neighbours, whatever the trend
            self.deviations += abs(value - (before + after) / 2)

    def standard_error(self) -> float:
        """That of a moving mean."""
        return self.deviations / (len(self.values) - 2) / math.sqrt(self.window)

    def best(self) -> tuple[float, int, int]:
        """The highest mean of logs before those of the last mean, and the first and last step of the latest such mean."""
        earlier = self.means[: -self.window]
        end = len(earlier) - earlier[::-1].index(max(earlier))
        return max(earlier), self.steps[end - 1], self.steps[end + self.window - 2]

    def describe(self) -> str:
        best, first, last = self.best()
        return (
            f"`{self.name}` from {best:.4g} (steps {first} to {last}) to {self.means[-1]:.4g} (steps "
            f"{self.steps[-self.window]} to {self.steps[-1]})"
        )


class CollapseCallback(TrainerCallback):
    r"""
    Warns of a collapse, or stops the training: the likelihood of the chosen completion falls, and the accuracy with it.

    It reads the logs. A training has collapsed if, in means over `patience` logs,

    - `logps/chosen_change`, log π - log π_ref of the chosen completion, is below zero and lower than `patience` logs
      before. Where it is not logged, as under `reference_free`, `logps/chosen` counts, less its first mean;
    - `metric` is below its best before by more than `tolerance` and more than 8 standard errors, which are estimated from how
      far each log is from the middle of its two neighbours.

    The logs of training count until the first evaluation, then those of evaluations alone; with several evaluation sets,
    those of the first. The warning comes once; again only if the accuracy recovers and collapses anew. A resumed run
    goes on from the logs of its checkpoint.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            What to do: `"warn"`, or `"stop"`, which warns and ends the training.
        metric (`str`, *optional*, defaults to `"ranking/mrr"`):
            Name of the accuracy in the log, of which more is better. `"eval_..."` if only evaluations log it.
        patience (`int`, *optional*, defaults to `3`):
            Number of logs in a mean. More are slower to see a collapse and see smaller ones.
        tolerance (`float`, *optional*, defaults to `0.02`):
            How far the accuracy may fall below its best, in units of the metric.

    Raises:
        `ValueError`: an option is out of its range, or the logs of training lack the likelihood or the metric.

    Example:

    ```python
    >>> from trl_dmpo import DMPOTrainer
    >>> from trl_dmpo.trainer.collapse import CollapseCallback

    >>> trainer = DMPOTrainer(..., callbacks=[CollapseCallback(action="stop")])  # doctest: +SKIP
    ```
    """

    def __init__(
        self, action: str = "warn", metric: str = "ranking/mrr", patience: int = 3, tolerance: float = 0.02
    ) -> None:
        if action not in ("warn", "stop"):
            raise ValueError(f"`action` must be 'warn' or 'stop', got {action!r}.")
        if metric.endswith("loss"):
            raise ValueError(
                f"`metric` is {metric!r}, but it must be one of which more is better, such as 'ranking/mrr'."
            )
        if patience < 2:
            raise ValueError(f"`patience` must be at least 2 logs, whose mean has less noise, got {patience}.")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"`tolerance` must be a number of at least 0, got {tolerance}.")
        self.action = action
        self.metric = metric
        self.patience = patience
        self.tolerance = tolerance
        self._reset()

    def _reset(self) -> None:
        self._likelihood = _Series(("logps/chosen_change", "logps/chosen"), self.patience)
        self._accuracy = _Series((self.metric,), self.patience)
        self._collapsed = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._reset()
        for logs in state.log_history:
            self._sees_collapse(logs, logs["step"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        logs = kwargs["logs"]
        collapses = self._sees_collapse(logs, state.global_step)
        if "loss" in logs:
            self._require_names(logs)
        if not collapses:
            return
        if state.is_world_process_zero:
            logger.warning(self._message(Path(args.output_dir or ".")))
        if self.action == "stop":
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        seen = {series.name or series.names[-1]: len(series.values) for series in (self._likelihood, self._accuracy)}
        if min(seen.values()) < 2 * self.patience and state.is_world_process_zero:
            found = " and ".join(f"{count} of `{name}`" for name, count in seen.items())
            logger.warning(
                f"CollapseCallback could not judge the training: with `patience={self.patience}` it needs "
                f"{2 * self.patience} logs and saw {found}. Log or evaluate more often (`logging_steps`, `eval_steps`), "
                "or correct `metric`."
            )

    def _sees_collapse(self, logs: Mapping[str, Any], step: int) -> bool:
        """Take in a log; whether a collapse shows that has not been seen yet."""
        self._likelihood.add(logs, step)
        self._accuracy.add(logs, step)
        if min(len(self._likelihood.values), len(self._accuracy.values)) < 2 * self.patience:
            return False
        likelihoods = self._likelihood.means
        start = 0 if str(self._likelihood.name).endswith("_change") else likelihoods[0]
        less_likely = likelihoods[-1] < min(start, likelihoods[-1 - self.patience])
        fall = self._accuracy.best()[0] - self._accuracy.means[-1]
        limit = max(self.tolerance, _STANDARD_ERRORS * self._accuracy.standard_error())
        if self._collapsed:
            self._collapsed = fall > limit / 2  # not `limit`, around which it may waver
            return False
        self._collapsed = less_likely and fall > limit
        return self._collapsed

    def _require_names(self, logs: Mapping[str, Any]) -> None:
        names = ", ".join(sorted(logs))
        if self._likelihood.name is None:
            raise ValueError(
                "CollapseCallback reads `logps/chosen_change` or `logps/chosen`, and the log has neither: it is for "
                f"DMPOTrainer. The log has: {names}."
            )
        if self._accuracy.name is None and not self.metric.startswith("eval_"):
            raise ValueError(
                f"`metric` of CollapseCallback is {self.metric!r}, which is not in the log. It has: {names}. Write "
                f"'eval_{self.metric}' if only evaluations log it."
            )

    def _message(self, folder: Path) -> str:
        _, _, last = self._accuracy.best()
        saved = [path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")]
        steps = [int(step) for step in saved if step.isdigit() and int(step) <= last]
        if steps:
            checkpoint = f"The last checkpoint from before the fall is {folder / f'checkpoint-{max(steps)}'}."
        else:
            checkpoint = f"{folder} has no checkpoint from before the fall: save more often (`save_steps`)."
        stopped = " Training stops here." if self.action == "stop" else ""
        return (
            "The training collapses: the chosen completions lose likelihood, and the accuracy falls with it. Means "
            f"of {self.patience} logs: {self._likelihood.describe()}, {self._accuracy.describe()}. {checkpoint} What helps: "
            f"{_REMEDIES}.{stopped}"
        )
