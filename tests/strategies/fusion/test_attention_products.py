"""Heads that are fused by their products compute the mean of the products, as far as their rank goes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.alignment.pairwise_merging import MergedModel
from fedbasin.strategies.fusion.attention_products import fuse_products, rotating_roles
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.groups.group_notation import parse_group
from fedbasin.strategies.tensors.state import interpolate
from tests.strategies.symmetry.families import Transformer

HEADS, SIZE = 4, 8
PREFIX = "blocks.0.attention."


def network(seed):
    torch.manual_seed(seed)
    return Transformer(heads=HEADS).double()


SYMMETRY = discover(network(0), torch.randn(2, 8, 8)).symmetry


def product(state, head):
    """The product of one head's queries and keys, biases included."""
    rows = slice(head * SIZE, (head + 1) * SIZE)
    sides = [
        torch.cat([state[f"{PREFIX}{side}.weight"][rows], state[f"{PREFIX}{side}.bias"][rows, None]], 1)
        for side in ("query", "key")
    ]
    return sides[0].T @ sides[1]


def outputs(state):
    model = network(0)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@settings(max_examples=5)
@given(st.integers(0, 99), st.lists(st.floats(0.1, 9), min_size=1, max_size=3))
def test_equal_models_are_kept(seed, weights):
    model = network(seed).state_dict()
    fused = fuse_products(SYMMETRY, model, [model] * len(weights), weights)
    for name, tensor in model.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-6, atol=1e-8)


def test_models_that_differ_by_an_invertible_map_of_each_head_are_one_function():
    model = network(0).state_dict()
    moved = dict(model)
    stretch = torch.diag(torch.linspace(0.5, 2, SIZE, dtype=torch.float64)).repeat(HEADS, 1, 1)
    for side, maps in (("query", stretch), ("key", torch.linalg.inv(stretch).mT)):
        for part in ("weight", "bias"):
            heads = model[f"{PREFIX}{side}.{part}"].unflatten(0, (HEADS, SIZE))
            moved[f"{PREFIX}{side}.{part}"] = torch.einsum("hij,hj...->hi...", maps, heads).flatten(0, 1)
    torch.testing.assert_close(outputs(moved), outputs(model))
    mean = interpolate(model, moved, 0.5)
    assert not torch.allclose(outputs(mean), outputs(model))
    torch.testing.assert_close(outputs(fuse_products(SYMMETRY, mean, [model, moved], [1, 1])), outputs(model))


@pytest.mark.parametrize("head", range(HEADS))
def test_a_head_is_the_best_approximation_of_the_mean_product(head):
    models = [network(seed).state_dict() for seed in (1, 2)]
    fused = fuse_products(SYMMETRY, interpolate(*models, 0.25), models, [3, 1])
    target = 0.75 * product(models[0], head) + 0.25 * product(models[1], head)
    u, s, vh = torch.linalg.svd(target)
    torch.testing.assert_close(product(fused, head), u[:, :SIZE] * s[:SIZE] @ vh[:SIZE])


@settings(max_examples=5)
@given(st.floats(0.1, 9), st.floats(0.1, 9))
def test_a_pair_is_merged_by_its_products_where_a_symmetry_is_given(examples, others):
    first, second = (network(seed).state_dict() for seed in (1, 2))
    moving = MergedModel(second, others, (2,), SYMMETRY)
    merged = MergedModel(first, examples, (1,), SYMMETRY).combine(moving)
    share = others / (examples + others)
    expected = fuse_products(SYMMETRY, interpolate(first, second, share), [first, second], [1 - share, share])
    assert all(torch.equal(merged.model[name], expected[name]) for name in first)
    assert merged.products_of is SYMMETRY


@pytest.mark.parametrize(
    ("notation", "roles"),
    [
        ("O(8)*O(8) wr S(2)", [0, 1]),
        ("R(8,4)*O(8) wr S(2)", [1]),  # positions leave queries and keys some rotations only
        ("O(8)*R(8,4) wr S(2)", [0]),
        ("O(1)*S(1) wr S(4)", []),
        ("(R(4,2)*O(3))xS(2) wr S(3)", []),  # several heads read one value
        ("S(8)", []),
        ("O(8)^2", []),
    ],
)
def test_factors_belong_to_one_product_where_a_head_turns_by_any_rotation(notation, roles):
    assert rotating_roles(parse_group(notation)) == roles
