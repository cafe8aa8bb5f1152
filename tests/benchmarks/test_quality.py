"""The harness of `benchmarks/quality`."""

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import yaml
from benchmarks.quality.baselines import fit_baseline
from benchmarks.quality.data import (
    TASKS,
    alike,
    find,
    hold_out_disliked,
    in_no_order,
    item_embeddings,
    limit,
    make_task,
    of_users,
    shorten,
    split_users,
    titles_of,
    users_of,
    windows,
    without_ties,
)
from benchmarks.quality.experiment import Arm, load_experiment
from benchmarks.quality.made_up import write_made_up_data
from benchmarks.quality.models import make_model, make_tokenizer
from benchmarks.quality.plots import plot_against
from benchmarks.quality.pool import plan
from benchmarks.quality.report import (
    Figures,
    adjust,
    baseline_of,
    contrasted,
    plain,
    short_table,
    start_of,
    token_counts,
)
from benchmarks.quality.stages import Stages, hash_of, read_stage
from benchmarks.quality.training import Runner, read_scores, save_scores

from trl_dmpo import Scorer
from trl_dmpo.data import load_interactions
from trl_dmpo.data.log import make_log
from trl_dmpo.ranking.evaluate import evaluate_scores


PRESETS = Path(__file__).parents[2] / "benchmarks" / "quality" / "presets"
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_made_up_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sequence(folder):
    return make_task({"kind": "sequence", "source": "ml-100k", "seen": False, "full_catalogue": True}, 0, [folder])


def write(tmp_path, **fields):
    file = tmp_path / "trial.yaml"
    file.write_text(
        yaml.safe_dump({"title": "t", "data": {}, "starts": {"a": {}}, "arms": [{}], "evaluate": {}} | fields)
    )
    return file


class TestExperiment:
    def test_lists_become_arms(self, tmp_path):
        arms = [{}, {"method": ["sft", "dmpo"], "rows": {"k": [1, 5], "rows": 10}}]
        file = write(tmp_path, arms=arms, methods={"sft": {}, "dmpo": {}})
        names = [arm.name for arm in load_experiment(file).expand()]
        assert names == [
            "start",
            "sft, k=1, rows=10",
            "sft, k=5, rows=10",
            "dmpo, k=1, rows=10",
            "dmpo, k=5, rows=10",
        ]

    def test_arms_of_some_tests(self, tmp_path):
        file = write(
            tmp_path, arms=[{}, {"method": ["sft", "dmpo"], "tests": "titles"}], methods={"sft": {}, "dmpo": {}}
        )
        assert [arm.tests for arm in load_experiment(file).expand()] == ["", "titles", "titles"]

    def test_tiny_replaces_field_by_field(self, tmp_path):
        file = write(tmp_path, data={"kind": "a", "rows": 1000}, tiny={"data": {"rows": 5}})
        assert load_experiment(file, tiny=True).data == {"kind": "a", "rows": 5}
        assert load_experiment(file).data == {"kind": "a", "rows": 1000}

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"arm": []}, "has the field 'arm', but there are only"),
            ({"arms": [{"method": "x"}]}, "An arm of trial has the method 'x', but there are"),
            ({"arms": [{"start": "x"}]}, "An arm of trial has the start 'x', but there are: a"),
            ({"starts": {"a": {"trian": {}}}}, r"`starts\.a` of .* has the option 'trian', but there are only: shape"),
            ({"evaluate": {"metric": []}}, "`evaluate` of .* has the option 'metric'"),
            ({"arms": [{"k": 3}]}, "`arms` of trial have no option 'k'"),
            ({"baselines": ["ease"]}, r"has `baselines`: `tune\.test` and `tune\.metric`"),
        ],
    )
    def test_errors_name_the_field(self, tmp_path, fields, message):
        with pytest.raises(ValueError, match=message):
            load_experiment(write(tmp_path, **fields)).expand()

    def test_missing_field(self, tmp_path):
        file = tmp_path / "trial.yaml"
        file.write_text("title: t")
        with pytest.raises(ValueError, match="has no 'data'"):
            load_experiment(file)
        with pytest.raises(ValueError, match="has no section `tiny`"):
            load_experiment(file, tiny=True)

    @pytest.mark.parametrize("tiny", [False, True])
    @pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda file: file.stem)
    def test_presets_are_sound(self, preset, tiny):
        experiment = load_experiment(preset, tiny)
        assert experiment.data["kind"] in TASKS
        assert all(arm.method is None or arm.method in experiment.methods for arm in experiment.expand())
        arms, baseline = experiment.expand(), experiment.evaluate.get("baseline")
        compared = [baseline_of(experiment, arms, arm) for arm in arms]
        for contrast in experiment.evaluate.get("contrasts", ()):
            assert contrasted(arms, contrast)
        assert not baseline or any(compared)


class TestPlan:
    def test_each_waits_for_what_it_needs(self, tmp_path):
        methods = {"sft": {}, "dmpo": {"tune": {"beta": [1, 5]}}, "anew": {"like": "dmpo"}}
        arms = [{}, {"method": ["sft", "dmpo", "anew"]}]
        more = {
            "seeds": [0, 1],
            "baselines": ["ease"],
            "tune": {"test": "t", "metric": "mrr"},
            "explain": {"users": 1},
        }
        file = write(tmp_path, arms=arms, methods=methods, **more)
        jobs = plan(Runner(load_experiment(file), tmp_path))
        tried = {("trial", "dmpo", (("beta", beta),)) for beta in (1, 5)}
        assert list(jobs)[:2] == [("start", "a", 0), ("start", "a", 1)]
        assert {job for job in jobs if job[0] == "trial"} == tried
        assert all(jobs[job] == {("start", "a", 0)} for job in tried)
        assert jobs["run", "start", 1] == jobs["run", "sft", 1] == {("start", "a", 1)}
        assert jobs["run", "dmpo", 1] == jobs["run", "anew", 1] == {("start", "a", 1), *tried}
        assert jobs["baseline", "ease", 1] == set()
        assert jobs["explain", "anew", 1] == {("run", "anew", 1)}
        assert set().union(*jobs.values()) <= jobs.keys()

    def test_settings_are_tried_with_a_start_that_no_arm_has(self, tmp_path):
        tune = {"start": "b", "seed": 7}
        file = write(
            tmp_path,
            starts={"a": {}, "b": {}},
            arms=[{"method": "dmpo"}],
            methods={"dmpo": {"tune": {"beta": [1, 5]}}},
            tune=tune,
        )
        jobs = plan(Runner(load_experiment(file), tmp_path))
        assert jobs["trial", "dmpo", (("beta", 1),)] == {("start", "b", 7)}
        assert jobs["start", "b", 7] == set()


class TestStages:
    def test_what_exists_is_not_made_again(self, tmp_path):
        stages, made = Stages(tmp_path), []

        def make(folder):
            made.append(folder)
            (folder / "a").write_text("b")
            return {"found": 1}

        first = stages.get("start", {"seed": 0}, make)
        assert stages.get("start", {"seed": 0}, make) == first
        assert stages.get("start", {"seed": 1}, make) != first
        assert len(made) == 2
        assert (first / "a").read_text() == "b"
        assert read_stage(first)["made_from"] == {"seed": 0}
        assert read_stage(first)["found"] == 1

    def test_what_fails_leaves_nothing(self, tmp_path):
        stages = Stages(tmp_path)

        def fail(folder):
            (folder / "half").write_text("")
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            stages.get("start", {}, fail)
        assert not stages.path("start", {}).exists()
        folder = stages.get("start", {}, lambda folder: {})
        assert not (folder / "half").exists()

    def test_another_process_was_as_quick(self, tmp_path):
        stages = Stages(tmp_path)

        def slow(folder):
            path = stages.path("start", {})
            path.mkdir()
            (path / "stage.json").write_text('{"first": true}')
            return {"first": False}

        assert read_stage(stages.get("start", {}, slow))["first"]
        assert [each.name for each in tmp_path.iterdir()] == [stages.path("start", {}).name]

    def test_hash_does_not_depend_on_order(self):
        assert hash_of({"a": 1, "b": [2]}) == hash_of({"b": [2], "a": 1}) != hash_of({"a": 1, "b": [3]})


class TestData:
    def test_windows_hold_all(self):
        assert windows(list("aaaaabbc"), 2) == [0, 2, 4, 6, 7]
        assert windows(list("aaaaabbc"), 10) == [4, 6, 7]

    def test_find_names_the_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"nothing.json is in none of {tmp_path}.*--data"):
            find("nothing.json", [tmp_path])

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match=r"`data\.kind` is 'log'"):
            make_task({"kind": "log"}, 0)

    def test_a_larger_k_only_adds(self, sequence):
        small, large = (sequence.rows(rows=30, k=k) for k in (3, 7))
        assert small["prompt"][:] == large["prompt"][:]
        assert [row[:3] for row in large["rejected"]] == small["rejected"][:]
        other = sequence.rows(rows=30, k=3, negatives="popularity")
        assert other["chosen"][:] == small["chosen"][:]
        assert other["rejected"][:] != small["rejected"][:]

    def test_items_of_the_same_taste_are_near(self, folder):
        log = load_interactions(folder / "ml-100k")
        table = item_embeddings(log, size=4)
        vectors = np.array(table["embedding"].to_list())
        near = np.argsort(-(vectors @ vectors.T) / np.linalg.norm(vectors, axis=1), axis=1)[:, :10]
        titles = dict(log.items.select("item_id", "title").iter_rows())
        colours = np.array([titles[item][0] for item in table["item_id"]])
        assert np.mean(colours[near] == colours[:, None]) > 0.9

    def test_nothing_of_the_test_is_learnt(self, sequence):
        def pairs(rows, column="chosen_id"):
            return set(zip(rows["user_id"], rows[column], strict=True))

        held_out = pairs(sequence.test["sampled"].columns) | pairs(sequence.validation["sampled"].columns)
        preferred, texts = pairs(sequence.rows(rows=100)), sequence.texts().to_polars()
        learnt = pairs(texts) | pairs(texts.explode("history_ids"), "history_ids")
        assert not held_out & preferred
        assert not learnt & (held_out | preferred)

    def test_what_is_liked_later_may_be_rejected(self, sequence):
        rows = sequence.rows(rows=120, k=15, pool=15)
        rejected = set(
            rows.select_columns(["user_id", "rejected_ids"]).to_polars().explode("rejected_ids").iter_rows()
        )
        columns = sequence.test["sampled"].columns
        assert rejected & set(zip(columns["user_id"], columns["chosen_id"], strict=True))
        liked = rows.to_polars().explode("history_ids").select("user_id", "history_ids").iter_rows()
        assert not rejected & set(liked)

    def test_everything_that_was_not_met_is_ranked(self, sequence):
        sampled, full = sequence.test["sampled"], sequence.test["full"]
        for row in range(len(full)):
            right = sampled.candidates[row][sampled.labels[row]]
            assert full.candidates[row][full.labels[row]] == right
            assert set(sampled.candidates[row]) <= set(full.candidates[row])
            assert not set(full.columns["history_ids"][row]) & set(full.columns["candidate_ids"][row])
            assert full.columns["candidate_ids"][row][full.labels[row]] == full.columns["chosen_id"][row]

    def test_disliked_items_are_kept_from_training(self, folder):
        task = make_task({"kind": "sequence", "source": "ml-100k", "seen": False, "disliked": 1}, 0, [folder])
        log = load_interactions(folder / "ml-100k")
        low = log.interactions.filter(log.interactions["rating"] <= 3).join(log.items, on="item_id")
        disliked = dict(low.group_by("user_id").agg("title").iter_rows())
        held_out = {user: [] for user in disliked}
        for rows, sampled in ((task.validation, task.validation["sampled"]), (task.test, task.test["sampled"])):
            places = rows["disliked"].places.tolist()
            assert rows["disliked"].prompts == [sampled.prompts[place] for place in places]
            for user, (right, low), place in zip(
                rows["disliked"].columns["user_id"], rows["disliked"].candidates, places, strict=True
            ):
                assert right == sampled.candidates[place][sampled.labels[place]]
                held_out[user].append(low)
        assert any(held_out.values())
        for user, titles in held_out.items():
            assert len(set(titles)) == len(titles) in (0, 2)
            assert set(titles) <= set(disliked[user])
        rows = task.rows(rows=40, k=2, negatives="disliked")
        for user, rejected in zip(rows["user_id"], rows["rejected"], strict=True):
            assert set(rejected) <= set(disliked[user]) - set(held_out[user])
        # Nor are they drawn as what a user has not met
        rows = task.rows(rows=100, k=40, pool=40)
        for user, rejected in zip(rows["user_id"], rows["rejected"], strict=True):
            assert not set(rejected) & set(held_out[user])

    def test_disliked_items_are_those_of_the_same_time(self):
        times = {1: [(1, 1), (2, 1), (3, 5), (4, 1), (5, 5), (6, 2), (7, 5), (8, 3)], 2: [(1, 1), (3, 5), (5, 5)]}
        taken = [
            (user, item, place, rating) for user, each in times.items() for place, (item, rating) in enumerate(each)
        ]
        items = pl.DataFrame({"item_id": range(1, 9), "title": [f"Film {number}" for number in range(1, 9)]})
        schema = ["user_id", "item_id", "timestamp", "rating"]
        log = make_log(pl.DataFrame(taken, schema=schema, orient="row"), items, "films")
        test, validation = (
            SimpleNamespace(columns={"user_id": [1, 2], "chosen_id": chosen}) for chosen in ([7, 5], [3, 3])
        )
        assert hold_out_disliked(log, 2, test, validation) == [{1: [6, 8]}, {1: [2, 4]}]
        assert hold_out_disliked(log, 1, validation, test) == [{1: [2]}, {1: [6]}]

    def test_what_is_of_one_time_is_in_no_order(self):
        taken = pl.DataFrame(
            {"user_id": [1] * 200, "item_id": range(200), "timestamp": [place // 50 for place in range(200)]}
        )
        items = pl.DataFrame({"item_id": range(200), "title": [f"Film {number}" for number in range(200)]})
        log = make_log(taken, items, "films")
        found = without_ties(log)
        times = found.interactions["timestamp"]
        assert times.n_unique() == 200
        assert times.is_sorted()
        order = found.interactions["item_id"].to_numpy()
        assert (np.diff(order // 50) >= 0).all()
        assert np.mean(np.diff(order) > 0) < 0.6
        assert sorted(order.tolist()) == list(range(200))
        assert without_ties(log).interactions.equals(found.interactions)

    def test_nobody_disliked_so_many(self, folder):
        with pytest.raises(ValueError, match="no user of the rows rated twice as many items low"):
            make_task({"kind": "sequence", "source": "ml-100k", "disliked": 9}, 0, [folder])

    def test_of_items_with_one_title_the_chosen_one_is_ranked(self, folder, tmp_path):
        (tmp_path / "ml-100k").mkdir()
        for file in (folder / "ml-100k").iterdir():
            (tmp_path / "ml-100k" / file.name).write_text(file.read_text().replace("Blue film 31", "Red film 0"))
        full = make_task({"kind": "sequence", "source": "ml-100k", "full_catalogue": True}, 0, [tmp_path]).test["full"]
        found = [ids[label] for ids, label in zip(full.columns["candidate_ids"], full.labels, strict=True)]
        assert found == full.columns["chosen_id"]
        named = [row[label] for row, label in zip(full.candidates, full.labels, strict=True)]
        assert {item for item, title in zip(found, named, strict=True) if title == "Red film 0"} == {1, 32}

    def test_shorter_histories(self):
        instruction = "Seen: Here it is:  <Title:A>  <Title:B (1)>  <Title:C> . Rank the likelihood of  <Title:D>  and  <Title:E> ."
        expected = "Seen: Here it is:  <Title:B (1)>  <Title:C> . Rank the likelihood of  <Title:D>  and  <Title:E> ."
        assert shorten(instruction.replace("Seen: ", ""), 2) == expected.replace("Seen: ", "")
        assert shorten(instruction, None) == instruction

    def test_fewer_users_are_among_more(self, folder):
        options = {"kind": "pairs", "train": "dmpo/ml_1m", "test": {"same": "dmpo/ml_1m"}, "validation_rows": 10}
        task = make_task(options, 1, [folder])
        five, ten = (set(task.rows(form="orders", k=3, users=users)["prompt"]) for users in (5, 10))
        assert five < ten
        assert len(task.rows(form="orders", k=3, users=5)) == 15
        assert len(task.rows(form="titles", k=3, users=5)) == 5
        assert {len(row) for row in task.rows(form="titles", k=3)["rejected"]} == {3}
        with pytest.raises(ValueError, match=r"`rows\.users` is 21, but there are 20"):
            task.rows(form="titles", users=21)
        listed = task.rows(form="titles", k=1, listed=3)
        assert listed["prompt"][:] == task.rows(form="titles", k=3)["prompt"][:]
        assert {len(row) for row in listed["rejected"]} == {1}
        one, three = (task.rows(form="titles", k=k) for k in (1, 3))
        for rows, k in ((one, 1), (listed, 3)):
            turns = [
                titles_of(prompt)[1].index(chosen.strip())
                for prompt, chosen in zip(rows["prompt"], rows["chosen"], strict=True)
            ]
            assert turns == [number % (k + 1) for number in range(len(rows))]
        assert all(set(few) < set(more) for few, more in zip(one["rejected"], three["rejected"], strict=True))
        numbered = [
            {"instruction": f"Seen: {user} . Rank", "number": number} for user in range(50) for number in range(5)
        ]
        assert {each["number"] for each in of_users(numbered, None, 1, 0)} == set(range(5))

    def test_titles_are_alike(self):
        record = {
            "instruction": " <Title:Alien (1979)>  <Title:Sting, The (1973)>  <Title:Big > .",
            "input": "",
            "output": ["<Title:Red Violin, The (Le Violon rouge) (1998)>", "<Title:M (or 2)>", "<Title:1984 (1984)>"],
        }
        expected = [
            " <Title:Alien>  <Title:Sting>  <Title:Big> .",
            "",
            ["<Title:Red Violin>", "<Title:M (or 2)>", "<Title:1984>"],
        ]
        assert list(alike(record).values()) == expected

    def test_titles_of_a_prompt(self):
        prompt = "Films:  <Title:A>  <Title:B: C > . Which of these?  <Title:D>  <Title:A>  Answer:"
        assert titles_of(prompt) == (["A", "B: C"], ["D", "A"])

    @pytest.mark.parametrize(
        "options",
        [
            {"kind": "pairs", "train": "dmpo/ml_1m", "test": {"same": "dmpo/ml_1m"}, "max_history": 2},
            {"kind": "listed", "file": "llara/lastfm_val.json", "validation_users": 10, "test_users": 20},
        ],
        ids=lambda options: options["kind"],
    )
    def test_what_classical_recommenders_learn(self, folder, options):
        options |= {"validation_rows": 10} if options["kind"] == "pairs" else {}
        task = make_task(options, 0, [folder])
        liked, rows = task.liked(), next(rows for name, rows in task.test.items() if not name.endswith("orders"))
        assert not set(liked["user_id"]) & set(rows.columns["user_id"])
        assert not liked.select("user_id", "item_id").is_duplicated().any()
        assert all(re.fullmatch(r"(Red|Blue) film \d+", title) for title in liked["item_id"])
        for prompt, seen, ids, candidates in zip(
            rows.prompts, rows.columns["history_ids"], rows.columns["candidate_ids"], rows.candidates, strict=True
        ):
            assert seen == [title for title in seen if title in prompt]
            assert ids == [title.strip() for title in candidates]
            assert len(seen) == 2 if options["kind"] == "pairs" else len(seen) > 0
        counts = dict(liked["item_id"].value_counts().iter_rows())
        for ids, scores in zip(rows.columns["candidate_ids"], fit_baseline("popularity", liked, 0)(rows), strict=True):
            known = [place for place, title in enumerate(ids) if title in counts]
            assert np.array_equal(scores[known], [counts[ids[place]] for place in known])

    def test_rows_of_each_test(self, folder):
        options = {"kind": "pairs", "train": "dmpo/ml_1m", "test": dict.fromkeys("abc", "dmpo/ml_1m")}
        task = make_task(options | {"validation_rows": 10, "test_rows": {"a": 3, "b": 7}}, 0, [folder])
        few, more, rest = (task.test[f"{name}, titles"] for name in "abc")
        assert (len(few), len(more)) == (3, 7)
        assert few.prompts == more.prompts[:3] == rest.prompts[:3]
        everything = make_task(options | {"validation_rows": 10}, 0, [folder])
        assert len(rest) == len(everything.test["a, titles"]) > 7
        with pytest.raises(ValueError, match=r"`data\.test_rows` has 'd', but there are: a, b, c"):
            make_task(options | {"test_rows": {"d": 3}}, 0, [folder])

    def test_validation_is_no_test(self, folder):
        for options in (
            {"kind": "pairs", "train": "dmpo/ml_1m", "test": {"same": "dmpo/ml_1m"}, "validation_rows": 10},
            {"kind": "listed", "file": "llara/lastfm_val.json", "validation_users": 10, "test_users": 20},
        ):
            task = make_task(options, 0, [folder])
            validated = {prompt for rows in task.validation.values() for prompt in rows.prompts}
            assert not validated & {prompt for rows in task.test.values() for prompt in rows.prompts}

    def test_users_of_rows_that_follow_each_other(self):
        rows = [("a::b::c", "d"), ("x::y::z", "d"), ("b::c::d::e", "f"), ("a::b::c::d", "e"), ("a::b::c", "d")]
        records = [{"historyList": history, "trueSelection": answer} for history, answer in rows]
        assert users_of(records) == [0, 1, 0, 0, 0]

    def test_rows_in_no_order(self):
        titles = [f"Artist {number:03}" for number in range(400)]
        records, users = [], []
        for user in range(20):
            own = titles[user * 15 : user * 15 + 14]
            for place in range(10, 14):
                listed = [own[place], *titles[300 + user : 304 + user], own[0]]
                records.append(
                    {
                        "historyList": "::".join(own[place - 10 : place]),
                        "itemList": listed,
                        "trueSelection": own[place],
                    }
                )
                users.append(user * 4)
        found = in_no_order(records, users)
        assert found == in_no_order(records, users)
        assert in_no_order(found, users) != found
        places = []
        for user, old, new in zip(users, records, found, strict=True):
            own = set(titles[user // 4 * 15 : user // 4 * 15 + 14])
            assert {*new["historyList"], new["trueSelection"]} <= own
            assert len(set(new["historyList"])) == 10
            assert set(new["itemList"]) & own == {new["trueSelection"]}
            assert set(new["itemList"]) >= set(old["itemList"][1:5])
            assert len(set(new["itemList"])) == 6
            places.append(new["itemList"].index(new["trueSelection"]))
        assert set(places) == set(range(6))
        for (one, first), (other, second) in pairwise(zip(users, found, strict=True)):
            if one == other:  # windows that slide, as they did
                assert second["historyList"] == [*first["historyList"][1:], first["trueSelection"]]
        after = [new["trueSelection"] > max(new["historyList"]) for new in found]
        assert np.mean(after) < 0.3  # all of them were

    def test_users_are_not_split(self):
        users = [0, 0, 0, 3, 3, 5, 6, 6, 6, 6]
        validation, test, rest = split_users(users, [1, 2], most=2)
        parts = [{users[row] for row in part} for part in (validation, test, rest)]
        assert [len(part) for part in parts] == [1, 2, 1]
        assert set.union(*parts) == set(users)
        assert len(test) == sum(min(2, users.count(user)) for user in parts[1])
        assert len(rest) == sum(users.count(user) for user in parts[2])

    def test_seeds_share_the_test(self, folder):
        options = {
            "kind": "listed",
            "file": "llara/lastfm_val.json",
            "train_rows": 20,
            "validation_users": 10,
            "test_users": 20,
        }
        first, second = (make_task(options, seed, [folder]) for seed in (0, 1))
        assert first.test["listed"].content_hash == second.test["listed"].content_hash
        assert len(first.rows()) == len(second.rows()) == 20
        assert set(first.rows()["prompt"]) != set(second.rows()["prompt"])
        assert not set(first.rows()["prompt"]) & set(first.test["listed"].prompts)

    def test_too_few_rows(self, sequence):
        with pytest.raises(ValueError, match="1,000 rows are asked for, but there are 120"):
            limit(sequence.rows(rows=120, k=1), 1000, 0)


class TestRunner:
    def test_a_baseline_ranks_items_alone(self, folder, tmp_path):
        runner = Runner(load_experiment(PRESETS / "few_shot.yaml", tiny=True), tmp_path, (folder,))
        assert list(runner.baseline("popularity", 0)) == ["movielens, titles", "amazon, titles"]
        assert {name.partition(", ")[2] for name in runner.task(0).test} == {"orders", "titles"}

    def test_what_is_not_trained_has_no_seed(self, folder, tmp_path, monkeypatch):
        experiment = load_experiment(PRESETS / "few_shot.yaml")
        experiment.data |= {"validation_rows": 5, "test_rows": {}}
        runner = Runner(experiment, tmp_path, (folder,))
        monkeypatch.setattr(runner.stages, "get", lambda name, made_from, make: made_from)
        assert runner.start("base", 0) == runner.start("base", 1)
        assert runner.start("orders", 0) != runner.start("orders", 1)


class TestFigures:
    def test_one_seed_is_an_evaluation(self, sequence):
        rows = sequence.test["sampled"]
        generator = np.random.default_rng(0)
        scores = [generator.normal(size=len(row)).astype(np.float32) for row in rows.candidates]
        found = Figures(rows, [scores]).summary()["metrics"]
        expected = evaluate_scores(rows, {"model": scores}).results["model"]
        for metric in ("ndcg@10", "hit_rate@1", "mrr"):
            assert found[metric] == expected[metric]._asdict()
        assert found["pooled_auc"]["value"] == pytest.approx(expected["pooled_auc"].value)

    def test_seeds_are_averaged_row_by_row(self, sequence):
        rows = sequence.test["sampled"]
        best = [np.eye(len(row))[label] for row, label in zip(rows.candidates, rows.labels, strict=True)]
        worst = [-each for each in best]
        figures = Figures(rows, [best, worst])
        assert figures.per_row["hit_rate@1"].tolist() == [0.5] * len(rows)
        assert [each["hit_rate@1"] for each in figures.summary()["seeds"]] == [1.0, 0.0]
        difference = Figures(rows, [best, best]).compare(figures)["hit_rate@1"]
        assert difference["value"] == 0.5
        assert difference["p"] < 0.01

    def test_some_of_the_rows(self, sequence):
        rows = sequence.test["sampled"]
        best = [np.eye(len(row))[label] for row, label in zip(rows.candidates, rows.labels, strict=True)]
        worst = [each if place < 3 else -each for place, each in enumerate(best)]
        few = np.arange(len(rows)) < 4
        found = Figures(rows, [best]).compare(Figures(rows, [worst]), few)["hit_rate@1"]
        assert (found["value"], found["n"]) == (0.25, 4)
        assert Figures(rows, [best]).compare(Figures(rows, [worst]), ~few)["hit_rate@1"]["value"] == 1.0

    def test_rows_with_a_short_history_have_a_table(self):
        change = {"value": 0.25, "low": 0.125, "high": 0.5, "p": 0.25, "p_holm": 0.0001}
        arms = {"sft": {}, "dmpo": {"against": "sft", "short": {"mrr": change}}}
        assert short_table({"arms": arms}, "mrr") == []
        lines = short_table({"arms": arms, "short": 4}, "mrr")
        assert lines[0] == "Of the 4 rows with a short history:"
        assert lines[4:] == ["| dmpo | sft | +0.250 (+0.125 to +0.500) | 0.250 | < 0.001 |", ""]

    def test_tokens_are_those_of_the_scorer(self, sequence, tmp_path):
        rows = sequence.test["sampled"]
        tokenizer = make_tokenizer(sequence.titles, 300)
        model = make_model(tokenizer, SHAPE, 0)
        tokenizer.save_pretrained(tmp_path)
        scorer, candidates = Scorer(model, tokenizer), rows.candidates[:4]
        whole, mean = (scorer.score(rows.prompts[:4], candidates, normalize=each) for each in ("sum", "mean"))
        for counts, total, of_token in zip(token_counts(tmp_path, rows), whole, mean, strict=False):
            np.testing.assert_allclose(total.numpy() / counts, of_token, rtol=1e-5)

    def test_answers_of_a_model(self, sequence):
        rows = sequence.test["sampled"]
        scores = [np.zeros(len(row)) for row in rows.candidates]
        right = [row[label] for row, label in zip(rows.candidates, rows.labels, strict=True)]
        figures = Figures(rows, [scores] * 2, [right, ["nothing"] * len(rows)])
        metrics = figures.summary()["metrics"]
        assert metrics["generated_hit_rate"]["value"] == metrics["generated_valid_ratio"]["value"] == 0.5
        none = Figures(rows, [scores])
        assert figures.compare(none).keys() == none.compare(figures).keys() == none.compare(none).keys()
        assert figures.compare(figures).keys() - none.compare(none).keys() == {
            "generated_hit_rate",
            "generated_valid_ratio",
        }

    def test_adjusted_for_all_comparisons(self):
        some = {"m": {"p": 0.01}, "of some": {"p": 0.04}}
        results = {"a": {}, "b": {"difference": some}, "c": {"difference": {"m": {"p": 0.03}}}}
        adjust([each["difference"] for each in results.values() if each])
        assert [results[name]["difference"]["m"]["p_holm"] for name in "bc"] == [0.02, 0.03]
        assert some["of some"]["p_holm"] == 0.04

    def test_what_an_arm_is_compared_with(self, tmp_path):
        arms = [
            {},
            {"method": "sft", "rows": {"k": 1, "rows": [10, 20]}},
            {"method": "dmpo", "rows": {"k": 3, "rows": 20}},
            {"method": "longer", "rows": {"k": 3, "rows": 10}},
            {"method": "sft, longer", "rows": {"k": 1, "rows": 10}},
            {"method": "sft", "rows": {"k": 3, "rows": 20, "negatives": "disliked"}},
            {"method": "dmpo", "rows": {"k": 5, "rows": 20, "negatives": ["disliked", "hard"]}},
        ]
        methods = {"sft": {}, "dmpo": {}, "sft, longer": {}, "longer": {"against": "sft, longer"}}
        evaluate = {"baseline": "sft"}
        experiment = load_experiment(write(tmp_path, arms=arms, methods=methods, evaluate=evaluate))
        known = experiment.expand()
        compared = {arm.name: baseline_of(experiment, known, arm) for arm in known}
        assert compared["dmpo, k=3, rows=20"] == "sft, k=1, rows=20"
        assert compared["dmpo, k=5, negatives=disliked, rows=20"] == "sft, k=3, negatives=disliked, rows=20"
        assert compared["dmpo, k=5, negatives=hard, rows=20"] == "sft, k=1, rows=20"
        assert compared["longer, k=3, rows=10"] == "sft, longer, k=1, rows=10"
        assert compared["start"] == "sft, k=1, rows=10"
        assert compared["sft, k=1, rows=10"] is None
        other = Arm("other", "dmpo", "a", {"k": 3, "rows": 30})
        with pytest.raises(ValueError, match="other of trial is compared with sft, of which no arm has such rows"):
            baseline_of(experiment, known, other)
        assert start_of(known, other) == "start"
        assert start_of(known, known[0]) is None

    def test_contrasts_differ_in_one_option(self, tmp_path):
        arms = [
            {},
            {"method": ["a", "b"], "rows": {"rows": 10, "k": [1, 5]}},
            {"method": "a", "rows": {"rows": 10, "k": 5, "negatives": "hard", "pool": 7}},
            {"method": "a", "rows": {"rows": 20, "k": 5}},
            {"method": "c", "rows": {"rows": 20, "k": 1}},
        ]
        experiment = load_experiment(write(tmp_path, arms=arms, methods={"a": {}, "b": {}, "c": {}}))

        def names(contrast):
            return [tuple(arm.name for arm in pair) for pair in contrasted(experiment.expand(), contrast)]

        assert names({"k": [1, 5]}) == [(f"{name}, k=1, rows=10", f"{name}, k=5, rows=10") for name in "ab"]
        assert names({"negatives": [None, "hard"]}) == [("a, k=5, rows=10", "a, k=5, negatives=hard, pool=7, rows=10")]
        assert names({"method": ["a", "b"]}) == [(f"a, k={k}, rows=10", f"b, k={k}, rows=10") for k in (1, 5)]
        assert names({"method": ["a", "c"]}) == [("a, k=5, rows=20", "c, k=1, rows=20")]
        with pytest.raises(ValueError, match=r"no two arms differ in k alone, 1 and 9"):
            names({"k": [1, 9]})

    def test_plot_of_differences(self, tmp_path, monkeypatch):
        from matplotlib import pyplot

        rows = {"rows": 20, "negatives": "disliked"}
        arms = [
            {},
            {"method": "sft", "rows": {**rows, "k": 1}},
            {"method": "dmpo", "rows": {**rows, "k": [1, 15]}},
            {"method": "dmpo", "rows": {**rows, "k": 5, "negatives": "hard"}},
            {"method": ["longer", "other"], "rows": {**rows, "k": 1}},
            {"method": ["sft", "dmpo"], "rows": {**rows, "k": 1, "rows": 80, "train_targets": -1}},
        ]
        methods = {"sft": {}, "dmpo": {}, "longer": {}, "other": {"against": "longer"}}
        file = write(tmp_path, arms=arms, methods=methods, evaluate={"baseline": "sft"})
        experiment = load_experiment(file)
        values = {"start": -2, "dmpo, k=1": 1, "dmpo, k=15": 3, "dmpo, k=5": 9, "other": 7}
        results = {"sft, k=1, negatives=disliked, rows=20": {}}
        for arm in experiment.expand():
            for name, value in values.items():
                value = 5 if arm.rows.get("rows") == 80 else value
                if arm.name.startswith(f"{name}, ") or arm.name == name:
                    difference = {"value": value, "low": value - 1, "high": value + 2}
                    against = f"{'longer' if arm.method == 'other' else 'sft'}, k=1, negatives=disliked, rows=20"
                    results[arm.name] = {"difference": {"mrr": difference}, "against": against}
        figures = []
        monkeypatch.setattr(pyplot, "close", figures.append)
        plot_against({"arms": results}, experiment, "k", "mrr", "title", tmp_path / "plot.png")
        (panel,) = figures[0].axes
        drawn = {line.get_label(): line.get_ydata() for line in panel.lines if not line.get_label().startswith("_")}
        assert {name: list(data) for name, data in drawn.items()} == {"sft": [0, 0], "start": [-2, -2]}
        (container,) = panel.containers
        assert container.get_label() == "dmpo"
        assert list(container.lines[0].get_ydata()) == [1, 3]
        assert [part.tolist()[0][1] for part in container.lines[2][0].get_segments()] == [0, 2]
        assert panel.get_ylabel() == "mrr, less that of sft on the same rows"
        assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "15"]
        plot_against({"arms": results}, experiment, "rows", "mrr", "title", tmp_path / "plot.png")
        (container,) = figures[1].axes[0].containers
        assert list(container.lines[0].get_ydata()) == [1, 5]
        assert [label.get_text() for label in figures[1].axes[0].get_xticklabels()] == ["20", "80"]
        monkeypatch.undo()
        pyplot.close("all")

    def test_scores_are_kept(self, tmp_path):
        scores = [np.array([0.1, -2], np.float32), np.array([3], np.float32)]
        save_scores(scores, tmp_path)
        assert [each.tolist() for each in read_scores(tmp_path)] == [each.tolist() for each in scores]

    def test_plain_values(self):
        assert json.dumps(plain({"a": float("nan"), 1: (1 / 3, [2])})) == '{"a": null, "1": [0.333333, [2]]}'
