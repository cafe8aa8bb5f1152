import csv
import gzip
import json
import logging
import re
from collections import Counter

import numpy as np
import polars as pl
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SHARED, not_interpreted
from trl_dmpo.data.formats import FORMATS, dmpo, load_rows
from trl_dmpo.data.schema import find_problem


DATA = SHARED / "data"
FILES = sorted(DATA.glob("*/*.json"))


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return [{"role": "assistant", "content": text}]


LLARA = {"historyList": "Boris::Fever Ray", "itemList": ["Angra", "µ-Ziq", "Hope"], "trueSelection": "µ-Ziq", "id": 7}
TALLREC = {
    "instruction": 'Answer by "Yes." or "No.".',
    "input": 'Liked: "{input}"\nTarget: "Scream"?',
    "output": "No.",
}
STARS = {"user_id": "A1", "history_item_title": "['Fame', \"Bug's Life, A\"]", "item_title": "Heat", "item_id": "9"}
NUMBERED = {
    "prompt": "Next:",
    "chosen": " Aliens",
    "rejected_2": " Big",
    "rejected_10": " Babe",
    "rejected_1": " Heat",
}
PAIR = {"prompt": "Next:", "chosen": " Aliens", "rejected": " Heat"}
ROW = {"prompt": "Next:", "chosen": " Aliens", "rejected": [" Heat", " Big"]}
SCORED = {"prompt": "Next:", "completions": [" Big", " Aliens", " Heat"], "scores": [3, 5.0, 1], "lang": "en"}
ULTRA = {
    "instruction": "What next?\n",
    "completions": [
        {"response": "Big", "overall_score": 3.0, "model": "a"},
        {"response": " Aliens", "overall_score": 8.5, "model": "b"},
        {"response": "Heat", "overall_score": 1.0, "model": "c"},
    ],
    "models": ["a", "b", "c"],
}


def dmpo_record(first, second, output, history=("Babe ", "4 > 3, really")):
    told = "".join(f" <Title:{title}> " for title in history)
    return {
        "instruction": "You are an assistant working on movie recommendations. Here is the user's history of movies they have "
        f"watched: {told}. Rank the likelihood of the user watching the two movies  <Title:{first}>  and  <Title:{second}> .",
        "input": "",
        "output": output,
    }


HEAT_FIRST = " <Title:Heat > ,  <Title: Me, Myself & Irene> "
HEAT_LAST = " <Title: Me, Myself & Irene> ,  <Title:Heat > "
DMPO = dmpo_record("Heat ", " Me, Myself & Irene", [HEAT_LAST, HEAT_FIRST])


class TestRecommendation:
    def test_llara(self):
        (row,) = load_rows([LLARA], domain="artist")
        assert (row["chosen"], row["rejected"]) == (" µ-Ziq", [" Angra", " Hope"])
        assert row["candidates"] == [" Angra", " µ-Ziq", " Hope"]
        assert row["id"] == 7
        assert "has listened to Boris, Fever Ray in" in row["prompt"]
        assert row["prompt"].endswith(" Angra, µ-Ziq, Hope. Answer:")

    def test_llara_as_messages_with_lists_and_repetitions(self, tmp_path):
        listed = {**LLARA, "historyList": ["Boris", "Fever Ray"], "itemList": "Hope::µ-Ziq::Angra\n::Hope::µ-Ziq"}
        path = tmp_path / "steam_val.json"
        path.write_text(json.dumps([LLARA, listed]), encoding="utf-8")
        rows = load_rows(path, chat=True)
        assert rows[1]["chosen"] == said("µ-Ziq")
        assert rows[1]["candidates"] == [said("Hope"), said("µ-Ziq"), said("Angra")]
        assert rows[1]["rejected"] == [said("Hope"), said("Angra")]
        assert "has played Boris, Fever Ray" in rows[1]["prompt"][0]["content"]
        assert "1 rows that list a candidate twice, kept once" in rows.info.description

    @pytest.mark.parametrize(
        ("output", "chosen", "rejected"),
        [
            ([HEAT_LAST, HEAT_FIRST], HEAT_LAST, HEAT_FIRST),
            ([HEAT_FIRST, HEAT_LAST], HEAT_FIRST, HEAT_LAST),
            (HEAT_LAST, HEAT_LAST, HEAT_FIRST),
            ([HEAT_FIRST], HEAT_FIRST, HEAT_LAST),
        ],
    )
    def test_dmpo_pairs_keep_every_letter(self, output, chosen, rejected):
        (row,) = load_rows([{**DMPO, "output": output}])
        assert row == {
            "prompt": DMPO["instruction"],
            "chosen": chosen,
            "rejected": [rejected],
            "candidates": [HEAT_FIRST, HEAT_LAST],
        }
        (row,) = load_rows([{**DMPO, "output": output}], chat=True)
        assert row["prompt"] == [user(DMPO["instruction"])]
        assert row["chosen"] == said(chosen.strip())

    def test_dmpo_grouped(self):
        records = [
            DMPO,
            dmpo_record(" Me, Myself & Irene", "Antz", " <Title: Me, Myself & Irene> ,  <Title:Antz> "),
            dmpo_record("Heat", " Me, Myself & Irene", [HEAT_LAST.replace("Heat >", "Heat>")]),
            dmpo_record("Heat", "Antz", " <Title:Antz> ,  <Title:Heat> "),
            dmpo_record("Heat", "Antz", " <Title:Antz> ,  <Title:Heat> ", history=["Big"]),
        ]
        rows = load_rows(records, grouped=True)
        assert [row["chosen"] for row in rows] == [" Me, Myself & Irene", " Antz", " Antz"]
        assert [row["rejected"] for row in rows] == [[" Heat", " Antz"], [" Heat"], [" Heat"]]
        assert rows[0]["candidates"] == [" Antz", " Heat", " Me, Myself & Irene"]
        assert rows[0]["prompt"] == (
            "You are an assistant working on movie recommendations. Here is the user's history of movies they have watched:  "
            "<Title:Babe >  <Title:4 > 3, really> . Which of these movies has the highest likelihood of the user watching it?  "
            "<Title:Antz>  <Title:Heat>  <Title:Me, Myself & Irene>  Answer with its title. Answer:"
        )
        assert "3 rows from 5 records" in rows.info.description
        assert "1 titles rejected twice in a group, kept once" in rows.info.description
        chat = load_rows(records, grouped=True, chat=True)
        assert chat[0]["prompt"] == [user(rows[0]["prompt"].removesuffix(" Answer:"))]
        assert chat[0]["rejected"] == [said("Heat"), said("Antz")]

    def test_tallrec(self):
        (row,) = load_rows([TALLREC])
        assert row["prompt"].endswith(
            "### Instruction:\n"
            'Answer by "Yes." or "No.".\n\n'
            "### Input:\n"
            'Liked: "{input}"\nTarget: "Scream"?\n\n'
            "### Response:\n"
        )
        assert (row["chosen"], row["rejected"], row["candidates"]) == ("No.", ["Yes."], ["Yes.", "No."])
        (row,) = load_rows([{**TALLREC, "output": "Yes"}], chat=True)
        assert row["prompt"] == [user(f"{TALLREC['instruction']}\n{TALLREC['input']}")]
        assert (row["chosen"], row["rejected"]) == (said("Yes"), [said("No")])

    def test_minionerec(self, tmp_path):
        path = tmp_path / "Video_Games.csv"
        records = [
            STARS,
            {**STARS, "history_item_title": "['Heat']", "item_title": "Jaws", "item_id": "4"},
            {"user_id": "A2", "history_item_title": "['Big', 'Léon']", "item_title": "Babe", "item_id": "5"},
        ]
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
        rows = load_rows(path, negatives=2, domain="game")
        assert [row["chosen"] for row in rows] == [" Heat", " Jaws", " Babe"]
        assert [(row["user_id"], row["item_id"]) for row in rows] == [("A1", "9"), ("A1", "4"), ("A2", "5")]
        foreign = [{" Big", " Léon", " Babe"}] * 2 + [{" Fame", " Bug's Life, A", " Heat", " Jaws"}]
        for row, others in zip(rows, foreign, strict=True):
            assert len(set(row["rejected"])) == 2
            assert set(row["rejected"]) < others
        assert "played" in rows[0]["prompt"]
        assert rows[0]["prompt"].index("Fame") < rows[0]["prompt"].index("Bug's Life, A")
        rows = load_rows(path, negatives=4)
        assert [len(row["rejected"]) for row in rows] == [3, 3, 4]
        assert "2 rows with fewer than 4 negatives" in rows.info.description
        with pytest.raises(ValueError, match=r"has no rejected answers\. Set `negatives`"):
            load_rows(path)

    def test_negatives_are_uniform_and_seeded(self):
        titles = [f"t{number}" for number in range(40)]
        records = [
            {"history_item_title": [titles[row % 40]], "item_title": titles[(row + 1) % 40]} for row in range(2000)
        ]
        drawn = load_rows(records, negatives=3)["rejected"]
        counts = Counter(title for titles in drawn for title in titles)
        # 6,000 draws of 40 titles: 150 each, give or take 12
        assert all(90 < counts[f" {title}"] < 210 for title in titles)
        assert load_rows(records, negatives=3)["rejected"] == drawn
        assert load_rows(records, negatives=3, seed=1)["rejected"] != drawn


class TestPreferences:
    def test_numbered_columns(self):
        fewer = {**NUMBERED, "rejected_2": None, "rejected_10": " "}
        rows = load_rows([NUMBERED, fewer, {**PAIR, "rejected1": " Big"}])
        assert rows["rejected"] == [[" Heat", " Big", " Babe"], [" Heat"], [" Heat", " Big"]]
        assert rows.column_names == ["prompt", "chosen", "rejected"]

    def test_pairs_of_text(self):
        records = [
            {**PAIR, "source": "a", "score": 1},
            {**PAIR, "source": "b", "chosen": " Jaws"},
            {**PAIR, "source": "a", "rejected": " Big", "score": 2},
            {**PAIR, "source": "a", "score": 1},
        ]
        rows = load_rows(records)
        assert list(rows) == [{**ROW, "source": "a"}, {**ROW, "source": "b", "chosen": " Jaws", "rejected": [" Heat"]}]
        assert "2 rows from 4 records" in rows.info.description
        assert "1 pairs given twice, kept once; 1 column 'score', left out" in rows.info.description

    def test_pairs_of_messages(self):
        turns = {name: [user("Next?"), *said(name)] for name in ("Aliens", "Heat", "Big")}
        records = [{"chosen": turns["Aliens"], "rejected": turns[name]} for name in ("Heat", "Big")]
        grouped = {"chosen": turns["Aliens"], "rejected": [turns["Heat"], turns["Big"]]}
        assert list(load_rows(records)) == [grouped]
        assert list(load_rows([{"prompt": "Next?", **record} for record in records])) == [grouped]
        explicit = [{"prompt": [user("Next?")], "chosen": said("Aliens"), "rejected": said(name)} for name in "ab"]
        assert [row["rejected"] for row in load_rows(explicit)] == [[said("a"), said("b")]]
        tools = [{**record, "tools": json.dumps([{"name": str(number)}])} for number, record in enumerate(explicit)]
        assert len(load_rows(tools)) == 2

    @pytest.mark.parametrize(("ties", "rejected"), [("drop", [" Heat"]), ("keep", [" Heat", " Jaws"])])
    def test_scored(self, ties, rejected):
        record = {
            **SCORED,
            "completions": [" Heat", " Aliens", " Jaws", " Heat", " Big", " Babe", " "],
            "scores": [3, 5.0, 5, 1, None, float("nan"), 9],
        }
        rows = load_rows([record], ties=ties)
        assert list(rows) == [{"prompt": "Next:", "chosen": " Aliens", "rejected": rejected, "lang": "en"}]
        told = rows.info.description
        assert "1 answers given twice" in told
        assert "2 answers left out, without a score" in told
        assert "1 answers left out, blank" in told
        assert ("1 answers left out, as good as the best" in told) == (ties == "drop")

    def test_the_better_score_of_an_answer_counts(self):
        (row,) = load_rows([{**SCORED, "completions": ["a", "b", "a"], "scores": [1, 2, 3]}])
        assert (row["chosen"], row["rejected"]) == ("a", ["b"])

    def test_ultrafeedback(self):
        (row,) = load_rows([ULTRA])
        assert row == {
            "prompt": "What next?",
            "chosen": " Aliens",
            "rejected": [" Big", " Heat"],
            "models": ["a", "b", "c"],
        }
        (row,) = load_rows([ULTRA], chat=True)
        assert (row["chosen"], row["rejected"]) == (said("Aliens"), [said("Big"), said("Heat")])
        (row,) = load_rows([SCORED], chat=True)
        assert (row["prompt"], row["chosen"]) == ([user("Next:")], said("Aliens"))

    def test_rows_pass_as_they_are(self):
        conversation = {"prompt": [user("Next?")], "chosen": said("Aliens"), "rejected": [said("Heat")], "extra": None}
        assert list(load_rows([conversation])) == [conversation]
        rows = load_rows([ROW, {**PAIR, "user_id": 3}])
        assert list(rows) == [{**ROW, "user_id": None}, {**PAIR, "rejected": [" Heat"], "user_id": 3}]


BY_FORMAT = {
    "llara": LLARA,
    "dmpo": DMPO,
    "tallrec": TALLREC,
    "rejected_columns": NUMBERED,
    "scored": ULTRA,
    "rows": ROW,
    "pairs": PAIR,
}


@pytest.mark.parametrize("format", BY_FORMAT)
def test_every_format_is_recognised_and_told(format, caplog):
    caplog.set_level(logging.INFO, "trl_dmpo")
    rows = load_rows([BY_FORMAT[format]])
    assert rows.info.description == f"list: 1 row from 1 record, read as {format}: {FORMATS[format].LOOKS}."
    assert caplog.messages == [rows.info.description]
    assert list(load_rows([BY_FORMAT[format]], format)) == list(rows)
    assert list(load_rows(Dataset.from_list([BY_FORMAT[format]]))) == list(rows)


SAME = dmpo_record("Heat", "Heat ", HEAT_LAST)


@pytest.mark.parametrize(
    ("good", "change", "reason", "column", "detail"),
    [
        (LLARA, {"trueSelection": "Abba"}, "chosen not among the candidates", "trueSelection", "'Abba' is not in `itemList`"),
        (LLARA, {"itemList": ["µ-Ziq"]}, "no rejected", "itemList", "nothing but the chosen one"),
        (LLARA, {"itemList": ["µ-Ziq", None]}, "wrong type", "itemList", "a list of titles, none of them blank"),
        (LLARA, {"historyList": 3}, "wrong type", "historyList", "expected list or str, got int"),
        (LLARA, {"historyList": ""}, "no value", "historyList", "the value is missing"),
        (LLARA, {"trueSelection": ...}, "missing column", "trueSelection", "only: historyList, id, itemList"),
        (DMPO, {"output": HEAT_LAST[:-3]}, "not an order of the two titles", "output", "expected the two titles"),
        (DMPO, {"output": [HEAT_LAST] * 2}, "not an order of the two titles", "output", "expected the two titles"),
        (DMPO, {"instruction": "Rank them."}, "not of the paper's form", "instruction", "is not of the form of DMPO"),
        (DMPO, {"input": "More."}, "not of the paper's form", "input", "is not of the form of DMPO"),
        (DMPO, SAME, "two equal titles", "instruction", "both titles are 'Heat'"),
        (TALLREC, {"output": "Maybe."}, "neither Yes. nor No.", "output", "the answer is 'Maybe.'"),
        (TALLREC, {"input": None}, "no value", "input", "the value is missing"),
        (NUMBERED, {"rejected_1": " Aliens"}, "chosen among rejected", "rejected", "is the chosen completion ' Aliens'"),
        (NUMBERED, {"prompt": ...}, "no value", "prompt", "other rows have one"),
        (PAIR, {"rejected": " Aliens"}, "chosen among rejected", "rejected", "is the chosen completion ' Aliens'"),
        (PAIR, {"rejected": ...}, "missing column", "rejected", "only: chosen, prompt"),
        (PAIR, {"prompt": None}, "no value", "prompt", "the value is None"),
        (SCORED, {"scores": [1, 2]}, "scores do not fit the completions", "scores", "2 scores for 3 completions"),
        (SCORED, {"scores": [1, None, "?"]}, "fewer than two answers", "completions", "it has 1 with a score"),
        (SCORED, {"scores": [1, 1, 1]}, "all answers are ties", "completions", "no score is lower than the best"),
        (SCORED, {"completions": " Big"}, "wrong type", "completions", "expected list, got str"),
        (ULTRA, {"completions": ["Big"]}, "wrong type", "completions", "expected `response` and `overall_score`"),
        (ROW, {"rejected": []}, "no rejected", "rejected", "give at least one"),
        (ROW, {"rejected": ...}, "missing column", "rejected", "there is no such column"),
        (ROW, {"prompt": [user("a")], "chosen": said("b"), "rejected": [said("c")]}, "text and messages mixed", "chosen", "not as in the first row"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_used(good, change, reason, column, detail, tmp_path, caplog):
    bad = {name: value for name, value in {**good, **change}.items() if value is not ...}
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [good, bad, bad]), encoding="utf-8")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_rows(path)
    message = str(error.value)
    assert message.startswith(f"some.jsonl[1], column '{column}': ")
    assert detail in message
    assert message.endswith(
        f"In all, 2 of 3 records cannot be used: 2 {reason}. To leave them out, set `on_invalid_row='drop'`."
    )
    rows = load_rows(path, on_invalid_row="drop")
    assert list(rows) == list(load_rows([good]))
    assert rows.info.description.endswith(f" Dropped: 2 {reason}.")
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", rows.info.description)]


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("history_item_title", "['Fame', nan]", "not a list"),
        ("history_item_title", "__import__('os').getcwd()", "not a list"),
        ("history_item_title", "{'a': 1}", "wrong type"),
        ("item_title", " ", "no value"),
    ],
)
def test_a_history_is_read_and_never_run(column, value, reason):
    other = {**STARS, "user_id": "A2", "item_title": "Big"}
    with pytest.raises(ValueError, match=rf"list\[2\], column '{column}': .* 1 {reason}\."):
        load_rows([STARS, other, {**STARS, column: value}], negatives=1)


ENDLESS: list = [" Heat"]
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("good", "change", "column", "detail"),
    [
        (DMPO, {"input": np.array(["a", "b"])}, "input", "it has a value of type ndarray; make it a list"),
        (PAIR, {"review": "\ud800"}, "review", "it has half a surrogate pair"),
        (ROW, {3: "x"}, "3", "it has 3 for a name"),
        (
            ROW,
            {"more": ENDLESS},
            "more",
            "it is nested more than 50 levels deep",
        ),  # pyarrow follows it until the process ends
        (SCORED, {"completions": [{"a": 1, None: 2}, " Big"]}, "completions", "it has None for a name"),
        (STARS, {"user_id": ["A1"]}, "user_id", "expected a string or a number, got list"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_values_that_no_table_holds_cost_only_their_record(good, change, column, detail, first):
    other = {**good, **({"user_id": "B", "item_title": "Big"} if good is STARS else {})}
    options = {"negatives": 1} if good is STARS else {}
    records = [good, {**good, **change}, other]
    if first:
        records[:2] = records[1::-1]
    with pytest.raises(ValueError, match=rf"^list\[{1 - first}\], column '{column}': {re.escape(detail)}"):
        load_rows(records, **options)
    rows = load_rows(records, on_invalid_row="drop", **options)
    assert [row["rejected"] for row in rows] == [row["rejected"] for row in load_rows([good, other], **options)]
    with pytest.raises(ValueError, match=rf"^list(\[0\], column '{column}': |.* No row is left\.)"):
        load_rows([{**good, **change}], on_invalid_row="drop", **options)


def test_a_record_behind_an_unreadable_one_is_counted_beside_it():
    records = [{**ROW, "review": "\ud800"}, {**ROW, "rejected": []}, ROW]
    with pytest.raises(
        ValueError, match=r"^list\[0\], column 'review': .* In all, 2 of 3 records .*: 1 unreadable, 1 no rej"
    ):
        load_rows(records)
    rows = load_rows(records, on_invalid_row="drop")
    assert list(rows) == [ROW]
    assert rows.info.description.endswith("Dropped: 1 unreadable, 1 no rejected.")


@pytest.mark.parametrize(
    ("name", "where"), [("a.json", r"a\.json\[1\] is not"), ("a.jsonl", r"line 2 \(row a\.jsonl\[1\]\)")]
)
@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
def test_json_beyond_what_python_reads(name, where, value, tmp_path):
    lines = [json.dumps(ROW), f'{{"prompt": {value}']
    (tmp_path / name).write_text("[" + ",\n".join(lines) if name == "a.json" else "\n".join(lines))
    with pytest.raises(ValueError, match=where):
        load_rows(tmp_path / name)


def test_a_user_with_all_titles():
    with pytest.raises(ValueError, match=r"the user has all titles.*1 no title to draw"):
        load_rows([STARS], negatives=1)


class TestFiles:
    records = [PAIR, {**PAIR, "rejected": ' "B"\n,ig'}, {**PAIR, "rejected": " 東京物語\u2028!"}]
    rejected = [" Heat", ' "B"\n,ig', " 東京物語\u2028!"]

    def write(self, path, kind):
        if kind == "csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, PAIR)
                writer.writeheader()
                writer.writerows(self.records)
        elif kind == "lines":
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
            path.write_text("".join(lines), encoding="utf-8")
        elif kind == "array":
            path.write_text(json.dumps(self.records, indent=1), encoding="utf-8")
        else:
            pl.DataFrame(self.records).write_parquet(path)
        return path

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("a.csv", "csv"), ("a.jsonl", "lines"), ("a.json", "lines"), ("a.json", "array"), ("a.parquet", "parquet")],
    )
    def test_all_kinds_hold_the_same(self, name, kind, tmp_path):
        path = self.write(tmp_path / name, kind)
        assert load_rows(path)["rejected"] == [self.rejected]
        assert load_rows(str(path)).info.description.startswith(f"{name}: 1 row from 3 records")
        if kind != "parquet":
            packed = tmp_path / f"{name}.gz"
            packed.write_bytes(gzip.compress(path.read_bytes()))
            assert load_rows(packed)["rejected"] == [self.rejected]

    @pytest.mark.parametrize(
        ("name", "kind", "cut", "message"),
        [
            ("a.csv", "csv", b",ig", r"a\.csv, line 3 \(row a\.csv\[1\]\): unexpected end of data"),
            (
                "a.jsonl",
                "lines",
                b'jected": " \xe6',
                r"a\.jsonl, line 3 \(row a\.jsonl\[2\]\): cut off or malformed JSON",
            ),
            ("a.jsonl", "lines", "京".encode()[1:], r"a\.jsonl, line 3: cut off within a character"),
            (
                "a.json",
                "array",
                b'jected": " \\u',
                r"cut off or malformed at line 15, .* first 2 rows are whole, a\.json\[2\] is not",
            ),
            ("a.parquet", "parquet", b"PAR1", r"a\.parquet: not a whole parquet file"),
        ],
    )
    def test_a_file_that_is_cut_off(self, name, kind, cut, message, tmp_path):
        path = self.write(tmp_path / name, kind)
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rindex(cut)])
        with pytest.raises(ValueError, match=message):
            load_rows(path)
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(whole)[:-30])
        if kind != "parquet":
            with pytest.raises(ValueError, match=r"the compressed file is cut off or damaged"):
                load_rows(packed)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.json", b'[{"chosen": " a"}, 3]', r"a\.json\[1\] has no named values, it is of type int"),
            ("a.json", b"[]", r"a\.json: there are no rows"),
            ("a.jsonl", b"", r"a\.jsonl: there are no rows"),
            ("a.csv", b"prompt,chosen,rejected\nNext:, a, b\nNext:, a\n", r"line 3 \(row a\.csv\[1\]\): 2 values for 3 col"),
            ("a.csv", b"prompt,chosen,rejected\nNext:, a,\"['x', 'y']\"\n", r"lists written as text"),
            ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', r"a\.jsonl, line 2: not UTF-8"),
            ("a.xlsx", b"x", r"cannot be read\. It is one of: \.json, \.jsonl, \.ndjson, \.csv, \.tsv, \.parquet"),
            ("a.json", b'{"text": "hi", "n": 1}', r"a\.json\[0\] is of no known format, it has: text, n\. .*\n- llara: LLaRA"),
        ],
    )  # fmt: skip
    def test_a_file_that_cannot_be_read(self, name, content, message, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_rows(tmp_path / name)

    def test_a_wrong_path(self, tmp_path):
        (tmp_path / "lastfm_val.json").write_text("[]")
        with pytest.raises(FileNotFoundError, match=r"lastfm_vla\.json\. Did you mean lastfm_val\.json\?"):
            load_rows(tmp_path / "lastfm_vla.json")
        with pytest.raises(FileNotFoundError, match=r"no file .*nowhere/a\.json\.$"):
            load_rows(tmp_path / "nowhere/a.json")
        with pytest.raises(ValueError, match=r"is a folder; give a file\. It holds: lastfm_val\.json"):
            load_rows(tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([ROW], {"format": "trl"}, r"`format` must be one of 'llara', .* got 'trl'"),
        ([ROW], {"on_invalid_row": "skip"}, r"`on_invalid_row` must be one of 'raise', 'drop', got 'skip'"),
        ([SCORED], {"ties": "both"}, r"`ties` must be one of 'drop', 'keep', got 'both'"),
        ([STARS], {"negatives": 0}, r"`negatives` must be at least 1, got 0"),
        ([ROW], {"chat": True}, r"`chat` is not for the format 'rows', which list is read as\. It takes: none"),
        ([LLARA], {"grouped": True}, r"`grouped` is not for the format 'llara'.* It takes: `chat`, `domain`"),
        ([LLARA], {"domain": "cheese"}, r"`domain`: there is no 'cheese'"),
        ([], {}, r"list: there are no rows"),
        (3, {}, r"Rows come from a file, a list or a `datasets.Dataset`, not from int"),
        (DatasetDict(train=Dataset.from_list([ROW])), {}, r"several datasets; give one of them: train"),
        (
            [{**ROW, "chosen": " Big"}],
            {"on_invalid_row": "drop"},
            r"0 rows .* Dropped: 1 chosen among .* No row is left",
        ),
        ([{**ROW, "n": 1}, {**ROW, "n": "b"}], {}, r"list, column 'n': its values are not of one type"),
        ([{**ROW, "n\0x": 1}], {}, r"list, column 'n\\x00x': its values are not of one type"),
        ([{**SCORED, "prompt": [user("a")]}], {"chat": True}, r"`chat=True` makes messages of a text prompt"),
    ],
)
def test_wrong_calls(source, options, message):
    with pytest.raises(ValueError, match=message):
        load_rows(source, **options)


titles = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "::" not in text and not text.startswith(":") and not text.endswith(":")
)


@settings(max_examples=200, deadline=None)
@given(st.lists(titles, min_size=2, max_size=6), st.data())
def test_any_titles_make_rows_that_can_be_trained_on(listed, data):
    chosen = data.draw(st.sampled_from(listed))
    distinct = list(dict.fromkeys(" ".join(title.split()) for title in listed))
    record = {"historyList": "::".join(listed), "itemList": listed, "trueSelection": chosen}
    if len(distinct) == 1:
        return
    (row,) = load_rows([record])
    assert find_problem(row) is None
    assert row["candidates"] == [f" {title}" for title in distinct]
    assert sorted([row["chosen"], *row["rejected"]]) == sorted(row["candidates"])
    assert row["prompt"].endswith(f": {', '.join(distinct)}. Answer:")


@settings(max_examples=200, deadline=None)
@given(st.lists(titles.filter(lambda text: "<" not in text and ">" not in text), min_size=3, max_size=6, unique=True))
def test_an_instruction_is_its_parts(titles):
    *history, first, second = titles
    instruction = dmpo_record(first, second, "", history)["instruction"]
    ranking = dmpo.parse(instruction)
    assert (ranking.history, ranking.pair) == (history, (first, second))
    assert ranking.text == instruction


@pytest.mark.real
@pytest.mark.skipif(not FILES, reason="the published data files are absent")
class TestPublishedFiles:
    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    @pytest.mark.parametrize("chat", [False, True])
    def test_every_row_can_be_used(self, path, chat):
        records = json.loads(path.read_text(encoding="utf-8"))
        rows = load_rows(path, chat=chat)
        assert f"read as {path.parent.name}: " in rows.info.description
        assert len(rows) == len(records)
        for row in rows:
            assert find_problem(row) is None
            assert row["chosen"] in row["candidates"]
            assert all(answer in row["candidates"] for answer in row["rejected"])
            assert len(row["candidates"]) == len(row["rejected"]) + 1
        if path.parent.name == "dmpo" and not chat:
            assert rows["prompt"] == [record["instruction"] for record in records]
            for row, record in zip(rows, records, strict=True):
                outputs = record["output"] if isinstance(record["output"], list) else [record["output"]]
                assert outputs == [row["chosen"], *row["rejected"]][: len(outputs)]

    @pytest.mark.parametrize("path", sorted(DATA.glob("dmpo/*_dpo_*.json")), ids=lambda path: path.stem)
    def test_a_group_is_a_user(self, path):
        rows = load_rows(path, grouped=True)
        k = int(path.stem[-1])
        assert len(rows) == (200 if path.stem == "amazon_movie_dpo_1" else 100)
        for row in rows:
            assert find_problem(row) is None
            assert len(row["rejected"]) == k
            assert sorted([row["chosen"], *row["rejected"]]) == row["candidates"]

    @not_interpreted
    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_a_step(self, path, model_path, make_args):
        from trl_dmpo import DMPOTrainer

        args = make_args(max_steps=1, max_length=None)
        trainer = DMPOTrainer(model_path(), args=args, train_dataset=load_rows(path).select(range(2)))
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert trainer.state.log_history[0]["grad_norm"] > 0
