"""From a log to rows with text: `build_dataset`."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from .build_config import BuildConfig
from .events import Ragged
from .log import InteractionLog
from .plan import Plan, make_plan
from .prompts import Case, Text, fit_history, token_counter
from .seeding import RandomStream, make_keys, uniforms
from .splits import SPLIT_NAMES


if TYPE_CHECKING:
    from datasets import DatasetDict

CONFIGURATIONS = ("preference", "sft", "ranking")
_CHUNK = 20_000  # rows whose texts are in memory at a time
_SHUFFLE = 4


def build_dataset(
    log: InteractionLog, configuration: str = "preference", tokenizer: Any = None, **options: Any
) -> "DatasetDict":
    """
    The dataset of a log: split, with negatives and prompts, checked for leaks.

    Args:
        log ([`~trl_dmpo.data.log.InteractionLog`]):
            The log, from [`load_interactions`].
        configuration (`str`, *optional*, defaults to `"preference"`):
            `"preference"` (prompt, chosen, rejected), `"sft"` (prompt, completion) or `"ranking"` (prompt, candidates, label;
            without training rows).
        tokenizer (*optional*):
            Counts tokens for `max_prompt_tokens`.
        options:
            Those of [`BuildConfig`].

    Returns:
        [`~datasets.DatasetDict`]: `train`, `validation` and `test`, those that have rows. Beside the text, the columns
        `user_id`, `chosen_id`, `rejected_ids` (or `candidate_ids`), `history_ids` and `timestamp`.

    Raises:
        `ValueError`: an option is out of range or does not fit the log, nothing is left to predict, or there is a leak.

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data import build_dataset
    >>> from trl_dmpo.data.log import make_log

    >>> titles = pl.DataFrame({"item_id": range(6), "title": ["Alien", "Aliens", "Heat", "Big", "Babe", "Jaws"]})
    >>> taken = pl.DataFrame({"user_id": [7] * 4, "item_id": [0, 2, 1, 5], "timestamp": [10, 20, 30, 40]})
    >>> log = make_log(taken, titles, source="six films", domain="film")
    >>> data = build_dataset(log, negatives="uniform", num_negatives=2, prompt="next_item(wording='quotes')")
    >>> data["test"][0]["chosen"], sorted(data["test"][0]["rejected"])
    (' Jaws', [' Babe', ' Big'])
    ```
    """
    from datasets import Dataset, DatasetDict

    if configuration not in CONFIGURATIONS:
        raise ValueError(f"`configuration` is {configuration!r}, but it is one of: {', '.join(CONFIGURATIONS)}.")
    plan = make_plan(log, BuildConfig(**options))
    chunks: dict[str, list[pa.Table]] = {}
    for split, tables in write_texts(plan, tokenizer):
        if configuration in tables:
            chunks.setdefault(split, []).append(tables[configuration])
    return DatasetDict({split: Dataset(pa.concat_tables(tables)) for split, tables in chunks.items()})


def write_texts(
    plan: Plan, tokenizer: Any = None, shortened: list[int] | None = None
) -> Iterator[tuple[str, dict[str, pa.Table]]]:
    """
    The rows of a plan with their texts, some thousand at a time.

    Args:
        plan ([`~trl_dmpo.data.plan.Plan`]):
            The rows.
        tokenizer (*optional*):
            Counts tokens for `max_prompt_tokens`.
        shortened (`list[int]`, *optional*):
            Gets, of each prompt that had to be shortened, how many items of the history it leaves out.

    Yields:
        `tuple[str, dict[str, pa.Table]]`: the split of the rows, and a table for each configuration that has them.

    Raises:
        `ValueError`: a row cannot be written, which the message names.
    """
    items = plan.events.items.to_dicts()
    named = [plan.form.answer(item) for item in items]
    # What names an item is written once for the item, not once for every row that it is in
    names = None if named[0] is None else pa.array(named)
    writer = _Writer(plan, _make_write(plan, tokenizer), items, names, [] if shortened is None else shortened)
    for number, split in enumerate(SPLIT_NAMES.categories):
        rows = np.flatnonzero(plan.split == number)
        for start in range(0, len(rows), _CHUNK):
            yield split, writer.tables(rows[start : start + _CHUNK])


def _make_write(plan: Plan, tokenizer: Any) -> Callable[[Case], tuple[Text, int]]:
    """From a case to its text and the number of items left out of its history."""
    limit = plan.config.max_prompt_tokens
    if limit is None:
        return lambda case: (plan.form.write(case), 0)
    if tokenizer is None:
        raise ValueError("`max_prompt_tokens` counts tokens: give a tokenizer.")
    return partial(fit_history, plan.form, count_tokens=token_counter(tokenizer), max_tokens=limit)


class _Writer(NamedTuple):
    """What rows are written with. `rows` are consecutive rows of the plan and of one split."""

    plan: Plan
    write: Callable[[Case], tuple[Text, int]]
    items: list[dict]
    names: pa.Array | None
    shortened: list[int]

    def tables(self, rows: np.ndarray) -> dict[str, pa.Table]:
        """The rows in each configuration."""
        plan, negatives = self.plan, self.plan.negatives[rows]
        # A prompt that names no candidate is the same whatever they are
        texts = self.texts(rows, negatives if self.names is None or plan.form.listed else negatives[:, :0])
        prompts = {"prompt": pa.array([text.prompt for text in texts])}
        ids = self.ids(rows)
        chosen, rejected = self.answers(rows, texts)
        rejected_ids = {"rejected_ids": self.item_lists(negatives)} if plan.form.negatives else {}
        tables = {
            "preference": pa.table({**prompts, "chosen": chosen, "rejected": rejected, **ids, **rejected_ids}),
            "sft": pa.table({**prompts, "completion": chosen, **ids}),
        }
        if plan.split[rows[0]] > 0:
            tables["ranking"] = pa.table({**prompts, **self.candidates(rows, texts), **ids})
        return tables

    def answers(self, rows: np.ndarray, texts: list[Text]) -> tuple[pa.Array, pa.Array]:
        """What was chosen and what was rejected."""
        if self.names is None:
            return pa.array([text.chosen for text in texts]), pa.array([text.rejected for text in texts])
        chosen = self.names.take(pa.array(self.plan.events.item[self.plan.event[rows]]))
        return chosen, _lists_of(self.names, self.plan.negatives[rows])

    def ids(self, rows: np.ndarray) -> dict[str, pa.Array]:
        """What every configuration says about its rows."""
        events, event, history = self.plan.events, self.plan.event[rows], self.plan.history
        offsets = history.offsets[rows[0] : rows[-1] + 2]
        taken = events.item[history.values[offsets[0] : offsets[-1]]]
        item_ids = events.items["item_id"]
        return {
            "user_id": events.user_ids.gather(events.user[event]).to_arrow(),
            "chosen_id": item_ids.gather(events.item[event]).to_arrow(),
            "history_ids": _list_array(item_ids.gather(taken).to_arrow(), offsets - offsets[0]),
            "timestamp": pa.array(events.time[event]),
        }

    def item_lists(self, items: np.ndarray) -> pa.Array:
        return _lists_of(self.plan.events.items["item_id"].to_arrow(), items)

    def texts(self, rows: np.ndarray, negatives: np.ndarray) -> list[Text]:
        texts: list[Text] = []
        for case in self.cases(rows, negatives):
            try:
                text, left_out = self.write(case)
            except ValueError as error:
                user = self.plan.events.user_ids[int(self.plan.events.user[self.plan.event[rows[len(texts)]]])]
                raise ValueError(f"The row of user {user!r} with target {case.target['title']!r}: {error}") from error
            texts.append(text)
            if left_out:
                self.shortened.append(left_out)
        return texts

    def cases(self, rows: np.ndarray, negatives: np.ndarray) -> Iterator[Case]:
        plan, items = self.plan, self.items
        with_rating = plan.form.history == "rated"
        event = plan.event[rows]
        columns = (
            self.described(event, with_rating or plan.form.targets == "all"),
            self.described_lists(plan.history, rows, with_rating),
            self.described_lists(plan.disliked, rows, False),
            plan.events.liked[event].tolist(),
            negatives.tolist(),
            plan.keys[rows].tolist(),
        )
        for target, history, disliked, liked, others, key in zip(*columns, strict=True):
            negative = [items[other] for other in others if other >= 0]
            yield Case(history, disliked, target, liked, negative, RandomStream(key))

    def described(self, events: np.ndarray, with_rating: bool) -> list[dict]:
        """The items of events, with this user's rating if asked for."""
        items = [self.items[number] for number in self.plan.events.item[events].tolist()]
        if not with_rating:
            return items
        ratings = self.plan.events.rating[events].tolist()  # type: ignore[index]
        return [item | {"rating": rating} for item, rating in zip(items, ratings, strict=True)]

    def described_lists(self, lists: Ragged, rows: np.ndarray, with_rating: bool) -> Iterator[list[dict]]:
        offsets = lists.offsets[rows[0] : rows[-1] + 2]
        described = self.described(lists.values[offsets[0] : offsets[-1]], with_rating)
        return (described[start:stop] for start, stop in pairwise((offsets - offsets[0]).tolist()))

    def candidates(self, rows: np.ndarray, texts: list[Text]) -> dict[str, pa.Array]:
        """Each row's candidates in random order, and the place of the chosen one."""
        plan, others = self.plan, self.plan.negatives[rows]
        if plan.ranking_negatives.shape[1]:
            others = plan.ranking_negatives[rows - np.flatnonzero(plan.split > 0)[0]]
        items = np.concatenate([plan.events.item[plan.event[rows], None], others], axis=1)
        answers = [[text.chosen, *text.rejected] for text in texts] if self.names is None else None
        lengths = (items >= 0).sum(axis=1) if answers is None else np.array([len(row) for row in answers])
        order = self.shuffled(rows, lengths)
        label = {"label": pa.array(np.argmin(order, axis=1))}
        ids = {}
        if plan.form.negatives:
            items = np.take_along_axis(items, order, axis=1)
            ids = {"candidate_ids": self.item_lists(items)}
        if answers is None:
            return {"candidates": _lists_of(self.names, items), **label, **ids}
        mixed = [[row[i] for i in places[: len(row)]] for row, places in zip(answers, order.tolist(), strict=True)]
        return {"candidates": pa.array(mixed), **label, **ids}

    def shuffled(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """A random order of the first of each row's places, of shape `(len(rows), max(lengths))`."""
        places = np.arange(lengths.max())
        draws = uniforms(make_keys(self.plan.config.seed, _SHUFFLE)[:, None] ^ self.plan.keys[rows, None], places)
        return np.argsort(np.where(places < lengths[:, None], draws, np.inf), axis=1, kind="stable")


def _lists_of(values: pa.Array, numbers: np.ndarray) -> pa.Array:
    """The rows of a matrix of places in `values`, without its -1, as lists of these values."""
    real = numbers >= 0
    offsets = np.concatenate([[0], np.cumsum(real.sum(axis=1))])
    return _list_array(values.take(pa.array(numbers[real])), offsets)


def _list_array(values: pa.Array, offsets: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
