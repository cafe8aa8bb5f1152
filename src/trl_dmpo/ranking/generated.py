"""Hit rates of answers that a model generated, as published, but by exact match."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np


# What models put around a title, and some data sets too
_AROUND = " \t\r\n.\"'`“”‘’«»"


def generated_metrics(
    answers: Sequence[str], chosen: Sequence[Any], candidates: Sequence[Sequence[Any]]
) -> dict[str, np.ndarray]:
    r"""
    Whether generated answers name the chosen candidate. An answer is *valid* if it is one of the row's candidates.

    | key | its mean over rows | whose |
    |---|---|---|
    | `generated_hit_rate` | hits / rows | S-DPO; LLaRA's valid ratio times hit rate |
    | `generated_hit_rate_of_valid` | hits / valid answers | LLaRA's hit rate |
    | `generated_valid_ratio` | valid answers / rows | both |

    Both papers call an answer valid if exactly one candidate is somewhere in its text, so that "Red Heat" names "Heat".
    Here the answer must be the candidate, with a tolerance on both sides for what does not make another title: the case of
    letters (as in LLaRA's code), the form of accented letters (NFC), and blanks, quotation marks and full stops around it.
    Of an answer of several lines the first counts, as in LLaRA's code. Where two candidates are the same under this
    tolerance, the answer must be one of them letter by letter, or is not valid.

    Args:
        answers (`Sequence[str]`):
            N generated texts, without the prompt and special tokens.
        chosen (`Sequence`):
            The right answer of each row, a string or a list of messages, of which the last counts.
        candidates (`Sequence[Sequence]`):
            The candidates of each row, the chosen one among them.

    Returns:
        `dict[str, np.ndarray]`: `float64` of shape (N,), 0 or 1 in each row; `generated_hit_rate_of_valid` is NaN in rows
        whose answer is not valid.

    Raises:
        `ValueError`: if the lengths differ, or naming the row, if the chosen one is not among the candidates.

    Example:

    ```python
    >>> from trl_dmpo.ranking.generated import generated_metrics

    >>> films = [["Heat", "Red Heat", "Alien"]] * 4
    >>> metrics = generated_metrics(['"Heat".', "Red Heat", "I would watch Heat", "alien"], ["Heat"] * 4, films)
    >>> {name: values.tolist() for name, values in metrics.items()}
    {'generated_hit_rate': [1.0, 0.0, 0.0, 0.0], 'generated_hit_rate_of_valid': [1.0, 0.0, nan, 0.0], 'generated_valid_ratio': [1.0, 1.0, 0.0, 1.0]}
    ```
    """
    if not len(answers) == len(chosen) == len(candidates) > 0:
        lengths = f"{len(answers)} answers, {len(chosen)} chosen and {len(candidates)} lists of candidates"
        raise ValueError(f"Expected one of each for every row, got {lengths}.")
    hit, valid = np.zeros(len(answers)), np.zeros(len(answers))
    for row, (answer, right, others) in enumerate(zip(answers, chosen, candidates, strict=True)):
        titles = [_text(candidate) for candidate in others]
        if _text(right) not in titles:
            raise ValueError(f"Row {row}: the chosen {_text(right)!r} is not among its candidates; add it.")
        named = find_named(answer, titles)
        valid[row] = named is not None
        hit[row] = named == _text(right)
    return {
        "generated_hit_rate": hit,
        "generated_hit_rate_of_valid": np.where(valid > 0, hit, np.nan),
        "generated_valid_ratio": valid,
    }


def find_named(answer: str, titles: Sequence[str]) -> str | None:
    """
    The title that an answer is, by the rule of [`generated_metrics`].

    Args:
        answer (`str`):
            Generated text.
        titles (`Sequence[str]`):
            What it may be.

    Returns:
        `str` or `None`: the one of `titles`, or `None` if it is none of them or could be several.
    """
    line = next(iter(answer.strip().splitlines()), "")
    same = [title for title in titles if title.strip() == line.strip()]
    if not same and _key(line):
        same = [title for title in titles if _key(title) == _key(line)]
    return same[0] if len(set(same)) == 1 else None


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _key(title: str) -> str:
    return unicodedata.normalize("NFC", title).casefold().strip(_AROUND)
