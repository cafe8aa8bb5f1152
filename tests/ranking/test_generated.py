import pytest

from trl_dmpo.ranking.generated import find_named, generated_metrics


TITLES = ["Heat", "Red Heat", "E.T.", "'Til There Was You", "Amélie", "IT", "It", "..."]


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("Heat", "Heat"),
        (" Heat\n", "Heat"),
        ('"Heat".', "Heat"),
        ("“heat”", "Heat"),
        ("\n\nHEAT\nbecause the user likes De Niro", "Heat"),
        ("Red Heat", "Red Heat"),
        ("I would watch Heat", None),
        ("Heat, Red Heat", None),
        ("Hea", None),
        ("e.t", "E.T."),
        ("'Til There Was You", "'Til There Was You"),
        ("Ame\u0301lie", "Amélie"),  # Two characters that look as one
        ("It", "It"),
        ("IT", "IT"),
        ("it", None),  # Either
        ("...", "..."),
        ("", None),
        (" \n", None),
        ('"', None),
    ],
)
def test_an_answer_is_a_title_or_none(answer, named):
    assert find_named(answer, TITLES) == named


def test_both_published_hit_rates():
    answers = ["Heat", "Alien", "nothing of that kind", "Big.", "Jaws"]
    metrics = generated_metrics(
        answers, ["Heat", "Heat", "Heat", "Big", "Jaws"], [["Heat", "Alien", "Big", "Jaws"]] * 5
    )
    rates = {name: values[values == values].mean() for name, values in metrics.items()}
    assert rates["generated_hit_rate"] == 3 / 5
    assert rates["generated_hit_rate_of_valid"] == 3 / 4
    assert rates["generated_valid_ratio"] == 4 / 5
    assert rates["generated_hit_rate_of_valid"] * rates["generated_valid_ratio"] == pytest.approx(3 / 5)
    assert [len(values) for values in metrics.values()] == [5] * 3


def test_messages():
    films = [[{"role": "assistant", "content": title}] for title in ("Heat", "Alien")]
    assert generated_metrics(["Alien"], [films[1]], [films])["generated_hit_rate"].tolist() == [1]


def test_errors():
    with pytest.raises(ValueError, match="Row 1: the chosen 'Alien' is not among its candidates"):
        generated_metrics(["Heat"] * 2, ["Heat", "Alien"], [["Heat"]] * 2)
    with pytest.raises(ValueError, match="got 1 answers, 2 chosen and 2 lists"):
        generated_metrics(["Heat"], ["Heat"] * 2, [["Heat"]] * 2)
