"""Which rows a dataset has: targets, histories, negatives. Numbers only; the texts come later."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from .build_config import BuildConfig
from .drawing import Targets
from .events import Events, Ragged, make_events
from .log import InteractionLog
from .negatives import Uniform
from .seeding import make_keys
from .splits import SPLIT_NAMES, SPLITS_IN_ORDER, AtTime, check_leaks, draw_order, keep_core


_RANKING_STREAM = 1 << 20


@dataclass(frozen=True)
class Plan:
    """
    The rows of a dataset, by split, then by user, then in the order of time.

    Args:
        log ([`~trl_dmpo.data.log.InteractionLog`]):
            The log, filtered.
        config ([`BuildConfig`]):
            The options.
        form (`Form`):
            The form of prompt.
        events ([`~trl_dmpo.data.events.Events`]):
            The log as arrays.
        split (`np.ndarray` of shape `(R,)`):
            Number of each row's split: 0 training, 1 validation, 2 test.
        event (`np.ndarray` of shape `(R,)`):
            The event to be predicted.
        history, disliked ([`~trl_dmpo.data.events.Ragged`]):
            `R` lists of events before it.
        negatives (`np.ndarray` of shape `(R, K)`):
            Items; -1 where there is none, at the end.
        ranking_negatives (`np.ndarray` of shape `(H, C)`):
            Items to rank it among, for the `H` rows of validation and test, which come last; -1 where there is none, at the
            end. `C` is 0 if the row's own answers are the candidates.
        popularity (`np.ndarray` of shape `(I,)`):
            How often each item was liked in training.
        notes (`dict[str, int]`):
            What was left out or found short, with the number of rows.
    """

    log: InteractionLog
    config: BuildConfig
    form: Any
    events: Events
    split: np.ndarray
    event: np.ndarray
    history: Ragged
    disliked: Ragged
    negatives: np.ndarray
    ranking_negatives: np.ndarray
    popularity: np.ndarray
    notes: dict[str, int] = field(default_factory=dict)

    @cached_property
    def keys(self) -> np.ndarray:
        """A random key for each row, `uint64`, of shape `(R,)`: what its text is drawn by."""
        return make_keys(self.config.seed, 3, self.events.user[self.event], self.events.item[self.event])


def make_plan(log: InteractionLog, config: BuildConfig, splits: Sequence[str] = SPLITS_IN_ORDER) -> Plan:
    """
    Choose the rows.

    Args:
        log ([`~trl_dmpo.data.log.InteractionLog`]):
            The log.
        config ([`BuildConfig`]):
            The options.
        splits (`Sequence[str]`, *optional*):
            Which of `"train"`, `"validation"` and `"test"` to have rows of. Defaults to all.

    Returns:
        [`Plan`]

    Raises:
        `ValueError`: nothing is left to predict, an option does not fit the log, or there is a leak.

    Example:

    ```python
    >>> import polars as pl
    >>> from trl_dmpo.data import BuildConfig
    >>> from trl_dmpo.data.log import make_log
    >>> from trl_dmpo.data.plan import make_plan, rows_of

    >>> titles = pl.DataFrame({"item_id": range(6), "title": ["Alien", "Aliens", "Heat", "Big", "Babe", "Jaws"]})
    >>> taken = pl.DataFrame({"user_id": [7] * 4, "item_id": [0, 2, 1, 5], "timestamp": [10, 20, 30, 40]})
    >>> log = make_log(taken, titles, source="six films")
    >>> plan = make_plan(log, BuildConfig(negatives="uniform", num_negatives=2))
    >>> rows_of(plan).select("split", "history_ids", "chosen_id").rows()
    [('train', [0], 2), ('validation', [0, 2], 1), ('test', [0, 2, 1], 5)]
    ```
    """
    if config.k_core is not None:
        log = keep_core(log, config.k_core)
    form = config.make_form(log.domain)
    events = make_events(log, config.positive)
    may_ask, again = _may_ask(events, form, config)
    past = events.liked if form.history == "liked" else np.ones(len(events.user), bool)
    assigned = _assign(log, events, may_ask, config)
    event, notes = _choose(events, assigned, past, config)
    event = event[np.isin(assigned[event], [SPLITS_IN_ORDER.index(name) for name in splits])]
    event = event[np.argsort(assigned[event], kind="stable")]
    split = assigned[event]
    negatives, ranking_negatives = _draw(events, event, assigned, form, config)
    plan = Plan(
        log=log,
        config=config,
        form=form,
        events=events,
        split=split,
        event=event,
        history=events.before(event, past, config.max_history, np.where(split == 0, config.history_step, 1)),
        disliked=events.before(event, ~events.liked, config.max_history) if form.disliked else _none(len(event)),
        negatives=negatives,
        ranking_negatives=ranking_negatives,
        popularity=np.bincount(events.item[(assigned == 0) & events.liked], minlength=events.items.height),
        notes=log.notes | again | notes,
    )
    plan = _count_short(_few_shot(_without_empty(plan)))
    check_leaks(rows_of(plan), one_moment=isinstance(config.make_split(), AtTime))
    return plan


def _none(count: int) -> Ragged:
    return Ragged(np.empty(0, np.int32), np.zeros(count + 1, np.int64))


def _may_ask(events: Events, form: Any, config: BuildConfig) -> tuple[np.ndarray, dict[str, int]]:
    """Which events may be targets, and what was left out."""
    rated = form.targets == "all" or form.history == "rated" or form.disliked
    if rated and events.rating is None:
        raise ValueError(f"`prompt`: {config.prompt!r} asks about ratings, and this log has none.")
    if not events.liked.any():
        low, high = events.rating.min(), events.rating.max()  # type: ignore[union-attr]
        raise ValueError(
            f"`positive`: no rating is above {config.positive:g}; they go from {low:g} to {high:g}. Lower it."
        )
    may_ask = events.liked if form.targets == "liked" else np.ones(len(events.user), bool)
    # The answer would stand in the history, or an answer of the test among those of training
    again = int((may_ask & ~events.is_new).sum())
    reason = "interactions with a title that the user had met before, not to be predicted"
    return may_ask & events.is_new, {reason: again} if again else {}


def _assign(log: InteractionLog, events: Events, may_ask: np.ndarray, config: BuildConfig) -> np.ndarray:
    """The split of each event, as a number; 3 for none."""
    split = config.make_split()
    if isinstance(split, AtTime) and not log.has_time:
        raise ValueError("`split`: a moment in time needs time stamps, and this log has none. Try 'leave_one_out'.")
    asked = pl.DataFrame(
        {"user_id": events.user[may_ask], "item_id": events.item[may_ask], "timestamp": events.time[may_ask]}
    )
    names = split.assign(asked, config.seed)
    assigned = np.full(len(events.user), len(SPLIT_NAMES.categories), np.uint8)
    assigned[may_ask] = names.cast(SPLIT_NAMES).to_physical().fill_null(len(SPLIT_NAMES.categories)).to_numpy()
    return assigned


def _choose(
    events: Events, assigned: np.ndarray, past: np.ndarray, config: BuildConfig
) -> tuple[np.ndarray, dict[str, int]]:
    """The events to be predicted, and what was left out."""
    event = np.flatnonzero(assigned < len(SPLIT_NAMES.categories))
    known = np.concatenate([[0], np.cumsum(past, dtype=np.int32)])
    enough = known[event] - known[events.first_of_user[events.user[event]]] >= config.min_history
    event = event[enough]
    silent = len(events.user_ids) - len(np.unique(events.user[event]))
    notes = {f"users without a target after {config.min_history} others": silent} if silent else {}
    train = event[assigned[event] == 0]
    if config.train_targets != -1:
        train = train[_is_late(events.user[train], config.train_targets)]
    event = np.concatenate([train, event[assigned[event] != 0]])
    if len(event) == 0:
        raise ValueError(
            f"No rows are left: no user has {config.min_history} interactions before one that is to be predicted. Lower "
            "`min_history` or `k_core`, or choose another `split`."
        )
    return event, notes


def _is_late(user: np.ndarray, n: int) -> np.ndarray:
    """For each of the events of users, who are in order, whether it is one of its user's last `n`."""
    return np.concatenate([user[:-n] != user[n:], np.ones(min(n, len(user)), bool)])


def _draw(
    events: Events, event: np.ndarray, assigned: np.ndarray, form: Any, config: BuildConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Negatives of each row, and those to rank it among."""
    nothing = np.empty((len(event), 0), np.int32)
    in_training = assigned[event] == 0
    held_out = np.flatnonzero(~in_training)
    if not form.negatives:
        return nothing, nothing[held_out]
    targets = Targets(events, event, in_training, assigned == 0, config.seed)
    negatives = config.make_sampler().sample(targets, np.full(len(event), config.num_negatives), nothing)
    if form.listed or form.answer(events.items.row(0, named=True)) is None:
        return negatives, nothing[held_out]
    asked = replace(
        targets,
        event=event[held_out],
        in_training=in_training[held_out],
        stream=_RANKING_STREAM,
        forbidden=events.seen_pairs,
    )
    wanted = np.full(len(held_out), config.ranking_negatives)
    return negatives, Uniform().sample(asked, wanted, nothing[held_out])


def _without_empty(plan: Plan) -> Plan:
    """The plan without rows that have no negative, if fewer will do."""
    keep = plan.negatives.max(axis=1, initial=-1) >= 0
    if not plan.form.negatives or not plan.config.fewer_negatives or keep.all():
        return plan
    if not keep.any():
        raise ValueError(f"`negatives`: no row has an eligible item by {plan.config.negatives!r}. Choose others.")
    return select_rows(plan, keep, {"rows without an eligible negative, left out": int((~keep).sum())})


def _few_shot(plan: Plan) -> Plan:
    """The plan with only some users to train on; the order in which users are taken does not depend on how many."""
    count = plan.config.few_shot
    user, train = plan.events.user[plan.event], plan.split == 0
    if count is None or not train.any():
        return plan
    users = np.unique(user[train])
    if len(users) < count:
        raise ValueError(f"`few_shot`: there are {len(users)} users to train on, not {count}. Lower it.")
    place = draw_order(len(plan.events.user_ids), plan.config.seed, purpose=2)
    drawn = np.isin(user, users[np.argsort(place[users])][:count])
    return select_rows(plan, np.logical_or(~train, drawn))


def _count_short(plan: Plan) -> Plan:
    """The plan with the number of rows that have fewer negatives than asked for in its notes, or an error."""
    if not plan.form.negatives:
        return plan
    found, wanted = (plan.negatives >= 0).sum(axis=1), plan.config.num_negatives
    short = int((found < wanted).sum())
    if short and not plan.config.fewer_negatives:
        row = int(np.argmin(found))
        user, item = plan.events.user_ids[int(plan.events.user[plan.event[row]])], plan.events.item[plan.event[row]]
        raise ValueError(
            f"`negatives`: {short} rows have fewer than {wanted} eligible items, such as that of user {user!r} with target "
            f"{plan.events.items['title'][int(item)]!r}, which has {found[row]}. Lower `num_negatives`, mix in 'uniform', or "
            "set `fewer_negatives=True`."
        )
    few = int((plan.ranking_negatives < 0).any(axis=1).sum())
    notes = {
        f"rows with fewer than {wanted} negatives": short,
        f"rows to rank among fewer than {plan.config.ranking_negatives} others": few,
    }
    return replace(plan, notes=plan.notes | {reason: count for reason, count in notes.items() if count})


def select_rows(plan: Plan, keep: np.ndarray, notes: dict[str, int] | None = None) -> Plan:
    """
    The plan with some of its rows.

    Args:
        plan ([`Plan`]):
            The rows.
        keep (`np.ndarray` of shape `(R,)`):
            Which to keep.
        notes (`dict[str, int]`, *optional*):
            What to add to the notes.

    Returns:
        [`Plan`]
    """
    if keep.all():
        return replace(plan, notes=plan.notes | (notes or {}))
    return replace(
        plan,
        split=plan.split[keep],
        event=plan.event[keep],
        history=plan.history.select(keep),
        disliked=plan.disliked.select(keep),
        negatives=plan.negatives[keep],
        ranking_negatives=plan.ranking_negatives[keep[plan.split > 0]],
        notes=plan.notes | (notes or {}),
    )


def rows_of(plan: Plan) -> pl.DataFrame:
    """The rows by their ids, as [`~trl_dmpo.data.splits.check_leaks`] takes them."""
    events = plan.events
    item_ids = events.items["item_id"]
    history = events.item[plan.history.values]
    return pl.DataFrame(
        {
            "split": SPLIT_NAMES.categories.gather(plan.split),
            "user_id": events.user_ids.gather(events.user[plan.event]),
            "chosen_id": item_ids.gather(events.item[plan.event]),
            "timestamp": events.time[plan.event],
            "history_ids": as_list_column(item_ids.gather(history), plan.history.offsets),
            "rejected_ids": as_list_column(*_flat(plan.negatives, item_ids)),
        }
    )


def _flat(items: np.ndarray, ids: pl.Series) -> tuple[pl.Series, np.ndarray]:
    lengths = (items >= 0).sum(axis=1)
    return ids.gather(items[items >= 0]), np.concatenate([[0], np.cumsum(lengths)])


def as_list_column(values: pl.Series, offsets: np.ndarray) -> pl.Series:
    """The lists `values[offsets[i]:offsets[i + 1]]` as a column."""
    # Not of large lists: polars 1 reads large lists of strings wrongly
    return pl.Series(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.to_arrow()))
