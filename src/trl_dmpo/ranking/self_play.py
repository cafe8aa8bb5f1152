"""Rejected completions that move with the model: what it wrongly recommends itself, scored anew every so many steps."""

import json
from collections.abc import Iterator, Sequence
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.schema import as_list
from ..trainer.dmpo_trainer import DMPOTrainer
from ..trainer.tokenization import tokenize_row
from .rows import as_text
from .scorer import Scorer, trained_scorer
from .self_play_rows import check_answers, check_trainer, columns_of, named_in, survey_rows, text_of, user_of


logger = get_logger(__name__)

# The file in a checkpoint
FILE_NAME = "self_play.parquet"
# Rows whose tokens are in memory at a time
_ROWS_AT_A_TIME = 1000
# What random numbers are for: streams of their own
_CANDIDATES, _ORIGINALS = 0, 1


class SelfPlayCallback(TrainerCallback):
    """
    Trains against the wrong answers that the model itself would recommend, found anew every so many steps.

    At the start and then after every `every` optimizer steps, the model in training scores answers for each row of the
    training set. The best wrong ones take the place of a share of the row's rejected completions; the others are drawn
    from those of the dataset. A row keeps its number of rejected completions. Wrong is an answer that is chosen in no row
    of the same user (of the same prompt, without the column `user_id`) and that the prompt does not name.

    The idea is that of SPRec ([Self-Play to Debias LLM-based Recommendation](https://huggingface.co/papers/2412.09243)).
    What is found is saved in checkpoints, as `self_play.parquet`, so that a resumed training goes on as it would have.
    Several processes share the rows.

    Args:
        trainer ([`DMPOTrainer`]):
            Trainer to which the callback will be attached.
        every (`int`):
            Score the answers anew after every so many optimizer steps.
        share (`float`, *optional*, defaults to `0.5`):
            Which share of a row's rejected completions is the model's own, above 0 and up to 1; rounded, at least one.
        answers (`Sequence[str]` or `Sequence[list[dict]]`, *optional*):
            The answers to score, such as a catalogue, written like the completions of the rows. By default all chosen and
            rejected completions of the training set.
        num_candidates (`int`, *optional*):
            Score only so many wrong answers of each row, drawn anew each time. By default all.
        exclude (`str`, *optional*, defaults to `"prompt"`):
            `"prompt"`: an answer that the prompt names, as a history does, is no wrong answer. `None`: it may be one.

    Attributes:
        found (`dict[int, list]`):
            From the `row_index` of a row to the model's own wrong answers, the best first.
        refreshes (`int`):
            How often answers have been scored.

    Raises:
        `TypeError`: the trainer is not a [`DMPOTrainer`].
        `ValueError`: an option is out of its range, or does not go with the trainer's dataset, loss or reference; or the
            checkpoint to resume from has no pools.

    Example:

    ```python
    >>> from trl_dmpo import DMPOTrainer
    >>> from trl_dmpo.ranking.self_play import SelfPlayCallback

    >>> trainer = DMPOTrainer(...)  # doctest: +SKIP
    >>> trainer.add_callback(SelfPlayCallback(trainer, every=200, num_candidates=100))  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        trainer: DMPOTrainer,
        every: int,
        share: float = 0.5,
        answers: Sequence[Any] | None = None,
        num_candidates: int | None = None,
        exclude: str | None = "prompt",
    ):
        check_trainer(trainer)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` is {every}, but it is a number of steps, at least 1.")
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}, but it is above 0 and at most 1.")
        if exclude not in ("prompt", None):
            raise ValueError(f"`exclude` is {exclude!r}, but it is 'prompt' or None.")
        self.trainer = trainer
        self.every = every
        self.share = share
        self.num_candidates = num_candidates
        self.exclude = exclude
        self._rows = columns_of(trainer.train_dataset, trainer.args.trunk_column)
        self._places = {index: place for place, index in enumerate(self._rows["row_index"])}
        survey = survey_rows(self._rows)
        if exclude == "prompt" and survey.lists_candidates:
            raise ValueError(
                "Every prompt names the chosen answer of its row, as prompts do that list their candidates: answers from "
                "elsewhere would be easy to tell. SelfPlayCallback is for prompts without such a list. If it is because users "
                "come back to the same items, set `exclude=None`."
            )
        most = self._wanted(survey.most_rejected)
        if num_candidates is not None and num_candidates < most:
            raise ValueError(
                f"`num_candidates` is {num_candidates}, fewer than the {most} answers to find where a row has "
                f"{survey.most_rejected} rejected completions. Raise it, lower `share`, or leave it out to score all."
            )
        self._liked = survey.liked
        self._answers = survey.completions if answers is None else check_answers(answers, survey.completions)
        self._texts = list(self._answers)
        if len(self._texts) < 2:
            raise ValueError(f"There is only one answer, {self._texts[0]!r}. Give at least two as `answers`.")
        self.found: dict[int, list] = {}
        self.refreshes = 0
        self._last_step = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.found, self.refreshes, self._last_step = {}, 0, -1
        self.trainer.rejected_pools = None
        if state.global_step > 0:
            self._load(Path(str(self.trainer.resumed_from)))
            self.trainer.rejected_pools = self

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._refresh_if_due(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # Before the checkpoint of this step is saved: a resumed training begins with what is in it
        if state.global_step < state.max_steps:
            self._refresh_if_due(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.trainer.rejected_pools = None

    def rejected(self, row_index: int) -> list:
        """The rejected completions that a row has now: the model's own, the best first, and then those of the dataset."""
        return self._rejected(self._rows[self._places[row_index]])

    def examples(self, row_indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows with the rejected completions that they have now, tokenized, as the collator takes them."""
        tokenizer = self.trainer.processing_class
        eos_token = self.trainer._tokenizer.eos_token
        trunk_column = self.trainer.args.trunk_column
        examples = []
        for row_index in row_indices:
            row = self._rows[self._places[row_index]]
            user = {} if trunk_column is None else {trunk_column: row[trunk_column]}
            row = {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": self._rejected(row)}
            examples.append({"row_index": row_index, **user, **tokenize_row(row, tokenizer, eos_token)})
        return examples

    def _rejected(self, row: dict[str, Any]) -> list:
        rejected, own = as_list(row["rejected"]), self.found.get(row["row_index"], [])
        texts = set(map(text_of, own))
        others = [completion for completion in rejected if text_of(completion) not in texts]
        count = min(len(rejected) - len(own), len(others))
        drawn = self._generator(row, _ORIGINALS).choice(len(others), count, replace=False)
        return own + [others[index] for index in sorted(drawn)]

    def _generator(self, row: dict[str, Any], purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.trainer.args.seed, self.refreshes, row["row_index"], purpose])

    def _wanted(self, num_rejected: int) -> int:
        return max(round(self.share * num_rejected), 1)

    def _refresh_if_due(self, state: TrainerState) -> None:
        if state.global_step % self.every or state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        self.refreshes += 1
        args = self.trainer.args
        places = range(args.process_index, len(self._rows), args.world_size)
        try:
            found = dict(gather_object(list(self._play(places, state))))
            self._adopt({index: [self._answers[text] for text in texts] for index, texts in found.items()})
        except Exception as error:
            error.add_note(f"This was SelfPlayCallback, scoring answers after step {state.global_step}.")
            raise

    def _adopt(self, found: dict[int, list]) -> None:
        count = sum(map(len, found.values()))
        if count == 0:
            raise ValueError(
                f"No row has a wrong answer among the {len(self._texts)} `answers`: all are chosen or in its prompt. Give "
                "others, or `exclude=None`."
            )
        known = {index: set(map(text_of, own)) for index, own in self.found.items()}
        new = sum(text_of(answer) not in known.get(index, ()) for index, own in found.items() for answer in own)
        self.found = found
        self.trainer.rejected_pools = self
        # TRL logs it with the next loss
        self.trainer._metrics["train"]["self_play/new"].append(new / count)
        logger.info(f"{count} wrong answers of the model for {len(found)} rows, {new} of them new.")

    def _play(self, places: Sequence[int], state: TrainerState) -> Iterator[tuple[int, list[str]]]:
        """For each of some rows, its index and the model's best wrong answers."""
        scorer = trained_scorer(self.trainer)
        disable = self.trainer.args.disable_tqdm or not state.is_world_process_zero
        with tqdm(total=len(places), desc="Self-play", leave=False, disable=disable) as bar:
            for start in range(0, len(places), _ROWS_AT_A_TIME):
                rows = [self._rows[place] for place in places[start : start + _ROWS_AT_A_TIME]]
                for found in self._play_rows(scorer, rows):
                    bar.update()
                    yield found

    def _play_rows(self, scorer: Scorer, rows: list[dict[str, Any]]) -> Iterator[tuple[int, list[str]]]:
        wrong = [self._wrong_answers(row) for row in rows]
        yield from ((row["row_index"], []) for row, texts in zip(rows, wrong, strict=True) if not texts)
        asked = [(row, texts) for row, texts in zip(rows, wrong, strict=True) if texts]
        # One list for all rows is tokenized once: then the answers that are not wrong are scored, too, and left out
        scores_all = self.num_candidates is None
        everything = list(self._answers.values())
        stream = scorer.stream(
            [row["prompt"] for row, _ in asked],
            [everything if scores_all else [self._answers[text] for text in texts] for _, texts in asked],
            names=lambda number: f"train[{asked[number][0]['row_index']}]",
        )
        for number, scores in stream:
            row, texts = asked[number]
            score_of = dict(zip(self._texts if scores_all else texts, scores.tolist(), strict=True))
            wanted = self._wanted(len(as_list(row["rejected"])))
            yield row["row_index"], nlargest(wanted, texts, key=score_of.__getitem__)

    def _wrong_answers(self, row: dict[str, Any]) -> list[str]:
        """What to score of a row."""
        excluded = self._liked[user_of(row)]
        if self.exclude == "prompt":
            excluded = excluded | named_in(as_text(row["prompt"]), self._texts)
        wrong = [text for text in self._texts if text not in excluded]
        if self.num_candidates is None or len(wrong) <= self.num_candidates:
            return wrong
        drawn = self._generator(row, _CANDIDATES).choice(len(wrong), self.num_candidates, replace=False)
        return [wrong[index] for index in sorted(drawn)]

    def save(self, folder: Path) -> None:
        """Write what was found into a checkpoint, as the trainer asks for before the checkpoint counts as whole."""
        rejected = [[_write(answer) for answer in own] for own in self.found.values()]
        table = pa.table(
            {"row_index": list(self.found), "rejected": rejected},
            pa.schema([("row_index", pa.int64()), ("rejected", pa.list_(pa.string()))]),
        )
        counts = {"refreshes": self.refreshes, "last_step": self._last_step}
        aside = folder / f"{FILE_NAME}.part"
        pq.write_table(table.replace_schema_metadata({"self_play": json.dumps(counts)}), aside)
        aside.replace(folder / FILE_NAME)

    def _load(self, folder: Path) -> None:
        path = folder / FILE_NAME
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {folder} has no {FILE_NAME}: it is of a training without SelfPlayCallback. Resume without "
                "the callback, or begin a training with the model of the checkpoint."
            )
        # Not `read_table`, which takes folders of the path such as "lr=0.1" for columns
        table = pq.ParquetFile(path).read()
        indices = table["row_index"].to_pylist()
        if set(indices) != self._places.keys():
            raise ValueError(
                f"{path} is of {len(indices)} rows, which are not the {len(self._places)} of the training set. Resume with "
                "the dataset that the training began with."
            )
        counts = json.loads(table.schema.metadata[b"self_play"])
        self.refreshes, self._last_step = counts["refreshes"], counts["last_step"]
        read = str if isinstance(next(iter(self._answers.values())), str) else json.loads
        rejected = table["rejected"].to_pylist()
        self.found = {index: [read(answer) for answer in own] for index, own in zip(indices, rejected, strict=True)}


def _write(completion: Any) -> str:
    return completion if isinstance(completion, str) else json.dumps(completion, ensure_ascii=False)
