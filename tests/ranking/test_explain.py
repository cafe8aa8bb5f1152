"""Why an item: attributions and counterfactuals of made-up users whose tastes are known, and titles in sentences."""

import io
import math
import sys
from itertools import chain, combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.conftest import TITLES
from trl_dmpo.data.prompts import NextItem, Template
from trl_dmpo.ranking.explain import Counterfactual, Explanation, Named, Sentence, explain
from trl_dmpo.ranking.explain.attribution import attribute
from trl_dmpo.ranking.explain.counterfactual import find_counterfactual
from trl_dmpo.ranking.explain.explanation import _of_all
from trl_dmpo.ranking.explain.grounding import check_grounding
from trl_dmpo.ranking.generation import generate_answers
from trl_dmpo.ranking.recommender import Recommendations, Recommender


FORM = Template(prompt="Seen: {history}. Next:", separator="; ")
LISTED = Template(prompt="Seen: {history}. Of {candidates}, next:", separator="; ")


class Taste:
    """A scorer that knows what each title is worth to a user who has seen others, and keeps what it was asked."""

    def __init__(self, worth, model=None, tokenizer=None):
        self.worth, self.model, self.tokenizer, self.asked = worth, model, tokenizer, []

    def stream(self, prompts, candidates, normalize="sum", names=None):
        return enumerate(self.score(prompts, candidates, normalize))

    def score(self, prompts, candidates, normalize="sum", progress=None, names=None):
        self.asked.append(list(prompts))
        lists = candidates if isinstance(candidates[0], list) else [candidates] * len(prompts)
        seen = [prompt.removeprefix("Seen: ").split(". ")[0].split("; ") for prompt in prompts]
        if progress is not None:
            progress(len(prompts))
        return [
            torch.tensor([self.worth(history, title.strip()) for title in titles], dtype=torch.float32)
            for history, titles in zip(seen, lists, strict=True)
        ]


@pytest.fixture(scope="module")
def tiny(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path())


@pytest.fixture
def make_recommender(tiny, tokenizer):
    def make(worth=None, form=FORM, catalogue=TITLES, **options):
        recommender = Recommender(tiny, tokenizer, catalogue, form, **options)
        if worth is not None:
            recommender.scorer = Taste(worth, tiny, tokenizer)
        return recommender

    return make


def science_fiction(seen, title):
    """Alien is worth 3 to Aliens, Heat costs it 1, and Big and Babe are worth 4 together; Jaws is worth 0.5 to all alike."""
    worth = {"Aliens": 1.0, "Red Heat": 0.5}.get(title, -9.0)
    if title == "Aliens":
        worth += 3 * ("Alien" in seen) - ("Heat" in seen) + 4 * ({"Big", "Babe"} <= set(seen))
    return worth + 0.5 * ("Jaws" in seen)


HISTORY = ["Jaws", "Big", "Alien", "Heat", "Babe"]


@pytest.mark.parametrize(("method", "expected"), [("ablation", [0, 4, 3, -1, 4]), ("shapley", [0, 2, 3, -1, 2])])
def test_attributions_by_hand(make_recommender, method, expected):
    recommender = make_recommender(science_fiction)
    found = explain(recommender, HISTORY, method=method, budget=0)
    assert (found.history, found.item, found.runner_up) == (HISTORY, "Aliens", "Red Heat")
    assert (found.log_odds, found.log_odds_without_history) == (6.5, 0.5)
    np.testing.assert_allclose(found.attributions, expected, atol=1e-6)
    # The recommendation, and all histories together
    first, ablated = recommender.scorer.asked
    assert len(first) == 1
    assert len(ablated) == (7 if method == "ablation" else 32)
    assert "Seen: Jaws; Alien; Heat; Babe. Next:" in ablated
    assert "Seen: (none). Next:" in ablated


def test_attributions_are_differences_of_real_scores(make_recommender):
    recommender = make_recommender(form=NextItem(domain="film"))
    history = ["Heat", "Big", "Jaws"]
    found = explain(recommender, history, budget=0)
    best = recommender.recommend(history, k=2)
    assert [found.item, found.runner_up] == best.titles

    def log_odds(seen):
        prompts, answers = recommender.prompts([seen]), [f" {title}" for title in best.titles]
        item, runner_up = recommender.scorer.score(prompts, answers)[0].tolist()
        return item - runner_up

    assert found.log_odds == pytest.approx(log_odds(history), abs=1e-4)
    assert found.log_odds_without_history == pytest.approx(log_odds([]), abs=1e-4)
    left_out = [log_odds(history[:i] + history[i + 1 :]) for i in range(3)]
    np.testing.assert_allclose(found.attributions, log_odds(history) - np.array(left_out), atol=1e-3)
    assert (np.abs(found.attributions) > 1e-2).all()


@given(st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_shapley_value_is_the_mean_over_all_orders(count, seed):
    values = np.random.default_rng(seed).normal(size=2**count)
    places = 2 ** np.arange(count)
    expected = np.zeros(count)
    for order in permutations(range(count)):
        taken = 0
        for item in order:
            expected[item] += (values[taken + 2**item] - values[taken]) / math.factorial(count)
            taken += 2**item
    found, full, empty = attribute(lambda kept: values[kept @ places], count, "shapley", samples=99, seed=0)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.sum() == pytest.approx(full - empty)


def test_sampled_shapley_values():
    """Of twenty items: sums that are right in any case, values within the noise, the same for a seed and only for it."""
    weights = np.random.default_rng(0).normal(size=20)
    calls = []

    def value(kept):
        calls.append(len(kept))
        return kept @ weights + 3 * (kept[:, 0] & kept[:, 1]) + 0.25

    state = torch.get_rng_state()
    found, full, empty = attribute(value, 20, "shapley", samples=25, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    # captum adds up in float32
    assert found.sum() == pytest.approx(full - empty, abs=1e-5)
    np.testing.assert_allclose(found[2:], weights[2:], atol=1e-5)
    # Which of the two comes last is a coin flip, 25 times
    np.testing.assert_allclose(found[:2], weights[:2] + 1.5, atol=3 * 3 * 0.5 / 5)
    assert found[:2].sum() == pytest.approx(weights[:2].sum() + 3, abs=1e-5)
    torch.manual_seed(1)
    np.testing.assert_array_equal(attribute(value, 20, "shapley", 25, seed=0)[0], found)
    assert (attribute(value, 20, "shapley", 25, seed=1)[0] != found).any()
    assert len(calls) == 3
    assert max(calls) <= 25 * 19 + 2


def test_item_and_what_it_is_compared_with(make_recommender):
    catalogue = ["Aliens", "Red Heat", "Fargo", "Alien", "Léon"]
    recommender = make_recommender(lambda seen, title: -float(catalogue.index(title)), catalogue=catalogue)

    def pair(**options):
        found = explain(recommender, ["Alien"], budget=0, **options)
        return found.item, found.runner_up, found.log_odds

    assert pair() == ("Aliens", "Red Heat", 1)
    assert pair(item="Fargo") == ("Fargo", "Aliens", -2)
    assert pair(against="Aliens") == ("Red Heat", "Aliens", -1)
    assert pair(item="Red Heat", against="Léon") == ("Red Heat", "Léon", 3)
    assert pair(candidates=["Léon", "Fargo"]) == ("Fargo", "Léon", 2)


def test_runner_up_has_another_title(make_recommender):
    import polars as pl

    catalogue = pl.DataFrame({"item_id": [7, 8, 9, 10], "title": ["Heat", "Heat", "Big", "Jaws"]})
    recommender = make_recommender(
        lambda seen, title: {"Heat": 0.0, "Big": -1.0, "Jaws": -2.0}[title], FORM, catalogue
    )
    found = explain(recommender, [10, "Unknown film"])
    assert (found.item_id, found.runner_up_id) == (7, 9)
    assert (found.history, found.history_ids) == (["Jaws", "Unknown film"], [10, None])
    with pytest.raises(ValueError, match="both titled 'Heat', so they always have the same score"):
        explain(recommender, [10], item=7, against=8)
    with pytest.raises(ValueError, match="no second item to recommend"):
        explain(recommender, [10, 9])


def test_a_list_of_candidates_in_the_prompt_stays(make_recommender):
    recommender = make_recommender(science_fiction, LISTED)
    found = explain(recommender, ["Alien", "Heat"], candidates=["Big", "Aliens", "Red Heat"])
    np.testing.assert_allclose(found.attributions, [3, -1])
    assert all(". Of Big; Aliens; Red Heat, next:" in prompt for prompt in chain(*recommender.scorer.asked))


def test_older_items_do_not_slide_in(make_recommender):
    recommender = make_recommender(science_fiction, max_history=3)
    found = explain(recommender, ["Alien", "Jaws", "Babe", "Big"])
    assert found.history == ["Jaws", "Babe", "Big"]
    np.testing.assert_allclose(found.attributions, [0, 4, 4])
    assert not any("Alien" in prompt for prompt in chain(*recommender.scorer.asked))


def test_items_that_are_repeated_are_items_of_their_own(make_recommender):
    found = explain(make_recommender(lambda seen, title: seen.count("Heat") * (title == "Big")), ["Heat", "Heat"])
    np.testing.assert_allclose(found.attributions, [1, 1])


@given(st.integers(1, 6), st.integers(0, 999), st.floats(0, 2))
@settings(max_examples=150, deadline=None)
def test_counterfactual_is_the_smallest_there_is(count, seed, threshold):
    """Against all sets, for recommendations that change by chance."""
    random = np.random.default_rng(seed)
    sets = [each for size in range(1, count + 1) for each in combinations(range(count), size)]
    firsts = {each: "B" if random.random() < threshold / len(sets) * 2 else "A" for each in sets}
    attributions = random.normal(size=count)

    def search(budget):
        return find_counterfactual(lambda some: [firsts[tuple(each)] for each in some], "A", attributions, budget)

    found = search(len(sets))
    smallest = min((len(each) for each in sets if firsts[each] == "B"), default=None)
    assert found.proven
    assert (found.removed and len(found.removed)) == smallest
    assert found.title == ("B" if smallest else None)
    poor = search(3)
    assert poor.tried <= 3
    if poor.removed is not None:
        assert firsts[tuple(poor.removed)] == "B"
        assert not poor.proven or len(poor.removed) == smallest
    elif poor.proven:
        assert smallest is None


def test_counterfactual_of_a_recommendation(make_recommender):
    found = explain(make_recommender(science_fiction), HISTORY).counterfactual
    # Without Alien it is 3.5 ahead, without Alien and Big (or Babe) 0.5 behind; one that is seen is not recommended
    assert found == Counterfactual([1, 2], "Red Heat", True, found.tried)
    done = []
    poor = explain(make_recommender(science_fiction), HISTORY, budget=4, progress=done.append).counterfactual
    assert sum(done) == poor.tried == 4
    assert not poor.proven
    assert explain(make_recommender(science_fiction), HISTORY, budget=0).counterfactual is None


def test_what_would_come_first_is_of_the_whole_catalogue(make_recommender, monkeypatch):
    """Babe is far behind, so that it is not on the shortlist, and first of all when Alien is left out."""
    monkeypatch.setattr("trl_dmpo.ranking.explain.explanation.SHORTLIST", 2)

    def like(seen, title):
        worth = {"Aliens": 3.0, "Red Heat": 2.0, "Babe": 9.0}.get(title, 0.0)
        return worth if "Alien" not in seen else {"Aliens": 5.0, "Red Heat": 2.0}.get(title, -9.0)

    assert explain(make_recommender(like), ["Alien", "Jaws"]).counterfactual == Counterfactual(None, None, True, 3, 2)
    change = make_recommender(lambda seen, title: like(seen, title) - 2 * (title == "Aliens" and "Alien" not in seen))
    assert explain(change, ["Alien", "Jaws"]).counterfactual == Counterfactual([0], "Babe", True, 2, 2)


def test_noise_that_brings_the_first_one_back_is_no_change():
    found = Counterfactual([0], "Heat", True, 1, 2)
    alien, babe = (Recommendations([1], [title], [0.0]) for title in ("Alien", "Babe"))
    assert _of_all(found, alien, alien) == found
    assert _of_all(found, alien, babe).title == "Babe"


def test_what_is_removed_is_not_recommended(make_recommender):
    """Else every recommender that likes to recommend what it knows would do so as soon as it is removed."""
    recommender = make_recommender(lambda seen, title: {"Alien": 5.0, "Heat": 4.0, "Big": 1.0}.get(title, 0.0))
    for history in (["Alien", "Heat"], ["Alien", "Heat", "Unknown film"]):
        assert explain(recommender, history).counterfactual == Counterfactual(None, None, True, 2 ** len(history) - 1)


def test_options_that_make_no_sense(make_recommender):
    recommender = make_recommender(science_fiction)
    for options, message in [
        ({"history": []}, "`history` is empty"),
        ({"history": "Alien"}, "`history` is not a list of items"),
        ({"history": [["Alien"]]}, "`history` is not a list of items"),
        ({"method": "lime"}, "`method` is 'lime', but it is 'ablation' or 'shapley'"),
        ({"samples": 0}, "`samples` is 0"),
        ({"budget": -1}, "`budget` is -1"),
        ({"item": "Alian"}, "the catalogue has no item 'Alian'. Did you mean 'Alien'?"),
        ({"item": "Big", "candidates": ["Fargo", "Jaws"]}, "`item`: 'Big' is not among the candidates"),
    ]:
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            explain(recommender, **{"history": ["Alien"], **options})
    with pytest.raises(ValueError, match=r"the form Template lists candidates in its prompt\. Give `candidates`"):
        explain(make_recommender(science_fiction, LISTED), ["Alien"])


def test_captum_is_asked_for(make_recommender, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-dmpo\[explain\]'"):
        explain(make_recommender(science_fiction), ["Alien"])


SEEN = ["Red Heat", "Amélie", "Schindler's List", "東京物語", "Alien (1979)", "Babe"]
OFFERED = [*SEEN, "Heat", "Big", "Wings of Desire", "Fargo (1996)"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Nothing is named here, though it is a big heat.", []),
        ('You liked "Red Heat".', ["Red Heat"]),
        ('"Heather" is no heat.', ["?Heather"]),
        ("You liked red heat, Red Heat and Heat.", ["Red Heat", "+Heat"]),
        ('You liked "red heat," AMÉLIE and “amélie”.', ["Red Heat", "Amélie"]),
        ("Like 'Schindler's List' and ‘Schindler’s Ark’", ["Schindler's List", "?Schindler’s Ark"]),
        ("「東京物語」と東京物語と「秋刀魚の味」", ["東京物語", "?秋刀魚の味"]),
        ("As **Alien** and *Blade Runner* are.", ["Alien (1979)", "?Blade Runner"]),
        ('As "alien (1979)" is, not "Alien (1986)" or "Babe (1995)".', ["Alien (1979)", "?Alien (1986)", "Babe"]),
        ('The "Red Heat 2" of "The Heat".', ["?Red Heat 2", "?The Heat"]),
        ('Of "Heat, Big and Babe", Babe.', ["+Heat", "+Big", "Babe"]),
        ('A "fun" and "heartwarming" film.', []),
        ("It's what you'd like: Fargo isn't Babe's.", ["+Fargo (1996)", "Babe"]),
        ('**"Blade Runner"** and "", "…".', ["?Blade Runner"]),
    ],
)
def test_titles_in_sentences(text, named):
    where = {"+": "catalogue", "?": "unknown"}
    expected = [Named(each.lstrip("+?"), where.get(each[0], "history")) for each in named]
    found = check_grounding(text, SEEN, OFFERED)
    assert found == Sentence(text, expected)
    assert found.unknown == [each[1:] for each in named if each[0] == "?"]


@given(st.text("ab\"'*( )19“", max_size=30), st.lists(st.text("ab'( 1", min_size=1, max_size=5), max_size=4))
@settings(max_examples=100, deadline=None)
def test_no_sentence_breaks_the_check(text, titles):
    found = check_grounding(text, titles[:2], titles)
    assert {each.title for each in found.named if each.where != "unknown"} <= set(titles)


def test_sentence_is_the_models_own(make_recommender, monkeypatch):
    recommender = make_recommender(form=NextItem(domain="film"))
    found = explain(recommender, ["Heat", "Big"], budget=0, sentence=True)
    question = (
        'I have watched these movies, the latest last:\n- "Heat"\n- "Big"\n\n'
        f'You recommend "{found.item}" to me. Say in one sentence why, and name those of my movies that it follows from. '
        "Put every title in double quotes."
    )
    model, tokenizer = recommender.scorer.model, recommender.scorer.tokenizer
    (answer,) = generate_answers(model, tokenizer, [[{"role": "user", "content": question}]], 80)
    assert found.sentence == check_grounding(answer.strip(), ["Heat", "Big"], TITLES)
    assert found.sentence.text
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="`sentence`: the tokenizer has no chat template"):
        explain(recommender, ["Heat"], sentence=True)


def make_explanation(counterfactual=None, sentence=None):
    return Explanation(
        history=["[bold]Heat[/bold]", "Big"],
        history_ids=[1, 2],
        item="[red]Aliens",
        item_id=3,
        runner_up="Babe",
        runner_up_id=4,
        log_odds=2.5,
        log_odds_without_history=-0.25,
        attributions=np.array([1.0, -0.5]),
        method="ablation",
        counterfactual=counterfactual,
        sentence=sentence,
    )


def show(explanation):
    console = Console(file=io.StringIO(), width=120)
    console.print(explanation)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_explanation_on_the_terminal():
    said = Sentence("[b]As you liked “Blade”.", [Named("Blade", "unknown"), Named("Big", "history")])
    assert show(make_explanation(Counterfactual([0, 1], "Babe", True, 3), said)) == [
        "Why [red]Aliens rather than Babe: log-odds +2.50 (-0.25 without a history)",
        "[bold]Heat[/bold]  +1.00  ████████████████████",
        "Big                -0.50  ██████████",
        "Without [bold]Heat[/bold] and Big, Babe would come first. No smaller set of items changes the first recommendation.",
        "The model says: [b]As you liked “Blade”.",
        'In neither the history nor the catalogue: "Blade"',
    ]
    assert len(show(make_explanation())) == 3


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Counterfactual(None, None, True, 3, 100), "stays the same among the 100 best items."),
        (Counterfactual([1], "Babe", True, 2), "Without Big, Babe would come first."),
        (Counterfactual([0, 1], "Babe", False, 2), "A smaller set of items may do: 2 sets were tried, not all."),
        (Counterfactual(None, None, True, 3), "the first recommendation stays the same."),
        (Counterfactual(None, None, False, 3), "as far as was tried: 3 sets."),
    ],
)
def test_counterfactual_on_the_terminal(found, told):
    assert show(make_explanation(found))[-1].endswith(told)
