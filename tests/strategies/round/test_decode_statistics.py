"""Every form on the wire: what honest clients write is read, all else is refused by name."""

from dataclasses import replace

import pytest
import torch

from fedbasin.client.collect import gram_statistics
from fedbasin.proto import packing
from fedbasin.proto.encoding import Encoding, GramForm, GramKind, MomentKind
from fedbasin.proto.header import STATISTICS
from fedbasin.proto.reply import LayerStatistic, Reply
from fedbasin.proto.request import Request
from fedbasin.strategies.fusion.compression.formats import decode, encode, encode_cross_moment
from fedbasin.strategies.fusion.compression.sketch import Sketch
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Sketched
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.round.decode_statistics import decode_statistics

BLOCK = ("fc.weight", "fc.bias")
INPUTS, OUTPUTS = 6, 3
FORMS = [
    GramForm(),
    GramForm(GramKind.half),
    GramForm(GramKind.byte),
    GramForm(GramKind.sketch, 2),
    GramForm(GramKind.blocks, 2),
    GramForm(GramKind.diagonal),
]


def rows():
    x = torch.randn(20, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, -1] = 1
    return x


def pieces_of(form):
    if form.kind is GramKind.sketch:
        sketch = Sketch.zero(form.size, INPUTS, bias=True)
        sketch.add(rows())
        return sketch.finish(above=True)
    return encode(rows().T @ rows(), form, bias=True)


def encoding(form, moment=MomentKind.float32):
    return Encoding(form, moment, INPUTS)


def transmitted(statistics, request=None):
    """The statistics as the server reads them from a client's message."""
    request = request or Request("fuse")
    content = Reply(1, "fuse", statistics=tuple(statistics)).to_content(request)
    return Reply.from_message(content, request).statistics


def received(pieces, encoding, moment=None):
    moments = None if moment is None else {BLOCK: moment}
    statistics = transmitted(gram_statistics({BLOCK: pieces}, moments))
    return decode_statistics(statistics, "gram", {BLOCK: encoding})


@pytest.mark.parametrize("form", FORMS)
def test_an_encoding_survives_its_message(form):
    encodings = {BLOCK: Encoding(form, MomentKind.float16, INPUTS, 3)}
    content = Request("fuse", encodings=encodings).to_content()
    assert Request.from_message(content).encodings == encodings


@pytest.mark.parametrize("kind", MomentKind)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(form, kind):
    moment = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    decoded = received(pieces_of(form), encoding(form, kind), encode_cross_moment(moment, kind))
    expected = decode(pieces_of(form), form, bias=True)
    torch.testing.assert_close(decoded.precisions[BLOCK].matrix, expected)
    torch.testing.assert_close(decoded.moments[BLOCK], moment, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_groups_travel_side_by_side(form):
    pieces = {name: torch.stack([piece, piece]) for name, piece in pieces_of(form).items()}
    grouped = Encoding(form, inputs=INPUTS, groups=2)
    assert received(pieces, grouped).precisions[BLOCK].matrix.shape == (2, INPUTS, INPUTS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("spoil", "outcome"),
    [
        (lambda t: t[..., :-1], "wrong_shape"),
        (lambda t: t[None], "wrong_shape"),
        (lambda t: t.flatten()[0], "wrong_shape"),
        (lambda t: t.double(), "wrong_dtype"),
        (lambda t: t.to(torch.uint8), "wrong_dtype"),
    ],
)
def test_every_part_has_its_shape_and_type(form, spoil, outcome):
    for name in pieces_of(form):
        pieces = pieces_of(form)
        with pytest.raises(Refusal, match=f"{outcome}: the statistic of fc.weight.*{name}"):
            received({**pieces, name: spoil(pieces[name])}, encoding(form))


@pytest.mark.parametrize("form", FORMS)
def test_every_part_is_finite(form):
    for name, piece in pieces_of(form).items():
        if piece.is_floating_point():
            spoiled = {**pieces_of(form), name: piece * torch.nan}
            with pytest.raises(Refusal, match=f"non_finite.*{name}"):
                received(spoiled, encoding(form))


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_form_that_was_not_asked_for_is_refused(form):
    with pytest.raises(Refusal, match=r"wrong_shape.*parts"):
        received(pieces_of(form), encoding(GramForm()))
    with pytest.raises(Refusal, match=r"wrong_shape.*parts"):
        received(pieces_of(GramForm()), encoding(form))


def test_correlations_of_nothing_are_not_positive():
    pieces = pieces_of(GramForm(GramKind.half))
    pieces["values"] = torch.full_like(pieces["values"], -(2**15) + 1)
    with pytest.raises(Refusal, match="not_positive"):
        received(pieces, encoding(GramForm(GramKind.half)))


def test_a_few_bytes_cannot_ask_for_a_large_matrix():
    pieces = {"values": torch.ones(99_999), "mean": torch.ones(100_000)}
    with pytest.raises(Refusal, match=r"wrong_shape.*\(99999,\), not \(5,\)"):
        received(pieces, encoding(GramForm(GramKind.diagonal)))


@pytest.mark.parametrize(
    ("moment", "outcome"),
    [
        ({"values": torch.ones(3)}, "wrong_shape"),
        ({"values": torch.ones(3, INPUTS)}, "wrong_shape"),
        ({"values": torch.ones(3, INPUTS), "scale": torch.ones(3)}, "wrong_dtype"),
        ({"values": torch.ones(3, INPUTS).half(), "scale": torch.ones(2)}, "wrong_shape"),
        ({"values": torch.full((3, INPUTS), torch.inf).half(), "scale": torch.ones(3)}, "non_finite"),
    ],
)
def test_a_moment_has_its_parts(moment, outcome):
    with pytest.raises(Refusal, match=outcome):
        received(pieces_of(GramForm()), encoding(GramForm(), MomentKind.float16), moment)


OTHER = ("other.weight", "other.bias")
ALIKE = Encoding(GramForm(), MomentKind.float32, INPUTS)


def nbytes_of(statistics):
    content = Reply(1, "fuse", statistics=statistics).to_content(Request("fuse"))
    return packing.nbytes(content[STATISTICS])


@pytest.mark.parametrize("form", FORMS)
def test_pieces_in_common_are_sent_once_and_read_as_one_matrix(form):
    pieces = pieces_of(form)
    moments = {block: {"values": torch.randn(OUTPUTS, INPUTS)} for block in (BLOCK, OTHER)}
    both = gram_statistics({BLOCK: pieces, OTHER: pieces}, moments)
    first = gram_statistics({BLOCK: pieces}, {BLOCK: moments[BLOCK]})
    assert nbytes_of(both) - nbytes_of(first) == 4 * OUTPUTS * INPUTS  # the other's moment
    encodings = dict.fromkeys((BLOCK, OTHER), encoding(form))
    decoded = decode_statistics(transmitted(both), "gram", encodings)
    assert decoded.precisions[BLOCK] is decoded.precisions[OTHER]
    for block, moment in moments.items():
        torch.testing.assert_close(decoded.moments[block], moment["values"].double())


def test_equal_pieces_that_are_not_the_same_are_two():
    statistics = gram_statistics({BLOCK: pieces_of(GramForm()), OTHER: pieces_of(GramForm())})
    decoded = decode_statistics(transmitted(statistics), "gram", {})
    assert decoded.precisions[BLOCK] is not decoded.precisions[OTHER]


def referring(**changes):
    """Statistics of which the second refers to the first, with other fields of the second."""
    pieces = pieces_of(GramForm())
    first, second = gram_statistics({BLOCK: pieces, OTHER: pieces})
    assert (second.same, second.pieces) == (0, ())
    return transmitted([first, replace(second, **changes)])


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"same": 1}, "unexpected_statistic: other.*number 1 of 1"),
        ({"same": 2**32 - 1}, "unexpected_statistic"),
        ({"pieces": (torch.ones(21),)}, "unexpected_statistic"),
        ({"kind": "fisher"}, "unexpected_statistic: 'fisher' of other.*'gram' was requested"),
    ],
)
def test_a_reference_to_no_earlier_matrix_is_refused(changes, outcome):
    with pytest.raises(Refusal, match=outcome):
        decode_statistics(referring(**changes), "gram", {})


@pytest.mark.parametrize("kind", ["fisher", "kronecker"])
def test_only_gram_matrices_are_shared(kind):
    values = {"fisher": (torch.ones(3, 5),), "kronecker": (torch.ones(15), torch.ones(6))}[kind]
    statistics = [LayerStatistic(BLOCK, kind, values), LayerStatistic(OTHER, kind, same=0)]
    with pytest.raises(Refusal, match=r"unexpected_statistic: other.*number 0 of 1"):
        decode_statistics(transmitted(statistics), kind, {})


def test_a_reference_to_a_matrix_in_another_form_is_refused():
    encodings = {BLOCK: ALIKE, OTHER: encoding(GramForm(GramKind.half))}
    with pytest.raises(Refusal, match=r"wrong_shape: other.*as triangle.*not as half"):
        decode_statistics(referring(), "gram", encodings)


def outcome_of(kind, *statistics):
    with pytest.raises(Refusal) as refused:
        decode_statistics(transmitted(statistics), kind, {})
    return refused.value.outcome


def test_a_fisher_diagonal_is_one_tensor():
    values = torch.rand(3, 5)
    decoded = decode_statistics([LayerStatistic(("w",), "fisher", (values,))], "fisher", {})
    assert isinstance(decoded.precisions["w",], Diagonal)
    assert torch.equal(decoded.precisions["w",].values, values.double())
    two = LayerStatistic(("w",), "fisher", (values, values))
    assert outcome_of("fisher", two) is Outcome.wrong_shape


def test_kronecker_factors_are_two_triangles():
    inputs, outputs = torch.eye(3), torch.eye(2)
    triangles = tuple(encode(m, GramForm(), bias=False)["values"] for m in (inputs, outputs))
    (statistic,) = transmitted([LayerStatistic(("w",), "kronecker", triangles)])
    factors = decode_statistics([statistic], "kronecker", {}).precisions["w",]
    assert isinstance(factors, Kronecker)
    torch.testing.assert_close(factors.inputs, inputs[None].double())
    torch.testing.assert_close(factors.outputs, outputs[None].double())
    for pieces in (triangles[:1], (*triangles, triangles[0]), (triangles[0], torch.eye(2))):
        statistic = LayerStatistic(("w",), "kronecker", pieces)
        assert outcome_of("kronecker", statistic) is Outcome.wrong_shape


def test_a_sketch_stays_a_sketch_where_nothing_but_the_inputs_was_measured():
    pieces = (torch.ones(2, INPUTS), torch.zeros(INPUTS))
    sketch = Encoding(GramForm(GramKind.sketch, 2), inputs=INPUTS)
    statistic = LayerStatistic(("w",), "gram", pieces)
    decoded = decode_statistics(transmitted([statistic]), "gram", {("w",): sketch})
    assert isinstance(decoded.precisions["w",], Sketched)
    triangle = LayerStatistic(("w",), "gram", (torch.ones(21),))
    decoded = decode_statistics(transmitted([triangle]), "gram", {})
    assert isinstance(decoded.precisions["w",], Gram)


@pytest.mark.parametrize(
    ("statistics", "outcome"),
    [
        ([LayerStatistic(("w",), "gram", (torch.ones(6),))] * 2, Outcome.unexpected_statistic),
        ([LayerStatistic((), "gram", (torch.ones(6),))], Outcome.unexpected_statistic),
        ([LayerStatistic(("w",), "fisher", (torch.ones(6),))], Outcome.unexpected_statistic),
        ([LayerStatistic(("w",), "gram")], Outcome.missing_statistic),
    ],
    ids=["twice", "of no tensor", "of another kind", "without tensors"],
)
def test_statistics_are_of_the_requested_kind_and_of_every_layer_once(statistics, outcome):
    assert outcome_of("gram", *statistics) is outcome


def test_a_kind_that_this_version_does_not_know_is_refused_also_where_it_was_requested():
    statistic = LayerStatistic(("w",), "hessian", (torch.ones(6),))
    assert outcome_of("hessian", statistic) is Outcome.unexpected_statistic
