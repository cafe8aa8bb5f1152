"""
Random numbers that belong to a row: the same whatever else is drawn, in whatever order, on however many threads.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) as a hash of a seed and
of counters.
"""

import numpy as np
from numpy.typing import ArrayLike


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def make_keys(seed: int, *counters: ArrayLike) -> np.ndarray:
    """
    A random key for each combination of counters.

    Args:
        seed (`int`):
            Seed, at least 0.
        counters (`ArrayLike`):
            Integers, at least 0, of shapes that broadcast: what the key belongs to, such as a user and an item.

    Returns:
        `np.ndarray`: `uint64`, of the shape that the counters broadcast to.

    Example:

    ```python
    >>> from trl_dmpo.data.seeding import make_keys

    >>> make_keys(0, [1, 2], 3).tolist() == [make_keys(0, 1, 3).item(), make_keys(0, 2, 3).item()]
    True
    ```
    """
    keys = _mix(np.atleast_1d(np.uint64(seed)) + _GOLDEN)
    for counter in counters:
        keys = _mix(keys + (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return keys


def uniforms(keys: np.ndarray, numbers: ArrayLike) -> np.ndarray:
    """
    Uniform random numbers, each a function of its key and its number alone.

    Args:
        keys (`np.ndarray` of shape `(...)`):
            Keys, from [`make_keys`].
        numbers (`ArrayLike`):
            Integers, at least 0, of a shape that broadcasts with `keys`: which of a key's random numbers.

    Returns:
        `np.ndarray`: `float64`, at least 0 and below 1.

    Example:

    ```python
    >>> from trl_dmpo.data.seeding import make_keys, uniforms

    >>> keys = make_keys(0, [1, 2])
    >>> uniforms(keys[:, None], range(3)).shape
    (2, 3)
    ```
    """
    mixed = _mix(keys + (np.atleast_1d(numbers).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)) * 2.0**-53


class RandomStream:
    """
    The random numbers of one key, one after the other. Costs nothing until the first is drawn, where `random.Random` takes
    as long to seed as a prompt to write.

    Args:
        key (`int`):
            Key, from [`make_keys`].

    Example:

    ```python
    >>> from trl_dmpo.data.seeding import RandomStream, make_keys, uniforms

    >>> key = make_keys(0, 7)[0]
    >>> stream = RandomStream(int(key))
    >>> [stream.random(), stream.random()] == uniforms(key, [0, 1]).tolist()
    True
    ```
    """

    __slots__ = ("_state",)

    def __init__(self, key: int) -> None:
        self._state = key

    def random(self) -> float:
        """The next number, at least 0 and below 1."""
        self._state = state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((state ^ (state >> 31)) >> 11) * 2.0**-53
