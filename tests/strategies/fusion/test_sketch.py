"""Frequent directions: bounds from below and above, the tail bound, merging."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from fedbasin.proto.encoding import GramForm, GramKind
from fedbasin.strategies.fusion.compression.formats import decode, layout
from fedbasin.strategies.fusion.compression.sketch import Sketch

W = torch.float64


@st.composite
def problems(draw):
    """Rows in parts, a size, and whether there is a bias."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    own, size = draw(st.integers(2, 8)), draw(st.integers(1, 5))
    few = draw(st.integers(1, own))
    parts = []
    for rows in draw(st.lists(st.integers(0, 12), min_size=1, max_size=6)):
        x = torch.randn(rows, few, generator=random, dtype=W)
        x = x @ torch.randn(few, own, generator=random, dtype=W) + draw(st.sampled_from([0, 5]))
        x += 0.01 * torch.randn(rows, own, generator=random, dtype=W)
        parts.append(x)
    if bias := draw(st.booleans()):
        parts = [torch.cat([x, torch.ones(len(x), 1, dtype=W)], 1) for x in parts]
    return parts, size, bias


def sketched(parts, size, bias, kept=0):
    sketch = Sketch.zero(size, parts[0].shape[1], bias, kept)
    for part in parts:
        sketch.add(part)
    return sketch


def matrix(sketch, above):
    return decode(sketch.finish(above=above), GramForm(GramKind.sketch, sketch.size), sketch.bias)


def lost(sketch):
    """What is sent as the bound on all that is missing."""
    return float(sketch.finish(above=True)["spread"].max())


def check_bounds(sketch, rows):
    gram = rows.T @ rows
    tolerance = 1e-5 * float(gram.diagonal().sum()) + 1e-12
    upper, same = matrix(sketch, above=True), matrix(sketch, above=False)
    own = len(gram) - sketch.bias
    lower = upper - torch.diag(torch.tensor([lost(sketch)] * own + [0.0] * sketch.bias, dtype=W))
    assert torch.linalg.eigvalsh(upper - gram).min() > -tolerance
    assert torch.linalg.eigvalsh(gram - lower).min() > -tolerance
    assert torch.linalg.eigvalsh(same).min() > -tolerance
    torch.testing.assert_close(same.diagonal(), gram.diagonal(), rtol=1e-5, atol=tolerance)
    if sketch.bias:
        torch.testing.assert_close(same[-1], gram[-1], rtol=1e-5, atol=tolerance)
        rows = rows[:, :-1] - rows[:, :-1].mean(0)
    squares = torch.linalg.svdvals(rows).square() if len(rows) else torch.zeros(1, dtype=W)
    for rank in range(sketch.size):
        tail = float(squares[rank:].sum())
        assert lost(sketch) <= tail / (sketch.size - rank) + tolerance


@given(problems(), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_sketch_bounds_the_gram_matrix_and_its_loss_is_within_the_tail(problem, kept):
    parts, size, bias = problem
    check_bounds(sketched(parts, size, bias, kept), torch.cat(parts))


@given(problems(), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_merged_sketches_keep_the_same_bounds(problem, cut):
    parts, size, bias = problem
    nothing = parts[0][:0]
    first = sketched([nothing, *parts[:cut]], size, bias)
    first.merge(sketched([nothing, *parts[cut:]], size, bias))
    check_bounds(first, torch.cat(parts))


@given(problems())
@settings(max_examples=40, deadline=None)
def test_merging_in_another_order_stays_within_both_losses(problem):
    parts, size, bias = problem
    each = [parts[0], *parts, parts[-1]]

    def merged(*groups):
        one, *others = [sketched(group, size, bias) for group in groups]
        for other in others:
            one.merge(other)
        return one

    left = merged(each[:1], each[1:2], each[2:])
    right = sketched(each[1:2], size, bias)
    right.merge(sketched(each[2:], size, bias))
    alone = sketched(each[:1], size, bias)
    alone.merge(right)
    difference = matrix(left, above=True) - matrix(alone, above=True)
    bound = lost(left) + lost(alone)
    total = float(torch.cat(each).square().sum())
    assert float(torch.linalg.matrix_norm(difference, 2)) <= bound + 1e-5 * total + 1e-12


def test_few_rows_are_kept_as_they_are():
    rows = torch.randn(4, 6, dtype=W)
    sketch = sketched([rows], 4, bias=False)
    assert lost(sketch) == 0
    torch.testing.assert_close(matrix(sketch, above=True), rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_a_narrow_sketch_has_the_largest_directions_in_full_where_more_rows_are_kept():
    rows = torch.randn(300, 20, dtype=W) * torch.linspace(3, 0.1, 20, dtype=W)
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    best = (values[:2, None] * directions[:2]).T @ (values[:2, None] * directions[:2])
    sent = sketched([rows], 2, bias=False, kept=20).finish(above=False)["values"].double()
    torch.testing.assert_close(sent.T @ sent, best, rtol=1e-4, atol=1e-3)
    narrow = sketched([rows], 2, bias=False).finish(above=False)["values"].double()
    assert float(narrow.square().sum()) < 0.9 * float(best.trace())


def test_a_sketch_is_as_its_layout_says_and_never_holds_more_than_twice_the_rows_that_it_keeps():
    assert len(sketched([torch.randn(100, 7, dtype=W)], 3, bias=True, kept=5).rows) <= 10
    sketch = sketched([torch.randn(100, 7, dtype=W)], 3, bias=True)
    assert len(sketch.rows) <= 6
    expected = layout(GramForm(GramKind.sketch, 3), 7, True)
    pieces = sketch.finish(above=False)
    assert list(pieces) == list(expected)
    assert all(tuple(pieces[n].shape) == p.shape for n, p in expected.items())
