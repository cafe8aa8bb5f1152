import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data.schema import as_list, find_problem, find_relevance_problem


def message(text, role="assistant"):
    return {"role": role, "content": text}


GOOD = {"prompt": "Next:", "chosen": " Aliens", "rejected": [" Heat", " Big"]}
CHAT = {
    "prompt": [message("Next?", "user")],
    "chosen": [message("Aliens")],
    "rejected": [[message("Heat")], [message("Big")]],
}


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        CHAT,
        {**GOOD, "rejected": " Heat"},
        {**CHAT, "rejected": [message("Heat")]},
        {**GOOD, "prompt": ""},
        {"chosen": "Next: Aliens", "rejected": ["Next: Heat"]},
        {**GOOD, "user_id": None, "extra": [1, 2]},
        {**CHAT, "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "play"}]}]},
        {**GOOD, "chosen": [" Aliens"]},
        {**GOOD, "chosen": [" Aliens", " Alien"]},
        {**CHAT, "chosen": [[message("Aliens")], [message("Alien")]]},
    ],
)
def test_good_rows(row):
    assert find_problem(row) is None


@pytest.mark.parametrize(
    ("change", "reason", "column", "detail"),
    [
        ({"rejected": None}, "no value", "rejected", "the value is None; fill it in or remove the row"),
        ({"prompt": None}, "no value", "prompt", "or leave the column out of all rows"),
        ({"rejected": [" Heat", None]}, "no value", "rejected", "entry 1 is None"),
        ({"rejected": {" Heat"}}, "wrong type", "rejected", "expected a list of completions, got set"),
        ({"rejected": [3]}, "wrong type", "rejected", "entry 0 is 3; expected a string, or a list of messages"),
        ({"chosen": [4]}, "wrong type", "chosen", "the completion is [4]; expected a string"),
        ({"chosen": []}, "no chosen", "chosen", "give at least one chosen completion"),
        ({"chosen": [" Aliens", None]}, "no value", "chosen", "entry 1 is None"),
        ({"chosen": [" Aliens", " "]}, "blank completion", "chosen", "entry 1 is blank"),
        ({"chosen": [" Alien"] * 2}, "repeated chosen", "chosen", "entries 0 and 1 are both ' Alien'"),
        (
            {"chosen": [" Alien", " Big"]},
            "chosen among rejected",
            "rejected",
            "entry 1 is the chosen completion ' Big'",
        ),
        (
            {"chosen": [" Alien", [message("Aliens")]]},
            "text and messages mixed",
            "chosen",
            "entry 1 is messages, but `chosen` is text",
        ),
        ({"rejected": []}, "no rejected", "rejected", "give at least one"),
        ({"rejected": [" Heat", "\n\t "]}, "blank completion", "rejected", "entry 1 is blank"),
        (
            {"rejected": [" Heat", " Aliens"]},
            "chosen among rejected",
            "rejected",
            "entry 1 is the chosen completion ' Aliens'",
        ),
        ({"rejected": [" Big", " Big"]}, "repeated rejected", "rejected", "entries 0 and 1 are both ' Big'; keep one"),
        (
            {"rejected": [" Big", [message("Heat")]]},
            "text and messages mixed",
            "rejected",
            "entry 1 is messages, but `chosen` is text",
        ),
        (
            {"prompt": [message("Next?")]},
            "text and messages mixed",
            "prompt",
            "the prompt is messages, but `chosen` is text",
        ),
    ],
)
def test_problems(change, reason, column, detail):
    problem = find_problem({**GOOD, **change})
    assert (problem.reason, problem.column) == (reason, column)
    assert detail in problem.detail


def nested(depth):
    value = "deep"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "reason", "column", "detail"),
    [
        ({"chosen": [message(3)]}, "unreadable", "chosen", "the completion has 3 for the `content` of message 0"),
        ({"chosen": [{"role": "assistant"}]}, "unreadable", "chosen", "has nothing in message 0 but its role"),
        ({"chosen": [{**message("a"), "tool_calls": "b"}]}, "unreadable", "chosen", "'b' for the `tool_calls` of message 0"),
        ({"chosen": [{**message("a"), 1: "b"}]}, "unreadable", "chosen", "has 1 for a name; make it a string"),
        ({"chosen": [{**message("a"), "x": np.ones(2)}]}, "unreadable", "chosen", "has a value of type ndarray; make it a list"),
        ({"rejected": [[message("Am\ud83clie")]]}, "unreadable", "rejected", "entry 0 has half a surrogate pair"),
        ({"prompt": [message(nested(60), "user")]}, "unreadable", "prompt", "is nested more than 50 levels deep"),
        ({"chosen": nested(3000)}, "wrong type", "chosen", "the completion is a list; expected a string"),
        ({"chosen": np.array([])}, "wrong type", "chosen", "array([], dtype=float64); expected a string"),
        ({"tools": "["}, "wrong type", "tools", "it is '['; expected a list of tools, or one as JSON"),
        ({"tools": '{"name": "play"}'}, "wrong type", "tools", "expected a list of tools"),
        ({"tools": [{"name": "\udfff"}]}, "wrong type", "tools", "it has half a surrogate pair"),
        ({"chat_template_kwargs": 3}, "wrong type", "chat_template_kwargs", "it is 3; expected a dictionary"),
        ({"chat_template_kwargs": {"tokenize": False}}, "wrong type", "chat_template_kwargs", "`tokenize` is no argument"),
    ],
)  # fmt: skip
def test_problems_of_messages(change, reason, column, detail):
    problem = find_problem({**CHAT, **change})
    assert (problem.reason, problem.column) == (reason, column)
    assert detail in problem.detail


def test_half_a_surrogate_pair_in_text():
    """JSON can say it, and no tokenizer and no table takes it."""
    problem = find_problem({**GOOD, "rejected": [" Heat", json.loads('"\\ud800"')]})
    assert (problem.column, problem.reason) == ("rejected", "unreadable")
    assert find_problem({**GOOD, "rejected": [json.loads('"\\ud83c\\udfac"')]}) is None  # both halves


@pytest.mark.parametrize(
    ("relevance", "detail"),
    [
        ([1, 0, 10**400], "expected a list of finite numbers"),
        ([1, 0, -1e39], "expected a list of finite numbers"),  # infinite in single precision
        (None, "the loss needs it"),
        ([1, 0], "it has 2 entries for 1 chosen and 2 rejected completions"),
        ([1, 0, float("nan")], "expected a list of finite numbers"),
        ([1, 0, None], "expected a list of finite numbers"),
        ("1, 0, 0", "expected a list of finite numbers"),
    ],
)
def test_problems_of_relevance(relevance, detail):
    problem = find_relevance_problem({**GOOD, "relevance": relevance}, required=True)
    assert problem.column == "relevance"
    assert detail in problem.detail


def test_good_relevance():
    assert find_relevance_problem(GOOD) is None
    assert find_relevance_problem({**GOOD, "relevance": [2, 1.5, -1]}) is None
    assert find_relevance_problem({**GOOD, "relevance": list(np.float32([2, 1.5, -1]))}) is None
    assert find_relevance_problem({**GOOD, "chosen": [" Aliens", " Jaws"], "relevance": [2, 1, 0, 0]}) is None


def test_problems_of_conversations():
    assert find_problem({**CHAT, "chosen": [message(" ")]}).reason == "blank completion"
    assert find_problem({**CHAT, "rejected": [[message("Aliens")]]}).reason == "chosen among rejected"
    assert find_problem({**CHAT, "rejected": [[message("Heat")]] * 2}).reason == "repeated rejected"
    assert find_problem({**CHAT, "chosen": [{"content": "Aliens"}]}).reason == "wrong type"
    assert (
        find_problem({"rejected": [" Heat"], "text": 1}).detail
        == "there is no such column, only: rejected, text; rename or add it"
    )


def test_bare_rejected():
    assert as_list(" Heat") == [" Heat"]
    assert as_list([message("Heat")]) == [[message("Heat")]]
    assert as_list([[message("Heat")]]) == [[message("Heat")]]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "relevance"]), anything))
def test_no_row_is_a_crash(row):
    problem = find_problem(row)
    if problem is None and (unread := find_relevance_problem(row)) is not None:
        assert unread.column == "relevance"
    if problem is None:
        completions = [*as_list(row["chosen"]), *as_list(row["rejected"])]
        assert {type(completion) for completion in completions} in ({str}, {list})
    else:
        assert problem.column in ("prompt", "chosen", "rejected")
        assert problem.detail
