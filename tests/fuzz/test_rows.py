"""A few hundred rows and files on each run; `make fuzz` tries 100,000."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import not_interpreted
from tests.fuzz.fuzz_files import try_files
from tests.fuzz.fuzz_rows import Bench, try_rows
from tests.fuzz.tokenizers import TOKENIZERS


several = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def bench(request, tmp_path_factory):
    return Bench.make(request.param, tmp_path_factory.mktemp("model"))


@not_interpreted
def test_rows_are_refused_or_scored_as_by_a_plain_forward(bench):
    @several
    @given(st.randoms(use_true_random=False))
    def try_some(draw):
        try_rows(bench, draw)

    with torch.random.fork_rng():
        try_some()
    assert bench.counts["rows"] > 40
    assert bench.counts["compared"] > 5
    assert bench.counts["refused"] > 5


@settings(several, max_examples=200)
@given(st.randoms(use_true_random=False))
def test_files_are_refused_or_every_record_is_accounted_for(draw):
    try_files(Counter(), draw)
