import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.diagnostics.probe_sampling import bound, draw

nodes = st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=60)


@given(nodes, st.integers(1, 99), st.floats(0.01, 1))
def test_exactly_the_share_draws_at_most_the_bound(asked, number, share):
    limit = bound(asked, number, share)
    probing = [node for node in asked if draw(node, number) <= limit]
    assert len(probing) == max(1, int(share * len(asked) + 0.5))


def test_other_rounds_draw_other_clients():
    asked = range(40)
    chosen = [{node for node in asked if draw(node, number) <= bound(asked, number, 0.1)} for number in range(1, 30)]
    assert len(set.union(*chosen)) > 30


@pytest.mark.parametrize(("asked", "share"), [([], 0.5), ([1], 0.0), ([1], 1.5)])
def test_a_share_of_nobody_is_refused(asked, share):
    with pytest.raises(ValueError, match="ask at least one node"):
        bound(asked, 1, share)
