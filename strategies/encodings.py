"""Statistics as messages: how a request asks for them, how a client writes them, how a reply is read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.proto.encoding import Encoding, GramForm, GramKind, MomentKind
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.formats import (
    IndefiniteError,
    Pieces,
    decode,
    decode_moment,
    encode,
    layout,
    moment_layout,
    side,
)
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Precision, Sketched
from fedbasin.strategies.round.checks import check_pieces
from fedbasin.strategies.round.outcomes import Outcome, Refusal

_GRAM = {
    GramKind.triangle: pb.GRAM_FORM_TRIANGLE,
    GramKind.half: pb.GRAM_FORM_HALF,
    GramKind.byte: pb.GRAM_FORM_BYTE,
    GramKind.sketch: pb.GRAM_FORM_SKETCH,
    GramKind.blocks: pb.GRAM_FORM_BLOCKS,
    GramKind.diagonal: pb.GRAM_FORM_DIAGONAL,
}
_MOMENT = {
    MomentKind.float32: pb.MOMENT_FORM_FLOAT32,
    MomentKind.float16: pb.MOMENT_FORM_FLOAT16,
    MomentKind.byte: pb.MOMENT_FORM_BYTE,
}
_KIND = {value: kind for kind, value in _GRAM.items()}
_MOMENT_KIND = {value: kind for kind, value in _MOMENT.items()}


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a client says beside its weights, by block; as in `Update`."""

    precisions: dict[Block, Precision] = field(default_factory=dict)
    moments: dict[Block, Tensor] = field(default_factory=dict)


def encoding_messages(encodings: Mapping[Block, Encoding]) -> list[pb.Encoding]:
    """How layers' statistics are to be sent, for a request or a report."""
    return [
        pb.Encoding(
            tensors=block,
            gram=_GRAM[encoding.gram.kind],
            size=encoding.gram.size,
            moment=_MOMENT[encoding.moment],
            inputs=encoding.inputs,
            groups=encoding.groups,
        )
        for block, encoding in encodings.items()
    ]


def read_encodings(messages: Iterable[pb.Encoding]) -> dict[Block, Encoding]:
    """The same, read.

    Raises:
        KeyError: a form is none that this version knows.
    """
    return {
        tuple(m.tensors): Encoding(
            GramForm(_KIND[m.gram], m.size), _MOMENT_KIND[m.moment], m.inputs, m.groups
        )
        for m in messages
    }


def write_grams(
    header: pb.UpdateHeader,
    content: RecordDict,
    grams: Mapping[Block, Pieces],
    moments: Mapping[Block, Pieces],
) -> None:
    """Add Gram matrices to a reply, and the moments of those that were fitted.

    Args:
        header: of the reply.
        content: of the reply.
        grams: the pieces of each block's form; those that blocks have in common, one object, are sent once.
        moments: likewise, of the same blocks or of none.
    """
    first: dict[int, Block] = {}
    for block, pieces in grams.items():
        first.setdefault(id(pieces), block)
    own = {block: grams[block] for block in first.values()}
    tensors = {
        f"{what} {'+'.join(block)} {piece}": tensor
        for what, of in (("gram", own), ("moment", moments))
        for block, pieces in of.items()
        for piece, tensor in pieces.items()
    }
    content[wire.STATISTICS], packed = packing.pack(tensors)
    specs = iter(packed)
    places = {block: place for place, block in enumerate(grams)}
    for block, pieces in grams.items():
        entry = header.precisions.add(tensors=block, kind=pb.PRECISION_KIND_GRAM)
        if block in own:
            entry.statistic.CopyFrom(next(specs))
            entry.more.extend(next(specs) for _ in range(len(pieces) - 1))
        else:
            entry.same = places[first[id(pieces)]]
    for entry, pieces in zip(header.precisions, moments.values(), strict=False):
        entry.moment.CopyFrom(next(specs))
        entry.moment_more.extend(next(specs) for _ in range(len(pieces) - 1))


def write_kroneckers(
    header: pb.UpdateHeader, content: RecordDict, factors: Mapping[Block, tuple[Tensor, Tensor]]
) -> None:
    """Add Kronecker factors to a reply, as two triangles each: of the inputs, then of the outputs."""
    tensors = {
        f"{side} {'+'.join(block)}": encode(factor.cpu(), GramForm(), bias=False)["values"]
        for block, pair in factors.items()
        for side, factor in zip(("inputs", "outputs"), pair, strict=True)
    }
    content[wire.STATISTICS], packed = packing.pack(tensors)
    specs = iter(packed)
    for block in factors:
        entry = header.precisions.add(tensors=block, kind=pb.PRECISION_KIND_KRONECKER)
        entry.statistic.CopyFrom(next(specs))
        entry.more.append(next(specs))


def statistics(
    content: RecordDict, header: pb.UpdateHeader, kind: int, encodings: Mapping[Block, Encoding]
) -> Statistics:
    """The statistics of a reply, in double.

    Args:
        content: of the reply.
        header: of the reply.
        kind: that was asked for, of `pb.PrecisionKind`.
        encodings: that were asked for.

    Raises:
        Refusal: they are of another kind or in other forms, or not positive.
        PackingError: they do not parse.
    """
    found = Statistics()
    if not header.precisions:
        return found
    record = wire.records(content, ArrayRecord).get(wire.STATISTICS)
    if record is None:
        raise Refusal(Outcome.missing_statistic, f"no record {wire.STATISTICS!r}")
    tensors = packing.unpack(record, _specs(header.precisions))
    for entry in header.precisions:
        block = tuple(entry.tensors)
        if block in found.precisions:
            raise Refusal(Outcome.unexpected_statistic, f"{'+'.join(block)} stands twice")
        if entry.kind != kind:
            raise Refusal(Outcome.unexpected_statistic, "+".join(block))
        encoding = encodings.get(block, Encoding())
        if entry.HasField("same"):
            other = _same(entry, list(found.precisions), encodings)
            found.precisions[block] = found.precisions[other]
        else:
            found.precisions[block] = _precision(entry, tensors, encoding)
        if entry.HasField("moment"):
            found.moments[block] = _moment(entry, tensors, encoding.moment)
    return found


def _specs(precisions: Iterable[pb.Precision]) -> Iterator[pb.TensorSpec]:
    for entry in precisions:
        if not entry.HasField("same"):
            yield entry.statistic
            yield from entry.more
        if entry.HasField("moment"):
            yield entry.moment
            yield from entry.moment_more


def _same(
    entry: pb.Precision, before: Sequence[Block], encodings: Mapping[Block, Encoding]
) -> Block:
    """The block before this one whose Gram matrix it has in common."""
    block = tuple(entry.tensors)
    alone = entry.kind != pb.PRECISION_KIND_GRAM or entry.HasField("statistic")
    if alone or entry.same >= len(before):
        detail = f"{'+'.join(block)} refers to number {entry.same} of {len(before)} before it"
        raise Refusal(Outcome.unexpected_statistic, detail)
    other = before[entry.same]
    forms = [encodings.get(each, Encoding()).gram for each in (block, other)]
    if forms[0] != forms[1]:
        detail = f"{'+'.join(block)} as {forms[1]}, as {'+'.join(other)}, and not as {forms[0]}"
        raise Refusal(Outcome.wrong_shape, detail)
    return other


def _precision(entry: pb.Precision, tensors: Mapping[str, Tensor], encoding: Encoding) -> Precision:
    statistic = tensors[entry.statistic.name]
    match entry.kind:
        case pb.PRECISION_KIND_DIAGONAL:
            return Diagonal(statistic.double())
        case pb.PRECISION_KIND_GRAM:
            given = [statistic, *(tensors[spec.name] for spec in entry.more)]
            return _known(tuple(entry.tensors), given, encoding)
        case pb.PRECISION_KIND_KRONECKER:
            return _kronecker(entry, tensors)
        case _:
            raise Refusal(Outcome.unexpected_statistic, "+".join(entry.tensors))


def _known(block: Block, given: list[Tensor], encoding: Encoding) -> Gram | Sketched:
    """The square only where it was sent, or where it has a mean or groups."""
    if encoding.gram.kind is not GramKind.sketch or len(block) > 1 or encoding.groups > 1:
        return Gram(_gram(block, given, encoding))
    pieces = _pieces(block, given, encoding)
    return Sketched(pieces["values"].double(), pieces["spread"].double())


def _kronecker(entry: pb.Precision, tensors: Mapping[str, Tensor]) -> Kronecker:
    name = "+".join(entry.tensors)
    triangles = [tensors[spec.name] for spec in (entry.statistic, *entry.more)]
    if len(triangles) != 2 or any(triangle.dim() != 1 for triangle in triangles):
        shapes = ", ".join(str(tuple(triangle.shape)) for triangle in triangles)
        raise Refusal(
            Outcome.wrong_shape, f"the statistic of {name} has parts {shapes}, not two triangles"
        )
    a, b = (_gram((entry.tensors[0],), [triangle], Encoding()) for triangle in triangles)
    return Kronecker(a.unsqueeze(0), b.unsqueeze(0))


def _gram(block: Block, given: list[Tensor], encoding: Encoding) -> Tensor:
    """The matrix, in double; what was sent as a sketch too."""
    pieces = _pieces(block, given, encoding)
    try:
        return decode(pieces, encoding.gram, len(block) > 1)
    except IndefiniteError as error:
        raise Refusal(Outcome.not_positive, f"{'+'.join(block)}: {error}") from error


def _pieces(block: Block, given: list[Tensor], encoding: Encoding) -> Pieces:
    """The pieces by name; what their matrix would take is known before it is made: few bytes cannot ask for more."""
    values = given[0]
    groups: tuple[int, ...] = (encoding.groups,) if encoding.groups > 1 else ()
    inputs = encoding.inputs
    if not inputs:
        groups = tuple(values.shape[:-1])
        inputs = side(values.shape[-1]) if values.dim() else 0
    expected = layout(encoding.gram, inputs, len(block) > 1)
    check_pieces("+".join(block), given, expected, groups)
    return dict(zip(expected, given, strict=True))


def _moment(entry: pb.Precision, tensors: Mapping[str, Tensor], kind: MomentKind) -> Tensor:
    values = tensors[entry.moment.name]
    name = f"{'+'.join(entry.tensors)}, its moment"
    if values.dim() != 2:
        raise Refusal(Outcome.wrong_shape, f"the statistic of {name} is {tuple(values.shape)}")
    expected = moment_layout(kind, *values.shape)
    given = [values, *(tensors[spec.name] for spec in entry.moment_more)]
    check_pieces(name, given, expected, ())
    return decode_moment(dict(zip(expected, given, strict=True)))
