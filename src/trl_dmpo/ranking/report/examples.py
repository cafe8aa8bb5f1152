"""Some rows in full: what the user had taken, how each model ranks the candidates, and what the user chose."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..metrics import expected_ranks
from ..rows import as_text
from .text import Model, number, signed


if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..explain import Explanation
    from ..rows import RankingRows

# Up to so many candidates all are shown, of more the first TOP and the chosen one
SHORT_LIST, TOP = 20, 10


class Candidate(NamedTuple):
    """
    A line of a ranking.

    Args:
        rank (`str`):
            Its rank; for several of one score, the mean of their ranks.
        title (`str`):
            What it is.
        score (`str`):
            Its score.
        bar (`float`):
            Length of its bar in percent: 0 for the lowest score of the row, 100 for the highest.
        chosen (`bool`):
            Whether it is what the user chose.
        skipped (`int`):
            How many better ones are left out right before it.
    """

    rank: str
    title: str
    score: str
    bar: float
    chosen: bool
    skipped: int


class Ranking(NamedTuple):
    """
    What a model makes of a row.

    Args:
        model ([`Model`]):
            The model.
        rank (`str`):
            Rank of the chosen candidate.
        lines (`list[Candidate]`):
            The candidates that are shown, best first.
        rest (`int`):
            How many worse ones are left out at the end.
        answer (`str`, *optional*):
            What the model wrote when it was asked, if it was.
    """

    model: Model
    rank: str
    lines: list[Candidate]
    rest: int
    answer: str | None


class Effect(NamedTuple):
    """An item of the history: by how much it moves the log-odds, in words, and how strongly it is coloured, -1 to 1."""

    title: str
    moved: str
    strength: float


class Reason(NamedTuple):
    """Why an item is recommended: an explanation, its history as it is coloured, and its counterfactual in words."""

    explanation: "Explanation"
    effects: list[Effect]
    counterfactual: str


class Example(NamedTuple):
    """
    A row in full.

    Args:
        place (`int`):
            Its place in what the rows were read from: `row_index` of `per_user.parquet`.
        user (`str`, *optional*):
            Its user, where the rows name users.
        chosen (`str`):
            What the user chose.
        candidates (`int`):
            Number of candidates.
        history (`list[str]`, *optional*):
            Titles, oldest first; `None` where the rows do not say, and the page shows the prompt.
        messages (`list[tuple[str, str]]`):
            The prompt: role and text of each message. Text that is no chat has the role "".
        rankings (`list[Ranking]`):
            One a model.
        reason ([`Reason`], *optional*):
            Why an item is recommended, where it is explained. The page then shows its history.
    """

    place: int
    user: str | None
    chosen: str
    candidates: int
    history: list[str] | None
    messages: list[tuple[str, str]]
    rankings: list[Ranking]
    reason: Reason | None


def example_rows(evaluation: "Evaluation", count: int = 10) -> list[int]:
    """
    Numbers of rows that show how good and how bad it gets.

    One row of each user is drawn (only where there are fewer users than `count`, further ones), with the seed of the evaluation.
    Ordered by the rank that the first model gives to what was chosen, those are taken that stand equally far apart, from the
    best to the worst. So they are spread over outcomes, and nobody has picked them.

    Args:
        evaluation ([`~trl_dmpo.ranking.evaluate.Evaluation`]):
            What was evaluated.
        count (`int`, *optional*, defaults to `10`):
            How many; fewer if there are fewer rows.

    Returns:
        `list[int]`: numbers of rows, the best rank first.
    """
    rows = evaluation.rows
    drawn = np.random.default_rng(evaluation.settings["seed"]).permutation(len(rows))
    first_of_user = np.unique(rows.users[drawn], return_index=True)[1]
    others = np.setdiff1d(np.arange(len(drawn)), first_of_user)[: max(0, count - len(first_of_user))]
    # In the order of the draw, so that equal ranks are ordered by chance
    pool = drawn[np.sort(np.concatenate([first_of_user, others]))]
    scores = next(iter(evaluation.scores.values()))
    ranks = np.array([expected_ranks(scores[row])[rows.labels[row]] for row in pool])
    ordered = pool[np.argsort(ranks, kind="stable")]
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return ordered[places].tolist()


def make_example(
    evaluation: "Evaluation", models: Sequence[Model], row: int, explanation: "Explanation | None" = None
) -> Example:
    """What the page shows of the row with number `row`."""
    rows = evaluation.rows
    titles = [as_text(candidate).strip() for candidate in rows.candidates[row]]
    label = int(rows.labels[row])
    answers = {model: written[row] for model, written in (evaluation.generated or {}).items()}
    user = rows.columns["user_id"][row] if "user_id" in rows.columns else None
    return Example(
        place=int(rows.places[row]),
        user=None if user is None else str(user),
        chosen=titles[label],
        candidates=len(titles),
        history=_history(rows, row),
        messages=_messages(rows.prompts[row]),
        rankings=[
            _rank(model, titles, evaluation.scores[model.key][row], label, answers.get(model.key)) for model in models
        ],
        reason=None if explanation is None else _reason(explanation),
    )


def _messages(prompt: Any) -> list[tuple[str, str]]:
    if isinstance(prompt, str):
        return [("", prompt)]
    return [(message["role"], as_text([message])) for message in prompt]


def _history(rows: "RankingRows", row: int) -> list[str] | None:
    ids = rows.columns["history_ids"][row] if "history_ids" in rows.columns else None
    if ids is None or rows.items is None:
        return None
    titles = dict(rows.items.select("item_id", "title").iter_rows())
    return [titles.get(item) or str(item) for item in ids]


def _rank(model: Model, titles: Sequence[str], scores: np.ndarray, label: int, answer: str | None) -> Ranking:
    ranks = [f"{rank:,.1f}".removesuffix(".0") for rank in expected_ranks(scores)]
    order = np.argsort(-scores, kind="stable")
    shown = np.arange(len(order))
    if len(order) > SHORT_LIST:
        shown = np.union1d(shown[:TOP], np.flatnonzero(order == label))
    skipped = np.diff(shown, prepend=-1) - 1
    bars = _bars(scores)
    lines = [
        Candidate(ranks[at], titles[at], number(float(scores[at])), float(bars[at]), at == label, int(left_out))
        for at, left_out in zip(order[shown].tolist(), skipped, strict=True)
    ]
    return Ranking(model, ranks[label], lines, len(order) - int(shown[-1]) - 1, answer)


def _bars(scores: np.ndarray) -> np.ndarray:
    # In float32 the span of very large scores overflows
    scores = np.asarray(scores, dtype=np.float64)
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    if low == high:
        return np.where(np.isfinite(scores), 100.0, 0.0)
    return (100 * (np.clip(scores, low, high) - low) / (high - low)).round(1)


def _reason(explanation: "Explanation") -> Reason:
    # Not above: it brings the models with it, and a report without explanations needs none
    from ..explain.rendering import describe_counterfactual

    moved = explanation.attributions.tolist()
    largest = max(map(abs, moved)) or 1.0
    effects = [
        Effect(title, signed(each), round(each / largest, 3))
        for title, each in zip(explanation.history, moved, strict=True)
    ]
    told = describe_counterfactual(explanation) if explanation.counterfactual is not None else ""
    return Reason(explanation, effects, told)
