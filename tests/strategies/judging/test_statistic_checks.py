"""Statistics whose parts contradict each other are refused by name, whatever their kind and form; honest ones never."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.proto.encoding import GramForm, GramKind, MomentKind
from fedbasin.strategies.fusion.compression.formats import (
    decode,
    decode_cross_moment,
    encode,
    encode_cross_moment,
    raise_diagonal,
)
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.judging.outcomes import Refusal
from fedbasin.strategies.judging.statistic_checks import check_head, check_precisions

FORMS = [
    GramForm(),
    GramForm(GramKind.half),
    GramForm(GramKind.byte),
    GramForm(GramKind.blocks, 2),
    GramForm(GramKind.diagonal),
]
INPUTS, OUTPUTS = 6, 4
BLOCK = ("head.weight", "head.bias")
ANCHOR = {
    "head.weight": torch.zeros(OUTPUTS, INPUTS),
    "head.bias": torch.zeros(OUTPUTS),
    "conv.weight": torch.zeros(OUTPUTS, INPUTS // 2, 1, 1),
    "conv.bias": torch.zeros(OUTPUTS),
}


def moments(seed=0, rows=50, scale=1.0, shift=0.0, temperature=1.0, classes=OUTPUTS):
    """Return the Gram matrix of some inputs with a one behind them, and the sums of their classes."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=draw)
    one_hot = torch.nn.functional.one_hot(labels, OUTPUTS).double()
    centres = 2 * torch.randn(OUTPUTS, INPUTS, generator=draw, dtype=torch.float64)
    inputs = shift + scale * (torch.randn(rows, INPUTS, generator=draw, dtype=torch.float64) + one_hot @ centres)
    wide = temperature * torch.cat([inputs, torch.ones(rows, 1, dtype=torch.float64)], 1)
    return wide.mT @ wide, one_hot.mT @ wide


def refusal(block, precision, sums=None):
    try:
        check_precisions({block: precision}, ANCHOR)
        if sums is not None:
            check_head(block, precision, sums)
    except Refusal as error:
        return error
    return None


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    kind=st.sampled_from(list(MomentKind)),
    seed=st.integers(0, 2**20),
    rows=st.integers(0, 400),
    scale=st.sampled_from([1e-25, 1e-19, 1e-6, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 1.0, 1e3]),
    temperature=st.sampled_from([1.0, 0.1, -3.0]),
    classes=st.integers(1, OUTPUTS),
    raised=st.booleans(),
)
def test_honest_statistics_of_every_form_are_accepted(
    form, kind, seed, rows, scale, shift, temperature, classes, raised
):
    gram, sums = moments(seed, rows, scale, shift, temperature, classes)
    gram = raise_diagonal(gram, form, bias=True) if raised else gram
    received = Gram(decode(encode(gram, form, bias=True), form, bias=True))
    assert refusal(BLOCK, received, decode_cross_moment(encode_cross_moment(sums, kind))) is None


def rows_below_zero(gram):
    gram[-1, -1] = -gram[-1, -1]


def inputs_without_rows(gram):
    gram[-1], gram[:, -1] = 0.0, 0.0


def sums_beyond_their_squares(gram):
    gram[0, -1] = gram[-1, 0] = 3 * (gram[0, 0] * gram[-1, -1]).sqrt()


def squares_too_small(gram):
    gram[0, 0] = 0.5 * gram[0, -1] ** 2 / gram[-1, -1]


def squares_too_large(gram):
    gram[0, 0] = 1e20 * gram[-1, -1]


def as_gram(matrix):
    return BLOCK, Gram(matrix)


def as_grouped_gram(matrix):
    part = matrix[[0, 1, 2, -1]][:, [0, 1, 2, -1]]
    return ("conv.weight", "conv.bias"), Gram(torch.stack([moments()[0][-4:, -4:], part]))


def as_kronecker(matrix):
    return BLOCK, Kronecker(matrix[None], torch.eye(OUTPUTS, dtype=torch.float64)[None])


@pytest.mark.parametrize("kind", [as_gram, as_grouped_gram, as_kronecker])
@pytest.mark.parametrize(
    ("contradiction", "outcome"),
    [
        (rows_below_zero, "not_positive"),
        (inputs_without_rows, "inconsistent"),
        (sums_beyond_their_squares, "not_positive"),
        (squares_too_small, "not_positive"),
        (squares_too_large, "out_of_line"),
    ],
)
def test_moments_of_inputs_that_contradict_each_other_are_refused_with_their_layer(kind, contradiction, outcome):
    matrix, _ = moments(shift=1.0)
    assert refusal(*kind(matrix.clone())) is None
    contradiction(matrix)
    block, precision = kind(matrix)
    refused = refusal(block, precision)
    assert refused.outcome.name == outcome
    assert block[0] in refused.detail


def no_counts(sums):
    sums[:, -1] = 0


def a_negative_count(sums):
    sums[1, -1] -= 2 * sums[0, -1]
    sums[0, -1] += 2 * sums[0, -1]


def twice_as_many_examples(sums):
    sums[:, -1] *= 2


def one_class_doubled(sums):
    sums[0] *= 2


def inputs_of_classes_turned(sums):
    sums[:, :-1] *= -1


def classes_far_apart(sums):
    sums[0, 0] += 1e3
    sums[1, 0] -= 1e3


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    "contradiction",
    [
        no_counts,
        a_negative_count,
        twice_as_many_examples,
        one_class_doubled,
        inputs_of_classes_turned,
        classes_far_apart,
        torch.Tensor.zero_,
    ],
)
def test_sums_of_classes_that_are_no_parts_of_all_rows_are_refused_with_their_layer(form, contradiction):
    gram, sums = moments(shift=1.0)
    received = Gram(decode(encode(gram, form, bias=True), form, bias=True))
    contradiction(sums)
    refused = refusal(BLOCK, received, sums)
    assert refused.outcome.name == "inconsistent"
    assert BLOCK[0] in refused.detail


def test_classes_without_rows_are_refused():
    sums = torch.zeros(OUTPUTS, INPUTS + 1)
    nothing = Gram(torch.zeros(INPUTS + 1, INPUTS + 1))
    assert refusal(BLOCK, nothing, sums) is None
    sums[0, 0] = 1.0
    assert refusal(BLOCK, nothing, sums).outcome.name == "inconsistent"
