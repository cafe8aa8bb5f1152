"""How much each item of a history speaks for one item rather than another."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch


# From which items of the history are kept, bool of shape (S, n), to the log-odds, of shape (S,)
Value: TypeAlias = Callable[[np.ndarray], np.ndarray]


def attribute(value: Value, count: int, method: str, samples: int, seed: int) -> tuple[np.ndarray, float, float]:
    r"""
    Share out v(all n items) among the items.

    - `"ablation"`, leave one out: $a_i = v(N) - v(N \setminus i)$, from n + 1 histories. What two items say together
      counts for both of them, or for neither.
    - `"shapley"` (Shapley, 1953): what item i adds, on average over all orders in which the items may come in,

      $a_i = \sum_{S \subseteq N \setminus i} \frac{|S|! \, (n - |S| - 1)!}{n!} \, [v(S \cup i) - v(S)]$

      and so $\sum_i a_i = v(N) - v(\emptyset)$. By the formula where its 2^n histories are no more than sampling needs,
      and otherwise over `samples` random orders (Castro et al., 2009), whose sum is the same.

    Ablation and sampling are captum's `FeatureAblation` and `ShapleyValueSampling`. (Its `LLMAttribution` replaces tokens of a
    text; here, an item that is left out is not in the prompt, and no trace of a list entry remains.) It is asked twice: once
    for which histories it needs, which are then scored together, and once for the result.

    Args:
        value (`Callable`):
            v: from which items are kept, bool of shape (S, n), to the log-odds, of shape (S,). Called once.
        count (`int`):
            Number n of items, at least 1.
        method (`str`):
            `"ablation"` or `"shapley"`.
        samples (`int`):
            Random orders for `"shapley"`.
        seed (`int`):
            Seed of the random orders. The state of torch's generators is left as it was.

    Returns:
        `tuple[np.ndarray, float, float]`: a, float64 of shape (n,); v of all items; and v of none.

    Raises:
        `ImportError`: captum is not installed.

    Example:

    The second and the third item speak for the item only together:

    ```python
    >>> import numpy as np
    >>> from trl_dmpo.ranking.explain.attribution import attribute

    >>> def value(kept):
    ...     return 1.0 * kept[:, 0] + 2.0 * (kept[:, 1] & kept[:, 2])
    >>> attribute(value, 3, "ablation", samples=25, seed=0)
    (array([1., 2., 2.]), 3.0, 0.0)
    >>> attribute(value, 3, "shapley", samples=25, seed=0)
    (array([1., 1., 1.]), 3.0, 0.0)
    ```
    """
    captum = _import_captum()
    ends = np.stack([np.ones(count, bool), np.zeros(count, bool)])
    # Of a random order, all but the empty and the full history may be new
    if method == "shapley" and 2**count <= samples * (count - 1) + 2:
        subsets = (np.arange(2**count)[:, None] >> np.arange(count)) & 1 == 1
        values = value(subsets)
        return _shapley_values(values, subsets), float(values[-1]), float(values[0])

    def run(forward: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        everything = torch.ones(1, count, dtype=torch.float64)
        if method == "ablation":
            return captum.FeatureAblation(forward).attribute(everything, perturbations_per_eval=count)
        # Not torch.manual_seed, which also seeds the generators of GPUs
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            sampling = captum.ShapleyValueSampling(forward)
            return sampling.attribute(everything, n_samples=samples, perturbations_per_eval=count)

    asked = [ends]

    def record(kept: torch.Tensor) -> torch.Tensor:
        asked.append(kept.numpy() > 0.5)
        return torch.zeros(len(kept), dtype=torch.float64)

    run(record)
    histories = np.unique(np.concatenate(asked), axis=0)
    known = {kept.tobytes(): found for kept, found in zip(histories, value(histories), strict=True)}
    attributions = run(lambda kept: torch.tensor([known[row.tobytes()] for row in kept.numpy() > 0.5]).double())
    full, empty = (float(known[end.tobytes()]) for end in ends)
    return np.asarray(attributions, dtype=np.float64)[0], full, empty


def _shapley_values(values: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """The formula, over all subsets in binary order."""
    count = subsets.shape[1]
    size = subsets.sum(axis=1)
    weights = np.array([math.factorial(s) * math.factorial(count - s - 1) for s in range(count)]) / math.factorial(
        count
    )
    without = [np.flatnonzero(~subsets[:, i]) for i in range(count)]
    return np.array([weights[size[s]] @ (values[s + 2**i] - values[s]) for i, s in enumerate(without)])


def _import_captum() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError(
            "to explain a recommendation, captum is needed. Install it by: pip install 'trl-dmpo[explain]'"
        ) from error
    return captum.attr
