"""Where titles stand in a text."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.ranking.mentions import find_mentions, longest_mentions


@pytest.mark.parametrize(
    ("text", "titles", "all_of_them", "longest"),
    [
        ("Heather, Heat2 and preHeat", ["Heat"], [], []),
        ("Heat; (Heat) Heat's", ["Heat"], ["Heat"] * 3, ["Heat"] * 3),
        ("the heat of HEAT", ["Heat"], [], []),
        ("Red Heat", ["Heat", "Red Heat", "Red"], ["Red Heat", "Red", "Heat"], ["Red Heat"]),
        # Of two that overlap in part, the longer one; what it leaves is found
        ("The Big Red Heat Wave", ["The Big", "Big Red Heat", "Heat Wave", "Wave"],
         ["The Big", "Big Red Heat", "Heat Wave", "Wave"], ["Big Red Heat", "Wave"]),
        ("Amélie, Amélies", ["Amélie"], ["Amélie"], ["Amélie"]),
        # No spaces between words, so no borders of words
        ("東京物語を見た", ["東京物語", "物語"], ["東京物語", "物語"], ["東京物語"]),
        ("ฉันดูหนังแฟนฉันเมื่อวาน", ["แฟนฉัน"], ["แฟนฉัน"], ["แฟนฉัน"]),
        ("기생충을 보셨으니", ["기생충"], ["기생충"], ["기생충"]),
        ("aaa a aa", ["a", "aa", "aaa"], ["aaa", "a", "aa"], ["aaa", "a", "aa"]),
        ("...And! Who? (x)", ["...And!", "Who?", "(x)", ""], ["...And!", "Who?", "(x)"], ["...And!", "Who?", "(x)"]),
    ],
)  # fmt: skip
def test_mentions(text, titles, all_of_them, longest):
    found = find_mentions(text, titles)
    assert [titles[each.title] for each in found] == all_of_them
    assert [titles[each.title] for each in longest_mentions(found)] == longest
    assert all(text[each.start : each.end] == titles[each.title] for each in found)


@given(st.text("ab .", max_size=20), st.lists(st.text("ab .", min_size=1, max_size=4), max_size=5))
@settings(max_examples=80, deadline=None)
def test_every_mention_is_found_and_none_overlap(text, titles):
    """Against regular expressions, whose borders of words are the same for letters."""
    expected = {
        (found.start(), found.start() + len(title), number)
        for number, title in enumerate(titles)
        for found in re.finditer(
            ("(?<!\\w)" if title[0].isalnum() else "")
            + f"(?={re.escape(title)}"
            + ("(?!\\w))" if title[-1].isalnum() else ")"),
            text,
        )
    }
    mentions = find_mentions(text, titles)
    assert set(mentions) == expected
    kept = longest_mentions(mentions)
    assert all(before.end <= after.start for before, after in pairwise(kept))
    assert all(any(each.start < other.end and other.start < each.end for other in kept) for each in mentions)
