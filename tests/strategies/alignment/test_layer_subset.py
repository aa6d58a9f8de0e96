import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.alignment.layer_subset import SubsetError, choose_layers, layer_of
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.symmetry import parse
from tests.strategies.alignment.test_weight_matching import equal, family

LAYERS = 4
NAMES = ["residual"] + [f"{kind}.{layer}" for layer in range(LAYERS) for kind in ("heads", "mlp")]
SYMMETRY = parse("\n".join(f"{name} S(3) {name}[0]" for name in NAMES))


def names(chosen):
    return [space.name for space in choose_layers(SYMMETRY, chosen).spaces]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("", NAMES),
        ("mlp.*", ["mlp.0", "mlp.1", "mlp.2", "mlp.3"]),
        ("first:1", ["heads.0", "mlp.0"]),
        ("last:1, residual", ["residual", "heads.3", "mlp.3"]),
        ("first:2, !heads.*", ["mlp.0", "mlp.1"]),
        ("!residual, !mlp.?", ["heads.0", "heads.1", "heads.2", "heads.3"]),
        ("last:99", NAMES[1:]),
    ],
)
def test_layers_are_chosen_by_pattern_and_from_either_end(chosen, expected):
    assert names(chosen) == expected


@pytest.mark.parametrize("chosen", ["mpl.*", "first:0", "heads.9", "*, !*"])
def test_a_choice_that_fits_nothing_is_refused_by_name(chosen):
    with pytest.raises(SubsetError, match="layers"):
        names(chosen)


@given(st.integers(1, LAYERS - 1))
def test_head_and_tail_together_are_every_layer(count):
    both = names(f"first:{count}") + names(f"last:{LAYERS - count}")
    assert sorted(both) == sorted(NAMES[1:])


def test_what_is_left_out_stays_as_it_is():
    symmetry, anchor = family("mlp")
    _, client = family("mlp", 1)
    first = symmetry.spaces[0]
    found = match_weights(choose_layers(symmetry, first.name), anchor, client)
    moved = {axis.tensor for axis in first.axes}
    assert found.transform.elements.keys() == {first.name}
    assert equal({n: t for n, t in client.items() if n not in moved}, found.state)


def test_a_name_without_a_number_belongs_to_no_layer():
    assert [layer_of(space) for space in SYMMETRY.spaces[:3]] == [None, 0, 0]
