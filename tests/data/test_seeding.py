import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trl_dmpo.data.seeding import make_keys, uniforms


# The first outputs of SplitMix64 seeded with 1234567, as its authors' C code prints them
PUBLISHED = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], np.uint64)

counters = st.integers(0, 2**32)


def test_it_is_splitmix64():
    assert make_keys(1234567).tolist() == PUBLISHED[:1].tolist()
    expected = (PUBLISHED >> np.uint64(11)) * 2.0**-53
    np.testing.assert_array_equal(uniforms(np.array([1234567], np.uint64), range(3)), expected)


@given(st.integers(0, 2**63), st.lists(st.tuples(counters, counters), min_size=1, max_size=5))
def test_a_key_depends_on_its_own_counters_alone(seed, pairs):
    users, items = np.array(pairs).T
    together = make_keys(seed, users, items)
    assert together.tolist() == [make_keys(seed, user, item).item() for user, item in pairs]
    numbers = uniforms(together[:, None], range(4))
    np.testing.assert_array_equal(numbers[-1], uniforms(together[-1:], range(4)))
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_seeds_counters_and_their_order_all_tell_keys_apart():
    grid = make_keys(0, np.arange(300)[:, None], np.arange(300))
    assert grid.shape == (300, 300)
    keys = [grid.ravel(), make_keys(1, np.arange(300)), make_keys(0, np.arange(300))]
    assert len(np.unique(np.concatenate(keys))) == 300 * 300 + 600


def test_keys_of_counters_in_a_row_give_uniform_and_uncorrelated_numbers():
    drawn = uniforms(make_keys(0, np.arange(40_000))[:, None], [0, 1])
    counts = np.bincount((drawn[:, 0] * 10).astype(int) * 10 + (drawn[:, 1] * 10).astype(int), minlength=100)
    # Chi-square of 99 degrees of freedom is above 149 once in a thousand times
    assert ((counts - 400) ** 2 / 400).sum() < 149
