"""From scores to results, to files, and back."""

import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from sklearn.metrics import ndcg_score, roc_auc_score
from transformers import AutoModelForCausalLM

from trl_dmpo.ranking.evaluate import evaluate_scores, score_rows
from trl_dmpo.ranking.models import check_model, load_model, unify_lora
from trl_dmpo.ranking.results import Earlier, per_user_table, read_earlier, write_evaluation
from trl_dmpo.ranking.rows import FullCatalogue, RankingRows, load_ranking_rows
from trl_dmpo.ranking.scorer import Scorer

from ..conftest import make_rows as preference_rows
from .report_helpers import make_evaluation, make_rows, make_scores


ROWS = [
    {"prompt": "Next:", "candidates": [" Heat", " Alien", " Big"], "label": label, "user_id": user, "kind": kind}
    for label, user, kind in [(0, "ann", "a"), (1, "ann", "b"), (2, "bob", "a"), (0, "eve", "a")]
]
OLD = [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 0.0]]
NEW = [[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [3.0, 2.0, 2.0], [1.0, 0.0, 0.0]]


def test_by_hand():
    rows = load_ranking_rows(ROWS)
    made = evaluate_scores(rows, {"old": OLD, "new": NEW}, cutoffs=[1, 2], group_by=["kind"])
    assert made.per_row["old"]["hit_rate@1"].tolist() == [1, 0, 0, 0.5]
    assert made.per_row["new"]["hit_rate@1"].tolist() == [1, 1, 0, 1]
    assert made.per_row["new"]["hit_rate@2"].tolist() == [1, 1, 0.5, 1]
    assert made.results["old"]["hit_rate@1"].value == 0.375
    assert made.results["old"]["hit_rate@1"].n == 3
    assert made.comparisons["new"]["hit_rate@1"].difference.value == 0.375
    assert made.comparisons["new"]["hit_rate@1"].p_value == 0.5  # two users differ: 2 of 4 signs are as far from 0
    assert {label: groups["old"]["hit_rate@1"].value for label, groups in made.groups["kind"].items()} == {
        "a": 0.5,
        "b": 0.0,
    }
    assert made.generated is None
    assert made.settings["users"] == 3


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({}, {}, "There are no scores to evaluate"),
        ({"old": OLD[:3]}, {}, "old: there are scores of 3 rows, but 4 rows"),
        ({"old": [*OLD[:2], [1.0, 2.0], OLD[3]]}, {}, "old: row 2 has 2 scores for 3 candidates"),
        ({"old": [*OLD[:3], [1.0, math.nan, 2.0]]}, {}, "3"),
        (
            {"old": OLD},
            {"generated": {"new": ["Heat"] * 4}},
            "`generated` has answers of 'new', of which there are no scores",
        ),
        ({"old": OLD}, {"group_by": ["age"]}, "`group_by`: list has no column 'age', only: user_id, kind"),
    ],
)
def test_what_cannot_be_evaluated(scores, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_scores(load_ranking_rows(ROWS), scores, **options)


def test_what_is_computed_is_computed_from_what_is_kept():
    rows = load_ranking_rows(ROWS[:1])
    made = evaluate_scores(rows, {"old": [[1e9 + 1, 1e9, 0.0]]}, cutoffs=[1])
    assert made.per_row["old"]["hit_rate@1"].tolist() == [0.5]  # as float32, the two are one number
    assert per_user_table(made)["rank"].to_list() == [1.5]


def test_rows_of_which_some_lack_ids(tmp_path):
    lists = {"candidate_ids": [[1, 2, 3], None], "history_ids": [[2], None], "chosen_id": [1, None]}
    rows = [row | {name: values[place] for name, values in lists.items()} for place, row in enumerate(ROWS[:2])]
    items = pl.DataFrame({"item_id": [1, 2, 3], "title": ["Heat", "Alien", "Big"], "popularity": [5, 3, 1]})
    made = evaluate_scores(replace(load_ranking_rows(rows), items=items), {"old": OLD[:2]})
    assert list(made.groups) == ["activity", "popularity"]
    assert list(made.groups["popularity"]) == ["5", "none"]
    write_evaluation(made, tmp_path)
    assert pl.read_parquet(tmp_path / "per_user.parquet")["history_popularity"].fill_nan(None).to_list() == [3.0, None]


def test_settings_that_are_no_numbers_are_null(tmp_path):
    made = evaluate_scores(
        load_ranking_rows(ROWS), {"old": OLD}, settings={"bias": {"variance": math.nan, "of": [math.inf]}}
    )
    write_evaluation(made, tmp_path)
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["bias"] == {"variance": None, "of": [None]}


def test_names_of_an_earlier_run_stay_apart():
    earlier = Earlier({"m (out)": [1], "m": [2], "n": [3]}, {}, {"m": {}, "m (out)": {}, "n": {}}, {})
    assert earlier.renamed({"m"}, "out").scores == {"m (out)": [1], "m (out) (out)": [2], "n": [3]}
    assert list(earlier.renamed({"m", "m (out)"}, "out").models) == ["m (out) (out) (out)", "m (out) (out)", "n"]


@pytest.fixture(scope="module")
def evaluation():
    rows = make_rows(24)
    scores = {"sft": make_scores(rows, 1.0), "dmpo": make_scores(rows, 4.0, seed=2)}
    answers = [row[label] for row, label in zip(rows.candidates, rows.labels, strict=True)]
    generated = {"dmpo": [answer if place % 3 else "Nothing" for place, answer in enumerate(answers)]}
    return make_evaluation(rows, scores=scores, generated=generated, settings={"models": {"sft": {}, "dmpo": {}}})


@pytest.fixture(scope="module")
def written(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_evaluation(evaluation, folder)
    return folder


def recompute(part: pl.DataFrame, size: int) -> dict[str, float]:
    """Every figure of a model from its part of `per_user.parquet`, by other code where it is no mean of a column."""
    scores, label = np.array(part["scores"].to_list()), part["label"].to_numpy()
    chosen = np.arange(scores.shape[1]) == label[:, None]
    metrics = [name for name in part.columns if "@" in name or name.startswith(("generated_", "mrr", "paired"))]
    figures = {name: part[name].fill_nan(None).mean() for name in metrics if not part[name].is_null().all()}
    figures["pooled_auc"] = roc_auc_score(chosen.ravel(), scores.ravel())
    for k in (1, 5, 10):
        best = np.take_along_axis(np.array(part["candidate_ids"].to_list()), (-scores).argsort(1), 1)[:, :k]
        figures[f"coverage@{k}"] = len(np.unique(best)) / size
        figures[f"popularity_lift@{k}"] = best.mean() / part["history_popularity"].mean() - 1  # popularity is the id
    figures["ndcg@5"] = ndcg_score(chosen, scores, k=5)
    figures["mrr"] = (1 / part["rank"]).mean()
    return figures


def test_every_number_is_in_the_table(written):
    read = json.loads((written / "results.json").read_text())
    table = pl.read_parquet(written / "per_user.parquet")
    for model, results in read["results"].items():
        part = table.filter(pl.col("model") == model)
        figures = recompute(part, read["settings"]["catalogue_size"])
        flips = results.pop("coin_flip_auc")
        assert abs(flips["value"] - figures["pooled_auc"]) < 0.05
        assert {name: each["value"] for name, each in results.items() if each["n"]} == pytest.approx(figures)
        assert all(set(each) == {"value", "low", "high", "n"} for each in results.values())
        for column, labels in read["groups"].items():
            for label, by_model in labels.items():
                group = part.filter(pl.col(f"group_{column}") == label)
                for name, each in by_model[model].items():
                    assert each["n"] == 0 or each["value"] == pytest.approx(group[name].fill_nan(None).mean())
    ours, theirs = (table.filter(pl.col("model") == model) for model in ("dmpo", "sft"))
    for name, each in read["comparisons"]["dmpo"].items():
        assert each["difference"]["value"] == pytest.approx((ours[name] - theirs[name]).mean(), abs=1e-12)


def test_the_rows_of_the_table(evaluation, written):
    table = pl.read_parquet(written / "per_user.parquet")
    rows, part = evaluation.rows, table.filter(pl.col("model") == "dmpo")
    assert table["model"].to_list() == ["sft"] * 24 + ["dmpo"] * 24
    assert part["candidates"].to_list() == rows.candidates
    assert part["candidate_ids"].to_list() == rows.columns["candidate_ids"]
    assert part["label"].to_list() == rows.labels.tolist()
    assert part["user_id"].to_list() == rows.columns["user_id"]
    assert part["generated"].to_list() == evaluation.generated["dmpo"]
    assert part["generated_valid_ratio"].mean() == pytest.approx(2 / 3)
    assert (written / "report.html").read_text().startswith("<!DOCTYPE html>")


class TestEarlier:
    def test_what_was_written_is_read(self, evaluation, written):
        earlier = read_earlier(written, evaluation.rows)
        for model, scores in evaluation.scores.items():
            assert all((a == b).all() for a, b in zip(earlier.scores[model], scores, strict=True))
        assert earlier.generated == evaluation.generated
        again = earlier.renamed({"dmpo", "new"}, "out")
        assert list(again.scores) == ["sft", "dmpo (out)"]
        assert list(again.generated) == ["dmpo (out)"]

    def test_other_rows(self, evaluation, written):
        rows = evaluation.rows
        fewer = RankingRows(rows.name, rows.prompts[:9], rows.candidates[:9], rows.labels[:9])
        with pytest.raises(ValueError, match=r"other rows: .*\(24 rows\), and here .*\(9 rows\)\. Row 9, for one"):
            read_earlier(written, fewer)
        other = RankingRows("other", [*rows.prompts[:23], "Next:"], rows.candidates, rows.labels)
        with pytest.raises(ValueError, match=r"an evaluation of other data: films .*, and here other"):
            read_earlier(written, other)

    def test_what_is_no_evaluation(self, evaluation, written, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"`compare_to`: .* holds no evaluation: there is no results.json"):
            read_earlier(tmp_path, evaluation.rows)
        (tmp_path / "results.json").write_text((written / "results.json").read_text())
        (tmp_path / "per_user.parquet").write_text("not parquet")
        with pytest.raises(ValueError, match=r"`compare_to`: the evaluation in .* cannot be read"):
            read_earlier(tmp_path, evaluation.rows)
        (tmp_path / "results.json").write_text("{}")
        with pytest.raises(ValueError, match=r"cannot be read .*settings"):
            read_earlier(tmp_path, evaluation.rows)


@pytest.fixture(scope="module")
def scorer(model_path, tokenizer):
    return Scorer(AutoModelForCausalLM.from_pretrained(model_path()), tokenizer)


class TestScoring:
    def test_each_row(self, scorer):
        rows = load_ranking_rows(preference_rows(5, [2, 3]))
        done = []
        scores = score_rows(scorer, rows, progress=done.append)
        assert sum(done) == 5
        for row, each in enumerate(scores):
            alone = scorer.score(rows.prompts[row : row + 1], rows.candidates[row])[0].numpy()
            np.testing.assert_allclose(each, alone, atol=1e-4)

    def test_a_catalogue(self, scorer):
        answers, kept = [" Alien", " Heat", " Big", " Jaws"], [np.array([0, 2, 3]), np.array([1, 2])]
        candidates = [[answers[place] for place in places] for places in kept]
        rows = RankingRows("rows", ["Seen: Heat. Next:", "Seen: Babe. Next:"], candidates, np.array([0, 1]))
        plain = score_rows(scorer, rows)
        shared = RankingRows(rows.name, rows.prompts, candidates, rows.labels, catalogue=FullCatalogue(answers, kept))
        for each, other in zip(score_rows(scorer, shared), plain, strict=True):
            np.testing.assert_allclose(each, other, atol=1e-4)

    def test_an_error_names_the_row_of_the_source(self, scorer):
        source = [ROWS[0] | {"label": 9}, ROWS[0], ROWS[0] | {"prompt": "Alien, " * 600}]
        rows = load_ranking_rows(source, on_invalid_row="drop")
        with pytest.raises(ValueError, match=r"^list\[2\] has \d+ tokens"):
            score_rows(scorer, rows)


class TestModels:
    @pytest.fixture
    def adapter(self, model_path, tmp_path):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path()), LoraConfig(init_lora_weights=False))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model.eval()

    def test_an_adapter_with_the_tokenizer_of_its_base(self, adapter, tokenizer):
        folder, saved = adapter
        check_model(folder)
        model, found = load_model(folder)
        assert not model.training
        assert found.get_vocab() == tokenizer.get_vocab()
        prompts, candidates = ["Seen: Heat. Next:"], [" Alien", " Big"]
        ours, theirs = (Scorer(each, tokenizer).score(prompts, candidates)[0] for each in (model, saved))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

    def test_lora_in_the_type_of_its_base(self, adapter, tokenizer):
        folder, saved = adapter
        model, _ = load_model(folder, dtype="bfloat16")
        assert {each.dtype for each in model.parameters()} == {torch.bfloat16, torch.float32}
        assert unify_lora(model) is model
        assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
        prompts, candidates = ["Seen: Heat. Next:"], [" Alien", " Big"]
        ours, theirs = (Scorer(each, tokenizer).score(prompts, candidates)[0] for each in (model, saved))
        np.testing.assert_allclose(ours, theirs, rtol=0.02)

    def test_other_adapters_stay_as_they_are(self, model_path):
        model = get_peft_model(load_model(model_path(), dtype="bfloat16")[0], IA3Config(task_type="CAUSAL_LM"))
        before = {name: each.dtype for name, each in model.named_parameters()}
        assert set(before.values()) == {torch.bfloat16, torch.float32}
        assert before == {name: each.dtype for name, each in unify_lora(model).named_parameters()}

    def test_dtype_and_device(self, model_path):
        assert load_model(model_path(), dtype="bfloat16", device="cpu")[0].dtype.itemsize == 2
        with pytest.raises(ValueError, match="`device`: 'abacus' cannot be used"):
            load_model(model_path(), device="abacus")

    def test_what_is_no_model(self, adapter, tmp_path):
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")})
        )
        (tmp_path / "text").write_text("")
        (tmp_path / "empty").mkdir()
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text("{}")
        for name, kind, message in (
            ("nowhere", FileNotFoundError, "there is no folder .*nowhere"),
            ("text", ValueError, "text is a file; give the folder of a model"),
            ("empty", ValueError, "empty holds no model"),
            ("broken", ValueError, "broken cannot be loaded"),
            (
                "adapter",
                ValueError,
                "adapter, an adapter of .*gone, cannot be loaded: .*If its base model is elsewhere",
            ),
        ):
            for load in (check_model, load_model):
                with pytest.raises(kind, match=f"^`model_name_or_path`: .*{message}"):
                    load(tmp_path / name)
