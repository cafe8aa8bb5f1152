"""Where a prompt lists its candidates, and the same prompt with another order."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data.prompts import Case, NextItemFromList, RankTwo, Template
from trl_dmpo.ranking.listing import Listing


# Titles within titles, with a separator in them, without spaces between words, and with what patterns are made of
ITEMS = [
    {"title": title, "genres": genres}
    for title, genres in [
        ("Heat", ["Crime"]),
        ("Red Heat", ["Action", "Crime"]),
        ("Aliens (Director's Cut)", []),
        ("Aliens", ["Sci-Fi"]),
        ("Crosby, Stills", ["Sci-Fi"]),
        ("Crosby, Stills, Nash", ["Folk (Rock)"]),
        ("東京物語", ["Drama"]),
        ("M", []),
        ("Se7en [.*] {name}", ["Crime"]),
    ]
]
FORMS = {
    "lines": NextItemFromList(domain="film"),
    "quotes": NextItemFromList(domain="film", wording="quotes"),
    "semicolons": NextItemFromList(domain="film", wording="semicolons"),
    "sdpo": NextItemFromList(domain="film", wording="sdpo"),
    "chat": NextItemFromList(domain="film", chat=True),
    "features": NextItemFromList(domain="film", features=("genres",)),
    "quoted features": NextItemFromList(domain="film", wording="quotes", features=("genres",)),
    "template": Template(
        prompt="Which of {candidates}, after {history}?", separator=" | ", chat=True, system="Heat, M"
    ),
}


def write(form, seed: int, items=ITEMS):
    history = [
        {"title": "M", "genres": []},
        {"title": "Red Heat", "genres": []},
        {"title": "Big", "genres": ["Comedy"]},
    ]
    text = form.write(Case(history, [], items[0], True, items[1:], Random(seed)))
    return text.prompt, [text.chosen, *text.rejected]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_prompt_in_another_order_is_what_the_form_writes_in_that_order(form):
    prompt, candidates = write(form, seed=0)
    for seed in range(1, 6):
        other, _ = write(form, seed)
        order = Listing(other, candidates).order
        assert order != Listing(prompt, candidates).order
        assert Listing(prompt, candidates).write(order) == other


def test_order_is_that_of_the_prompt():
    listing = Listing("Seen: B, A. Choose: Red A, A, B. Answer:", [" A", " B", " Red A"])
    assert listing.order == [2, 0, 1]
    assert listing.write([1, 0, 2]) == "Seen: B, A. Choose: B, A, Red A. Answer:"


def test_labels_stay_and_features_move():
    prompt = "1. Heat (Crime)\n2. Big (1988; Comedy (US))\n10. M\nNumber:"
    assert Listing(prompt, ["Heat", "Big", "M"]).write([2, 1, 0]) == (
        "1. M\n2. Big (1988; Comedy (US))\n10. Heat (Crime)\nNumber:"
    )
    assert Listing("(A) Heat (B) Big (choose one)", ["Heat", "Big"]).write([1, 0]) == "(A) Big (B) Heat (choose one)"


@given(
    st.lists(st.text("ab é", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=8, unique=True),
    st.randoms(),
)
@settings(max_examples=60, deadline=None)
def test_any_titles_can_be_listed(titles, random):
    order = random.sample(range(len(titles)), len(titles))
    prompt = f"Seen: {'; '.join(titles[1:])}. Next: {'; '.join(titles)}?"
    listed = Listing(prompt, [f" {title}" for title in titles])
    assert listed.order == list(range(len(titles)))
    assert listed.write(order) == f"Seen: {'; '.join(titles[1:])}. Next: {'; '.join(titles[i] for i in order)}?"


def test_orders_of_titles_are_not_listed():
    prompt, candidates = write(RankTwo(domain="film", wording="dmpo"), 0, ITEMS[:2])
    with pytest.raises(ValueError, match="does not list its 2 candidates"):
        Listing(prompt, candidates)
