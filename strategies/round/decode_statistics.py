"""Decoding of the statistics in a reply: from the tensors that travel to precisions in double precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedbasin.proto.encoding import Encoding, GramKind, MomentKind
from fedbasin.proto.layer_graph import Block
from fedbasin.proto.reply import LayerStatistic
from fedbasin.strategies.fusion.compression.formats import (
    IndefiniteError,
    Pieces,
    cross_moment_layout,
    decode,
    decode_cross_moment,
    layout,
    side,
)
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Precision, Sketched
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.judging.statistic_checks import check_pieces


@dataclass(frozen=True, eq=False)
class DecodedStatistics:
    """Statistics of one client, by layer; as in `Update`."""

    precisions: dict[Block, Precision] = field(default_factory=dict)
    moments: dict[Block, Tensor] = field(default_factory=dict)


def decode_statistics(
    statistics: Sequence[LayerStatistic], kind: str, encodings: Mapping[Block, Encoding]
) -> DecodedStatistics:
    """Decode the statistics of a reply.

    Args:
        statistics: the statistics of the reply.
        kind: the kind that was requested.
        encodings: the encodings that were requested.

    Raises:
        Refusal: a statistic is of another kind or in another form, or is not positive.
    """
    decoded = DecodedStatistics()
    for entry in statistics:
        block = entry.block
        if block in decoded.precisions:
            raise Refusal(Outcome.unexpected_statistic, f"{'+'.join(block)} is listed twice")
        if not block or entry.kind != kind:
            raise Refusal(
                Outcome.unexpected_statistic,
                f"{entry.kind!r} of {'+'.join(block) or 'no tensor'}, where {kind!r} was requested",
            )
        encoding = encodings.get(block, Encoding())
        if entry.same is None:
            decoded.precisions[block] = _precision(entry, encoding)
        else:
            shared = _shared(entry, entry.same, list(decoded.precisions), encodings)
            decoded.precisions[block] = decoded.precisions[shared]
        if entry.moment:
            decoded.moments[block] = _moment(entry, encoding.moment)
    return decoded


def _shared(entry: LayerStatistic, place: int, before: Sequence[Block], encodings: Mapping[Block, Encoding]) -> Block:
    """Return the earlier layer whose Gram matrix this one shares."""
    name = "+".join(entry.block)
    if entry.kind != "gram" or entry.pieces or place >= len(before):
        detail = f"{name} refers to number {place} of {len(before)} before it"
        raise Refusal(Outcome.unexpected_statistic, detail)
    forms = [encodings.get(block, Encoding()).gram for block in (entry.block, before[place])]
    if forms[0] != forms[1]:
        detail = f"{name} as {forms[1]}, as {'+'.join(before[place])}, and not as {forms[0]}"
        raise Refusal(Outcome.wrong_shape, detail)
    return before[place]


def _precision(entry: LayerStatistic, encoding: Encoding) -> Precision:
    if not entry.pieces:
        raise Refusal(Outcome.missing_statistic, f"{'+'.join(entry.block)} has no tensors")
    match entry.kind:
        case "fisher":
            if len(entry.pieces) > 1:
                raise Refusal(
                    Outcome.wrong_shape,
                    f"the statistic of {'+'.join(entry.block)} has {len(entry.pieces)} parts, not 1",
                )
            return Diagonal(entry.pieces[0].double())
        case "gram":
            return _gram_or_sketch(entry.block, entry.pieces, encoding)
        case "kronecker":
            return _kronecker(entry)
        case _:
            raise Refusal(Outcome.unexpected_statistic, "+".join(entry.block))


def _gram_or_sketch(block: Block, tensors: Sequence[Tensor], encoding: Encoding) -> Gram | Sketched:
    """Return the square matrix only where it was sent, or where it has a mean or groups."""
    if encoding.gram.kind is not GramKind.sketch or len(block) > 1 or encoding.groups > 1:
        return Gram(_gram(block, tensors, encoding))
    pieces = _pieces(block, tensors, encoding)
    return Sketched(pieces["values"].double(), pieces["spread"].double())


def _kronecker(entry: LayerStatistic) -> Kronecker:
    if len(entry.pieces) != 2 or any(triangle.dim() != 1 for triangle in entry.pieces):
        shapes = ", ".join(str(tuple(triangle.shape)) for triangle in entry.pieces)
        raise Refusal(
            Outcome.wrong_shape, f"the statistic of {'+'.join(entry.block)} has parts {shapes}, not two triangles"
        )
    a, b = (_gram(entry.block[:1], [triangle], Encoding()) for triangle in entry.pieces)
    return Kronecker(a.unsqueeze(0), b.unsqueeze(0))


def _gram(block: Block, tensors: Sequence[Tensor], encoding: Encoding) -> Tensor:
    """Return the matrix in double precision, also where it was sent as a sketch."""
    pieces = _pieces(block, tensors, encoding)
    try:
        return decode(pieces, encoding.gram, len(block) > 1)
    except IndefiniteError as error:
        raise Refusal(Outcome.not_positive, f"{'+'.join(block)}: {error}") from error


def _pieces(block: Block, tensors: Sequence[Tensor], encoding: Encoding) -> Pieces:
    """Return the pieces by name, once their shapes are checked: few bytes must not ask for a large matrix."""
    values = tensors[0]
    groups: tuple[int, ...] = (encoding.groups,) if encoding.groups > 1 else ()
    inputs = encoding.inputs
    if not inputs:
        groups = tuple(values.shape[:-1])
        inputs = side(values.shape[-1]) if values.dim() else 0
    expected = layout(encoding.gram, inputs, len(block) > 1)
    check_pieces("+".join(block), tensors, expected, groups)
    return dict(zip(expected, tensors, strict=True))


def _moment(entry: LayerStatistic, kind: MomentKind) -> Tensor:
    values = entry.moment[0]
    name = f"{'+'.join(entry.block)}, its cross-moment"
    if values.dim() != 2:
        raise Refusal(Outcome.wrong_shape, f"the statistic of {name} is {tuple(values.shape)}")
    expected = cross_moment_layout(kind, *values.shape)
    check_pieces(name, entry.moment, expected, ())
    return decode_cross_moment(dict(zip(expected, entry.moment, strict=True)))
