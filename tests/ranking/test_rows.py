"""Rows to rank: read from every source, checked, sampled, and over a whole catalogue."""

import json
import re

import polars as pl
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_build import OPTIONS, films, make_rows
from tests.data.test_log import make_log, taken
from trl_dmpo.data import card
from trl_dmpo.data.build_config import BuildConfig
from trl_dmpo.data.plan import make_plan
from trl_dmpo.data.save import save_dataset
from trl_dmpo.ranking.full_catalogue import with_full_catalogue
from trl_dmpo.ranking.rows import load_ranking_rows


LISTED = {"prompt": "Next:", "candidates": [" Heat", " Alien", " Big"], "label": 1, "user_id": "ann"}
PAIRED = {"prompt": "Next:", "chosen": " Alien", "rejected": [" Heat", " Big"]}


def prepare(folder, **options):
    """The films' dataset in `folder`."""
    log = make_log(taken(*make_rows()), films(), "films", "film")
    options = OPTIONS | {"prompt": "next_item"} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "_draw_picture", lambda path, plans: None)
        save_dataset([make_plan(log, BuildConfig(**options))], folder, options)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return prepare(folder / "films")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def many(count):
    return [LISTED | {"prompt": f"User {number}. Next:"} for number in range(count)]


@pytest.mark.parametrize(
    ("row", "candidates", "label"),
    [
        (LISTED, [" Heat", " Alien", " Big"], 1),
        (PAIRED, [" Alien", " Heat", " Big"], 0),
        (PAIRED | {"candidates": [" Big", " Alien", " Heat"]}, [" Big", " Alien", " Heat"], 1),
    ],
)
def test_where_the_candidates_come_from(row, candidates, label, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for source in ([row], Dataset.from_list([row]), tmp_path / "rows.jsonl", str(tmp_path / "rows.jsonl")):
        rows = load_ranking_rows(source)
        assert (rows.prompts, rows.candidates, rows.labels.tolist()) == (["Next:"], [candidates], [label])


def test_a_published_file_keeps_the_order_of_its_candidates(tmp_path):
    record = {"historyList": ["Alien", "Big"], "itemList": ["Jaws", "Heat", "Babe"], "trueSelection": "Heat"}
    (tmp_path / "movielens_val.json").write_text(json.dumps([record]))
    rows = load_ranking_rows(tmp_path / "movielens_val.json")
    assert rows.name == "movielens_val.json"
    assert [each.strip() for each in rows.candidates[0]] == ["Jaws", "Heat", "Babe"]
    assert rows.labels.tolist() == [1]
    chat = load_ranking_rows(tmp_path / "movielens_val.json", chat=True)
    assert chat.candidates[0][1][0]["role"] == "assistant"
    assert chat.content_hash != rows.content_hash


def test_messages_with_message_candidates():
    say = [{"role": "assistant", "content": "Heat"}]
    ask = [{"role": "user", "content": "Next?"}]
    rows = load_ranking_rows([{"prompt": ask, "candidates": [say, [say[0] | {"content": "Big"}]], "label": 0}])
    assert rows.candidates[0][0] == say


class TestPrepared:
    def test_ranking(self, prepared):
        rows = load_ranking_rows(prepared)
        table = pl.read_parquet(prepared / "ranking" / "test-*.parquet")
        assert rows.prompts == table["prompt"].to_list()
        assert rows.candidates == table["candidates"].to_list()
        assert rows.labels.tolist() == table["label"].to_list()
        assert rows.columns["candidate_ids"] == table["candidate_ids"].to_list()
        assert rows.name == "films (ranking, test)"
        assert set(rows.items["item_id"]) == set(films()["item_id"])

    def test_preference(self, prepared):
        rows = load_ranking_rows(str(prepared), config="preference", split="validation")
        table = pl.read_parquet(prepared / "preference" / "validation-*.parquet")
        assert rows.candidates == [[a, *b] for a, b in zip(table["chosen"], table["rejected"].to_list(), strict=True)]
        ids = zip(table["chosen_id"], table["rejected_ids"].to_list(), strict=True)
        assert rows.columns["candidate_ids"] == [[a, *b] for a, b in ids]

    def test_what_is_not_there(self, prepared, tmp_path):
        for options, message in (
            ({"config": "pairs"}, "`config`: .* has no 'pairs', only: .*ranking"),
            ({"split": "train"}, "`split`: .* has no 'train' in 'ranking', only: validation, test"),
            ({"chat": True}, "a prepared dataset has its prompts already"),
        ):
            with pytest.raises(ValueError, match=message):
                load_ranking_rows(prepared, **options)
        with pytest.raises(ValueError, match=r"a folder, but not one made by `trl-dmpo prepare`"):
            load_ranking_rows(tmp_path)
        with pytest.raises(ValueError, match="`config` and `split` are for a prepared dataset, and list is none"):
            load_ranking_rows([LISTED], split="test")
        with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
            load_ranking_rows(tmp_path / "nowhere.json")


class TestFullCatalogue:
    def test_all_items_but_those_of_the_history(self, prepared):
        sampled = load_ranking_rows(prepared)
        rows = with_full_catalogue(sampled, prepared)
        title = dict(rows.items.select("item_id", "title").iter_rows())
        for row, label in enumerate(rows.labels):
            assert rows.candidates[row][label] == sampled.candidates[row][sampled.labels[row]]
            chosen = rows.columns["chosen_id"][row]
            assert rows.columns["candidate_ids"][row][label] == chosen
            seen = {title[item] for item in rows.columns["history_ids"][row]} - {title[chosen]}
            assert {title[item] for item in rows.columns["candidate_ids"][row]} == set(title.values()) - seen
            # Two items of one title are one candidate
            assert len(set(rows.candidates[row])) == len(rows.candidates[row]) == 39 - len(seen)
            answers = [rows.catalogue.answers[place] for place in rows.catalogue.kept[row]]
            assert answers == rows.candidates[row]

    def test_what_has_none(self, prepared, tmp_path):
        with pytest.raises(ValueError, match="`full_catalogue`: list has no catalogue of items"):
            with_full_catalogue(load_ranking_rows([LISTED]), prepared)
        folder = prepare(tmp_path / "listed", prompt="next_item_from_list")
        with pytest.raises(ValueError, match="list their candidates, so no other item can be the answer"):
            with_full_catalogue(load_ranking_rows(folder), folder)


@given(count=st.integers(1, 30), wanted=st.integers(1, 40), seed=st.integers(0, 5))
def test_a_sample_is_seeded_and_in_order(count, wanted, seed):
    rows = load_ranking_rows(many(count), max_rows=wanted, seed=seed)
    assert len(rows) == min(count, wanted)
    assert (rows.places[1:] > rows.places[:-1]).all()
    assert rows.prompts == [f"User {place}. Next:" for place in rows.places]
    assert (rows.places == load_ranking_rows(many(count), max_rows=wanted, seed=seed).places).all()
    assert ("random sample" in rows.description) == (wanted < count)


def test_every_row_is_as_likely_in_a_sample():
    drawn = [load_ranking_rows(many(10), max_rows=3, seed=seed).places.tolist() for seed in range(200)]
    counts = [sum(place in sample for sample in drawn) for place in range(10)]
    assert all(35 < count < 85 for count in counts)  # 60, four standard deviations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, "column 'candidates': it lists none; give at least two, or remove the row"),
        ({"candidates": [" Heat"]}, "column 'candidates': it lists ' Heat' alone"),
        ({"candidates": [" Heat", " Alien", " Heat"]}, "column 'candidates': "),
        ({"candidates": [" Heat", " Alien", "  "]}, "column 'candidates': "),
        ({"candidates": [" Heat", " Alien", None]}, "column 'candidates': "),
        ({"label": 3}, "column 'label': 3 is no place among 3 candidates"),
        ({"label": True}, "column 'label': True is no place among 3 candidates"),
        ({"candidate_ids": 3}, "column 'candidate_ids': it is no list of strings or numbers"),
        ({"user_id": [1]}, "column 'user_id': expected a string or a number, got list"),
        ({"note": "\ud800"}, "column 'note': it has half a surrogate pair"),
        ({"label": -1}, "column 'label': -1 is no place among 3 candidates"),
        ({"label": None}, "column 'candidates': there is neither a `label` nor a `chosen` one"),
        ({"label": None, "chosen": " Jaws"}, "column 'candidates': ' Jaws' is not listed; add it or remove the row"),
        ({"prompt": None}, "column 'prompt': there is none"),
        ({"candidate_ids": [1, 2]}, "column 'candidate_ids': there are 2 ids for 3 candidates"),
        ({"candidate_ids": [1, 2, 3], "chosen_id": 1}, "column 'chosen_id': 1 was chosen, but `label` points to 2"),
        ({"chosen": " Big"}, "column 'label': it points to ' Alien', but `chosen` is ' Big'"),
        ({"candidates": None, "label": None, "chosen": " Big"}, "column 'rejected': "),
        ({"tools": [{"name": "search"}]}, "column 'tools': it changes the prompt, and is not handed on"),
    ],
)
def test_a_bad_row_is_named_or_dropped(change, message):
    source = [LISTED, LISTED | change, LISTED, LISTED | change]
    with pytest.raises(ValueError, match=re.escape(f"list[1], {message}")) as raised:
        load_ranking_rows(source)
    assert "In all, 2 of 4 rows cannot be evaluated: 2 " in str(raised.value)
    rows = load_ranking_rows(source, on_invalid_row="drop")
    assert rows.places.tolist() == [0, 2]
    reason = re.search(r"evaluated: (2 .*?)\.", str(raised.value))[1]
    assert rows.description.endswith(f"Dropped: {reason}.")
    with pytest.raises(ValueError, match="No row is left"):
        load_ranking_rows(source[1:2], on_invalid_row="drop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "`max_rows` is 0, but it is at least 1"),
        ({"on_invalid_row": "skip"}, "`on_invalid_row` is 'skip', but it is 'raise' or 'drop'"),
        ({"chat": True}, "`chat` is not for rows that have `candidates` and `label` already"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        load_ranking_rows([LISTED], **options)


def test_users():
    users = ["ann", "bob", None, "ann", None]
    rows = load_ranking_rows([LISTED | {"user_id": user} for user in users])
    assert rows.users.tolist() == [0, 1, 2, 0, 3]
    assert load_ranking_rows([PAIRED] * 3).users.tolist() == [0, 1, 2]


def test_the_hash_is_of_prompts_candidates_and_labels():
    base = load_ranking_rows([LISTED]).content_hash
    assert load_ranking_rows([LISTED | {"user_id": "bob", "more": 1}]).content_hash == base
    changes = ({"prompt": "Then:"}, {"candidates": [" Heat", " Alien", " Jaws"]}, {"label": 0})
    assert len({base, *(load_ranking_rows([LISTED | change]).content_hash for change in changes)}) == 4
