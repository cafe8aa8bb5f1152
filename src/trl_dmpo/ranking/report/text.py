"""What numbers, names and foreign text look like on the page."""

import math
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup


if TYPE_CHECKING:
    from ..intervals import Comparison, Estimate

# Below this, and with an interval that leaves out zero, a difference is called one
SIGNIFICANT = 0.05

_FAMILIES = {
    "hit_rate": "Hit rate",
    "recall": "Recall",
    "ndcg": "NDCG",
    "mrr": "MRR",
    "map": "MAP",
    "paired_accuracy": "Paired accuracy",
    "pooled_auc": "AUC, pooled",
    "coin_flip_auc": "AUC, by coin flips",
    "generated_hit_rate": "Hit rate, generated",
    "generated_hit_rate_of_valid": "Hit rate, of valid ones",
    "generated_valid_ratio": "Valid answers",
}
# Those above are shares, of which more is better. Of others the page only says that they are higher or lower

# What XML 1.0 and HTML have no place for, and what would break off a line: shown, not sent
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_UNPRINTABLE = re.compile("[\x80-\x9f\ud800-\udfff\ufffe\uffff\u2028\u2029]")


def clean(value: Any) -> Any:
    """
    Text from the data as text that can stand in a page, as the `finalize` of the templates.

    Args:
        value:
            What a template is about to write.

    Returns:
        `value`, and if it is a string, with control characters as their pictures (U+2400 to U+2421), and lone surrogates
        and what else UTF-8 or HTML cannot hold as U+FFFD.

    Example:

    ```python
    >>> from trl_dmpo.ranking.report.text import clean

    >>> clean("Al\\x00ien \\ud83d")
    'Al␀ien �'
    ```
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNPRINTABLE.sub("\ufffd", value.translate(_PICTURES))


def number(value: float) -> str:
    """
    A number with three digits after the point, or four in all if it is large.

    Example:

    ```python
    >>> from trl_dmpo.ranking.report.text import number

    >>> number(0.5), number(-12345.678), number(float("-inf")), number(float("nan"))
    ('0.500', '−12,346', '−∞', '–')
    ```
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return decimal(value, max(0, min(3, 3 - int(math.log10(max(abs(value), 1))))))


def decimal(value: float, digits: int) -> str:
    """A number with `digits` after the point, a true minus sign, and none before what is rounded to zero."""
    return f"{value:z,.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """`number`, with a plus where there is no minus."""
    text = number(value)
    return f"+{text}" if value > 0 and text.strip("0.,") else text


def interval(estimate: "Estimate") -> str:
    """The two ends of an estimate's interval; nothing where it has none."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return ""
    return f"[{number(estimate.low)}, {number(estimate.high)}]"


def p_value(value: float) -> str:
    """
    A p-value as it stands in a sentence.

    Example:

    ```python
    >>> from trl_dmpo.ranking.report.text import p_value

    >>> p_value(0.0421), p_value(0.00002)
    ('p = 0.042', 'p < 0.001')
    ```
    """
    if math.isnan(value):
        return "p unknown"
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def family(metric: str) -> str:
    """`"ndcg"` of `"ndcg@10"`."""
    return metric.partition("@")[0]


def is_quality(metric: str) -> bool:
    """Whether a metric is one of how well items are ranked: between 0 and 1, and better when higher."""
    return family(metric) in _FAMILIES


def metric_label(metric: str) -> str:
    """
    What a metric is called on the page.

    Example:

    ```python
    >>> from trl_dmpo.ranking.report.text import metric_label

    >>> metric_label("hit_rate@10"), metric_label("mrr"), metric_label("my_own@5")
    ('Hit rate@10', 'MRR', 'My own@5')
    ```
    """
    name, at, cutoff = metric.partition("@")
    label = _FAMILIES.get(name) or name.replace("_", " ").strip().capitalize() or metric
    return f"{label}{at}{cutoff}"


def verdict(metric: str, comparison: "Comparison") -> str:
    """
    Whether a model differs from the first one.

    It does if p is below 0.05 and the interval of the difference leaves out zero: both, since the two are found differently
    and the weaker of them is what can be stood by.

    Args:
        metric (`str`):
            A key of the results.
        comparison ([`~trl_dmpo.ranking.intervals.Comparison`]):
            The model less the first one.

    Returns:
        `str`: `"better"` or `"worse"`; `"higher"` or `"lower"` if neither way is better; or `"none"`, if the difference is not
        beyond noise.
    """
    difference = comparison.difference
    if not (comparison.p_value < SIGNIFICANT and (difference.low > 0 or difference.high < 0)):
        return "none"
    up, down = ("better", "worse") if is_quality(metric) else ("higher", "lower")
    return up if difference.value > 0 else down


class Model(NamedTuple):
    """
    A model on the page.

    Args:
        key (`str`):
            Its name in the evaluation.
        letter (`str`):
            What it is called where there is no room: "A" for the first.
        name (`str`):
            Its name without the folders that all can do without.
        color (`int`):
            Number of its color in the style sheet.
    """

    key: str
    letter: str
    name: str
    color: int


def name_models(keys: Sequence[str]) -> list[Model]:
    """
    Short names for models that may be called by long paths.

    Args:
        keys (`Sequence[str]`):
            Names of the models in the evaluation, all different.

    Returns:
        `list[Model]`: with as many of the last parts of each path as it takes to tell them apart.

    Example:

    ```python
    >>> from trl_dmpo.ranking.report.text import name_models

    >>> [model.name for model in name_models(["HuggingFaceTB/SmolLM2-135M", "runs/a/checkpoint-50", "runs/b/checkpoint-50"])]
    ['SmolLM2-135M', 'a/checkpoint-50', 'b/checkpoint-50']
    ```
    """
    names = [_short_name(key, keys) for key in keys]
    letters = string.ascii_uppercase
    return [
        Model(key, letters[at] if at < 26 else str(at + 1), name, at % 6)
        for at, (key, name) in enumerate(zip(keys, names, strict=True))
    ]


def _short_name(key: str, keys: Sequence[str]) -> str:
    parts = _parts(key)
    # A checkpoint without its run says little, even if it is the only one
    first = 2 if len(parts) > 1 and parts[-1].startswith("checkpoint-") else 1
    others = [_parts(other) for other in keys if other != key]
    for count in range(first, len(parts)):
        if not any(other[-count:] == parts[-count:] for other in others):
            return _shortened("/".join(parts[-count:]), ["/".join(other[-count:]) for other in others])
    return key


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[/\\]", key) if part] or [key]


def _shortened(name: str, others: Sequence[str], length: int = 48) -> str:
    """`name` without its middle, if it is long and the rest still tells it from the others."""
    if len(name) <= length:
        return name
    head, tail = name[: length // 2], name[-(length // 2 - 1) :]
    ambiguous = any(other.startswith(head) and other.endswith(tail) for other in others)
    return name if ambiguous else f"{head}…{tail}"
