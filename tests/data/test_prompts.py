import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data import prompts
from trl_dmpo.data.prompts import (
    DOMAINS,
    PROMPTS,
    Case,
    Domain,
    Like,
    NextItem,
    NextItemFromList,
    RankList,
    RankTwo,
    Rating,
    Template,
    fit_history,
    token_counter,
)
from trl_dmpo.data.schema import find_problem


ROOT = Path(__file__).parents[2]
PAPERS = ROOT.parent / "shared" / "data"
PAGES = [ROOT / "docs" / "prompts.md", Path(__file__).parent / "snapshots" / "prompts.md"]

# A line of code, and what the form of that line writes
SHOWN = re.compile(r"```python\n(\w+\([^`]*\))\n```\n\n```text\n(.*?)\n```\n", re.DOTALL)

WORDINGS = [
    (form, wording)
    for form in (NextItem, NextItemFromList, RankTwo, RankList, Like, Rating)
    for wording in (*form.WORDINGS, "any")
]


def items(*titles, **columns):
    return [{"item_id": index, "title": title, **columns} for index, title in enumerate(titles)]


def rated(title, rating, genres, year):
    return {"title": title, "rating": rating, "genres": genres, "year": year}


FILMS = Case(
    [
        rated("Alien (1979)", 5.0, ["Horror", "Sci-Fi"], "1979"),
        rated("Lion King, The (1994)", 4.0, [], "1994"),
        rated("Toy Story (1995)", 4.5, ["Animation", "Comedy"], None),
    ],
    [rated("Batman & Robin (1997)", 2.0, ["Action"], "1997")],
    rated("Heat (1995)", 4.0, ["Action", "Crime"], "1995"),
    True,
    [rated("Big (1988)", 3.0, ["Comedy"], "1988"), rated("Babe (1995)", 1.0, ["Comedy"], "1995")],
    Random(0),
)


def example(form):
    """What the pages are written about: ratings on the form's scale, as many negatives as it takes."""
    history = FILMS.history
    if 4.5 not in getattr(form, "scale", [4.5]):
        history = [{**item, "rating": float(int(item["rating"]))} for item in history]
    negatives = FILMS.negatives[: 1 if isinstance(form, RankTwo) else 2]
    return FILMS._replace(history=history, negatives=negatives, random=Random(0))


def show(text):
    """A row as the pages have it."""
    prompt = text.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"[{message['role']}] {message['content']}" for message in prompt)
    answers = ", ".join(json.dumps(answer) for answer in text.rejected)
    return f"{prompt}\n--- chosen: {json.dumps(text.chosen)}\n--- rejected: {answers}"


def make(code):
    return eval(code, vars(prompts).copy())


BLOCKS = [(page.name, *block) for page in PAGES for block in SHOWN.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "code", "shown"), BLOCKS, ids=lambda value: value[:60].partition("\n")[0])
def test_the_pages_show_what_is_written(page, code, shown):
    form = make(code)
    assert show(form.write(example(form))) == shown


def test_the_pages_show_everything():
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    assert sum(len(re.findall(r"```python", page)) for page in pages) == len(BLOCKS)
    forms = [make(code) for _, code, _ in BLOCKS]
    assert {(type(form), form.chat) for form in forms} >= {
        (form, chat) for form in PROMPTS.values() for chat in (0, 1)
    }
    shown = {(type(form), form.wording) for form in forms if not isinstance(form, Template)}
    house = {(RankList, "quotes"), (RankList, "semicolons")}  # as of RankTwo
    assert shown == {(form, wording) for form, wording in WORDINGS if wording != "any"} - house
    assert {form.domain for form in forms if isinstance(form.domain, str)} == set(DOMAINS)
    assert all(f"### {name}" in pages[0] or f"## {name}" in pages[0] for name in PROMPTS if name != "template")


@pytest.mark.skipif(not PAPERS.is_dir(), reason="needs the papers' files")
def test_wordings_of_the_papers():
    mark = re.compile(r" <Title:(.*?)> (?= <Title:|\.$|\. Rank| and |,|$)")
    for row in json.loads((PAPERS / "dmpo" / "ml_1m_dpo_5.json").read_text(encoding="utf-8")):
        history, candidates = row["instruction"].split(". Rank the likelihood")
        listed = mark.findall(candidates)
        target, negative = mark.findall(row["output"][0])
        draws = Played([0.1, 0.2] if listed[0] == target else [0.2, 0.1])
        case = Case(items(*mark.findall(history + ". Rank")), [], *items(target), True, items(negative), draws)
        text = RankTwo(domain="film", wording="dmpo").write(case)
        assert (text.prompt, text.chosen, text.rejected) == (row["instruction"], row["output"][0], row["output"][1:])

    line = re.compile(r'User Preference: (.*)\nUser Unpreference: (.*)\nWhether the .* movie "(.*)"\?')
    for row in json.loads((PAPERS / "tallrec" / "movie_valid.json").read_text(encoding="utf-8")):
        liked, disliked, target = line.fullmatch(row["input"]).groups()
        liked, disliked = [items(*each[1:-1].split('", "')) if each else [] for each in (liked, disliked)]
        case = Case(liked, disliked, *items(target), row["output"] == "Yes.", [], Random(0))
        text = Like(domain="film", wording="tallrec").write(case)
        assert (text.prompt, text.chosen) == (f"{row['instruction']}\n{row['input']}", f" {row['output']}")


class Played:
    """Random numbers as given."""

    def __init__(self, numbers):
        self.numbers = iter(numbers)

    def random(self):
        return next(self.numbers)


def test_rank_list_by_hand():
    # By these keys 0 (the target) is listed third, and the negatives as 2, 3, 1
    case = Case([], [], *items("T"), True, items("A", "B", "C"), Played([0.5, 0.9, 0.1, 0.2]))
    text = RankList(wording="semicolons").write(case)
    assert "Candidates: B; C; T; A\n" in text.prompt
    assert text.chosen == " T > B > C > A"
    assert text.rejected == [" A > B > C > T", " B > T > C > A", " C > B > T > A"]


@pytest.mark.parametrize("wording", [*RankList.WORDINGS, "any"])
@pytest.mark.parametrize("chat", [False, True])
def test_rank_list_of_two_is_rank_two(wording, chat):
    for seed in range(9):
        cases = [FILMS._replace(negatives=FILMS.negatives[:1], random=Random(seed)) for _ in range(2)]
        options = {"domain": "film", "wording": wording, "chat": chat}
        assert RankTwo(**options).write(cases[0]) == RankList(**options).write(cases[1])


def test_rating_answers_are_the_scale():
    case = FILMS._replace(history=items("Alien", rating=3.5), target=items("Heat", rating=5.0)[0])
    text = Rating(scale=[0.5, 3.5, 5]).write(case)
    assert "- Alien: 3.5\n" in text.prompt
    assert "Answer with one of 0.5, 3.5, 5." in text.prompt
    assert (text.chosen, text.rejected) == (" 5", [" 0.5", " 3.5"])


def test_like_answers():
    assert Like().write(FILMS)[1:] == (" Yes.", [" No."])
    assert Like().write(FILMS._replace(liked=False))[1:] == (" No.", [" Yes."])


TRICKY = st.sampled_from(
    [
        "{history}",
        "{}",
        "}{",
        "%s",
        "a\nb",
        '"',
        "<|im_end|>",
        "::",
        "{0.__class__}",
        "\\n",
        "a; b",
        "> ",
        "$x",
        "(none)",
    ]
)
titles = TRICKY | st.text(min_size=1, max_size=8).filter(str.strip)


@st.composite
def cases(draw, form):
    title_lists = [draw(st.lists(titles, max_size=6)) for _ in range(2)]
    listed = draw(st.lists(titles, min_size=2, max_size=2 if form is RankTwo else 5, unique=True))
    ratings = st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0])
    history, disliked, candidates = (
        [{"title": t, "rating": draw(ratings)} for t in ts] for ts in (*title_lists, listed)
    )
    return history, disliked, candidates[0], draw(st.booleans()), candidates[1:] if form.negatives else []


@pytest.mark.parametrize(("form", "wording"), [*WORDINGS, (Template, None)])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), chat=st.booleans(), seed=st.integers(0, 2**32))
def test_promises(form, wording, data, chat, seed):
    options = {"wording": wording} if wording else {"prompt": "From {candidates} after {history}:"}
    written = form(domain="film", chat=chat, **options)
    given_case = data.draw(cases(form))
    case = Case(*given_case, Random(seed))
    try:
        text = written.write(case)
    except ValueError as error:  # "x", "y" and "x > y" make orders that read the same
        if form not in (RankTwo, RankList) or "two orders of the titles" not in str(error):
            raise
        return
    assert find_problem(text._asdict()) is None
    assert written.write(Case(*given_case, Random(seed))) == text

    prompt = text.prompt[0]["content"] if chat else text.prompt
    answers = [answer[0]["content"] if chat else answer for answer in (text.chosen, *text.rejected)]
    position = 0
    for item in (*case.history, *(case.disliked if form.disliked else [])):
        found = prompt.find(item["title"], position)
        assert found >= 0
        position = found + len(item["title"])
    assert form.listed is False or all(item["title"] in prompt for item in (case.target, *case.negatives))
    assert chat or (all(answer.startswith(" ") for answer in answers) and not prompt.endswith(" "))
    if form in (NextItem, NextItemFromList, Template):
        space = "" if chat else " "
        assert answers == [space + item["title"] for item in (case.target, *case.negatives)]
    if form in (RankTwo, RankList):
        first = "" if wording != "dmpo" else "<Title:"
        for item, answer in zip((case.target, *case.negatives), answers, strict=True):
            assert answer.lstrip(" ").startswith((first + item["title"]).lstrip(" "))


@pytest.mark.parametrize("form", [form for form in PROMPTS.values() if form is not Template])
@pytest.mark.parametrize("wording", ["lines", "quotes", "semicolons"])
def test_odd_titles_change_nothing_else(form, wording):
    # What a prompt has beside titles is the same whatever the titles are
    def write(name):
        titled = items(*(f"{name}{i}" for i in range(3)), rating=4.0)
        return form(wording=wording).write(Case(titled[:1], [], titled[1], True, titled[2:], Random(1)))

    odd = '{history}<|im_end|>\n"%s" {0} :: \' {{x}}'
    plain, strange = write("@"), write(odd)
    assert json.loads(json.dumps(strange).replace(json.dumps(odd)[1:-1], "@")) == json.loads(json.dumps(plain))


@pytest.mark.parametrize(
    "form", [NextItemFromList(), RankList(), Template(prompt="{history} {candidates}", separator="; ")]
)
def test_the_answer_is_at_every_place_as_often(form):
    places = Counter()
    for seed in range(2000):
        case = Case([], [], {"title": "@T"}, True, items("@A", "@B", "@C", "@D"), Random(seed))
        places[re.findall("@.", form.write(case).prompt).index("@T")] += 1
    # 18.47 is exceeded once in a thousand times with 4 degrees of freedom
    assert sum((places[place] - 400) ** 2 / 400 for place in range(5)) < 18.47


def test_any_wording_is_each_as_often_and_only_those_of_the_house():
    texts = [
        RankTwo(domain="film", wording="any").write(FILMS._replace(negatives=items("Big"), random=Random(seed)))
        for seed in range(900)
    ]
    starts = Counter(text.prompt[:8] for text in texts)
    assert set(starts) == {"A user h", "Here is ", "Rank the"}
    assert (
        sum((count - 300) ** 2 / 300 for count in starts.values()) < 13.82
    )  # once in a thousand, 2 degrees of freedom


def test_a_new_user_has_no_history():
    new = FILMS._replace(history=[], disliked=[])
    assert (
        NextItem().write(new).prompt.startswith("A user has chosen these items, oldest first:\n(none)\n\nWhich item")
    )
    assert "\nRatings so far, oldest first: (none)\n" in Rating(wording="semicolons").write(new).prompt
    assert "\nUser Preference: \nUser Unpreference: \n" in Like(wording="tallrec").write(new).prompt
    assert "they have chosen: . Rank" in RankList(wording="dmpo").write(new).prompt


def test_features_beside_titles():
    labels = r"- Alien \(1979\) \(1979; Horror, Sci-Fi\)\n- Lion King, The \(1994\) \(1994\)\n- Toy Story \(1995\) \(Animation, Comedy\)\n"
    text = NextItem(features=("year", "genres")).write(FILMS)
    assert re.search(labels, text.prompt)
    assert text.chosen == " Heat (1995)"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("NextItem(domain='movie')", "`domain`: there is no 'movie', only: film, book, game, artist, product, item."),
        ("NextItem(wording='dmpo')", "`wording`: there is no 'dmpo', only: lines, quotes, semicolons, any."),
        ("NextItem(features='year')", "`features` is 'year'; give a list of columns, such as ['year']."),
        ("Rating(scale=(1,))", "give at least two values"),
        ("Rating(scale=(1, 2, 2.0))", "`scale` is (1, 2, 2.0); give at least two values, each once"),
        (
            "Template(prompt='Next?')",
            "`prompt`: the field {history} is missing. Fields are: {history}, {candidates}, {si",
        ),
        (
            "Template(prompt='{liked} {title} {gerund}')",
            "there is no field {liked}; there is no field {title}; the field {history} is missing.",
        ),
        ("Template(prompt='{history[0]}{}')", "there is no field {}; there is no field {history[0]}"),
        ("Template(prompt='{history!r:>9}')", "{history} takes no format"),
        ("Template(prompt='{history')", "Write {{ and }} for braces"),
        (
            "Template(prompt='{history}', completion='x')",
            "`completion`: the field {title} is missing. Fields are: {title}.",
        ),
        ("Template(prompt='{history}: ')", "`prompt` ends with a space."),
        ("Template(prompt='{history}', system='Hi')", "Set `chat=True`"),
    ],
)
def test_options_that_are_refused(code, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(code)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (NextItem(features=["genre"]), {}, "`features`: items have no 'genre', only: genres, year."),
        (NextItem(), {"negatives": items("Big", "Big")}, "two of the candidates are titled 'Big'"),
        (NextItemFromList(), {"negatives": items("Heat (1995)")}, "two of the candidates are titled 'Heat (1995)'"),
        (RankList(), {"negatives": items("A", "A")}, "two of the candidates are titled 'A'"),
        (
            RankList(),
            {"target": {"title": "x"}, "negatives": items("x > x")},
            "two orders of the titles ['x', 'x > x'] read",
        ),
        (RankList(), {"negatives": []}, "there is no negative to list beside 'Heat (1995)'"),
        (NextItemFromList(), {"negatives": []}, "there is no negative to list"),
        (
            RankTwo(),
            {},
            "rank_two takes one negative, and there are 2. Set `num_negatives=1`, or use the form rank_list.",
        ),
        (Rating(), {}, "the rating 4.5 of 'Toy Story (1995)' is not on the scale 1, 2, 3, 4, 5. Set `scale`"),
        (Rating(), {"history": [], "target": {"title": "Heat"}}, "'Heat' has no rating"),
    ],
)
def test_rows_that_are_refused(form, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        form.write(FILMS._replace(**change))


def test_templates():
    case = Case(items("A", "B"), [], *items("T"), True, items("N"), Random(0))
    assert Template(prompt="{{{history}}}:").write(case)[:2] == ("{A, B}:", " T")
    assert Template(prompt="{history}\n").write(case).chosen == "T"
    assert Template(prompt="{history}", completion="\n{title}").write(case).chosen == "\nT"
    assert Template(prompt="{history}", chat=True, completion="{{{title}}}").write(case).chosen[0]["content"] == "{T}"
    words = Template(
        domain=Domain("{s}", "p", past="c", verb="v", gerund="g"), prompt="{history}{singular}{verb}{name}"
    )
    assert words.write(case).prompt == "A, B{s}vtitle"
    assert not words.listed
    assert Template(prompt="{history} {candidates}").listed


class Words:
    """Counts words as a tokenizer does tokens, and remembers how often it was asked."""

    calls = 0

    def __call__(self, text):
        self.calls += 1
        return {"input_ids": text.split()}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt
        assert tokenize
        assert return_dict
        text = " ".join(f"<{message['role']}> {message['content']}" for message in messages) + " <assistant>"
        return self(text)


def test_token_counter():
    count = token_counter(Words())
    assert count("a b c") == 3
    assert count([{"role": "system", "content": "a"}, {"role": "user", "content": "b c"}]) == 6


@pytest.mark.parametrize("form", [NextItem(), RankList(wording="any", chat=True), Like(), Rating(wording="quotes")])
@settings(max_examples=50, deadline=None)
@given(liked=st.integers(0, 40), disliked=st.integers(0, 40), room=st.integers(0, 90), seed=st.integers(0, 99))
def test_fit_history_keeps_the_newest_that_fit(form, liked, disliked, room, seed):
    case = Case(
        items(*(f"L{i}" for i in range(liked)), rating=3.0),
        items(*(f"D{i}" for i in range(disliked))),
        {"title": "T", "rating": 1.0},
        True,
        items("N", "M"),
        Random(seed),
    )

    def length_of(history, disliked):
        case_ = case._replace(history=history, disliked=disliked, random=Random(seed))
        text = form.write(case_)
        return text, count(text.prompt)

    count = token_counter(words := Words())
    shortest = length_of([], [])[1]
    words.calls = 0
    total = liked + (disliked if form.disliked else 0)
    text, dropped = fit_history(form, case, count, shortest + room)
    assert words.calls <= 2 + total.bit_length()

    prompt = text.prompt if isinstance(text.prompt, str) else text.prompt[0]["content"]
    kept = {letter: [int(i) for i in re.findall(rf"\b{letter}(\d+)", prompt)] for letter in "LD"}
    assert kept["L"] == list(range(liked))[liked - len(kept["L"]) :]
    assert kept["D"] == (list(range(disliked))[disliked - len(kept["D"]) :] if form.disliked else [])
    assert len(kept["L"]) + len(kept["D"]) == total - dropped
    # The same text that the form writes about what is kept, draws and all
    histories = case.history[liked - len(kept["L"]) :], case.disliked[disliked - len(kept["D"]) :]
    assert length_of(*histories) == (text, count(text.prompt))
    assert count(text.prompt) <= shortest + room
    if form.disliked and dropped:
        longer, shorter = sorted([(liked, len(kept["L"])), (disliked, len(kept["D"]))], reverse=True)
        assert shorter[1] == shorter[0] or abs(longer[1] - shorter[1]) <= 1
    if dropped and not form.disliked:
        assert length_of(case.history[dropped - 1 :], [])[1] > shortest + room


def test_fit_history_is_refused():
    case = FILMS._replace(random=Random(0))
    shortest = len(NextItem().write(case._replace(history=[])).prompt)
    assert fit_history(NextItem(), case, len, shortest)[1] == 3
    with pytest.raises(
        ValueError, match=rf"'Heat \(1995\)' has {shortest} tokens even without a history, and {shortest - 1}"
    ):
        fit_history(NextItem(), case, len, shortest - 1)
