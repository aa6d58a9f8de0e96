import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.alignment.pairwise_merging import Link, Links, MergedModel, chain, tree
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.symmetry import parse
from tests.benchmarks.bench_own_starts import follow

SYMMETRY = parse("hidden  S(6)  w[0] v[1]")
untimed = settings(max_examples=40, deadline=None)
ORDERS = pytest.mark.parametrize("order", [chain, tree])
Order = Callable[[Sequence[int]], Links]


def own(node: int) -> MergedModel:
    model = {"w": torch.full((2,), float(node)), "v": torch.tensor([node**2.0])}
    return MergedModel(model, examples=node + 1.0, nodes=(node,))


class Clients:
    """Clients whose models are in one frame already; some never answer."""

    def __init__(self, broken: Sequence[int] = ()) -> None:
        self.broken = set(broken)
        self.asked: list[Link] = []

    def __call__(self, link: Link) -> MergedModel | None:
        self.asked.append(link)
        if link.node in self.broken:
            return None
        return own(link.node) if link.moving is None else link.moving


@ORDERS
@untimed
@given(nodes=st.lists(st.integers(0, 40), max_size=9, unique=True))
def test_aligned_models_end_in_their_mean(order: Order, nodes: list[int]) -> None:
    merged = follow(order(nodes), Clients())
    if merged is None:
        assert not nodes
        return
    total = sum(node + 1.0 for node in nodes)
    mean = sum(own(node).model["w"] * (node + 1.0) for node in nodes) / total
    torch.testing.assert_close(merged.model["w"], mean, rtol=1e-4, atol=1e-4)
    assert merged.examples == total
    assert sorted(merged.nodes) == sorted(nodes)


@ORDERS
@untimed
@given(nodes=st.lists(st.integers(0, 40), max_size=9, unique=True), broken=st.sets(st.integers(0, 40)))
def test_clients_that_fail_are_left_out_and_the_others_are_not(
    order: Order, nodes: list[int], broken: set[int]
) -> None:
    merged = follow(order(nodes), Clients(sorted(broken)))
    expected = [node for node in nodes if node not in broken]
    assert sorted(merged.nodes if merged else ()) == sorted(expected)


def test_a_chain_aligns_each_client_to_all_before_it() -> None:
    clients = Clients(broken=[2])
    follow(chain([0, 1, 2, 3]), clients)
    before = [link.anchor.nodes if link.anchor else () for link in clients.asked]
    assert before == [(), (0,), (0, 1), (0, 1)]
    assert all(link.moving is None for link in clients.asked)


def test_a_tree_of_eight_has_three_levels_with_half_of_the_clients_in_each() -> None:
    clients = Clients()
    follow(tree(range(8)), clients)
    aligned = [link for link in clients.asked if link.anchor]
    sizes = [len(link.moving.nodes) if link.moving else 1 for link in aligned]
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 4]
    assert len(clients.asked) - len(aligned) == 4
    assert all(link.node in link.moving.nodes for link in aligned if link.moving)


def test_a_merge_is_aligned_by_the_next_of_its_clients_where_one_fails() -> None:
    clients = Clients()

    def once(link: Link) -> MergedModel | None:
        return None if link.moving and link.node == 2 else clients(link)

    merged = follow(tree(range(4)), once)
    assert merged is not None
    assert clients.asked[-1].node == 3
    assert len(merged.nodes) == 4


def test_a_merge_that_nobody_can_align_is_left_out() -> None:
    merged = follow(tree(range(4)), lambda link: None if link.moving else own(link.node))
    assert merged is not None
    assert merged.nodes == (0, 1)


@ORDERS
def test_permuted_copies_of_one_model_end_in_it(order: Order) -> None:
    torch.manual_seed(0)
    model = {"w": torch.randn(6, 4), "v": torch.randn(3, 6)}
    orders = [torch.randperm(6) for _ in range(5)]
    copies = [{"w": model["w"][p], "v": model["v"][:, p]} for p in orders]

    def ask(link: Link) -> MergedModel:
        moving = link.moving.model if link.moving else copies[link.node]
        nodes = link.moving.nodes if link.moving else (link.node,)
        if link.anchor:
            moving = match_weights(SYMMETRY, link.anchor.model, moving).state
        return MergedModel(moving, float(len(nodes)), nodes)

    merged = follow(order(range(5)), ask)
    assert merged is not None
    torch.testing.assert_close(dict(merged.model), copies[0], atol=1e-5, rtol=1e-5)
    assert math.isclose(merged.examples, 5)
