"""The report is whole and well formed, shows the evaluation's own numbers, and text from the data is only ever text."""

import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.ranking.explain import Counterfactual, Explanation, Named, Sentence
from trl_dmpo.ranking.intervals import Comparison, Estimate
from trl_dmpo.ranking.report import example_rows, write_report
from trl_dmpo.ranking.report.charts import cutoff_axis, histogram, linear_axis
from trl_dmpo.ranking.report.examples import expected_ranks, make_example
from trl_dmpo.ranking.report.figures import centred_scores, curve_cutoffs, cutoff_curves
from trl_dmpo.ranking.report.page import _environment, _render
from trl_dmpo.ranking.report.tables import groups, metric_rows
from trl_dmpo.ranking.report.text import clean, name_models, number, verdict

from .report_helpers import NASTY, make_evaluation, make_rows, make_scores


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page, and fails where a tag is not closed by its own."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], [], [], []
        self.tables, self.text, self.attributes = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.attributes += list(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if "table" in self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1] += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def evaluation():
    rows = make_rows(40, 12, titles=[NASTY, "Amélie", "東京物語", "[bold]Heat[/bold]", "A & B"])
    return make_evaluation(rows, {"runs/sft": 1.0, "runs/dmpo": 4.0}, cutoffs=(1, 5, 10))


@pytest.fixture(scope="module")
def page(evaluation):
    return Page(_render(evaluation, {}))


def cells(estimate):
    """How an estimate is written, without the code that writes it."""
    text = f"{estimate.value:.3f}" if abs(estimate.value) < 10 else f"{estimate.value:.2f}"
    if not math.isnan(estimate.low):
        digits = [3 if abs(end) < 10 else 2 for end in (estimate.low, estimate.high)]
        text += f" [{estimate.low:.{digits[0]}f}, {estimate.high:.{digits[1]}f}]"
    return text.replace("-", "−")


def test_results_are_those_of_the_evaluation(evaluation, page):
    table, caption = page.tables[0], "Hit rate@10"
    shown = next(row for row in table if row[0].startswith(caption))
    assert shown[1:] == [cells(evaluation.results[model]["hit_rate@10"]) for model in evaluation.results]
    everything = "".join(page.text)
    for found in evaluation.results.values():
        for estimate in found.values():
            assert cells(estimate).split(" [")[0] in everything
            assert cells(estimate).partition(" ")[2] in everything


def test_differences_are_those_of_the_evaluation(evaluation, page):
    lines = {row[0]: row for table in page.tables for row in table if row[-1] == "better" or "beyond" in row[-1]}
    for metric, label in {
        "ndcg@10": "NDCG@10",
        "paired_accuracy": "Paired accuracy",
        "hit_rate@1": "Hit rate@1",
    }.items():
        difference, p_value = evaluation.comparisons["runs/dmpo"][metric]
        sign = "+" if difference.value > 0 else ""
        assert lines[label][1] == sign + cells(difference)
        assert lines[label][3] == (f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001")
    sentence = " ".join("".join(page.text).split())
    assert "B dmpo is better than A sft on NDCG@10: +" in sentence.replace("Bdmpo", "B dmpo").replace("Asft", "A sft")


def test_curves_pass_through_the_results(evaluation):
    hit_rate, ndcg = cutoff_curves(evaluation, name_models(list(evaluation.results)))
    assert hit_rate.cutoffs == list(range(1, 13))
    for chart, metric in ((hit_rate, "hit_rate"), (ndcg, "ndcg")):
        for estimates, model in zip(chart.estimates, evaluation.results, strict=True):
            for k in (1, 5, 10):
                assert estimates[k - 1] == evaluation.results[model][f"{metric}@{k}"]


def test_groups_are_those_of_the_evaluation(evaluation, page):
    shown = {row[0]: row for table in page.tables for row in table}
    for label, of_models in evaluation.groups["popularity"].items():
        expected = [cells(found["ndcg@10"]) for found in of_models.values()]
        assert any(row[2:-1] == expected for table in page.tables for row in table if row[0] == label), label
    assert "activity" in shown
    assert "popularity" in shown


def test_a_group_that_a_model_lacks(evaluation):
    models = name_models(list(evaluation.results))
    part = {"some": {"runs/sft": {"mrr": Estimate(0.5, 0.4, 0.6, 7)}}}
    rows = metric_rows(evaluation.results, models)
    (made,) = groups(replace(evaluation, groups={"kind": part}), models, rows)
    assert made.leading.lines[0].estimates == [Estimate(0.5, 0.4, 0.6, 7), None]
    assert made.leading.lines[0].n == 7


def test_everything_is_in_the_file(evaluation, page):
    assert page.count("script") == page.count("img") == page.count("link") == page.count("iframe") == 0
    assert not [name for name in page.attributes if name.startswith("on") or name == "src"]
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    policies = [attributes.get("content") for tag, attributes in page.tags if tag == "meta"]
    assert any(policy and policy.startswith("default-src 'none'") for policy in policies)


def test_figures_and_tables_have_text_alternatives(page):
    figures = [attributes for tag, attributes in page.tags if tag == "svg" and "role" in attributes]
    assert len(figures) > 20
    assert all(attributes["role"] == "img" and attributes["aria-label"].strip() for attributes in figures)
    assert page.count("caption") == page.count("table")
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert all(attributes.get("scope") in ("col", "row") for attributes in headers)


def test_it_says_what_was_evaluated(evaluation, page):
    text = " ".join("".join(page.text).split())
    for part in ("films (ranking, test)", "runs/sft", "runs/dmpo", "Rows40", "Users20", evaluation.rows.content_hash):
        assert part in text.replace("Rows 40", "Rows40").replace("Users 20", "Users20"), part


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome, which is not on the path")
def test_in_a_browser_nothing_runs_and_the_plots_are_there(evaluation, tmp_path):
    from PIL import Image

    def browse(path, *options):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--blink-settings=preferredColorScheme=1", *options, "--dump-dom"]
        done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
        return done.stdout

    # Text that is not escaped does run: otherwise this test would prove nothing
    (tmp_path / "control.html").write_text(f"<title>control</title>{NASTY}")
    assert "<title>ran</title>" in browse(tmp_path / "control.html")

    write_report(evaluation, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    # The policy would stop a script, too: what is tested is that there is none
    (tmp_path / "open.html").write_text(re.sub("<meta http-equiv[^>]*>", "", html), encoding="utf-8")
    seen = browse(tmp_path / "open.html", "--window-size=1280,3000", f"--screenshot={tmp_path / 'report.png'}")
    assert "<title>films (ranking, test): sft, dmpo</title>" in seen
    assert "<script" not in seen
    assert "<img" not in seen
    assert "document.title='ran'" in seen
    assert seen.count("<svg") == html.count("<svg")
    assert seen.count("<table") == html.count("<table")
    pixels = np.asarray(Image.open(tmp_path / "report.png").convert("RGB")).reshape(-1, 3)
    for color in ((0x00, 0x67, 0xA5), (0xC4, 0x52, 0x0A)):
        assert (pixels == color).all(axis=1).sum() > 1000


BASE = make_evaluation(make_rows(4, 3), {"a": 1.0, "b": 2.0}, cutoffs=(1, 2))
ANY_TEXT = st.text(st.characters(exclude_categories=()), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT)
def test_any_title_is_text(title):
    example = make_example(BASE, name_models(["a", "b"]), 0)
    ranking = example.rankings[0]
    ranking = ranking._replace(lines=[ranking.lines[0]._replace(title=title)], answer=title)
    example = example._replace(chosen=title, history=[title], user=title, rankings=[ranking])
    macro = _environment().from_string(
        '{% from "examples.html.jinja" import example with context %}{{ example([], item, true) }}'
    )
    html = macro.render(item=example)
    html.encode("utf-8")
    seen = Page(html)
    # A parser joins line ends, and drops what is left of a control character
    written = clean(title).replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(seen.text).count(written) >= 5
    assert seen.count("tr") == 2
    assert {tag for tag, _ in seen.tags} <= {
        *("details", "summary", "bdi", "span", "div", "h3", "ol", "li", "table", "caption", "thead", "tbody", "tr"),
        *("th", "td", "p", "q"),
    }


@settings(max_examples=5, deadline=None)
@given(ANY_TEXT)
def test_any_name_is_text(text):
    rows = replace(BASE.rows, name=text, description=text, items=None, prompts=[text] * 4)
    renamed = {f"{text}/b": BASE.results["b"], "a": BASE.results["a"]}
    evaluation = replace(
        BASE,
        rows=rows,
        results=renamed,
        scores={f"{text}/b": BASE.scores["b"], "a": BASE.scores["a"]},
        comparisons={"a": BASE.comparisons["b"]},
        groups={text: {text: renamed}},
        settings={**BASE.settings, text: text},
    )
    html = _render(evaluation, {})
    html.encode("utf-8")
    assert {tag for tag, _ in Page(html).tags} <= {tag for tag, _ in Page(_render(BASE, {})).tags} | {"pre"}


def test_control_characters_and_lone_surrogates_can_be_written(tmp_path):
    rows = make_rows(
        12, 12, history=False, titles=["nul\x00bell\x07", "half \ud83d pair", "line\u2028end", "\x85\x7f"]
    )
    write_report(make_evaluation(replace(rows, name="x\udfff\x1b[31m")), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nul␀bell␇" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


def minus_infinity(rows):
    scores = make_scores(rows, 1.0)
    for row, label in zip(scores, rows.labels, strict=True):
        row[label] = -np.inf
    return scores


EDGES = {
    "one row": (make_rows(1, 3), lambda rows: make_scores(rows, 1.0)),
    "two candidates": (make_rows(3, 2, history=False), lambda rows: make_scores(rows, 1.0)),
    "all equal": (make_rows(5, 4), lambda rows: [np.zeros(len(row)) for row in rows.candidates]),
    "the chosen at -inf": (make_rows(5, 4), minus_infinity),
    "all at -inf": (make_rows(5, 4), lambda rows: [np.full(len(row), -np.inf) for row in rows.candidates]),
    "huge": (make_rows(5, 4), lambda rows: [np.geomspace(1e30, 1e38, len(row)) for row in rows.candidates]),
    "300 candidates": (make_rows(4, 300), lambda rows: make_scores(rows, 4.0)),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge):
    rows, score = EDGES[edge]
    html = _render(make_evaluation(rows, {"a": 0.0, "b": 0.0}, scores={"a": score(rows), "b": score(rows)}), {})
    page = Page(html)
    drawn = [value for _, attributes in page.tags for value in attributes.values() if value]
    for text in ["".join(page.text), *drawn]:
        assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", text), text


def test_rows_of_different_lengths():
    short, long = make_rows(1, 3), make_rows(1, 30, seed=1)
    rows = replace(
        short,
        prompts=short.prompts + long.prompts,
        candidates=short.candidates + long.candidates,
        labels=np.concatenate([short.labels, long.labels]),
        columns={},
        items=None,
        places=None,
    )
    text = "".join(Page(_render(make_evaluation(rows), {})).text)
    assert "3 to 30" in text
    assert "not named" in text


def test_a_long_list_shows_the_best_and_the_chosen():
    rows = make_rows(8, 200)
    evaluation = make_evaluation(rows, {"a": 0.0})
    for row in range(8):
        (ranking,) = make_example(evaluation, name_models(["a"]), row).rankings
        order = np.argsort(-evaluation.scores["a"][row])
        place = order.tolist().index(rows.labels[row])
        assert [line.title for line in ranking.lines[:10]] == [rows.candidates[row][at].strip() for at in order[:10]]
        assert [line.rank for line in ranking.lines if line.chosen] == [str(place + 1)] == [ranking.rank]
        assert len(ranking.lines) + sum(line.skipped for line in ranking.lines) + ranking.rest == 200


def test_ranks_of_ties_are_their_mean():
    assert expected_ranks(np.array([-1.0, -3.0, -3.0, -np.inf, 0.0])).tolist() == [2, 3.5, 3.5, 5, 1]


def test_examples_run_from_the_best_to_the_worst():
    # Row r ranks the chosen one at r + 1; each user has rows r and r + 20
    rows = replace(make_rows(40, 40, history=False), columns={"user_id": [row % 20 for row in range(40)]})
    scores = [np.where(np.arange(40) == label, -row - 0.5, -np.arange(40.0)) for row, label in enumerate(rows.labels)]
    scores = [np.sort(-np.arange(40.0))[::-1] for _ in range(40)]
    rows = replace(rows, labels=np.arange(40))
    evaluation = make_evaluation(rows, {"a": 0.0}, scores={"a": scores})
    shown = example_rows(evaluation)
    assert len(shown) == 10 == len({row % 20 for row in shown})
    assert shown == sorted(shown) == example_rows(evaluation)
    assert shown != example_rows(make_evaluation(rows, {"a": 0.0}, scores={"a": scores}, seed=1))
    drawn = example_rows(evaluation, 20)
    assert len(drawn) == 20
    assert shown[0] == drawn[0]
    assert shown[-1] == drawn[-1]


def test_few_users_give_several_rows_each():
    rows = replace(make_rows(15, 4), columns={"user_id": [0] * 15})
    assert len(set(example_rows(make_evaluation(rows)))) == 10
    assert len(example_rows(make_evaluation(make_rows(3, 4)))) == 3


def make_explanation(**options):
    return Explanation(
        history=["Alien", NASTY],
        history_ids=[1, None],
        item="Aliens",
        item_id=2,
        runner_up="Heat",
        runner_up_id=3,
        log_odds=1.5,
        log_odds_without_history=-0.25,
        attributions=np.array([2.0, -0.5]),
        method="shapley",
        **options,
    )


def test_a_history_is_coloured_by_its_explanation():
    sentence = Sentence(f'As you liked "Alien" and "{NASTY}".', [Named("Alien", "history"), Named(NASTY, "unknown")])
    explanation = make_explanation(counterfactual=Counterfactual([0], "Big", True, 3), sentence=sentence)
    last = example_rows(BASE)[-1]
    page = Page(_render(BASE, {last: explanation}))
    colours = [
        (attributes["class"], attributes["style"])
        for tag, attributes in page.tags
        if tag == "li" and attributes.get("style")
    ]
    assert colours == [("up", "--strength: 0.500"), ("down", "--strength: 0.125")]
    text = " ".join("".join(page.text).split())
    for part in (
        "Why Aliens",
        "and not Heat: log-odds +1.500, without a history −0.250.",
        "Alien+2.000",
        f"{NASTY}−0.500",
        "Without Alien, Big would come first.",
        f"The model says: {sentence.text}",
        f"“{NASTY}” is in neither the history nor the catalogue.",
    ):
        assert part in text, part


def test_a_bare_explanation_of_a_row_that_was_not_drawn():
    evaluation = make_evaluation(make_rows(12, 3), {"a": 1.0})
    row = next(row for row in range(12) if row not in example_rows(evaluation))
    page = Page(_render(evaluation, {row: replace(make_explanation(), attributions=np.zeros(2))}))
    assert f"row-{row}" in page.ids
    text = "".join(page.text)
    assert "Rows that are explained and were not drawn come last." in text
    assert "The model says" not in text
    assert "would come first" not in text


def test_explanations_of_other_rows():
    with pytest.raises(ValueError, match="`explanations` has row 4, but rows are numbered from 0 to 3"):
        write_report(BASE, "unused.html", {4: None})


def test_centred_scores_by_hand():
    rows = replace(make_rows(2, 3), labels=np.array([1, 0]))
    scores = {"a": [[-4.0, -1.0, -2.0], [-5.0, -np.inf, -1.0]]}
    chosen, rejected = centred_scores(make_evaluation(rows, {"a": 0.0}, scores=scores), "a")
    assert chosen.tolist() == [2, -4]
    assert rejected.tolist() == [-1, 1, -math.inf, 0]


def test_histogram_counts_everything_once():
    made = histogram([np.array([0.0, 1.0, -np.inf, 2.0]), np.arange(1000.0)])
    assert [share.sum() for share in made.shares] == pytest.approx([1, 1])
    assert made.shares[0][0] == 1  # the axis of 0 to 1000 has one bin for all of them, and -inf is at its end
    assert made.beyond == 1 + (np.arange(1000) < made.axis.low).sum() + (np.arange(1000) > made.axis.high).sum()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_axes_hold_their_values(values):
    axis = linear_axis(values)
    assert all(0 <= axis.place(value) <= 100 for value in values)
    assert axis.low < min(values) <= max(values) < axis.high
    assert axis.ticks
    assert len({tick.label for tick in axis.ticks}) == len(axis.ticks)


def test_cutoffs_of_long_lists():
    assert curve_cutoffs(120) == list(range(1, 121))
    many = curve_cutoffs(3700, (10, 333, 5000))
    assert {1, 10, 333, 3700} <= set(many)
    assert 5000 not in many
    assert len(many) <= 121
    assert [tick.label for tick in cutoff_axis(3700).ticks][-2:] == ["1,000", "3,700"]


@given(st.lists(st.text("ab/\\-.", min_size=1, max_size=60), min_size=1, max_size=6, unique=True))
def test_short_names_tell_models_apart(keys):
    models = name_models(keys)
    assert len({model.name for model in models}) == len({model.letter for model in models}) == len(keys)


@pytest.mark.parametrize(
    ("metric", "difference", "p_value", "word"),
    [
        ("ndcg@10", (0.031, 0.012, 0.05), 0.002, "better"),
        ("ndcg@10", (-0.031, -0.05, -0.012), 0.002, "worse"),
        ("ndcg@10", (0.031, -0.001, 0.05), 0.04, "none"),
        ("ndcg@10", (0.031, 0.001, 0.05), 0.05, "none"),
        ("average_popularity@10", (31.0, 12.0, 50.0), 0.002, "higher"),
        ("average_popularity@10", (-31.0, -50.0, -12.0), 0.002, "lower"),
        ("mrr", (math.nan, math.nan, math.nan), 1.0, "none"),
    ],
)
def test_verdicts(metric, difference, p_value, word):
    assert verdict(metric, Comparison(Estimate(*difference, 100), p_value)) == word


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_numbers_are_near_what_they_stand_for(value):
    read = float(number(value).replace("−", "-").replace(",", ""))
    assert read == pytest.approx(value, rel=6e-4, abs=6e-4)


def test_a_report_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    write_report(BASE, path)
    before = path.read_text(encoding="utf-8")
    assert before.rstrip().endswith("</html>")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(BASE, path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == before


def test_the_same_evaluation_gives_the_same_page():
    assert _render(BASE, {}) == _render(BASE, {})


def test_position_bias_and_generated_answers():
    rows = make_rows(6, 3)
    answers = {"a": ["Film 1", NASTY, "Film 2", "", "x", "y"]}
    bias = {"place_shares": [0.7, 0.2, 0.1], "expected_shares": [1 / 3] * 3, "num_orders": 4}
    bias |= {"mean_variance_of_scores": 0.25, "mean_variance_of_rank": 1.5}
    evaluation = make_evaluation(
        rows, {"a": 1.0, "b": 1.0}, generated=answers, settings={"position_bias": {"a": bias}}
    )
    html = _render(evaluation, {})
    page = Page(html)
    text = "".join(page.text)
    assert "1: 0.700, 2: 0.200, 3: 0.100" in html
    assert "Place in the list" in text
    assert "4 orders. Mean variance of a score 0.250, of the rank of the chosen 1.500." in text
    assert "Wrote: " + NASTY in text.replace("Wrote:  ", "Wrote: ")
    expected = cells(evaluation.results["a"]["generated_valid_ratio"])
    assert any(row[:2] == ["Valid answers", expected] for table in page.tables for row in table)
    assert any(row[0] == "Valid answers" and row[2] == "–" for table in page.tables for row in table)
    assert "place_shares" not in text
