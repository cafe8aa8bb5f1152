"""Faithfulness of explanations: what is removed, what that does by hand, and what is tested against what."""

import html
import json
import re

import numpy as np
import polars as pl
import pytest
import torch
from benchmarks.quality import faithfulness
from benchmarks.quality.faithfulness import (
    EFFECTS,
    KINDS,
    faithfulness_table,
    measure_faithfulness,
    plot_faithfulness,
    summarise_faithfulness,
    write_cases,
)
from transformers import AutoModelForCausalLM

from trl_dmpo.data.prompts import NextItem, Template
from trl_dmpo.ranking.explain import explain
from trl_dmpo.ranking.intervals import holm
from trl_dmpo.ranking.recommender import Recommender


FORM = Template(prompt="Seen: {history}. Next:", separator="; ")
CATALOGUE = pl.DataFrame(
    {"item_id": range(9), "title": ["Alien", "Heat", "Babe", "Jaws", "Aliens", "Big", "E[b]T", "<Up>", "M"]}
)
ALIEN, HEAT, BABE, JAWS, ALIENS, BIG, ET, UP, M = range(9)
USER = {"user_id": "ann", "history_ids": [HEAT, ALIEN, BABE, JAWS], "candidate_ids": [BIG, UP, ALIENS, ET]}


def taste(seen, title):
    """Alien is worth 3 to Aliens and Babe 1.5, Jaws costs it 0.5; Heat is worth 0.25 to Up, and that is all."""
    worth = {"Aliens": 0.0, "Big": 1.0, "E[b]T": 2.0, "<Up>": -1.0}.get(title, -9.0)
    if title == "Aliens":
        worth += 3 * ("Alien" in seen) + 1.5 * ("Babe" in seen) - 0.5 * ("Jaws" in seen)
    return worth + 0.25 * (title == "<Up>" and "Heat" in seen)


class Taste:
    """A scorer that knows what each title is worth to a user who has seen others, and keeps what it was asked."""

    def __init__(self, worth):
        self.worth, self.asked = worth, []

    def score(self, prompts, candidates, normalize="sum", progress=None, names=None):
        self.asked.append(list(prompts))
        seen = [prompt.removeprefix("Seen: ").split(". ")[0].split("; ") for prompt in prompts]
        return [
            torch.tensor([self.worth(history, title.strip()) for title in titles], dtype=torch.float32)
            for history, titles in zip(seen, candidates, strict=True)
        ]


@pytest.fixture
def make_recommender(model_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_path())

    def make(worth=None, form=FORM, **options):
        recommender = Recommender(model, tokenizer, CATALOGUE, form, **options)
        if worth is not None:
            recommender.scorer = Taste(worth)
        return recommender

    return make


def only(table, **values):
    return table.filter(**values).row(0, named=True)


def test_effects_by_hand(make_recommender):
    """Aliens has 4, E.T. 2, Big 1, Up -0.75. Attributions: Heat 0, Alien 3, Babe 1.5, Jaws -0.5."""
    table = measure_faithfulness(make_recommender(taste), [USER], counts=(1, 2), draws=99)
    assert table.select("user_id", "method", "n", "kind").rows() == [
        ("ann", "ablation", n, kind) for n in (1, 2) for kind in ("named", "random", "recent", "against")
    ]
    # Without Alien: E.T. 2, Aliens 1 and Big 1, Up -0.75
    assert only(table, n=1, kind="named") == {
        "user_id": "ann",
        "method": "ablation",
        "n": 1,
        "kind": "named",
        "changed": 1,
        "rank_change": 1.5,
        "held_out_rank_change": 0.5,
        "log_odds_change": -3,
        "held_out_log_odds_change": -3,
        "log_prob_change": -3,
        "moved": (1.5 + 1 + 0.5) / 4,
        "speaking_share": 1,
        "recent_share": 0,
        "noise": 0,
    }
    # Without Alien and Babe: E.T. 2, Big 1, Aliens -0.5, Up -0.75
    named = only(table, n=2, kind="named")
    assert (named["changed"], named["rank_change"], named["held_out_rank_change"]) == (1, 2, 1)
    assert (named["log_prob_change"], named["moved"], named["recent_share"]) == (-4.5, 4 / 4, 0.5)
    # Jaws is both the most recent and the one that speaks against
    recent, against = (only(table, n=1, kind=kind) for kind in ("recent", "against"))
    assert {**recent, "kind": ""} == {**against, "kind": ""}
    assert (recent["changed"], recent["log_odds_change"], recent["speaking_share"], recent["recent_share"]) == (
        0,
        0.5,
        0,
        1,
    )
    # Heat, of attribution 0, moves only one that is held out: 0.25 / 2 for Aliens
    against = only(table, n=2, kind="against")
    assert (against["log_odds_change"], against["held_out_log_odds_change"]) == (0.5, 0.5 + 0.125)
    # Babe and Jaws
    assert only(table, n=2, kind="recent")["log_odds_change"] == -1
    # All sets there are: 4 of one, 6 of two
    random = only(table, n=1, kind="random")
    assert (random["changed"], random["rank_change"], random["log_prob_change"]) == (1 / 4, 1.5 / 4, -4 / 4)
    assert (random["speaking_share"], random["recent_share"]) == (2 / 4, 1 / 4)
    random = only(table, n=2, kind="random")
    assert random["log_prob_change"] == -2  # half of the sets have a given item
    assert random["changed"] == pytest.approx(3 / 6)


def test_each_prompt_is_scored_once(make_recommender):
    recommender = make_recommender(taste)
    table = measure_faithfulness(recommender, [USER], methods=("ablation", "shapley"), draws=99)
    first, ablation, again, shapley, removed = recommender.scorer.asked
    assert (len(first), len(ablation), len(again), len(shapley)) == (1, 6, 1, 16)
    # The whole history, and all sets of 1, 2 and 3 of 4
    assert len(removed) == len(set(removed)) == 1 + 4 + 6 + 4
    assert removed[0] == first[0] == "Seen: Heat; Alien; Babe; Jaws. Next:"
    # The taste is a sum, of which both methods find the terms
    rows = {method: table.filter(method=method).drop("method", "noise") for method in ("ablation", "shapley")}
    for column in EFFECTS:
        np.testing.assert_allclose(rows["ablation"][column], rows["shapley"][column], atol=1e-6)


def test_effects_are_those_of_a_real_model(make_recommender):
    recommender = make_recommender(form=NextItem(domain="film"))
    found = explain(recommender, USER["history_ids"], candidates=USER["candidate_ids"], budget=0)
    done = []
    table = measure_faithfulness(recommender, [USER, USER], counts=[1, 3], draws=2, progress=done.append)
    assert done == [1, 1]
    named = only(table, n=1, kind="named")
    # By definition
    assert named["log_odds_change"] == pytest.approx(-found.attributions.max(), abs=1e-3)
    assert table.filter(n=1)["log_odds_change"].min() == pytest.approx(named["log_odds_change"], abs=1e-3)
    assert (table["noise"] < 1e-3).all()
    # By the public ranking, of the single item that stays
    keeps = USER["history_ids"][int(found.attributions.argmin())]
    before, after = (recommender.rank(history, USER["candidate_ids"]) for history in (USER["history_ids"], [keeps]))
    named = only(table, n=3, kind="named")
    place = after.ids.index(found.item_id)
    assert (named["changed"], named["rank_change"]) == (place > 0, place)
    assert named["log_prob_change"] == pytest.approx(after.scores[place] - before.scores[0], abs=1e-3)


def test_random_sets_follow_the_seed(make_recommender):
    def random(seed):
        table = measure_faithfulness(make_recommender(taste), [USER, USER], counts=[2], draws=2, seed=seed)
        return table.filter(kind="random")["log_prob_change"].to_list()

    assert random(0) == random(0)
    assert len({value for seed in range(5) for value in random(seed)}) > 2
    assert len({tuple(random(seed)) for seed in range(5)}) > 1
    # Users of one history have draws of their own
    assert any(first != second for first, second in map(random, range(5)))


def test_what_is_not_in_the_prompt_is_not_removed(make_recommender):
    recommender = make_recommender(taste, max_history=4)
    longer = {**USER, "history_ids": [M, BIG, *USER["history_ids"]]}
    tables = [measure_faithfulness(recommender, [user]) for user in (USER, longer)]
    assert tables[0].equals(tables[1])
    assert not any("M;" in prompt or "Big" in prompt for asked in recommender.scorer.asked for prompt in asked)


def test_an_item_that_is_first_by_noise_has_no_first_place_to_lose(make_recommender):
    """It is first when it is scored alone, and 0.5 less in company."""
    recommender = make_recommender(lambda seen, title: {"Big": 0.0, "Aliens": -1.0, "E[b]T": -0.3}.get(title, -9.0))
    score = recommender.scorer.score

    def noisy(prompts, candidates, *args, **options):
        scores = score(prompts, candidates, *args, **options)
        if len(prompts) > 1:
            for of_prompt, titles in zip(scores, candidates, strict=True):
                of_prompt[titles.index(" Big")] -= 0.5
        return scores

    recommender.scorer.score = noisy
    table = measure_faithfulness(recommender, [USER], counts=[1])
    assert table["changed"].is_nan().all()
    assert (table["rank_change"] == 0).all()
    (user,) = measure_faithfulness(make_recommender(taste), [USER], counts=[1]).filter(kind="named").to_dicts()
    results = summarise_faithfulness(pl.concat([table, made_up({"bob": user["changed"]}, counts=[1])]))
    assert results[0]["unstable_share"] == 0.5
    assert (results[0]["changed"]["n"], results[0]["rank_change"]["n"]) == (1, 2)
    assert "the 50.0% of users for whom another item was first the second time" in faithfulness_table(results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": []}, "`users` is empty"),
        ({"users": [{"user_id": 7, "history_ids": [0]}]}, "a user has no 'candidate_ids', only: user_id, history_ids"),
        (
            {"users": [{**USER, "history_ids": [0, 1, 2]}]},
            "user 'ann' has 3 items in the prompt, of which 3 cannot be",
        ),
        ({"users": [{**USER, "candidate_ids": [4, 5]}]}, "user 'ann' has 2 candidates. At least 3 are needed"),
        ({"users": [USER, {**USER, "candidate_ids": [4, 5, 99]}]}, "`users[1]`, user 'ann': .* no item of the id 99"),
        ({"counts": [1, 0]}, "`counts` has 0, but at least 1 item is removed"),
        ({"counts": []}, "`counts` is []; give at least one"),
        ({"methods": ["ablation", "ablation"]}, "`methods` is .*; give at least one, and each once"),
        ({"methods": ["lime"]}, "`method` is 'lime'"),
        ({"draws": 0}, "`draws` is 0, but it is at least 1"),
    ],
)
def test_errors_say_what_is_wrong(make_recommender, change, message):
    options = {"users": [USER]} | change
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        measure_faithfulness(make_recommender(taste), **options)


def made_up(named, counts=(1, 2), method="ablation"):
    """A table in which named items have an effect on each user, and others have none."""
    return pl.DataFrame(
        [
            {"user_id": user, "method": method, "n": n, "kind": kind}
            | dict.fromkeys(EFFECTS, float(value) * (kind == "named"))
            | {"speaking_share": 1.0, "recent_share": 0.5, "noise": 0.0}
            for user, value in named.items()
            for n in counts
            for kind in KINDS
        ]
    )


def test_summary_is_of_users_and_its_tests_are_adjusted_together():
    effects = dict(zip("abcdefgh", [1, 1, 1, 1, 1, 1, 0, 1], strict=True))
    results = summarise_faithfulness(made_up(effects))
    assert [(each["n"], each["kind"]) for each in results] == [(n, kind) for n in (1, 2) for kind in KINDS]
    assert json.loads(json.dumps(results)) == results
    named, random = results[0], results[1]
    assert (named["changed"]["value"], named["changed"]["n"], random["changed"]["value"]) == (7 / 8, 8, 0)
    assert 0 < named["changed"]["low"] < 7 / 8 < named["changed"]["high"] <= 1
    assert (named["speaking_share"], named["recent_share"]) == (1, 0.5)
    assert "less_random" not in random
    tests = [
        test
        for each in (results[0], results[4])
        for name in ("random", "recent")
        for test in each[f"less_{name}"].values()
    ]
    assert tests[0]["value"] == 7 / 8
    assert tests[0]["p"] == 2 / 2**7
    by_definition = [test for test in tests if test["p"] is None]
    assert by_definition == [results[0][f"less_{name}"]["log_odds_change"] for name in ("random", "recent")]
    assert all(test["p_holm"] is None for test in by_definition)
    tested = [test for test in tests if test["p"] is not None]
    assert [test["p_holm"] for test in tested] == holm([2 / 2**7] * 26).tolist()
    shapley = summarise_faithfulness(made_up(effects, method="shapley"))
    assert shapley[0]["less_random"]["log_odds_change"]["p"] == 2 / 2**7


def test_rows_that_are_not_paired_are_refused():
    table = made_up({"a": 1, "b": 2})
    for kind in ("random", "against"):
        without = table.filter((pl.col("kind") != kind) | (pl.col("user_id") == "a"))
        for broken in (without, pl.concat([table.filter(pl.col("kind") != kind), table.filter(kind=kind)[::-1]])):
            with pytest.raises(
                ValueError, match=f"the rows of '{kind}' and 'named' .* not of the same users in the same order"
            ):
                summarise_faithfulness(broken)


def test_table_says_what_is_seen_and_what_is_true_by_definition():
    table = faithfulness_table(summarise_faithfulness(made_up(dict.fromkeys(range(20), 1.0))))
    effects, differences, legend = table.split("\n\n")
    lines = effects.split("\n")
    assert lines[0].startswith("| ablation, 20 users: n | removed | no longer first | rank, change |")
    assert lines[2].startswith("| 1 | named | 1.00 (1.00 to 1.00) | +1.00 (+1.00 to +1.00) |")
    assert lines[3].endswith("| 0.00 (0.00 to 0.00) | 100% | 50% |")
    lines = [line.split(" | ") for line in differences.split("\n")]
    assert len({len(line) for line in lines}) == 1
    column = lines[0].index("log-odds against the runner-up, change")
    assert [line[column].split(", ")[1] for line in lines[2:]] == ["*", "*", "p = 0.003", "p = 0.003"]
    assert "True by definition" in legend


def test_plot_has_a_line_a_kind_and_a_row_a_method(tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    table = pl.concat([made_up({"a": 1, "b": 0}, method=method) for method in ("ablation", "shapley")])
    plot_faithfulness(summarise_faithfulness(table), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    panels = figures[0].axes
    assert [panel.get_title().rpartition(" ")[2] for panel in panels] == ["(ablation)"] * 3 + ["(shapley)"] * 3
    named, random = (container[0].get_ydata() for container in panels[0].containers[:2])
    assert (named.tolist(), random.tolist()) == ([0.5, 0.5], [0, 0])
    monkeypatch.undo()
    pyplot.close("all")


def test_cases_show_the_explanation_and_the_ranks_without_what_it_names(make_recommender, tmp_path):
    users = [{**USER, "user_id": f"<user {number}>"} for number in range(5)]
    file = write_cases(make_recommender(taste), users, tmp_path / "new", count=2, counts=(1, 2))
    page = file.read_text(encoding="utf-8")
    assert "<Up>" not in page
    text = html.unescape(re.sub("<[^>]+>", "", page))
    assert len(re.findall("<user .>", text)) == 2
    assert text.count("Why Aliens rather than E[b]T: log-odds +2.00") == 2
    assert "Without Alien, E[b]T would come first." in text
    assert "without the first 1, 2 of: Alien; Babe" in text
    lines = {
        line.split()[0]: line.split()[1:] for line in text.split("\n") if re.search(r"\d +[\d.]+ +[\d.]+ *$", line)
    }
    assert lines == {
        "Aliens": ["1", "2.5", "3"],
        "E[b]T": ["2", "1", "1"],
        "Big": ["3", "2.5", "2"],
        "<Up>": ["4", "4", "4"],
    }
    other = write_cases(make_recommender(taste), users, tmp_path / "other", count=2, counts=(1, 2), seed=1)
    assert other.read_text(encoding="utf-8") != page


def test_kinds_have_a_colour_each():
    assert len(set(faithfulness.COLOURS)) == len(KINDS)
