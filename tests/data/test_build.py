import random

import numpy as np
import polars as pl
import pytest

from trl_dmpo.data import build, build_dataset
from trl_dmpo.data.build_config import BuildConfig
from trl_dmpo.data.log import make_log
from trl_dmpo.data.plan import make_plan, rows_of
from trl_dmpo.data.prompts import Case
from trl_dmpo.data.schema import find_problem
from trl_dmpo.data.seeding import RandomStream
from trl_dmpo.data.splits import check_leaks

from .test_log import taken


CONFIGURATIONS = ("preference", "sft", "ranking")
OPTIONS = {"num_negatives": 4, "ranking_negatives": 6, "max_history": 5, "train_targets": 2}

# Two items share a title, and some titles hold what templates and chats are made of
TITLES = [f"Film {n}" for n in range(36)] + ["{history}", 'The "Best" > All', "<|end|>", "Film 7"]


def films(ids=int):
    return pl.DataFrame(
        {
            "item_id": list(map(ids, range(len(TITLES)))),
            "title": TITLES,
            "genres": [["Drama"] * (n % 2) + ["War"] * (n % 3) for n in range(len(TITLES))],
        },
        schema_overrides={"genres": pl.List(pl.String)},
    )


def make_rows():
    """24 users of whom each rated 3 to 14 films, some at the same moment."""
    generator = np.random.default_rng(0)
    return [
        (user, int(item), int(place // 2), int(generator.integers(1, 6)))
        for user in range(24)
        for place, item in enumerate(generator.choice(len(TITLES), generator.integers(3, 15), replace=False))
    ]


@pytest.fixture(scope="module")
def log():
    return make_log(taken(*make_rows()), films(), "films", "film")


def build_all(log, **options):
    """All configurations, as lists of rows by split."""
    return {
        name: {split: rows.to_list() for split, rows in build_dataset(log, name, **(OPTIONS | options)).items()}
        for name in CONFIGURATIONS
    }


def write_slowly(log, config):
    """Each row's text, composed by the form from the log alone; only the keys that seed the draws are the plan's."""
    plan, form = make_plan(log, config), config.make_form(log.domain)
    item = {item["item_id"]: item for item in log.items.to_dicts()}
    past = {}
    for event in log.interactions.to_dicts():
        past.setdefault(event["user_id"], []).append(event)
    for row, key in zip(rows_of(plan).to_dicts(), plan.keys.tolist(), strict=True):
        events = past[row["user_id"]]
        place = next(n for n, event in enumerate(events) if event["item_id"] == row["chosen_id"])
        seen = [item[event["item_id"]] | {"rating": event["rating"]} for event in events[:place]]
        taken_before = [film for film in seen if form.history == "rated" or film["rating"] > 3]
        disliked = [film for film in seen if film["rating"] <= 3]
        target = item[row["chosen_id"]] | {"rating": events[place]["rating"]}
        yield form.write(
            Case(
                taken_before[-config.max_history :],
                disliked[-config.max_history :],
                target,
                target["rating"] > 3,
                [item[number] for number in row["rejected_ids"]],
                RandomStream(key),
            )
        )


@pytest.mark.parametrize(
    "prompt",
    [
        "next_item",
        "next_item(chat=True, wording='any', features=['genres'])",
        "next_item_from_list(wording='any')",
        "next_item_from_list(chat=True)",
        "rank_two(wording='dmpo')",
        "rank_list(wording='any', chat=True)",
        "like(wording='any')",
        "like(chat=True)",
        "rating(wording='any')",
        "rating(chat=True)",
        "template(prompt='Seen: {history}. Next {singular}:', completion='{title}.')",
        "template(prompt='{history}; {candidates}?', system='Be brief.', chat=True)",
    ],
)
def test_rows_are_what_the_form_writes(prompt, log):
    options = OPTIONS | {"prompt": prompt} | ({"num_negatives": 1} if "rank_two" in prompt else {})
    data = build_all(log, **options)
    rows = [row for split in data["preference"].values() for row in split]
    texts = list(write_slowly(log, BuildConfig(**options)))
    assert len(rows) == len(texts) > 60
    for row, text in zip(rows, texts, strict=True):
        assert (row["prompt"], row["chosen"], row["rejected"]) == text
        assert find_problem(row) is None
    # The other configurations are about the same rows
    shared = ("prompt", "user_id", "chosen_id", "history_ids", "timestamp")
    assert list(data["preference"]) == list(data["sft"]) == ["train", "validation", "test"]
    assert list(data["ranking"]) == ["validation", "test"]
    for configuration in ("sft", "ranking"):
        for split, others in data[configuration].items():
            for row, other in zip(data["preference"][split], others, strict=True):
                assert [row[name] for name in shared] == [other[name] for name in shared]
                assert row["chosen"] == (
                    other["completion"] if configuration == "sft" else other["candidates"][other["label"]]
                )


@pytest.mark.parametrize("split", ["leave_one_out", "time(validation=0.4, test=0.7)", "user(per_user=2)"])
def test_ids_name_the_texts_and_nothing_leaks(split, log):
    data = build_all(log, split=split)
    title = dict(log.items.select("item_id", "title").rows())
    met = {(user, title[item]) for user, item in log.interactions.select("user_id", "item_id").rows()}
    for rows in data["preference"].values():
        for row in rows:
            assert row["chosen"] == f" {title[row['chosen_id']]}"
            assert row["rejected"] == [f" {title[item]}" for item in row["rejected_ids"]]
            assert row["prompt"].count("\n- ") == len(row["history_ids"])
            assert all(f"- {title[item]}\n" in row["prompt"] for item in row["history_ids"])
    for rows in data["ranking"].values():
        for row in rows:
            assert row["candidates"] == [f" {title[item]}" for item in row["candidate_ids"]]
            assert row["candidate_ids"][row["label"]] == row["chosen_id"]
            assert len(set(row["candidates"])) == len(row["candidates"]) == 7
            others = set(row["candidate_ids"]) - {row["chosen_id"]}
            assert not {(row["user_id"], title[item]) for item in others} & met
    places = {row["label"] for rows in data["ranking"].values() for row in rows}
    assert len(places) == 7, "the place of the answer must not give it away"
    frame = pl.DataFrame([row | {"split": split} for split, rows in data["preference"].items() for row in rows])
    check_leaks(frame, one_moment="time" in split)


@pytest.mark.parametrize("prompt", ["next_item_from_list", "rank_list"])
def test_the_candidates_of_a_listed_prompt_are_its_answers(prompt, log):
    data = build_all(log, prompt=prompt)
    for split in ("validation", "test"):
        for row, asked in zip(data["preference"][split], data["ranking"][split], strict=True):
            named = dict(zip([row["chosen_id"], *row["rejected_ids"]], [row["chosen"], *row["rejected"]], strict=True))
            assert dict(zip(asked["candidate_ids"], asked["candidates"], strict=True)) == named


def test_kinds_of_ids(log):
    def as_text(number):
        return f"id {number:03}"  # sorted like the numbers

    def as_numbers(value):
        if isinstance(value, dict):
            return {key: as_numbers(each) for key, each in value.items()}
        if isinstance(value, list):
            return [as_numbers(each) for each in value]
        return int(value.removeprefix("id ")) if isinstance(value, str) and value.startswith("id ") else value

    rows = [(as_text(user), as_text(item), *rest) for user, item, *rest in make_rows()]
    texts = build_all(make_log(taken(*rows), films(as_text), "films", "film"))
    assert texts["preference"]["train"][0]["user_id"].startswith("id ")
    assert as_numbers(texts) == build_all(log)


@pytest.mark.parametrize("prompt", ["next_item", "rank_list(chat=True)", "rating"])
def test_neither_chunks_nor_the_order_of_the_log_matter(prompt, log, monkeypatch):
    expected = build_all(log, prompt=prompt)
    rows, titles = make_rows(), films()
    random.Random(1).shuffle(rows)
    assert build_all(make_log(taken(*rows), titles[::-1], "films", "film"), prompt=prompt) == expected
    monkeypatch.setattr(build, "_CHUNK", 7)
    assert build_all(log, prompt=prompt) == expected
    assert build_all(log, prompt=prompt, seed=1) != expected


def test_prompts_keep_within_tokens_by_their_history(log, tokenizer):
    form = "template(prompt='Seen: {history}. Next:')"
    long, short = (build_all(log, prompt=form, max_prompt_tokens=n, tokenizer=tokenizer) for n in (500, 30))
    assert long == build_all(log, prompt=form)
    title, cut = dict(log.items.select("item_id", "title").rows()), 0

    def prompt_of(ids):
        return f"Seen: {', '.join(title[number] for number in ids) or '(none)'}. Next:"

    def length(prompt):
        return len(tokenizer(prompt)["input_ids"])

    for split, rows in short["preference"].items():
        for row, whole in zip(rows, long["preference"][split], strict=True):
            assert row | {"prompt": whole["prompt"]} == whole
            history = row["history_ids"]
            kept = next(n for n in range(len(history), -1, -1) if length(prompt_of(history[len(history) - n :])) <= 30)
            assert row["prompt"] == prompt_of(history[len(history) - kept :])
            cut += kept < len(history)
    assert 10 < cut < sum(map(len, short["preference"].values()))


def test_a_split_without_rows_is_not_there(log):
    assert list(build_dataset(log, split="user(validation=0, test=0)")) == ["train"]
    assert list(build_dataset(log, "ranking", split="user(validation=0, test=0.5)")) == ["test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configuration": "dpo"}, "`configuration` is 'dpo', but it is one of: preference, sft, ranking."),
        ({"max_prompt_tokens": 10}, "`max_prompt_tokens` counts tokens: give a tokenizer."),
        (
            {"prompt": "rank_two", "num_negatives": 2},
            "The row of user 0 with target 'Film 34': rank_two takes one negative, and there are 2. Set `num_negatives=1`, or "
            "use the form rank_list.",
        ),
        ({"prompt": "next_item(features=['year'])"}, "`features`: items have no 'year', only: genres."),
        ({"max_prompt_tokens": 3, "tokenizer": lambda text: {"input_ids": text.split()}}, "even without a history"),
    ],
)
def test_errors(options, message, log):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build_dataset(log, **options)
    assert message in str(error.value)
