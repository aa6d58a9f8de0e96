"""Laws of the sum of products, and its memory."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.lora.lora_factors import AdapterError
from fedbasin.strategies.fusion.lora.product_accumulator import ProductAccumulator
from fedbasin.strategies.fusion.precisions import Gram, Sketched
from fedbasin.strategies.fusion.update import Update

A, B = "x.lora_A.weight", "x.lora_B.weight"
OUT, IN = 30, 40
KINDS = st.sampled_from([False, Gram, Sketched])


def model(seed, rank=2, outputs=OUT, inputs=IN):
    draw = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, inputs, generator=draw, dtype=torch.float64),
        B: torch.randn(outputs, rank, generator=draw, dtype=torch.float64),
        "head.bias": torch.randn(3, generator=draw, dtype=torch.float64),
    }


def update(seed, gram=False, **how):
    """One client's; `gram` may be the kind of its statistic."""
    draw = torch.Generator().manual_seed(100 + seed)
    state = model(seed, **how)
    x = torch.randn(25 + seed, len(state[A][0]), generator=draw, dtype=torch.float64)
    known = Sketched(x[:4], x[4:].square().sum(0)) if gram is Sketched else Gram(x.T @ x)
    return Update(state, 1.0 + seed, {(A,): known} if gram else {})


def product(state):
    return state[B] @ state[A]


def fused(updates, anchor=None, ridge=None):
    anchor = anchor or model(99)
    accumulator = ProductAccumulator.zero(anchor)
    for each in updates:
        accumulator.add(each)
    return accumulator.finalize(anchor, ridge)


def best(matrix, rank):
    u, s, v = torch.linalg.svd(matrix)
    return u[:, :rank] * s[:rank] @ v[:rank]


def test_the_product_is_the_best_of_its_rank_to_the_weighted_mean_and_the_rest_is_averaged():
    updates = [update(n) for n in range(5)]
    weights = sum(u.examples for u in updates)
    mean = sum(u.examples * product(u.parameters) for u in updates) / weights
    found = fused(updates)
    torch.testing.assert_close(product(found), best(mean, 2))
    biases = sum(u.examples * u.parameters["head.bias"] for u in updates) / weights
    torch.testing.assert_close(found["head.bias"], biases)


def test_it_is_exact_where_the_rank_suffices():
    shared = model(0)[A]
    updates = [Update({**model(n), A: shared}, 1.0 + n) for n in range(40)]
    mean = sum(u.examples * product(u.parameters) for u in updates) / sum(u.examples for u in updates)
    torch.testing.assert_close(product(fused(updates)), mean)


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(6)), KINDS)
def test_the_order_of_arrival_does_not_matter(order, gram):
    ridge = Ridge(1e-2) if gram else None
    one = fused([update(n, gram) for n in range(6)], ridge=ridge)
    other = fused([update(n, gram) for n in order], ridge=ridge)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=1e-6)


def test_the_order_of_many_clients_matters_no_more_than_the_bound_says():
    anchor, means = model(99), []
    for order in (range(30), reversed(range(30))):
        accumulator = ProductAccumulator.zero(anchor)
        for n in order:
            accumulator.add(update(n))
        (total,) = accumulator.products.values()
        means.append((total.left @ total.right / accumulator.rest.examples, accumulator.dropped))
    (one, bound), (other, more) = means
    assert 0 < torch.dist(one, other) <= bound + more


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 20), KINDS)
def test_equal_clients_give_that_client(clients, gram):
    ridge = Ridge(1e-2) if gram else None
    found = fused(clients * [update(3, gram)], ridge=ridge)
    torch.testing.assert_close(product(found), product(model(3)))
    torch.testing.assert_close(found["head.bias"], model(3)["head.bias"])
    again = fused([Update(found, 2.0)], anchor=found)
    for name, tensor in found.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), KINDS)
def test_the_gauge_of_a_client_does_not_matter(seed, gram):
    ridge = Ridge(1e-2) if gram else None
    torch.manual_seed(seed)
    gauge = torch.eye(2, dtype=torch.float64) + torch.randn(2, 2, dtype=torch.float64) / 4

    def regauged(one):
        state = one.parameters
        turned = {A: torch.linalg.solve(gauge, state[A]), B: state[B] @ gauge}
        return Update({**state, **turned}, one.examples, one.precisions)

    updates = [update(n, gram) for n in range(4)]
    plain = fused(updates, ridge=ridge)
    moved = fused([regauged(u) for u in updates], ridge=ridge)
    for name, tensor in plain.items():
        torch.testing.assert_close(moved[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gram", [False, Gram, Sketched])
def test_sums_may_be_merged_in_a_tree(gram):
    anchor, ridge = model(99), Ridge(1e-2) if gram else None
    left, right = ProductAccumulator.zero(anchor), ProductAccumulator.zero(anchor)
    for n in range(7):
        (left if n % 2 else right).add(update(n, gram))
    left.merge(right)
    left.merge(ProductAccumulator.zero(anchor))
    assert left.clients == 7
    expected = fused([update(n, gram) for n in range(7)], anchor, ridge)
    for name, tensor in left.finalize(anchor, ridge).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_no_clients_give_the_anchor():
    assert fused([], anchor := model(5)) == anchor


def test_factors_lie_as_the_anchors_do():
    anchor = fused([update(0)])
    near = {n: t + 1e-3 * torch.randn_like(t) for n, t in anchor.items()}
    found = fused([Update(near, 1.0)], anchor)
    assert torch.dist(found[A], anchor[A]) < 0.05 * anchor[A].norm()


def test_weighted_products_are_least_squares_over_everything_that_the_layers_computed():
    updates = [update(n, gram=True, rank=4, inputs=6, outputs=4) for n in range(5)]
    grams = [u.precisions[A,].matrix for u in updates]
    moment = sum(product(u.parameters) @ g for u, g in zip(updates, grams, strict=True))
    weights = sum(u.examples for u in updates)
    mean = sum(u.examples * product(u.parameters) for u in updates) / weights
    total = sum(grams)
    rho = 1e-2 * total.diagonal().mean()
    ridge = rho * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(total + ridge, (moment + rho * mean).mT).mT
    anchor = model(99, rank=4, inputs=6, outputs=4)
    torch.testing.assert_close(product(fused(updates, anchor, Ridge(1e-2))), expected)


def test_clients_that_saw_nothing_leave_the_mean_of_products():
    updates = [
        Update(u.parameters, u.examples, {(A,): Gram(torch.zeros(IN, IN, dtype=torch.float64))})
        for u in map(update, range(3))
    ]
    plain = fused([Update(u.parameters, u.examples) for u in updates])
    torch.testing.assert_close(product(fused(updates, ridge=Ridge(1e-2))), product(plain))


def test_a_state_without_adapters_has_no_products():
    with pytest.raises(AdapterError, match="choose the recipe fedavg"):
        ProductAccumulator.zero({"w": torch.ones(2, 2)})


PEAK = """
import json, resource, sys, torch
from fedbasin.strategies.fusion.lora.product_accumulator import ProductAccumulator
from fedbasin.strategies.fusion.update import Update
A, B = "x.lora_A.weight", "x.lora_B.weight"
def peak(size, clients):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    anchor = {A: torch.randn(4, size), B: torch.randn(size, 4)}
    accumulator = ProductAccumulator.zero(anchor)
    for _ in range(clients):
        accumulator.add(Update({A: torch.randn(4, size), B: torch.randn(size, 4)}, 1.0))
    accumulator.finalize(anchor)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
torch.set_num_threads(1)
peak(64, 40)  # what torch loads with its first decompositions
print(json.dumps([peak(8192, 12), peak(8192, 60)]))
"""


def test_the_dense_product_is_never_made_and_clients_do_not_add_up():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    few, more = json.loads(done.stdout)
    assert few < 8192 * 8192 * 4 / 6  # a dense matrix in float32 takes 268 MB
    assert more < 4 * 8192 * 8 * 40  # 60 clients' factors in double take 31 MB


def test_adapters_of_layers_that_read_the_same_have_one_sum_and_one_factorisation(monkeypatch):
    names = {"y.lora_A.weight": A, "y.lora_B.weight": B}

    def pair(seed, *, together):
        one, other = update(seed, gram=True), update(seed + 50)
        state = one.parameters | {name: other.parameters[of] for name, of in names.items()}
        gram = one.precisions[A,]
        second = gram if together else gram.scaled(1.0)
        return Update(state, one.examples, {(A,): gram, ("y.lora_A.weight",): second})

    anchor = pair(9, together=True).parameters
    accumulator = ProductAccumulator.zero(anchor)
    for seed in range(3):
        accumulator.add(pair(seed, together=True))
    assert len({id(gram) for gram, _ in accumulator.blocks.values()}) == 1
    alone = ProductAccumulator.zero(anchor)
    for seed in range(3):
        alone.add(pair(seed, together=False))
    expected = alone.finalize(anchor, Ridge())
    made, factorise = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: made.append(m) or factorise(m))
    torch.testing.assert_close(accumulator.finalize(anchor, Ridge()), expected)
    assert len(made) == 1
