"""A small copy of the benchmark of transformers from different starts."""

import pytest

from fedbasin.strategies.alignment.pairwise_merging import chain
from tests.benchmarks.bench_own_starts import begin, figures


@pytest.mark.slow
def test_two_transformers_from_own_starts_are_merged_into_one_that_is_better() -> None:
    begun = begin(2, "SGD", seed=0, epochs=12)
    client, mean, star, *_, learned, _tree, _ensemble = figures(begun, steps=150)
    assert mean < 0.5 * client
    assert star > mean + 0.2
    assert learned > client + 0.01
    assert begun.merged(chain) == pytest.approx(star, abs=0.01)
