"""Sums of low-rank matrices against the dense ones that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.fusion.lora.lowrank import LowRank


def draw(seed, outputs=9, inputs=14, rank=2):
    torch.manual_seed(seed)
    left = torch.randn(outputs, rank, dtype=torch.float64)
    return LowRank(left, torch.randn(rank, inputs, dtype=torch.float64))


def dense(matrix):
    return matrix.left @ matrix.right


def summed(parts, width):
    total = LowRank.zero(*dense(parts[0]).shape)
    for part in parts:
        total = total.plus(part, width)
    return total


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 99), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4)
)
def test_the_error_of_a_sum_is_within_its_bound(seed, outputs, inputs, rank, clients, width):
    parts = [draw(seed + k, outputs, inputs, rank) for k in range(clients)]
    total = summed(parts, width)
    error = torch.dist(dense(total), sum(map(dense, parts)))
    assert error <= total.dropped + 1e-12
    assert total.width <= 2 * max(width, rank)


def test_the_bound_is_no_more_than_three_times_what_an_unfriendly_sum_loses():
    parts = [draw(k, rank=3) for k in range(12)]
    total = summed(parts, 4)
    error = torch.dist(dense(total), sum(map(dense, parts)))
    assert 0 < total.dropped < 3 * error


@pytest.mark.parametrize(("outputs", "width"), [(9, 9), (3, 3), (9, 14)])
def test_a_width_of_the_smaller_side_loses_nothing(outputs, width):
    parts = [draw(k, outputs) for k in range(20)]
    total = summed(parts, width)
    assert total.dropped < 1e-12
    torch.testing.assert_close(dense(total), sum(map(dense, parts)))


def test_the_order_does_not_matter_where_nothing_is_lost_and_little_elsewhere():
    parts = [draw(k) for k in range(9)]
    for width, slack in ((9, 1e-12), (4, None)):
        one, other = summed(parts, width), summed(parts[::-1], width)
        bound = one.dropped + other.dropped if slack is None else slack
        assert torch.dist(dense(one), dense(other)) <= bound


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 7))
def test_balanced_factors_are_the_closest_product_of_their_rank(seed, rank, kept):
    matrix = draw(seed, rank=rank)
    u, s, v = torch.linalg.svd(dense(matrix))
    found = matrix.balance(kept)
    assert (found.left.shape, found.right.shape) == ((9, kept), (kept, 14))
    best = u[:, :kept] * s[:kept] @ v[: min(kept, 9)] if kept <= 9 else dense(matrix)
    torch.testing.assert_close(dense(found), best)
    torch.testing.assert_close(found.left.mT @ found.left, found.right @ found.right.mT)


def test_facing_keeps_the_matrix_and_finds_planted_factors_again():
    planted = draw(0, rank=3).balance(3)
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turned = LowRank(planted.left @ turn.mT, turn @ planted.right)
    found = turned.align_to(planted)
    torch.testing.assert_close(found.left, planted.left, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.right, planted.right, atol=1e-6, rtol=0)
    other = turned.align_to(draw(2, rank=3))
    torch.testing.assert_close(dense(other), dense(planted))


def test_directions_without_use_keep_the_anchors_rows_and_can_learn():
    anchor = draw(0, rank=4)
    found = draw(1, rank=2).balance(4).align_to(anchor)
    torch.testing.assert_close(dense(found), dense(draw(1, rank=2)))
    assert torch.linalg.matrix_rank(found.left) == 2
    assert torch.linalg.matrix_rank(found.right) == 4
    unlearned = LowRank(torch.zeros_like(anchor.left), anchor.right)
    again = unlearned.balance(4).align_to(unlearned)
    torch.testing.assert_close(again.right, anchor.right)
    assert not again.left.any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_the_closest_matrix_on_some_inputs_is_that_of_their_outputs(seed, outputs, inputs, width, rank):
    matrix, scale = draw(seed, outputs, inputs, width), torch.rand(inputs, dtype=torch.float64) + 0.1
    root = torch.randn(inputs, inputs, dtype=torch.float64) * scale + 1e-3 * torch.eye(inputs, dtype=torch.float64)
    closest = matrix.closest_on(rank, lambda rows: rows @ root @ root.T)
    u, values, v = torch.linalg.svd(dense(matrix) @ root, full_matrices=False)
    expected = u[:, :rank] * values[:rank] @ v[:rank]
    assert closest.width <= rank
    torch.testing.assert_close(dense(closest) @ root, expected, atol=1e-7, rtol=1e-7)


def test_nothing_is_lost_on_any_inputs_where_the_rank_suffices():
    matrix = draw(0, rank=2)
    weights = torch.tensor([1e-6, *13 * [1.0]], dtype=torch.float64)
    torch.testing.assert_close(dense(matrix.closest_on(3, lambda rows: rows * weights)), dense(matrix))
