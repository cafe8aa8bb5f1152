"""Rows in groups, so that a mean over all does not hide whom a model serves."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


# A column of no more different values than this is grouped by value
FEW = 10


def group_rows(values: Sequence[Any], name: str = "column", quantiles: int = 4) -> dict[str, np.ndarray]:
    """
    Groups of rows by a column.

    A column of at most 10 different values is grouped by value. One of more numbers is grouped at its quantiles, so that the
    groups are about as large; equal numbers are never parted. A column of lists, such as `history_ids`, is grouped by their
    lengths: by how active a user is.

    Args:
        values (`Sequence`):
            A value for each row: numbers, text, booleans, or lists. `None` and NaN are in the group "none".
        name (`str`, *optional*, defaults to `"column"`):
            Name of the column, for errors.
        quantiles (`int`, *optional*, defaults to `4`):
            Into how many groups to part numbers.

    Returns:
        `dict[str, np.ndarray]`: from the label of a group, such as "5 to 9", to the numbers of its rows, rising. Groups are in
        the order of their values; "none", if there is one, is the last. Each row is in exactly one.

    Raises:
        `ValueError`: if there are more than 10 different values and they are no numbers, or values of another type.

    Example:

    ```python
    >>> from trl_dmpo.ranking.groups import group_rows

    >>> {label: rows.tolist() for label, rows in group_rows(["f", "m", None, "f"]).items()}
    {'f': [0, 3], 'm': [1], 'none': [2]}
    >>> {label: len(rows) for label, rows in group_rows(range(1, 101)).items()}
    {'1 to 25': 25, '26 to 50': 25, '51 to 75': 25, '76 to 100': 25}
    ```
    """
    plain = [len(value) if isinstance(value, (list, tuple, np.ndarray)) else value for value in values]
    missing = np.array([value is None or value != value for value in plain], bool)
    present = [value for value, gone in zip(plain, missing, strict=True) if not gone]
    if odd := {type(value).__name__ for value in present if not isinstance(value, Hashable)}:
        raise ValueError(f"Column '{name}' holds values of type {', '.join(odd)}; groups need numbers, text or lists.")
    different = set(present)
    numbers = all(isinstance(value, (int, float, np.number)) for value in different)
    if len(different) <= FEW:
        label_of = {value: str(value) for value in sorted(different, key=None if numbers else str)}
    elif numbers:
        label_of = _quantile_labels(np.array(present), quantiles)
    else:
        raise ValueError(
            f"Column '{name}' has {len(different)} different values that are no numbers; groups need at most {FEW}, or "
            "numbers."
        )
    labels = np.full(len(plain), "none", dtype=object)
    labels[~missing] = [label_of[value] for value in present]
    order = dict.fromkeys([*label_of.values(), *(["none"] if missing.any() else [])])
    return {label: np.flatnonzero(labels == label) for label in order}


def _quantile_labels(values: np.ndarray, quantiles: int) -> dict[Any, str]:
    """From each value to the label of its group, rising."""
    edges = np.unique(np.quantile(values, np.arange(1, quantiles) / quantiles, method="inverted_cdf"))
    values = np.unique(values)
    number = np.searchsorted(edges, values, "left")  # An edge is the last value of its group
    parts = [values[number == group] for group in np.unique(number)]
    labels = [_range_label(part, "{:.6g}") for part in parts]
    if values.dtype.kind in "iub" or len(set(labels)) < len(labels):
        labels = [_range_label(part, "{}") for part in parts]
    return {value: label for part, label in zip(parts, labels, strict=True) for value in part.tolist()}


def _range_label(values: np.ndarray, form: str) -> str:
    ends = dict.fromkeys(form.format(value) for value in (values[0], values[-1]))
    return " to ".join(ends)
