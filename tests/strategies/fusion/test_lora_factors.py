"""Which tensors are factors, in both forms of their names, and factors of other ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.lora.lora_factors import (
    Adapter,
    AdapterError,
    adapted_layers,
    as_module,
    blocks_of,
    find_adapters,
    narrow,
    widen,
)

SHAPES = {"lora_A": (2, 5), "lora_B": (3, 2)}


def state(rank=2, seed=0, middle=""):
    torch.manual_seed(seed)
    return {
        f"x.lora_A{middle}.weight": torch.randn(rank, 5),
        f"x.lora_B{middle}.weight": torch.randn(3, rank),
        "head.bias": torch.randn(3),
    }


def product(state):
    (adapter,) = find_adapters(state)
    return state[adapter.up] @ state[adapter.down]


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("m.q.lora_A.default.weight", "m.q.lora_B.default.weight"),
        ("m.q.lora_A.weight", "m.q.lora_B.weight"),
        ("m.e.lora_embedding_A.default", "m.e.lora_embedding_B.default"),
        ("m.e.lora_embedding_A", "m.e.lora_embedding_B"),
    ],
)
def test_pairs_are_found_in_models_and_in_what_is_saved_of_them(down, up):
    found = find_adapters({up: torch.ones(3, 2), "m.bias": torch.ones(3), down: torch.ones(2, 5)})
    assert found == [Adapter(down, up)]
    assert blocks_of(found, "down", {}) == ([] if "embedding" in down else [(down,)])
    assert blocks_of(found, "up", {}) == ([] if "embedding" in down else [(up,)])


def test_biases_and_magnitudes_are_no_factors():
    more = {"x.lora_B.bias": torch.ones(3), "x.lora_magnitude_vector": torch.ones(3)}
    assert len(find_adapters({**state(), **more})) == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"w": torch.ones(2, 2)}, "no tensor named lora_A"),
        ({"q.lora_A": torch.ones(2, 2)}, "it has q.lora_A, which are named otherwise than by peft"),
        ({"q.lora_down.weight": torch.ones(2, 2)}, "it has q.lora_down.weight, which are named otherwise than by peft"),
        ({"x.lora_A.weight": torch.ones(2, 5)}, "has no partner 'x.lora_B.weight'"),
        (
            {"x.lora_A.weight": torch.ones(2, 5, 3, 3), "x.lora_B.weight": torch.ones(3, 2, 1, 1)},
            r"\[2, 5, 3, 3\], a convolution's factor",
        ),
        ({"x.lora_A.weight": torch.ones(2, 5), "x.lora_B.weight": torch.ones(3, 4)}, "ranks must agree"),
    ],
)
def test_what_has_no_matrix_product_is_refused_by_name(wrong, says):
    with pytest.raises(AdapterError, match=says):
        find_adapters(wrong)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 50))
def test_a_narrow_client_keeps_its_product_in_a_wide_model(rank, wide, seed):
    trained, anchor = state(rank, seed), state(max(rank, wide))
    found = widen(trained, anchor)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in anchor.items()}
    torch.testing.assert_close(product(found), product(trained))


def test_what_is_wrong_in_other_ways_stays_for_the_server_to_refuse():
    wrong = state() | {"x.lora_A.weight": torch.ones(3, 7), "more": torch.ones(1)}
    assert widen(wrong, state())["x.lora_A.weight"] is wrong["x.lora_A.weight"]
    assert widen({"more": torch.ones(1)}, state()).keys() == {"more"}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_narrowed_model_has_the_closest_product_of_its_rank(rank):
    wide = state(3)
    found = narrow(wide, rank)
    assert found["x.lora_A.weight"].shape == (min(rank, 3), 5)
    u, s, v = torch.linalg.svd(product(wide), full_matrices=False)
    torch.testing.assert_close(product(found), u[:, :rank] * s[:rank] @ v[:rank])


def test_a_model_that_has_learned_nothing_is_narrowed_to_its_first_directions():
    wide = state(3) | {"x.lora_B.weight": torch.zeros(3, 3)}
    assert torch.equal(narrow(wide, 2)["x.lora_A.weight"], wide["x.lora_A.weight"][:2])


def test_a_holding_module_has_the_state_that_it_holds():
    given = state(middle=".default")
    found = as_module(given).state_dict()
    assert list(found) == list(given)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_the_layers_of_a_budget_are_those_with_rows():
    table = {"e.lora_embedding_A": torch.ones(2, 9), "e.lora_embedding_B": torch.ones(4, 2)}
    assert adapted_layers({**state(), **table}) == [Layer(("x.lora_A.weight",), 5, 2)]
