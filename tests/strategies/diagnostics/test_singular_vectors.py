import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.diagnostics.singular_vectors import affordable, spectral_alignment
from fedbasin.strategies.symmetry.groups.groups import Orthogonal
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random
from tests.strategies.diagnostics.models import SITES, learnt

quickly = settings(max_examples=25, deadline=None)

ROTATED = "hidden  O(16)  0.weight[0] 0.bias[0] 2.weight[1]"
seeds = st.integers(0, 2**16)
gammas = st.sampled_from([0.0, 0.3, 0.9, 1.0])


def state(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{i}.weight": torch.randn(shape, generator=generator, dtype=torch.float64)
        for i, shape in enumerate(shapes or [(8, 5), (3, 8)])
    }


@quickly
@given(seeds, gammas)
def test_equal_models_agree_completely(seed, gamma):
    found = spectral_alignment(state(seed), state(seed), gamma)
    assert found.total == pytest.approx(1)
    assert found.layers == pytest.approx({"0.weight": 1, "1.weight": 1})


@quickly
@given(seeds, gammas)
def test_agreement_is_symmetric_and_at_most_one(seed, gamma):
    a, b = state(seed), state(seed + 1)
    there, back = spectral_alignment(a, b, gamma), spectral_alignment(b, a, gamma)
    assert there.total == pytest.approx(back.total, abs=1e-9)
    assert all(abs(value) <= 1 + 1e-9 for value in (there.total, *there.layers.values()))


@quickly
@given(seeds, gammas)
def test_signs_and_scales_of_layers_are_not_directions(seed, gamma):
    a, b = state(seed), state(seed + 1)
    scaled = {name: 7.0 * tensor for name, tensor in b.items()}
    assert spectral_alignment(a, scaled, gamma).total == pytest.approx(spectral_alignment(a, b, gamma).total, abs=1e-9)
    flipped = {name: -tensor for name, tensor in b.items()}
    assert spectral_alignment(a, flipped, gamma).total == pytest.approx(
        -spectral_alignment(a, b, gamma).total, abs=1e-9
    )


@quickly
@given(seeds, gammas)
def test_singular_vectors_that_change_sign_together_change_nothing(seed, gamma):
    a, b = state(seed), state(seed + 1)
    rebuilt = {}
    for name, tensor in b.items():
        left, values, right = torch.linalg.svd(tensor, full_matrices=False)
        signs = torch.tensor([(-1.0) ** i for i in range(len(values))], dtype=torch.float64)
        rebuilt[name] = (left * signs) @ torch.diag(values) @ (signs[:, None] * right)
    expected = spectral_alignment(a, b, gamma).total
    assert spectral_alignment(a, rebuilt, gamma).total == pytest.approx(expected, abs=1e-9)


@quickly
@given(seeds, gammas, st.sampled_from([SITES, ROTATED]))
def test_a_transform_of_both_models_changes_nothing(seed, gamma, spaces):
    a, b = learnt(1, 2), learnt(2, 2)
    transform = random(parse(spaces), torch.Generator().manual_seed(seed))
    before, after = (spectral_alignment(a, b, gamma), spectral_alignment(transform.act(a), transform.act(b), gamma))
    assert after.total == pytest.approx(before.total, abs=1e-9)
    assert after.layers == pytest.approx(before.layers, abs=1e-9)


@quickly
@given(seeds)
def test_repeated_singular_values_may_choose_any_basis(seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (Orthogonal(4).inner_random(1, generator)[0] for _ in range(2))
    turn = torch.block_diag(Orthogonal(3).inner_random(1, generator)[0], torch.eye(1))
    values = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    a = {"w": left @ values @ right}
    # The same matrix, computed from another basis of its threefold singular value.
    b = {"w": (left @ turn) @ values @ (turn.mT @ right)}
    assert spectral_alignment(a, b, 0.9).total == pytest.approx(1, abs=1e-9)


def test_one_layer_equals_the_sum_over_pairs_of_vectors():
    a, b = state(1, (4, 3)), state(2, (4, 3))
    (ua, sa, va), (ub, sb, vb) = (torch.linalg.svd(m["0.weight"], full_matrices=False) for m in (a, b))
    rows = [i for i in range(3) if sa[i] >= 0.5 * sa[0]]
    columns = [j for j in range(3) if sb[j] >= 0.5 * sb[0]]
    pairs = sum(float((ua[:, i] @ ub[:, j]) * (va[i] @ vb[j])) for i in rows for j in columns)
    expected = pairs / (len(rows) * len(columns)) ** 0.5
    assert spectral_alignment(a, b, 0.5).total == pytest.approx(expected, abs=1e-12)


def test_the_total_counts_layers_by_their_directions():
    same = torch.eye(6, dtype=torch.float64)
    single = torch.zeros(6, 6, dtype=torch.float64)
    single[0, 0] = 1.0
    other = single.roll(1, 0)
    found = spectral_alignment({"a": same, "b": single}, {"a": same, "b": other})
    assert found.layers == pytest.approx({"a": 1.0, "b": 0.0}, abs=1e-12)
    assert found.total == pytest.approx(6 / 7)


def test_the_null_space_has_no_directions():
    thin = torch.outer(torch.arange(1.0, 6.0), torch.ones(4)).double()
    assert spectral_alignment({"w": thin}, {"w": thin}, gamma=0).total == pytest.approx(1)
    zero = torch.zeros(3, 3)
    found = spectral_alignment({"w": thin, "z": zero}, {"w": thin, "z": zero}, gamma=0)
    assert set(found.layers) == {"w"}


def test_a_truncated_decomposition_finds_the_dominant_directions():
    a, b = state(1, (40, 30)), state(2, (40, 30))
    a["0.weight"][:, :3] *= 20
    b["0.weight"][:, :3] *= 20
    full = spectral_alignment(a, b, gamma=0.5)
    truncated = spectral_alignment(a, b, gamma=0.5, rank=5)
    assert truncated.total == pytest.approx(full.total, abs=1e-9)
    assert truncated == spectral_alignment(a, b, gamma=0.5, rank=5)
    assert spectral_alignment(a, b, 0, rank=1).total == pytest.approx(spectral_alignment(a, b, gamma=1).total, abs=1e-9)


def test_kernels_are_matrices_and_vectors_are_left_out():
    a = {**state(1, (4, 3, 3, 3)), "bias": torch.ones(4), "steps": torch.tensor([[1]])}
    found = spectral_alignment(a, a)
    assert set(found.layers) == {"0.weight"}
    flat = {"0.weight": a["0.weight"].flatten(1)}
    other = state(2, (4, 3, 3, 3))
    assert (
        spectral_alignment(a, other).total == spectral_alignment(flat, {"0.weight": other["0.weight"].flatten(1)}).total
    )


def test_aligning_raises_the_agreement_of_a_planted_permutation_to_one():
    symmetry, anchor = parse(SITES), learnt(1)
    planted = random(symmetry, torch.Generator().manual_seed(3)).act(anchor)
    assert spectral_alignment(anchor, planted).total < 0.9
    aligned = match_weights(symmetry, anchor, planted).state
    assert spectral_alignment(anchor, aligned).total == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.1}, "gamma in"),
        ({"rank": 0}, "positive rank"),
        ({"layers": ["absent"]}, "not a weight of two axes"),
        ({"layers": []}, "no layer has a direction"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        spectral_alignment(state(1), state(2), **options)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="8 and 9 rows"):
        spectral_alignment(state(1, (8, 5)), state(1, (9, 5)))


def test_a_budget_pays_for_the_cheapest_matrices_first():
    state = {
        "wide": torch.ones(2, 100),
        "square": torch.ones(10, 10),
        "kernel": torch.ones(4, 2, 3),
        "bias": torch.ones(10),
        "ids": torch.ones(2, 2, dtype=torch.int64),
    }
    assert affordable(state, 95) == []
    assert affordable(state, 96) == ["kernel"]
    assert affordable(state, 96 + 400) == ["kernel", "wide"]
    assert affordable(state, 10**6) == ["kernel", "wide", "square"]
