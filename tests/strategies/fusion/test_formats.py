"""Forms of a Gram matrix: what is exact, what stays positive, what they cost."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fedbasin.proto.encoding import GramForm, GramKind, MomentKind
from fedbasin.strategies.fusion.compression.formats import (
    IndefiniteError,
    cross_moment_layout,
    decode,
    decode_cross_moment,
    encode,
    encode_cross_moment,
    layout,
    raise_diagonal,
)

W = torch.float64
FORMS = [
    GramForm(),
    GramForm(GramKind.half),
    GramForm(GramKind.byte),
    GramForm(GramKind.blocks, 3),
    GramForm(GramKind.blocks, 100),
    GramForm(GramKind.diagonal),
]


@st.composite
def grams(draw, bias=None, groups=None):
    """Of few or many rows, far from zero or not, of inputs of very different size, some of them dead."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    own, rows = draw(st.integers(1, 9)), draw(st.integers(0, 30))
    shape = () if groups is None else (groups,)
    x = torch.randn(*shape, rows, own, generator=random, dtype=W) + draw(st.sampled_from([0.0, 30]))
    x *= 10.0 ** torch.randint(-3, 3, (own,), generator=random)
    x[..., torch.rand(own, generator=random) < 0.2] = 0
    bias = draw(st.booleans()) if bias is None else bias
    if bias:
        x = torch.cat([x, torch.ones(*shape, rows, 1, dtype=W)], -1)
    return x.mT @ x, bias


def scale(gram):
    """Each entry relative to what it could be at most."""
    root = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    return root.unsqueeze(-1) * root.unsqueeze(-2) + 1e-30


def smallest(gram):
    """The smallest eigenvalue, of correlations."""
    return float(torch.linalg.eigvalsh(gram / scale(gram).clamp(min=1e-12)).min())


@given(grams())
@settings(max_examples=40, deadline=None)
def test_a_triangle_is_exact_but_for_the_rounding_of_its_entries(given_gram):
    gram, bias = given_gram
    found = decode(encode(gram, GramForm(), bias), GramForm(), bias)
    assert torch.equal(found, gram.float().double())


@given(grams(), st.sampled_from(FORMS))
@settings(max_examples=40, deadline=None)
def test_what_is_sent_is_what_the_layout_says(given_gram, form):
    gram, bias = given_gram
    pieces = encode(gram, form, bias)
    expected = layout(form, len(gram), bias)
    assert list(pieces) == list(expected)
    for name, piece in pieces.items():
        assert (piece.dtype, tuple(piece.shape)) == (expected[name].dtype, expected[name].shape)


@given(grams(), st.sampled_from(FORMS))
@settings(max_examples=40, deadline=None)
def test_every_form_is_positive_semi_definite(given_gram, form):
    gram, bias = given_gram
    found = decode(encode(gram, form, bias), form, bias)
    assert found.shape == gram.shape
    assert torch.equal(found, found.mT)
    assert smallest(found) > -1e-5


@given(grams(bias=True), st.sampled_from(FORMS))
@settings(max_examples=40, deadline=None)
def test_the_ones_and_the_diagonal_are_exact(given_gram, form):
    gram, bias = given_gram
    found = decode(encode(gram, form, bias), form, bias)
    tolerance = 1e-5 * scale(gram)
    assert ((found - gram)[:, -1].abs() <= tolerance[:, -1]).all()
    assert ((found - gram).diagonal().abs() <= tolerance.diagonal()).all()


@given(grams(), st.sampled_from([(GramKind.half, 15), (GramKind.byte, 7)]))
@settings(max_examples=40, deadline=None)
def test_rounded_correlations_are_as_near_as_their_units_are_small(given_gram, how):
    gram, bias = given_gram
    form, unit = GramForm(how[0]), 2.0 ** -how[1]
    found = decode(encode(gram, form, bias), form, bias)
    assert ((found - gram).abs() <= 3 * len(gram) * unit * scale(gram) + 1e-12).all()


@given(grams(), st.sampled_from([GramForm(GramKind.blocks, 3), GramForm(GramKind.diagonal)]))
@settings(max_examples=40, deadline=None)
def test_a_raised_diagonal_makes_up_for_what_is_left_out(given_gram, form):
    gram, bias = given_gram
    raised = raise_diagonal(gram, form, bias)
    found = decode(encode(raised, form, bias), form, bias)
    assert float(torch.linalg.eigvalsh((found - gram) / scale(gram).clamp(min=1e-12)).min()) > -1e-5


@given(grams(groups=3), st.sampled_from(FORMS))
@settings(max_examples=40, deadline=None)
def test_groups_are_sent_side_by_side(given_gram, form):
    gram, bias = given_gram
    found = decode(encode(gram, form, bias), form, bias)
    for one, expected in zip(found, gram, strict=True):
        torch.testing.assert_close(one, decode(encode(expected, form, bias), form, bias))


def test_half_is_a_quarter_of_the_square():
    size = 513
    square = 4 * size**2
    bytes_of = {f: sum(p.nbytes for p in layout(f, size, True).values()) for f in FORMS}
    assert bytes_of[GramForm()] < 0.502 * square
    assert bytes_of[GramForm(GramKind.half)] < 0.255 * square
    assert bytes_of[GramForm(GramKind.diagonal)] == 8 * size - 4


def test_correlations_of_nothing_are_refused():
    size = 8
    pieces = encode(torch.eye(size, dtype=W), GramForm(GramKind.half), bias=False)
    pieces["values"] = torch.full_like(pieces["values"], -(2**15) + 1)
    with pytest.raises(IndefiniteError, match="not positive semi-definite"):
        decode(pieces, GramForm(GramKind.half), bias=False)


def test_a_mean_of_no_rows_is_refused():
    pieces = encode(torch.eye(3, dtype=W), GramForm(GramKind.diagonal), bias=True)
    pieces["mean"] = torch.tensor([1.0, 0.0, 0.0])
    with pytest.raises(IndefiniteError, match="number of rows"):
        decode(pieces, GramForm(GramKind.diagonal), bias=True)


def test_a_sketch_is_not_made_of_a_square():
    with pytest.raises(ValueError, match="computed from rows"):
        encode(torch.eye(3), GramForm(GramKind.sketch, 1), bias=False)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6), st.sampled_from(MomentKind))
@settings(max_examples=40, deadline=None)
def test_moments_come_back(seed, outputs, inputs, kind):
    draw = torch.Generator().manual_seed(seed)
    moment = torch.randn(outputs, inputs, generator=draw, dtype=W)
    moment *= 10.0 ** torch.randint(-12, 12, (outputs, 1), generator=draw)
    moment[torch.rand(outputs, generator=draw) < 0.2] = 0
    pieces = encode_cross_moment(moment, kind)
    expected = cross_moment_layout(kind, outputs, inputs)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in pieces.items()} == {
        n: (p.dtype, p.shape) for n, p in expected.items()
    }
    found = decode_cross_moment(pieces)
    rows, columns = moment.abs().amax(1, keepdim=True), moment.abs().amax(0)
    bound = rows * 2.0 ** {MomentKind.float32: -23, MomentKind.float16: -10}.get(kind, 0)
    if kind is MomentKind.byte:
        level = moment / columns.where(columns > 0, 1.0)
        bound = 2.0**-7 * level.abs().amax(1, keepdim=True) * columns
    assert ((found - moment).abs() <= bound).all()
