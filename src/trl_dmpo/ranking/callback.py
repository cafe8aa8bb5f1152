"""Evaluation during training: rankings of whole lists of candidates, in the log of the training."""

from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .evaluate import CUTOFFS, Evaluation, distinct_metrics, evaluate_scores, score_rows
from .rows import RankingRows
from .scorer import trained_scorer


class RankingCallback(TrainerCallback):
    """
    Ranks candidates with the model in training and logs the metrics, to whatever `report_to` names.

    The metrics are those of `trl-dmpo evaluate`. In the log of the trainer they are called `eval_candidates/ndcg@10` and so
    on, and on a dashboard `eval/candidates/ndcg@10`; the trainer's own `eval_ranking/ndcg@10` ranks the rejected
    completions of the evaluation set. Training goes on as it would without the callback.

    The main process scores all rows, the others wait. `evaluation` is the last [`Evaluation`], with intervals and all scores.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer to which the callback will be attached.
        rows ([`~trl_dmpo.ranking.rows.RankingRows`]):
            Rows to rank, from [`~trl_dmpo.ranking.rows.load_ranking_rows`]. Some hundreds are enough to see where it goes.
        eval_steps (`int`, *optional*):
            Evaluate every so many steps. By default whenever the trainer evaluates; its metrics then count for
            `metric_for_best_model`, too.
        name (`str`, *optional*, defaults to `"candidates"`):
            What to call the rows in the log, where there are several callbacks.
        cutoffs (`Sequence[int]`, *optional*, defaults to `(1, 5, 10, 20)`):
            The k of the metrics at k.
        normalize (`str`, *optional*, defaults to `"sum"`):
            `"sum"` or `"mean"` of a candidate's log-probability over its tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the intervals and coin flips.

    Raises:
        `ValueError`: there are no rows, an option is out of its range, the trainer never evaluates and `eval_steps` is not
            set, or the model is spread over processes, by FSDP or DeepSpeed ZeRO-3.

    Example:

    ```python
    >>> from trl_dmpo import DMPOTrainer
    >>> from trl_dmpo.ranking.callback import RankingCallback
    >>> from trl_dmpo.ranking.rows import load_ranking_rows

    >>> trainer = DMPOTrainer(...)  # doctest: +SKIP
    >>> rows = load_ranking_rows("rows", split="validation", max_rows=200)  # doctest: +SKIP
    >>> trainer.add_callback(RankingCallback(trainer, rows))  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: RankingRows,
        eval_steps: int | None = None,
        name: str = "candidates",
        cutoffs: tuple[int, ...] = CUTOFFS,
        normalize: str = "sum",
        seed: int = 0,
    ):
        if not isinstance(rows, RankingRows) or not len(rows):
            raise ValueError("`rows` must be rows that `load_ranking_rows` has read, at least one.")
        if eval_steps is not None and eval_steps < 1:
            raise ValueError(f"`eval_steps` is {eval_steps}, but it is at least 1.")
        if eval_steps is None and trainer.args.eval_strategy == "no":
            raise ValueError(
                "The trainer never evaluates. Set its `eval_strategy`, or `eval_steps` of RankingCallback."
            )
        if is_spread(trainer):
            raise ValueError(
                "RankingCallback needs the whole model in one process, but it is spread over several, by FSDP, DeepSpeed ZeRO-3 "
                "or tensor parallelism. Evaluate checkpoints with `trl-dmpo evaluate` instead."
            )
        self.trainer = trainer
        self.rows = rows
        self.eval_steps = eval_steps
        self.name = name
        self.cutoffs = tuple(cutoffs)
        self.normalize = normalize
        self.seed = seed
        self.evaluation: Evaluation | None = None
        self._last_step = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._last_step = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.eval_steps is not None and state.global_step % self.eval_steps == 0:
            self._run(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # In training, the trainer comes here for each of several evaluation sets
        if self.eval_steps is None and not (self.trainer.is_in_train and state.global_step == self._last_step):
            # What the trainer returns, and chooses the best model by
            kwargs["metrics"].update(self._run(state, control))

    def _run(self, state: TrainerState, control: TrainerControl) -> dict[str, float]:
        """Evaluate and log; returns what was logged, in all processes."""
        self._last_step = state.global_step
        logged = [self._evaluate(state) if state.is_world_process_zero else {}]
        broadcast_object_list(logged)
        # Not `self.trainer.log`, with which TRL would log and forget what it has gathered since its last log
        should_log = control.should_log
        Trainer.log(self.trainer, dict(logged[0]))
        control.should_log = should_log
        return logged[0]

    def _evaluate(self, state: TrainerState) -> dict[str, float]:
        try:
            scorer = trained_scorer(self.trainer)
            scores = {self.name: score_rows(scorer, self.rows, self.normalize)}
            self.evaluation = evaluate_scores(self.rows, scores, self.cutoffs, self.seed, group_by=[])
        except Exception as error:
            error.add_note(f"This was RankingCallback, ranking {self.rows.name} after step {state.global_step}.")
            raise
        results = self.evaluation.results[self.name]
        metrics = [metric for metric in distinct_metrics(self.evaluation) if results[metric].n > 0]
        return {f"eval_{self.name}/{metric}": results[metric].value for metric in metrics}


def is_spread(trainer: Trainer) -> bool:
    """Whether no process has all weights."""
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.is_fsdp_enabled or zero3 or (getattr(trainer.model, "tp_size", None) or 1) > 1
