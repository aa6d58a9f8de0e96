"""Groups that pass alone and fail together: bisection keeps as many as go together."""

from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.symmetry.discover.discovery import compatible

MEMBERS = 9
PAIRS = st.sets(st.tuples(st.integers(0, MEMBERS - 1), st.integers(0, MEMBERS - 1)))


@given(PAIRS)
def test_what_is_kept_goes_together_and_nothing_more_would(conflicts: set[tuple[int, int]]) -> None:
    def keeps(chosen: list[int]) -> bool:
        return not any(a in chosen and b in chosen for a, b in conflicts)

    kept = compatible(keeps, range(MEMBERS))
    assert keeps(kept)
    assert not any(keeps([*kept, member]) for member in set(range(MEMBERS)) - set(kept))


def test_one_guilty_member_of_many_is_found_in_few_proofs() -> None:
    proofs = []

    def keeps(chosen: list[int]) -> bool:
        proofs.append(chosen)
        return 700 not in chosen

    assert 700 not in (kept := compatible(keeps, range(1024)))
    assert len(kept) == 1023
    assert len(proofs) <= 2 * 10 + 1
