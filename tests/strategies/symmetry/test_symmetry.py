import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError, parse

sizes = st.integers(1, 40)
names = st.text("abz09._-", min_size=1, max_size=12)
inners = st.one_of(st.builds(Permutation, sizes), st.builds(Orthogonal, sizes))
groups: st.SearchStrategy[Group] = st.one_of(
    st.builds(Permutation, sizes),
    st.builds(Orthogonal, sizes, sizes),
    st.builds(Wreath, st.lists(inners, min_size=1, max_size=3).map(tuple), sizes),
)
parts = st.tuples(st.integers(0, 99), st.integers(1, 99)).map(lambda p: (p[0], sum(p)))
axes = st.builds(Axis, names, st.integers(0, 3), st.none() | parts, st.integers(0, 2), st.booleans())
spaces = st.builds(Space, names, groups, st.lists(axes, min_size=1, max_size=4).map(tuple))
symmetries = st.lists(spaces, max_size=4, unique_by=lambda space: space.name).map(lambda found: Symmetry(tuple(found)))

STATE = {
    "0.weight": torch.zeros(4, 6),
    "0.bias": torch.zeros(4),
    "2.weight": torch.zeros(3, 8),
    "count": torch.tensor(0),
}


@given(symmetries)
def test_what_is_written_is_read_back(symmetry: Symmetry) -> None:
    assert parse(str(symmetry)) == symmetry
    assert parse(str(symmetry)).digest == symmetry.digest


def test_blank_lines_and_comments_are_skipped() -> None:
    text = "\n# hidden units\n  hidden   S(4)   0.weight[0] (0.bias[0])\n\n"
    weight, bias = Axis("0.weight", 0), Axis("0.bias", 0, scored=False)
    assert parse(text) == Symmetry((Space("hidden", Permutation(4), (weight, bias)),))


def test_a_symmetry_of_other_spaces_has_another_digest() -> None:
    assert parse("a S(2) w[0]").digest != parse("a S(2) w[1]").digest


@pytest.mark.parametrize(
    "line",
    [
        "hidden",
        "hidden S(4)",
        "hidden T(4) w[0]",
        "hidden S(-1) w[0]",
        "hidden S(0) w[0]",
        "hidden O(4)^0 w[0]",
        "hidden S(4) w",
        "hidden S(4) w[a]",
        "hidden S(4) w[0,3]",
        "hidden S(4) (w[0]",
        "hidden S(4) w[0])",
        "hidden S(4)^2 w[0]",
        "hidden O(4)*O(4) w[0]@1",
        "hidden O(4)^2 wr S(3) w[0]",
        "hidden S(2) wr O(3) w[0]",
    ],
)
def test_bad_notation_names_its_line(line: str) -> None:
    with pytest.raises(SymmetryError) as refused:
        parse(f"good S(2) v[0]\n{line}\n")
    assert repr(line) in str(refused.value)


def test_a_space_stands_once() -> None:
    with pytest.raises(SymmetryError, match="'a' stands twice"):
        parse("a S(2) v[0]\na S(2) w[0]")


@pytest.mark.parametrize(
    "space",
    [
        Space("#1", Permutation(2), (Axis("w", 0),)),
        Space("two words", Permutation(2), (Axis("w", 0),)),
        Space("a", Permutation(2), (Axis("w 1", 0),)),
        Space("a", Permutation(2), ()),
        Space("a", Orthogonal(2, 0), (Axis("w", 0),)),
        Space("a", Wreath((Orthogonal(2, 3),), 2), (Axis("w", 0),)),
    ],
)
def test_what_cannot_be_written_down_is_refused(space: Space) -> None:
    with pytest.raises(SymmetryError):
        Symmetry((space,))


def test_a_symmetry_that_fits_passes() -> None:
    parse("hidden S(4) 0.weight[0] 0.bias[0] 2.weight[1]").check(STATE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("h S(4) 1.weight[0]", "no such tensor"),
        ("h S(4) 0.weight[2]", "no axis 2"),
        ("h S(4) 0.weight[1]", "not a multiple"),
        ("h S(4) 2.weight[1,4:9]", "not a multiple"),
        ("h S(4) 2.weight[1,4:6]", "not a multiple"),
        ("h S(4) 2.weight[1,4:4]", "not a multiple"),
        ("h S(4) 0.weight[0]@1", "no scored axis on role 0"),
        ("h S(4) 0.weight[0] 0.bias[0]@1", "roles 0 to 0"),
        ("h S(4) (0.weight[0])", "no scored axis on role 0"),
        ("h O(2)*O(2) wr S(2) 0.weight[0]", "no scored axis on role 1"),
        ("h S(1) count[0]", "floating"),
        ("h S(4) 0.weight[0] 0.weight[0]", "already moves"),
        ("g S(4) 2.weight[1,0:4]\nh S(4) 2.weight[1]", "already moves"),
    ],
)
def test_what_does_not_fit_the_model_is_named(line: str, message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        parse(line).check(STATE)


def test_parts_of_one_axis_may_belong_to_two_spaces() -> None:
    parse("g S(4) 2.weight[1,0:4]\nh S(4) 2.weight[1,4:8]").check(STATE)


def test_a_tensor_with_the_space_on_two_axes_makes_it_quadratic() -> None:
    once, twice = parse("a S(4) w[0] v[1]\nb S(4) u[0] u[1]").spaces
    assert (once.quadratic, twice.quadratic) == (False, True)
