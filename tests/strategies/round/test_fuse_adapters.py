"""Recipes of adapters as stages: what they ask, and what they refuse without a trace."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedbasin.proto.encoding import Encoding, GramForm, GramKind
from fedbasin.proto.request import Request
from fedbasin.strategies.fusion.lora.lora_factors import AdapterError
from fedbasin.strategies.fusion.precisions import Gram, Sketched
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import fusing_stage
from fedbasin.strategies.symmetry.lora_symmetry import adapters
from tests.accepting import accept

A, B, TABLE = "x.lora_A.weight", "x.lora_B.weight", "e.lora_embedding_A"
ANCHOR = {
    A: torch.arange(10.0).view(2, 5),
    B: torch.zeros(3, 2),
    TABLE: torch.ones(2, 7),
    "e.lora_embedding_B": torch.zeros(4, 2),
    "head.weight": torch.ones(2, 3),
}


def fusing(recipe, align="off", frozen="", anchor=ANCHOR, **fields):
    request = Request("", frozen_factor=frozen, **fields)
    return fusing_stage(anchor, RECIPES[recipe], request, None, align)


def update(recipe="lora", frozen=""):
    torch.manual_seed(0)
    state = {name: tensor + torch.rand_like(tensor) for name, tensor in ANCHOR.items()}
    if frozen:
        state |= {name: ANCHOR[name] for name in ANCHOR if frozen[-2:] in name}
    grams = {b: Gram(torch.eye(ANCHOR[b[0]].shape[1])) for b in fusing(recipe, frozen=frozen).request.blocks}
    return Update(state, 4.0, grams)


@pytest.mark.parametrize(
    ("names", "factors"),
    [
        ({"lorm", "rolora"}, ["lora_A", "lora_B", "lora_A"]),
        ({"ffa-lora"}, ["lora_A"] * 3),
        (RECIPES.keys() - {"lorm", "rolora", "ffa-lora"}, [""] * 3),
    ],
)
def test_factors_are_frozen_in_turn_or_always_or_never(names, factors):
    for name in names:
        assert [RECIPES[name].frozen_factor(number) for number in (1, 2, 3)] == factors


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("recipe", ["ffa-lora", "rolora"])
def test_with_a_frozen_factor_the_mean_of_factors_is_that_of_the_products(recipe, number):
    frozen = RECIPES[recipe].frozen_factor(number)
    anchor = ANCHOR | {B: torch.rand(3, 2, generator=torch.Generator().manual_seed(9))}
    stage, products = fusing(recipe, frozen=frozen, anchor=anchor), 0
    trained = A if frozen == "lora_B" else B
    for client in range(3):
        tensor = torch.rand(ANCHOR[trained].shape, generator=torch.Generator().manual_seed(client))
        state = anchor | {trained: tensor}
        accept(stage, client, Update(state, 1.0 + client))
        products = products + (1 + client) / 6 * (state[B].double() @ state[A].double())
    fused = stage.finish()
    torch.testing.assert_close(fused[B].double() @ fused[A].double(), products, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "frozen", "blocks"),
    [
        ("lora", "", ((A,),)),
        ("lora-products", "", ()),
        ("lora-factors", "", ()),
        ("lora-rotated", "", ()),
        ("lora-gram", "", ((A,),)),
        ("ffa-lora", "lora_A", ()),
        ("rolora", "lora_B", ()),
        ("lorm", "lora_A", ((B,),)),
        ("lorm", "lora_B", ((A,),)),
    ],
)
def test_statistics_are_asked_of_the_factors_that_need_them(recipe, frozen, blocks):
    align = "client" if recipe == "lora-rotated" else "off"
    request = fusing(recipe, align, frozen).request
    assert request.blocks == blocks
    assert request.aligns == (recipe == "lora-rotated")
    assert request.frozen_factor == frozen


@pytest.mark.parametrize("align", ["client", "server"])
def test_rotation_has_the_symmetry_of_the_adapters(align):
    stage = fusing("lora-rotated", align)
    assert stage.request.symmetry == ("" if align == "server" else str(adapters(ANCHOR)))
    turn = torch.linalg.qr(torch.randn(2, 2)).Q
    near = {n: t + 0.01 * torch.ones_like(t) for n, t in ANCHOR.items()}
    turned = near | {A: turn @ near[A], B: near[B] @ turn.mT}
    if align == "server":
        accept(stage, 1, Update(turned, 1.0))
        found = stage.finish()
        torch.testing.assert_close(found[B] @ found[A], near[B] @ near[A], atol=1e-4, rtol=1e-4)
        assert torch.dist(found[A], ANCHOR[A]) < torch.dist(turned[A], ANCHOR[A])


def spoilt(**tensors):
    def change(good):
        state = {**good.parameters, **tensors}
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        return replace(good, parameters=kept)

    return change


BAD = {
    "a factor with NaN": ("lora", "", spoilt(**{A: ANCHOR[A] * torch.nan}), "non_finite", A),
    "a factor that is missing": ("lora", "", spoilt(**{B: None}), "missing_tensor", B),
    "a rank above": ("lora", "", spoilt(**{A: torch.ones(3, 5)}), "wrong_shape", A),
    "another width": ("lora", "", spoilt(**{A: torch.ones(2, 6)}), "wrong_shape", A),
    "one more adapter": ("lora", "", spoilt(**{"y.lora_A.weight": ANCHOR[A]}), "unexpected_tensor", "y"),
    "no statistic": ("lora-gram", "", lambda u: replace(u, precisions={}), "missing_statistic", A),
    "a statistic too much": ("lora-products", "", lambda u: replace(u, precisions={(A,): Gram(torch.eye(5))}), "unexpected_statistic", A),
    "a Gram of another size": ("lora-gram", "", lambda u: replace(u, precisions={(A,): Gram(torch.eye(4))}), "wrong_shape", A),
    "a negative Gram": ("lora-gram", "", lambda u: replace(u, precisions={(A,): Gram(-torch.eye(5))}), "not_positive", A),
    "a sketch of another size": ("lora", "", lambda u: replace(u, precisions={(A,): Sketched(torch.ones(2, 4), torch.ones(5))}), "wrong_shape", A),
    "a sketch of negative spread": ("lora", "", lambda u: replace(u, precisions={(A,): Sketched(torch.ones(2, 5), -torch.ones(5))}), "not_positive", A),
    "a trained frozen A": ("lorm", "lora_A", spoilt(**{A: ANCHOR[A] + 1}), "frozen_changed", A),
    "a trained frozen table": ("lorm", "lora_A", spoilt(**{TABLE: ANCHOR[TABLE] + 1}), "frozen_changed", TABLE),
    "a trained frozen B": ("lorm", "lora_B", spoilt(**{B: ANCHOR[B] + 1}), "frozen_changed", B),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_refused_by_name_and_leaves_the_sum_untouched(case):
    recipe, frozen, spoil, outcome, where = BAD[case]
    good = update(recipe, frozen)
    stage, clean = fusing(recipe, frozen=frozen), fusing(recipe, frozen=frozen)
    accept(stage, 1, good)
    accept(clean, 1, good)
    with pytest.raises(Refusal) as refused:
        accept(stage, 2, spoil(good))
    assert refused.value.outcome is Outcome[outcome]
    assert where in refused.value.detail
    found, expected = stage.finish(), clean.finish()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("number", [1, 2])
def test_lorm_is_least_squares_of_the_trained_factor(number):
    frozen = RECIPES["lorm"].frozen_factor(number)
    trained = A if frozen == "lora_B" else B
    stage, updates = fusing("lorm", frozen=frozen), []
    for client in range(3):
        base = update("lorm", frozen)
        draw = torch.Generator().manual_seed(client)
        state = base.parameters | {trained: torch.rand(ANCHOR[trained].shape, generator=draw)}
        x = torch.randn(9, ANCHOR[trained].shape[1], generator=draw)
        updates.append(Update(state, 1.0 + client, {(trained,): Gram((x.T @ x).double())}))
        accept(stage, client, updates[-1])
    grams = [u.precisions[trained,].matrix for u in updates]
    mean = sum(u.examples * u.parameters[trained].double() for u in updates) / 6
    rho = RECIPES["lorm"].weighting.ridge.strength * sum(grams).diagonal().mean()
    moment = sum(u.parameters[trained].double() @ g for u, g in zip(updates, grams, strict=True))
    ridged = sum(grams) + rho * torch.eye(len(grams[0]), dtype=torch.float64)
    expected = torch.linalg.solve(ridged, (moment + rho * mean).mT).mT.float()
    torch.testing.assert_close(stage.finish()[trained], expected)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(AdapterError, match="no tensor named lora_A"):
        fusing("lora", anchor={"w": torch.ones(2, 2)})


class Largest(TorchDispatchMode):
    """While active, the size of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return output


@pytest.mark.parametrize("recipe", ["lora", "lora-products"])
def test_no_tensor_is_ever_as_large_as_the_dense_product(recipe):
    size, rank = 400, 2
    anchor = {A: torch.randn(rank, size), B: torch.randn(size, rank)}
    stage = fusing(recipe, anchor=anchor)
    with Largest() as seen:
        for node in range(20):
            near = {name: tensor + torch.randn_like(tensor) for name, tensor in anchor.items()}
            known = {block: Sketched(near[A].double(), torch.ones(size)) for block in stage.request.blocks}
            accept(stage, node, Update(near, 1.0, known))
        stage.finish()
    # Of 160000: the stacked factors of nine clients, or the sketches of all.
    assert 0 < seen.elements <= (9 if recipe == "lora-products" else 22) * rank * size


def test_sketches_are_twice_as_wide_as_the_adapters_unless_a_budget_says_otherwise():
    anchor = {A: torch.randn(2, 12), B: torch.randn(4, 2), "y.lora_A.weight": torch.randn(2, 4), "y.lora_B.weight": torch.randn(4, 2)}  # fmt: skip
    stage = fusing("lora", anchor=anchor)
    assert stage.request.encodings == {(A,): Encoding(GramForm(GramKind.sketch, 4), inputs=12)}
    told = {(A,): Encoding(GramForm(GramKind.diagonal), inputs=12)}
    assert fusing("lora", anchor=anchor, encodings=told).request.encodings == told
    assert not fusing("lora-gram", anchor=anchor).request.encodings
