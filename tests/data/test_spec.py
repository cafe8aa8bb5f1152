import pytest

from trl_dmpo.data.negatives import NEGATIVES, Disliked, Nearest, Popularity, SharedFeature, Uniform
from trl_dmpo.data.prompts import PROMPTS
from trl_dmpo.data.spec import parse_choice, parse_mixture
from trl_dmpo.data.splits import SPLITS, AtTime, LeaveOneOut


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("leave_one_out", LeaveOneOut()),
        (" leave_one_out() ", LeaveOneOut()),
        ("time(validation='2003-01-31', test=0.9)", AtTime("2003-01-31", 0.9)),
        (AtTime(0.5), AtTime(0.5)),
    ],
)
def test_choices(text, choice):
    assert parse_choice(text, SPLITS, "split") == choice


def test_defaults_give_way():
    forms = [parse_choice(text, PROMPTS, "prompt", {"domain": "film"}) for text in ("like", "like(domain='book')")]
    assert [form.domain for form in forms] == ["film", "book"]


@pytest.mark.parametrize(
    ("text", "mixture"),
    [
        ("popularity(power=0.5)", Popularity(0.5)),
        ("0.5 * uniform", [(0.5, Uniform())]),
        ("1*disliked + 2*nearest(source='a*b.npy', top=5)", [(1, Disliked()), (2, Nearest("a*b.npy", 5))]),
        (
            '0.2 * disliked + 0.3 * shared_feature(feature="genres") + 0.5 * uniform',
            [(0.2, Disliked()), (0.3, SharedFeature("genres")), (0.5, Uniform())],
        ),
    ],
)
def test_mixtures(text, mixture):
    assert parse_mixture(text, NEGATIVES, "negatives") == mixture


ALL = "uniform, popularity, disliked, shown, shared_feature, nearest"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' cannot be read. Write a name, or name(option=value)."),
        ("popularity(", "'popularity(' cannot be read. Write a name, or name(option=value)."),
        ("random", f"there is no 'random', only: {ALL}."),
        ("populariti(power=2)", f"there is no 'populariti', only: {ALL}. Did you mean popularity?"),
        ("uniform(power=1)", "uniform takes no 'power'; it takes: nothing."),
        ("popularity(0.5)", "popularity takes keyword arguments only; it takes: power."),
        ("popularity(**{'power': 1})", "popularity takes no 'None'; it takes: power."),
        ("nearest(source=a.npy)", "'a.npy' in nearest is not a value. Put text into quotation marks."),
        ("popularity(power={[]: 1})", "'{[]: 1}' in popularity is not a value. Put text into quotation marks."),
        ("popularity(power=-1)", "`power` is -1, but it is at least 0."),
        ("uniform + disliked", "'uniform' has no share. Write 0.5 * name + 0.5 * name."),
        ("0.5 * uniform - 0.5 * disliked", "'0.5 * uniform - 0.5 * disliked' has no share. Write"),
        ("0 * uniform + 1 * disliked", "'0 * uniform' has no share. Write"),
        ("-1 * uniform", "'-1 * uniform' has no share. Write"),
        ("0.5 * uniform + 0.5 * dislike", f"there is no 'dislike', only: {ALL}. Did you mean disliked?"),
    ],
)
def test_errors_say_what_to_write(text, message):
    with pytest.raises(ValueError, match=r"^`negatives`: ") as error:
        parse_mixture(text, NEGATIVES, "negatives")
    assert str(error.value).startswith(f"`negatives`: {message}")


def test_a_missing_argument_is_named():
    with pytest.raises(
        ValueError, match=r"`negatives`: shared_feature needs 'feature'. Write shared_feature\(feature=...\)"
    ):
        parse_mixture("shared_feature", NEGATIVES, "negatives")
