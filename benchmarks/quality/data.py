"""The rows of an experiment: what a start learns, what the preference stage learns, and what both are judged by."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from datasets import Dataset

from trl_dmpo.data import build_dataset, load_interactions, load_rows
from trl_dmpo.data.log import InteractionLog
from trl_dmpo.data.negatives import Nearest
from trl_dmpo.data.splits import SPLIT_NAMES, TRAIN
from trl_dmpo.ranking.rows import FullCatalogue, RankingRows, load_ranking_rows

from .baselines import liked_before, refuse_leaks


FOLDERS = [
    Path(os.environ.get("TRL_DMPO_ASSETS", Path.home() / ".cache" / "trl-dmpo-assets")),
    Path(__file__).parents[3] / "shared" / "data",
]
MAX_HISTORY = 20
# The answers are lines, as the titles of a history are: the language model of a preset reads and writes nothing else
LINES = r"template(prompt='{history}\n', separator='\n')"


class Task(NamedTuple):
    """
    The data of one seed.

    Args:
        titles (`list[str]`):
            For a tokenizer.
        texts (`Callable[..., Dataset]`):
            From options to rows with `prompt` and `chosen` that a start learns.
        validation_texts (`Callable[..., Dataset]`):
            From the same options to rows that say when to stop.
        rows (`Callable[..., Dataset]`):
            From options to the rows of a preference stage: `prompt`, `chosen`, `rejected`.
        validation (`dict[str, RankingRows]`):
            What settings are chosen by.
        test (`dict[str, RankingRows]`):
            What is reported, never looked at before.
        liked (`Callable[[], pl.DataFrame]`):
            What a classical recommender may learn from.
        rated (`Callable[[], pl.DataFrame]`, *optional*):
            The same, with what was not liked, of a log.
        items (`Callable[[], pl.DataFrame]`, *optional*):
            The catalogue of a log.
    """

    titles: list[str]
    texts: Callable[..., Dataset]
    validation_texts: Callable[..., Dataset]
    rows: Callable[..., Dataset]
    validation: dict[str, RankingRows]
    test: dict[str, RankingRows]
    liked: Callable[[], Any]
    rated: Callable[[], Any] | None = None
    items: Callable[[], Any] | None = None


def find(name: str, folders: Sequence[Path] = ()) -> Path:
    """The file or folder `name` in the first of the data folders that has it."""
    for folder in [*folders, *FOLDERS]:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(
        f"{name} is in none of {', '.join(map(str, [*folders, *FOLDERS]))}. Give the folder that has it with `--data`."
    )


def make_task(options: Mapping[str, Any], seed: int, folders: Sequence[Path] = ()) -> Task:
    """The data that the section `data` of an experiment describes."""
    options = dict(options)
    kind = options.pop("kind")
    if kind not in TASKS:
        raise ValueError(f"`data.kind` is {kind!r}, but it is one of: {', '.join(TASKS)}.")
    return TASKS[kind](**options, seed=seed, folders=folders)


def make_sequence_task(
    source: str,
    seed: int,
    folders: Sequence[Path] = (),
    max_history: int = MAX_HISTORY,
    prompt: str = LINES,
    targets: int = 2,
    seen: bool = True,
    step: int = 10,
    validation_users: int | None = None,
    test_users: int | None = None,
    full_catalogue: bool = False,
    disliked: int | None = None,
) -> Task:
    """
    The next item of a user, from a log: of each user the last is to be told in the test, the one before in validation.

    Args:
        source (`str`):
            The log.
        seed (`int`):
            Draws the rows of training and their negatives. Validation and test are the same for all seeds.
        folders (`Sequence[Path]`, *optional*):
            Where to look for it.
        max_history (`int`, *optional*, defaults to `20`):
            Items of a prompt.
        prompt (`str`, *optional*):
            Its form, as of [`~trl_dmpo.data.BuildConfig`]. By default the titles, a line each.
        targets (`int`, *optional*, defaults to `2`):
            Items of a user that are told in a preference stage: those before the one of validation.
        seen (`bool`, *optional*, defaults to `True`):
            Whether the start has been trained on these, too.
        step (`int`, *optional*, defaults to `10`):
            Items from one text of a user that the start learns to the next.
        validation_users, test_users (`int`, *optional*):
            How many users at most. By default all.
        full_catalogue (`bool`, *optional*, defaults to `False`):
            Whether to rank all items that the user has not met, too.
        disliked (`int`, *optional*):
            How many items that the user rated low to rank the right one among, too, in validation and in the test, of
            prompts that are titles, a line each: those nearest to it in the order of time. They are no negatives of
            training.
    """
    log = without_ties(load_interactions(find(source, folders)))
    common = {"split": "leave_one_out", "prompt": prompt, "max_history": max_history}
    ranked = build_dataset(log, configuration="ranking", negatives="uniform", seed=0, **common)
    everything = build_dataset(log, negatives="uniform", num_negatives=1, train_targets=-1, seed=0, **common)
    known = {"split": AllTraining(), "prompt": prompt, "max_history": max_history, "train_targets": targets}
    learnt = everything["train"] if seen else _without_last(everything["train"], targets)
    validation = {"sampled": _ranking(ranked["validation"], "sampled", validation_users)}
    test = {"sampled": _ranking(ranked["test"], "sampled", test_users)}
    if full_catalogue:
        test["full"] = rank_everything(test["sampled"], log)
    trained_on, held_out = before_validation(log, everything["validation"]), frozenset()
    if disliked:
        found = hold_out_disliked(log, disliked, test["sampled"], validation["sampled"])
        for rows, of_users in zip((test, validation), found, strict=True):
            rows["disliked"] = among_disliked(rows["sampled"], of_users, log)
        held_out = frozenset((user, item) for users in found for user, items in users.items() for item in items)
        trained_on = without(trained_on, held_out)
    for rows in (*validation.values(), *test.values()):
        refuse_leaks(trained_on.interactions, rows)
    return Task(
        titles=log.items["title"].to_list(),
        texts=lambda rows=None: limit(learnt.select(windows(learnt["user_id"][:], step)), rows, seed),
        validation_texts=lambda rows=None: limit(everything["validation"], rows and min(rows, 200), seed=0),
        rows=partial(_preference_rows, trained_on, held_out=held_out, seed=seed, **known),
        validation=validation,
        test=test,
        liked=lambda: liked_before(log, *validation.values(), *test.values()),
        rated=lambda: trained_on.interactions,
        items=lambda: log.items,
    )


@dataclasses.dataclass(frozen=True)
class AllTraining:
    """A split without validation and test, for a log that has neither."""

    def assign(self, targets: pl.DataFrame, seed: int) -> pl.Series:
        return pl.Series([TRAIN] * len(targets), dtype=SPLIT_NAMES)


def without_ties(log: InteractionLog) -> InteractionLog:
    """
    The log with time stamps that are distinct for a user: what the user did at one time is put in an order at random.

    Half of the ratings of MovieLens-100K are of the same second as another of the user. Logs have these in the order of the
    numbers of items: a model of sequences could learn to count.
    """
    drawn = pl.Series("drawn", np.random.default_rng(0).permutation(len(log.interactions)))
    ordered = log.interactions.with_columns(drawn).sort("user_id", "timestamp", "drawn")
    number = pl.int_range(pl.len()).over("user_id", "timestamp")
    longest = int(ordered.select(number.max()).item()) + 1
    return dataclasses.replace(
        log, interactions=ordered.with_columns(pl.col("timestamp") * longest + number).drop("drawn")
    )


def before_validation(log: InteractionLog, validation: Dataset) -> InteractionLog:
    """
    The log without what each user did from the target of validation on.

    Negatives of the whole log are never what a user likes later, as [`~trl_dmpo.data.build_dataset`] promises: a model could
    learn which candidates of the test were never rejected. Of this log they may be.
    """
    columns = ["user_id", "chosen_id", "timestamp"]
    held_out = validation.select_columns(columns).to_polars().rename({"chosen_id": "item_id", "timestamp": "until"})
    kept = (
        log.interactions.join(held_out.select("user_id", "until"), on="user_id", how="left")
        .filter((pl.col("timestamp") <= pl.col("until")) | pl.col("until").is_null())
        .join(held_out, on=["user_id", "item_id"], how="anti")
    )
    return dataclasses.replace(log, interactions=kept.select(log.interactions.columns))


def hold_out_disliked(
    log: InteractionLog, count: int, *rows: RankingRows, positive: float = 3.0
) -> list[dict[Any, list]]:
    """
    What users rated low, nearest in the order of time to what they are to be told: what they did long before would be told
    apart by its age.

    Args:
        log ([`~trl_dmpo.data.log.InteractionLog`]):
            With ratings, in the order of time.
        count (`int`):
            Items of a user for each of `rows`. Users who rated fewer low are left out.
        rows ([`~trl_dmpo.ranking.rows.RankingRows`]):
            What is to be told; earlier ones have the first choice.
        positive (`float`, *optional*, defaults to `3.0`):
            What is rated no higher is disliked.

    Returns:
        `list[dict]`: for each of `rows`, from users to items.
    """
    titles = log.items.select("item_id", "title")
    rated = log.interactions.with_row_index("place").join(titles, on="item_id", how="left", maintain_order="left")
    # An item may be there twice, under one title
    low = rated.join(rated.filter(pl.col("rating") > positive), on=["user_id", "title"], how="anti")
    low = low.unique(["user_id", "title"], keep="first", maintain_order=True)
    places = {(user, item): place for place, user, item in rated.select("place", "user_id", "item_id").iter_rows()}
    of_users = low.group_by("user_id").agg("place", "item_id").filter(pl.col("place").list.len() >= count * len(rows))
    left = {user: dict(zip(*both, strict=True)) for user, *both in of_users.iter_rows()}

    def take(user: Any, target: Any) -> list:
        nearest = sorted(left[user], key=lambda place: abs(place - places[user, target]))
        return [left[user].pop(place) for place in nearest[:count]]

    return [
        {user: take(user, target) for user, target in zip(*targets, strict=True) if user in left}
        for targets in ((each.columns["user_id"], each.columns["chosen_id"]) for each in rows)
    ]


def without(log: InteractionLog, pairs: Set[tuple[Any, Any]]) -> InteractionLog:
    """The log without some items of users, nor others of the same title."""
    titles = log.items.select("item_id", "title")
    rated = log.interactions.join(titles, on="item_id", how="left", maintain_order="left")
    users, items = ([pair[place] for pair in pairs] for place in (0, 1))
    schema = {name: rated.schema[name] for name in ("user_id", "item_id")}
    left_out = pl.DataFrame({"user_id": users, "item_id": items}, schema=schema).join(titles, on="item_id")
    kept = rated.join(left_out, on=["user_id", "title"], how="anti", maintain_order="left")
    return dataclasses.replace(log, interactions=kept.select(log.interactions.columns))


def among_disliked(rows: RankingRows, disliked: Mapping[Any, list], log: InteractionLog) -> RankingRows:
    """The rows of users with disliked items, with these as the other candidates."""
    titles = dict(log.items.select("item_id", "title").iter_rows())
    kept = [place for place, user in enumerate(rows.columns["user_id"]) if user in disliked]
    if not kept:
        raise ValueError("`data.disliked`: no user of the rows rated twice as many items low. Ask for fewer.")
    columns = {name: [values[place] for place in kept] for name, values in rows.columns.items()}
    columns["candidate_ids"] = [
        [item, *disliked[user]] for item, user in zip(columns["chosen_id"], columns["user_id"], strict=True)
    ]
    return dataclasses.replace(
        rows,
        name="disliked",
        prompts=[rows.prompts[place] for place in kept],
        candidates=[[titles[item] for item in items] for items in columns["candidate_ids"]],
        labels=np.zeros(len(kept), dtype=np.int64),
        columns=columns,
        places=rows.places[kept],
    )


def windows(users: Sequence[Any], step: int) -> list[int]:
    """
    Rows whose histories and answers together hold all items of all users, about `max_history / step` times each.

    Args:
        users (`Sequence`):
            The user of each row; rows of a user are together, in the order of time.
        step (`int`):
            Rows from one that is taken to the next.

    Returns:
        `list[int]`: of each user the last row, and every `step`-th before it.
    """
    starts = np.flatnonzero([place == 0 or users[place] != users[place - 1] for place in range(len(users))]).tolist()
    ends = [*starts[1:], len(users)]
    found = [range(end - 1, start - 1, -step) for start, end in zip(starts, ends, strict=True)]
    return sorted(row for rows in found for row in rows)


def _without_last(rows: Dataset, count: int) -> Dataset:
    """Without the last `count` rows of each user."""
    users = rows["user_id"][:]
    return rows.select([row for row in range(len(users) - count) if users[row + count] == users[row]])


def _preference_rows(
    log: InteractionLog,
    seed: int,
    rows: int,
    k: int = 15,
    negatives: str = "uniform",
    pool: int = 19,
    held_out: Set[tuple[Any, Any]] = frozenset(),
    **common: Any,
) -> Dataset:
    """
    The same prompts and chosen items for all samplers that find enough, and every `k`; and of a row's pool of negatives the
    first `k`. `held_out` are users and items that are not drawn.
    """
    sampler = Nearest(item_embeddings(log), top=50) if negatives == "hard" else negatives
    # Few users disliked as many items as are asked for
    drawn = {"negatives": sampler, "num_negatives": max(k, pool), "fewer_negatives": negatives == "disliked"}
    data = build_dataset(log, **drawn, seed=seed, **common)["train"]

    def take(row: dict[str, Any]) -> dict[str, list]:
        kept = [place for place, item in enumerate(row["rejected_ids"]) if (row["user_id"], item) not in held_out][:k]
        return {name: [row[name][place] for place in kept] for name in ("rejected", "rejected_ids")}

    return limit(data, rows, seed).map(take)


def item_embeddings(log: InteractionLog, size: int = 32) -> Any:
    """Items that the same users liked are near: the largest singular vectors of what users liked."""
    every = {"split": AllTraining(), "train_targets": -1}
    liked = build_dataset(log, "sft", prompt=LINES, max_history=1, **every)["train"].to_polars()
    users, items = liked["user_id"].unique().sort(), log.items["item_id"]
    taken = np.zeros((len(users), len(items)))
    taken[users.search_sorted(liked["user_id"]), items.sort().search_sorted(liked["chosen_id"])] = 1
    # Or else all are near the popular ones
    taken /= np.sqrt(np.maximum(taken.sum(axis=0), 1))
    vectors = np.linalg.svd(taken, full_matrices=False)[2][:size].T
    return pl.DataFrame({"item_id": items.sort(), "embedding": vectors.tolist()})


def limit(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """So many rows at random. Those of a smaller number are among those of a larger one."""
    if count is None:
        return rows
    if count > len(rows):
        raise ValueError(f"{count:,} rows are asked for, but there are {len(rows):,}.")
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())


def _ranking(rows: Dataset, name: str, count: int | None = None) -> RankingRows:
    chosen = limit(rows, None if count is None else min(count, len(rows)), seed=0)
    return dataclasses.replace(load_ranking_rows(list(chosen)), name=name)


def rank_everything(rows: RankingRows, log: InteractionLog) -> RankingRows:
    """The rows with all titles as candidates, but those of items that the user met in any way."""
    titles = dict(log.items.select("item_id", "title").iter_rows())
    answers = list(dict.fromkeys(titles.values()))
    number = {title: place for place, title in enumerate(answers)}
    ids = {number[title]: item for item, title in reversed(titles.items())}
    met = dict(log.interactions.group_by("user_id").agg("item_id").iter_rows())
    chosen = [number[titles[item]] for item in rows.columns["chosen_id"]]
    kept = [
        np.setdiff1d(
            np.arange(len(answers)), [number[titles[item]] for item in met[user] if number[titles[item]] != right]
        )
        for user, right in zip(rows.columns["user_id"], chosen, strict=True)
    ]
    labels = np.array([np.searchsorted(places, right) for places, right in zip(kept, chosen, strict=True)])
    candidate_ids = [[ids[place] for place in places] for places in kept]
    # Of items with the same title it is not always the first that was chosen
    for found, label, item in zip(candidate_ids, labels, rows.columns["chosen_id"], strict=True):
        found[label] = item
    return dataclasses.replace(
        rows,
        name="full",
        candidates=[[answers[place] for place in places] for places in kept],
        labels=labels,
        columns=rows.columns | {"candidate_ids": candidate_ids},
        catalogue=FullCatalogue(answers, kept),
    )


def make_pairs_task(
    train: str,
    test: Mapping[str, str],
    seed: int,
    folders: Sequence[Path] = (),
    max_history: int | None = None,
    validation_rows: int = 200,
    test_rows: int | Mapping[str, int] | None = None,
) -> Task:
    """
    Which of two items a user will watch, from files of the DMPO paper.

    Args:
        train (`str`):
            What the names of the files to train on begin with: `"dmpo/ml_1m"`.
        test (`Mapping[str, str]`):
            From names to what the names of the files to test on begin with.
        seed (`int`):
            Draws the users of training, where not all are asked for. Validation and test are the same for all seeds.
        folders (`Sequence[Path]`, *optional*):
            Where to look for them.
        max_history (`int`, *optional*):
            Keep only so many titles of a history, the last.
        validation_rows (`int`, *optional*, defaults to `200`):
            Rows of the test files of `train` that settings are chosen by.
        test_rows (`int` or `Mapping[str, int]`, *optional*):
            How many of the others to test on, or of each of `test`. By default all.
    """
    most = test_rows if isinstance(test_rows, Mapping) else dict.fromkeys(test, test_rows)
    if most.keys() - test.keys():
        raise ValueError(f"`data.test_rows` has {min(most.keys() - test.keys())!r}, but there are: {', '.join(test)}.")

    def records(name: str) -> list[dict]:
        found = json.loads(find(f"{name}.json", folders).read_text(encoding="utf-8"))
        return [each | {"instruction": shorten(each["instruction"], max_history)} for each in map(alike, found)]

    def evaluated(name: str) -> tuple[list[dict], list[dict]]:
        rows = records(f"{name}_eval")
        order = np.random.default_rng(0).permutation(len(rows))
        parts = order[:validation_rows], order[validation_rows:]
        validated, tested = ([rows[place] for place in part] for part in parts)
        return validated, tested

    def read(given: list[dict], form: str) -> Dataset:
        found = load_rows(given, "dmpo", grouped=form == "titles", on_invalid_row="drop")
        return found.map(list_in_turn, with_indices=True) if form == "titles" else found

    def rows(form: str, users: int | None = None, k: int = 5, listed: int | None = None) -> Dataset:
        # The files of other K may have other users
        found = read(of_users(records(f"{train}_dpo_5"), users, max(k, listed or k), seed), form)
        return found.map(lambda row: {"rejected": row["rejected"][:k]})

    def texts(form: str, users: int | None = None) -> Dataset:
        return rows(form, users, k=1)

    def ranking(given: list[dict], form: str, name: str) -> RankingRows:
        found = dataclasses.replace(load_ranking_rows(read(given, form)), name=name)
        # The answer is no title otherwise
        return (
            with_titles_as_ids(found, [titles_of(prompt)[0] for prompt in found.prompts])
            if form == "titles"
            else found
        )

    def liked() -> pl.DataFrame:
        given = json.loads(find(f"{train}_dpo_5.json", folders).read_text(encoding="utf-8"))
        chosen = load_rows(list(map(alike, given)), "dmpo", grouped=True, on_invalid_row="drop")
        histories = [titles_of(prompt)[0] for prompt in chosen["prompt"]]
        return as_log(
            {
                user: [*seen, title.strip()]
                for user, (seen, title) in enumerate(zip(histories, chosen["chosen"], strict=True))
            }
        )

    return Task(
        titles=[],
        texts=texts,
        validation_texts=lambda form, users=None: read(evaluated(train)[0][:100], form),
        rows=rows,
        validation={form: ranking(evaluated(train)[0], form, form) for form in FORMS},
        test={
            f"{name}, {form}": ranking(evaluated(start)[1][: most.get(name)], form, f"{name}, {form}")
            for name, start in test.items()
            for form in FORMS
        },
        liked=liked,
    )


def with_titles_as_ids(rows: RankingRows, histories: list[list[str]]) -> RankingRows:
    """The rows with what classical recommenders ask for, in which an item's title stands for its id."""
    ids = {"history_ids": histories, "candidate_ids": [[title.strip() for title in each] for each in rows.candidates]}
    users = rows.columns.get("user_id", [f"{rows.name}[{place}]" for place in rows.places])
    return dataclasses.replace(rows, columns=rows.columns | ids | {"user_id": users})


def as_log(taken: Mapping[Any, Sequence[str]]) -> pl.DataFrame:
    """What users took, each title once, as of [`~benchmarks.quality.baselines.liked_before`]."""
    found = [
        (str(user), title, place)
        for user, titles in taken.items()
        for place, title in enumerate(dict.fromkeys(titles))
    ]
    return pl.DataFrame(found, ["user_id", "item_id", "timestamp"], orient="row")


# The paper's: an order of two listed titles is the answer; or one of K + 1 listed titles is, so that K negatives have one prompt
FORMS = ("orders", "titles")
_HISTORY = re.compile(r"(?P<before>.*?:) (?P<history> <Title:.*> )\. (?P<after>Rank the likelihood .*)", re.DOTALL)


_YEAR = re.compile(r"(<Title:[^>,(]+?)\s*(?:[,(][^>]*)?\(\d{4}\)\s*>")
_SPACE = re.compile(r"(<Title:[^>]*?)\s+>")


def alike(record: Mapping[str, Any]) -> dict[str, Any]:
    """
    A row of the paper with titles as the others have them. Those of MovieLens in tests have years, and what their training file
    cuts off, from the first comma or bracket: ", The" tells it nothing. Some end in a space.
    """

    def text(value: Any) -> Any:
        return [text(each) for each in value] if isinstance(value, list) else _cut(value)

    return {name: text(value) for name, value in record.items()}


def _cut(text: str) -> str:
    return _SPACE.sub(r"\1>", _YEAR.sub(r"\1>", text))


def shorten(instruction: str, count: int | None) -> str:
    """An instruction of the paper with only the last `count` titles of its history."""
    found = _HISTORY.fullmatch(instruction)
    if count is None or found is None:
        return instruction
    titles = found["history"].removeprefix(" <Title:").removesuffix("> ").split(">  <Title:")[-count:]
    return f"{found['before']} {_as_list(titles)}. {found['after']}"


def list_in_turn(row: Mapping[str, Any], number: int) -> dict[str, str]:
    """
    The prompt of a row in which the chosen title is listed first, second, third in turn, the others at random: in the order of the
    alphabet it is the second of two in 65 of 100 rows, and a model may learn that.
    """
    _, given = titles_of(row["prompt"])
    chosen = row["chosen"].strip()
    others = [title for title in given if title != chosen]
    others = [others[place] for place in np.random.default_rng(number).permutation(len(others))]
    turn = number % len(given)
    before, old, after = row["prompt"].rpartition(_as_list(given))
    if not old:
        raise ValueError(f"The prompt of row {number} does not list {given} in its form: {row['prompt']!r}.")
    return {"prompt": before + _as_list([*others[:turn], chosen, *others[turn:]]) + after}


def _as_list(titles: Sequence[str]) -> str:
    return "".join(f" <Title:{title}> " for title in titles)


def titles_of(prompt: str) -> tuple[list[str], list[str]]:
    """The titles of a prompt of the paper: of the history, and those to choose from."""
    history, _, choice = prompt.partition("> . ")
    return tuple(re.findall(r"<Title:\s*([^>]*?)\s*(?:>|$)", part) for part in (history, choice))


def of_users(records: Sequence[dict], count: int | None, k: int, seed: int) -> list[dict]:
    """
    Of so many users `k` rows each, both at random, for in the files the first rejected items are of another kind than the last.
    Those of smaller numbers are among those of larger ones.

    Raises:
        `ValueError`: there are fewer users, or one has fewer rows.
    """
    rows: dict[str, list[dict]] = {}
    for record in records:
        rows.setdefault(record["instruction"].partition(" . ")[0], []).append(record)
    fewest = min(map(len, rows.values()))
    for name, asked, most in (("users", count or 1, len(rows)), ("k", k, fewest)):
        if asked > most:
            raise ValueError(f"`rows.{name}` is {asked}, but there are {most}.")
    names = list(rows)
    order = np.random.default_rng(seed).permutation(len(names))[:count]

    def some(place: int) -> list[dict]:
        own = rows[names[place]]
        return [own[number] for number in np.random.default_rng([seed, place]).permutation(len(own))[:k]]

    return [record for place in sorted(order.tolist()) for record in some(place)]


def make_listed_task(
    file: str,
    seed: int,
    folders: Sequence[Path] = (),
    form: str = "listed",
    train_rows: int | None = None,
    validation_users: int = 20,
    test_users: int = 50,
    rows_of_user: int = 10,
) -> Task:
    """
    Which of the candidates of a row was taken, from a file of the LLaRA form, split by user, for all seeds alike.

    Args:
        file (`str`):
            The file.
        seed (`int`):
            Draws the rows of training, of all that are neither of validation nor of the test.
        folders (`Sequence[Path]`, *optional*):
            Where to look for it.
        form (`str`, *optional*, defaults to `"listed"`):
            `"listed"`, the prompt of S-DPO, which lists the candidates, or `"lines"`: the history, one title a line.
        train_rows (`int`, *optional*):
            How many rows to train on. By default all that are left. Of more rejected titles than a row lists, the others are
            drawn from the whole file.
        validation_users, test_users (`int`, *optional*, defaults to `20` and `50`):
            How many users to choose settings by, and to test on.
        rows_of_user (`int`, *optional*, defaults to `10`):
            Of each of them so many rows at random at most: some have a hundred.
    """
    path = find(file, folders)
    records = json.loads(path.read_text(encoding="utf-8"))
    users = users_of(records)
    records = in_no_order(records, users)
    read = as_lines(records) if form == "lines" else load_rows(records, "llara", domain="artist")
    read = read.add_column("user_id", list(map(str, users))).add_column("history_ids", list(map(history_of, records)))
    validation, test, rest = split_users(read["user_id"][:], [validation_users, test_users], rows_of_user)
    train = [rest[place] for place in np.random.default_rng(seed).permutation(len(rest))[:train_rows]]

    titles = list(dict.fromkeys(title for record in records for title in record["itemList"]))

    def rows(rows: int | None = None, k: int | None = None) -> Dataset:
        chosen = read.select(train[:rows])
        generator = np.random.default_rng(seed)

        def first(row: dict[str, Any]) -> dict[str, Any]:
            listed = row["rejected"]
            if k is None or k <= len(listed):
                return {"rejected": listed[:k]}
            if form == "listed":
                raise ValueError(f"`rows.k` is {k}, but a row lists {len(listed)} rejected titles.")
            known = {row["chosen"], *listed, *row["prompt"].splitlines()}
            others = (titles[place] for place in generator.permutation(len(titles)))
            return {"rejected": [*listed, *(title for title in others if title not in known)][:k]}

        return chosen.map(first, load_from_cache_file=False).remove_columns("candidates")

    def ranking(places: list[int]) -> dict[str, RankingRows]:
        found = dataclasses.replace(load_ranking_rows(read.select(places)), name=form)
        return {form: with_titles_as_ids(found, found.columns["history_ids"])}

    def liked() -> pl.DataFrame:
        taken: dict[str, list[str]] = {}
        for place in sorted(train):
            taken.setdefault(read["user_id"][place], []).extend(
                [*history_of(records[place]), records[place]["trueSelection"]]
            )
        return as_log(taken)

    return Task(
        titles=titles,
        texts=lambda: read.select(train),
        validation_texts=lambda: read.select(validation),
        rows=rows,
        validation=ranking(validation),
        test=ranking(test),
        liked=liked,
    )


def history_of(record: Mapping[str, Any]) -> list[str]:
    """The titles of a row's history."""
    history = record["historyList"]
    return history.split("::") if isinstance(history, str) else history


def users_of(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """
    A number for the user of each row, of whom the file says nothing but this: the history of the next row of a user is that
    of this row with its answer at the end, less what is older than the longest. Split by row, nine answers in ten of Last.fm
    are in histories of other rows.

    Args:
        records (`Sequence[Mapping]`):
            N rows with `historyList` and `trueSelection`.

    Returns:
        `list[int]`: N numbers of users, those of the first row of each.
    """
    histories = [tuple(history_of(record)) for record in records]
    longest = max(map(len, histories))
    first: dict[tuple[str, ...], int] = {}
    for row, history in enumerate(histories):
        first.setdefault(history, row)
    user = list(range(len(records)))

    def root(row: int) -> int:
        while user[row] != row:
            row = user[row]
        return row

    for row, (history, record) in enumerate(zip(histories, records, strict=True)):
        following = first.get((*history, record["trueSelection"])[-longest:])
        for other in (first[history], following):
            if other is not None:
                low, high = sorted((root(row), root(other)))
                user[high] = low
    return [root(row) for row in range(len(records))]


def in_no_order(records: Sequence[Mapping[str, Any]], users: Sequence[int]) -> list[dict[str, Any]]:
    """
    The rows of each user made anew from the same items in an order at random, with as long histories and as many candidates,
    listed at random.

    The file of Last.fm has the items of all users in one order, which is not that of time: an item's place in it tells the
    answer. Rejected are what the user's rows list that is in none of the user's histories, and if that is too little, what others'
    do.
    """
    rows: dict[int, list[int]] = {}
    for row, user in enumerate(users):
        rows.setdefault(user, []).append(row)
    listed = list(dict.fromkeys(title for record in records for title in record["itemList"]))
    found: list[dict[str, Any]] = [{}] * len(records)
    for user, own in rows.items():
        generator = np.random.default_rng(user)
        taken = dict.fromkeys(
            title for row in own for title in (*history_of(records[row]), records[row]["trueSelection"])
        )
        near = dict.fromkeys(title for row in own for title in records[row]["itemList"] if title not in taken)
        order = generator.permutation(list(taken)).tolist()
        for number, row in enumerate(reversed(own)):
            place = len(order) - 1 - number % (len(order) - 1)
            history = order[max(0, place - len(history_of(records[row]))) : place]
            count = len(dict.fromkeys(records[row]["itemList"])) - 1
            others = [*generator.permutation(list(near)).tolist(), *generator.permutation(listed).tolist()]
            rejected = list(dict.fromkeys(title for title in others if title not in taken))[:count]
            candidates = generator.permutation([order[place], *rejected]).tolist()
            found[row] = {"historyList": history, "itemList": candidates, "trueSelection": order[place]}
    return found


def split_users(users: Sequence[int], counts: Sequence[int], most: int) -> list[list[int]]:
    """For each of `counts` up to `most` rows at random of each of so many users, and all rows of the other users."""
    rows: dict[int, list[int]] = {}
    for row, user in enumerate(users):
        rows.setdefault(user, []).append(row)
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(rows[user]).tolist() for user in generator.permutation(list(rows)).tolist()]
    parts = []
    for count in counts:
        parts.append(sorted(row for of_user in drawn[:count] for row in of_user[:most]))
        drawn = drawn[count:]
    return [*parts, sorted(row for of_user in drawn for row in of_user)]


def as_lines(records: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows of the LLaRA form in which a prompt is the history, one title a line, and does not list its candidates."""
    rows = []
    for record in records:
        candidates = list(dict.fromkeys(record["itemList"]))
        rejected = [title for title in candidates if title != record["trueSelection"]]
        prompt = "".join(f"{title}\n" for title in history_of(record))
        rows.append(
            {"prompt": prompt, "chosen": record["trueSelection"], "rejected": rejected, "candidates": candidates}
        )
    return Dataset.from_list(rows)


TASKS: dict[str, Callable[..., Task]] = {
    "sequence": make_sequence_task,
    "pairs": make_pairs_task,
    "listed": make_listed_task,
}
