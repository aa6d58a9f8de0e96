"""Every form on the wire: what honest clients write is read, all else is refused by name."""

import pytest
import torch
from flwr.app import RecordDict

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.proto.encoding import Encoding, GramForm, GramKind, MomentKind
from fedbasin.strategies.encodings import (
    encoding_messages,
    read_encodings,
    statistics,
    write_grams,
)
from fedbasin.strategies.fusion.compression.formats import decode, encode, encode_moment
from fedbasin.strategies.fusion.compression.sketch import Sketch
from fedbasin.strategies.round.outcomes import Refusal

BLOCK = ("fc.weight", "fc.bias")
INPUTS, OUTPUTS = 6, 3
GRAM = pb.PRECISION_KIND_GRAM
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
        return sketch.finished(above=True)
    return encode(rows().T @ rows(), form, bias=True)


def encoding(form, moment=MomentKind.float32):
    return Encoding(form, moment, INPUTS)


def received(pieces, asked, moment=None):
    header, content = pb.UpdateHeader(), RecordDict()
    write_grams(header, content, {BLOCK: pieces}, {} if moment is None else {BLOCK: moment})
    return statistics(content, header, GRAM, {BLOCK: asked})


@pytest.mark.parametrize("form", FORMS)
def test_an_encoding_survives_its_message(form):
    asked = {BLOCK: Encoding(form, MomentKind.float16, INPUTS, 3)}
    assert read_encodings(encoding_messages(asked)) == asked


@pytest.mark.parametrize("kind", MomentKind)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(form, kind):
    moment = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    found = received(pieces_of(form), encoding(form, kind), encode_moment(moment, kind))
    expected = decode(pieces_of(form), form, bias=True)
    torch.testing.assert_close(found.precisions[BLOCK].matrix, expected)
    torch.testing.assert_close(found.moments[BLOCK], moment, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_groups_travel_side_by_side(form):
    pieces = {name: torch.stack([piece, piece]) for name, piece in pieces_of(form).items()}
    asked = Encoding(form, inputs=INPUTS, groups=2)
    assert received(pieces, asked).precisions[BLOCK].matrix.shape == (2, INPUTS, INPUTS)


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
        (
            {"values": torch.full((3, INPUTS), torch.inf).half(), "scale": torch.ones(3)},
            "non_finite",
        ),
    ],
)
def test_a_moment_has_its_parts(moment, outcome):
    with pytest.raises(Refusal, match=outcome):
        received(pieces_of(GramForm()), encoding(GramForm(), MomentKind.float16), moment)


def test_parts_that_overlap_are_malformed():
    header, content = pb.UpdateHeader(), RecordDict()
    write_grams(header, content, {BLOCK: pieces_of(GramForm(GramKind.half))}, {})
    header.precisions[0].more[0].CopyFrom(header.precisions[0].more[1])
    with pytest.raises(packing.PackingError):
        statistics(content, header, GRAM, {BLOCK: encoding(GramForm(GramKind.half))})
    assert wire.STATISTICS in content


OTHER = ("other.weight", "other.bias")
ALIKE = Encoding(GramForm(), MomentKind.float32, INPUTS)


def sent(grams, moments=None):
    header, content = pb.UpdateHeader(), RecordDict()
    write_grams(header, content, grams, moments or {})
    return header, content


@pytest.mark.parametrize("form", FORMS)
def test_pieces_in_common_are_sent_once_and_read_as_one_matrix(form):
    pieces = pieces_of(form)
    moments = {block: {"values": torch.randn(OUTPUTS, INPUTS)} for block in (BLOCK, OTHER)}
    header, content = sent({BLOCK: pieces, OTHER: pieces}, moments)
    _, own = sent({BLOCK: pieces}, {BLOCK: moments[BLOCK]})
    extra = packing.nbytes(content[wire.STATISTICS]) - packing.nbytes(own[wire.STATISTICS])
    assert extra == 4 * OUTPUTS * INPUTS  # the other's moment
    found = statistics(content, header, GRAM, dict.fromkeys((BLOCK, OTHER), encoding(form)))
    assert found.precisions[BLOCK] is found.precisions[OTHER]
    for block, moment in moments.items():
        torch.testing.assert_close(found.moments[block], moment["values"].double())


def test_equal_pieces_that_are_not_the_same_are_two():
    header, content = sent({BLOCK: pieces_of(GramForm()), OTHER: pieces_of(GramForm())})
    found = statistics(content, header, GRAM, {})
    assert found.precisions[BLOCK] is not found.precisions[OTHER]


def referring(change):
    pieces = pieces_of(GramForm())
    header, content = sent({BLOCK: pieces, OTHER: pieces})
    change(header.precisions[1])
    return header, content


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda entry: setattr(entry, "same", 1), "unexpected_statistic: other.*number 1 of 1"),
        (lambda entry: setattr(entry, "same", 2**32 - 1), "unexpected_statistic"),
        (lambda entry: entry.statistic.SetInParent(), "unexpected_statistic"),
        (lambda entry: setattr(entry, "kind", pb.PRECISION_KIND_DIAGONAL), "unexpected_statistic"),
    ],
)
def test_a_reference_to_no_earlier_matrix_is_refused(change, outcome):
    header, content = referring(change)
    with pytest.raises(Refusal, match=outcome):
        statistics(content, header, GRAM, {})


def test_a_reference_to_a_matrix_in_another_form_is_refused():
    header, content = referring(lambda entry: None)
    with pytest.raises(Refusal, match=r"wrong_shape: other.*as triangle.*not as half"):
        statistics(content, header, GRAM, {BLOCK: ALIKE, OTHER: encoding(GramForm(GramKind.half))})
