"""
Where the marks of a chart are.

Nothing here is drawn, and no number of the evaluation is computed: values become places, in percent of the width and height of a
plot, and the templates draw them as SVG. Percentages, so that a chart takes the width of the page and its text does not.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .text import decimal


if TYPE_CHECKING:
    from ..intervals import Estimate


class Tick(NamedTuple):
    """A labelled place on an axis, in percent."""

    at: float
    label: str


class Axis(NamedTuple):
    """A range of values, from 0 to 100 percent; on a `log` one equal ratios are equally far apart."""

    low: float
    high: float
    ticks: list[Tick]
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` is, in percent; beyond the ends it is at the end."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return round(100 * (min(max(value, low), high) - low) / (high - low), 2)


def linear_axis(values: Iterable[float], bounds: tuple[float, float] = (-math.inf, math.inf), ticks: int = 4) -> Axis:
    """
    An axis that holds all `values`, with round labels.

    Args:
        values (`Iterable[float]`):
            What must have a place. Those that are not finite are ignored.
        bounds (`tuple[float, float]`, *optional*):
            What the axis does not go beyond, such as (0, 1) for a share.
        ticks (`int`, *optional*, defaults to `4`):
            About how many labels.

    Returns:
        [`Axis`]
    """
    from matplotlib.ticker import MaxNLocator

    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    # All equal would be an axis of no length
    margin = 0.04 * (high - low) or max(abs(high), 1) / 20
    low, high = max(low - margin, bounds[0]), min(high + margin, bounds[1])
    at = MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    digits = max(0, -math.floor(math.log10(at[1] - at[0]) + 1e-9))
    digits += round(at[1] - at[0], digits) != round(at[1] - at[0], digits + 1)
    axis = Axis(low, high, [])
    inside = [value for value in np.asarray(at).tolist() if low - 1e-12 <= value <= high + 1e-12]
    return axis._replace(ticks=[Tick(axis.place(value), decimal(value, digits)) for value in inside])


def cutoff_axis(last: int) -> Axis:
    """An axis of cutoffs from 1 to `last`: in equal steps if they are few, else in equal ratios."""
    axis = Axis(1, max(last, 2), [], log=last > 30)
    if axis.log:
        labelled = [10**power for power in range(len(str(last))) if 10**power < last / 2] + [last]
    else:
        labelled = sorted({1, *range(5, last - 1, 5), last})
    return axis._replace(ticks=[Tick(axis.place(k), f"{k:,}") for k in labelled])


def estimates_axis(estimates: Iterable["Estimate | None"], extra: Iterable[float] = (), ticks: int = 4) -> Axis:
    """An axis that holds estimates and their intervals, not beyond 0 and 1 if none of them is."""
    values = [value for estimate in estimates if estimate is not None for value in estimate[:3]] + list(extra)
    shares = all(0 <= value <= 1 for value in values if math.isfinite(value))
    return linear_axis(values, (0.0, 1.0) if shares else (-math.inf, math.inf), ticks)


class Mark(NamedTuple):
    """An estimate in a plot: of which model (its number), where its ends and its value are, and itself, for its label."""

    model: int
    low: float
    value: float
    high: float
    estimate: "Estimate"


def marks(estimates: Sequence["Estimate | None"], axis: Axis) -> list[Mark]:
    """Places of the estimates of each model; without those that are missing or undefined."""
    return [
        Mark(model, axis.place(low), axis.place(estimate.value), axis.place(high), estimate)
        for model, estimate in enumerate(estimates)
        if estimate is not None and math.isfinite(estimate.value)
        for low, high in [_ends(estimate)]
    ]


def _ends(estimate: "Estimate") -> tuple[float, float]:
    """The interval to draw; where there is none, the value alone."""
    ends = (estimate.low, estimate.high)
    return ends if all(map(math.isfinite, ends)) else (estimate.value, estimate.value)


class Curve(NamedTuple):
    """The line of a model (its number) and the band around it: SVG paths in a box of 100 by 100, of which the top is 0."""

    model: int
    line: str
    band: str


def curve(model: int, cutoffs: Sequence[int], estimates: Sequence["Estimate"], x: Axis, y: Axis) -> Curve:
    """Paths through the estimates at each cutoff, and around their intervals."""
    across = [x.place(k) for k in cutoffs]
    line = [(at, y.place(estimate.value)) for at, estimate in zip(across, estimates, strict=True)]
    ends = [_ends(estimate) for estimate in estimates]
    lower = [(at, y.place(low)) for at, (low, _) in zip(across, ends, strict=True)]
    upper = [(at, y.place(high)) for at, (_, high) in zip(across, ends, strict=True)]
    return Curve(model, path(line), path(upper + lower[::-1]) + "Z")


def path(points: Iterable[tuple[float, float]]) -> str:
    """An SVG path through points given in percent from the bottom left."""
    return "M" + "L".join(f"{x:g} {round(100 - y, 2):g}" for x, y in points)


class Histogram(NamedTuple):
    """
    How groups of values are spread over bins of equal width.

    Args:
        axis ([`Axis`]):
            Of the values.
        shares (`list[np.ndarray]`):
            For each group of values, the share of it in each bin.
        outlines (`list[str]`):
            Their SVG paths in a box of 100 by 100, in which the largest share has the full height.
        beyond (`int`):
            Number of values left or right of the axis, counted in the first or last bin.
    """

    axis: Axis
    shares: list[np.ndarray]
    outlines: list[str]
    beyond: int


def histogram(groups: Sequence[np.ndarray]) -> Histogram:
    """
    Histograms of several groups of values on one axis.

    The axis holds the middle 99% of each group, so that a few far ones do not press all others into one bin; they count in the
    outermost bins, as do infinite ones. The number of bins follows Rice's rule for the smallest group, 2 n^(1/3), from 8 to 48.

    Args:
        groups (`Sequence[np.ndarray]`):
            Values, one-dimensional, without NaN, at least one in each group.

    Returns:
        [`Histogram`]
    """
    finite = [group[np.isfinite(group)] for group in groups]
    ends = [np.quantile(group, (0.005, 0.995)) for group in finite if len(group)]
    axis = linear_axis(np.concatenate(ends).tolist() if ends else [], ticks=5)
    bins = int(np.clip(np.ceil(2 * np.cbrt(min(map(len, groups)))), 8, 48))
    edges = np.linspace(axis.low, axis.high, bins + 1)
    shares = [np.histogram(np.clip(group, axis.low, axis.high), edges)[0] / len(group) for group in groups]
    tallest = max(share.max() for share in shares)
    outlines = [_outline(share / tallest) for share in shares]
    beyond = sum(int(((group < axis.low) | (group > axis.high)).sum()) for group in groups)
    return Histogram(axis, shares, outlines, beyond)


def _outline(heights: np.ndarray) -> str:
    at = np.linspace(0, 100, len(heights) + 1).round(2).repeat(2)
    tops = np.concatenate([[0], heights.repeat(2) * 100, [0]]).round(2)
    return path(zip(at.tolist(), tops.tolist(), strict=True))
