"""Building a client's reply: align the trained model, collect statistics on it, probe the path, pack.

anchor, trained  ->  aligned, precision, path, header

A model that alignment has made another function of is not sent: the reply says so, in place of the tensors.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from flwr.app import MetricRecord, RecordDict
from torch import Tensor, nn

from fedbasin.client.activations import correlations
from fedbasin.client.adapters import completed, model_names
from fedbasin.client.data import Batches
from fedbasin.client.fisher import diagonal_fisher
from fedbasin.client.kronecker import kronecker_factors
from fedbasin.client.learned import align_learned
from fedbasin.client.moments import preactivation_moments
from fedbasin.client.probe import path_losses
from fedbasin.client.regression import order
from fedbasin.client.statistics import gram_pieces
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain, wire
from fedbasin.strategies.alignment.activations import match_activations
from fedbasin.strategies.alignment.matcher import Matcher
from fedbasin.strategies.alignment.matching import Alignment, match_weights
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.diagnostics.endpoints import Verdict, endpoint_error
from fedbasin.strategies.diagnostics.share import draw
from fedbasin.strategies.diagnostics.spectra import affordable, matrices, spectral_alignment
from fedbasin.strategies.diagnostics.variance import variance_ratios
from fedbasin.strategies.encodings import read_encodings, write_grams, write_kroneckers
from fedbasin.strategies.fusion.adapters import widened
from fedbasin.strategies.fusion.compact import Pieces
from fedbasin.strategies.fusion.update import Block, Order
from fedbasin.strategies.messages import alignment_message
from fedbasin.strategies.state import State, floating
from fedbasin.strategies.symmetry.sites import Symmetry, parse

Data = Callable[[], Batches]

# What comparing singular vectors may take: about a tenth of a second on one core for all models.
_PRODUCTS = 2**23


class MissingDataError(ValueError):
    """The server asks for what only the client's data can say, and the mod was given none."""


@dataclass(frozen=True, eq=False)
class Request:
    """A stage's question, read from a message.

    Attributes:
        header: as sent.
        anchor: the global model.
        radii: the anchor's identity radii, by site.
        path_points: points of the path that this client is to evaluate; 0 for none.
        moving: the floating tensors of a merge to align in place of the client's own model; empty for none.
        seed: of what this client draws in this round.
    """

    header: pb.Request
    anchor: dict[str, Tensor]
    radii: dict[str, Tensor]
    path_points: int = 0
    moving: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0


def read_request(content: RecordDict, node_id: int = 0) -> Request:
    """Read a message that `fedbasin.server` sent.

    Args:
        content: of the message.
        node_id: whose it is; decides whether this client is among those that probe, and what it draws.

    Raises:
        WireError: it is no such message, or of another version.
        PackingError: its tensors do not parse.
    """
    header = wire.read_request(content)
    arrays = wire.arrays(content, wire.ARRAYS)
    anchor = packing.unpack(arrays, header.anchor) if header.anchor else plain.read(arrays)
    radii = {}
    if header.radii:
        radii = packing.unpack(wire.arrays(content, wire.RADII), header.radii)
    seed = draw(node_id, header.round)
    probes = not header.HasField("probe_bound") or seed <= header.probe_bound
    moving = {}
    if header.moving:
        moving = packing.unpack(wire.arrays(content, wire.MOVING), header.moving)
    return Request(header, anchor, radii, header.path_points if probes else 0, moving, seed)


def build_reply(
    request: Request,
    trained: State,
    metrics: dict[str, float],
    model: nn.Module,
    data: Data | None = None,
    *,
    train_seconds: float = 0.0,
) -> RecordDict:
    """The reply to a stage: the model in the anchor's frame, and what the client knows about it.

    Args:
        request: the question.
        trained: the client's own model.
        metrics: what the app measured; `num-examples` is the client's weight.
        model: to run; its tensors are replaced.
        data: gives the client's own examples, afresh at every call.
        train_seconds: how long training took, for the round's report.

    Raises:
        MissingDataError: the stage needs data and there is none.
        KeyError: the metrics have no `num-examples`.
    """
    header = answer(request)
    header.examples = _examples(metrics)
    header.train_seconds = train_seconds
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if request.header.align:
        # A site of adapters is as wide as the anchor's rank.
        trained = widened(trained, request.anchor)
    aligned = _align(request, trained, model, data, header)
    with _probing(header):
        _probe(request, trained, aligned, model, data, header)
        _compare_directions(request, trained, aligned, header)
    if not header.function_changed:
        _collect(request, aligned, model, data, header, content)
        _pack(request, aligned, header, content)
    if request.header.order:
        _describe_order(header, order(model, required(data, "the order of the layers")()))
    wire.write(content, header)
    return content


def fused_path(
    request: Request, own: State, model: nn.Module, data: Data | None
) -> pb.UpdateHeader:
    """What goes with an evaluation: the path from the model that is evaluated to the client's own.

    With it, whether the fused model's hidden layers vary as the client's do.

    Args:
        request: the question; its anchor is the new global model.
        own: the floating tensors that this client sent in the same round.
        model: to run; it is left as it was.
        data: gives the client's own examples, afresh at every call.

    Raises:
        MissingDataError: there is no data.
    """
    batches = required(data, "the path from the fused model")
    start, end = completed(model, request.anchor), completed(model, {**request.anchor, **own})
    header = answer(request)
    with _probing(header):
        path = path_losses(model, start, end, batches(), request.path_points)
        header.path.CopyFrom(path_message(path))
        header.variance.extend(_variance(start, end, model, batches))
    return header


def path_message(path: Path) -> pb.PathSums:
    """Sums along a path that has nothing to do with alignment."""
    return pb.PathSums(
        points=path.points, loss_after=path.loss, correct_after=path.correct, examples=path.examples
    )


def _variance(
    fused: State, own: State, model: nn.Module, batches: Data
) -> Iterator[pb.VarianceRatio]:
    """Layer by layer; one that does not vary in the client's own model has no ratio."""
    ours, theirs = (preactivation_moments(model, state, batches()) for state in (fused, own))
    for layer, found in variance_ratios(ours, [theirs]).items():
        if math.isfinite(found.layer):
            yield pb.VarianceRatio(layer=layer, ratio=found.layer)


@contextmanager
def _probing(header: pb.UpdateHeader) -> Iterator[None]:
    """Say what the probes took, apart from all else."""
    started = time.perf_counter()
    yield
    header.probe_seconds += time.perf_counter() - started


def answer(request: Request) -> pb.UpdateHeader:
    """The header of a reply, which says what it answers."""
    asked = request.header
    return pb.UpdateHeader(round=asked.round, stage=asked.stage, anchor_digest=asked.anchor_digest)


def _pack(request: Request, aligned: State, header: pb.UpdateHeader, content: RecordDict) -> None:
    aligned = widened(aligned, request.anchor)
    if request.header.anchor:
        content[wire.ARRAYS], specs = packing.pack(floating(aligned))
        header.tensors.extend(specs)
    else:
        content[wire.ARRAYS] = plain.write({name: aligned[name] for name in request.anchor})


def _describe_order(header: pb.UpdateHeader, found: Order) -> None:
    for level in found.levels:
        header.levels.add(blocks=[pb.Block(tensors=block) for block in level])
    if found.head:
        header.head.tensors.extend(found.head)


def _examples(metrics: dict[str, float]) -> float:
    if "num-examples" not in metrics:
        raise KeyError(
            "the reply's metrics lack 'num-examples', the weight of this client's update"
        )
    return metrics["num-examples"]


def _align(
    request: Request, trained: State, model: nn.Module, data: Data | None, header: pb.UpdateHeader
) -> State:
    if not request.header.align:
        return trained
    symmetry = parse(request.header.symmetry)
    started = time.perf_counter()
    found = _matched(request, symmetry, trained, model, data, header.examples)
    header.symmetry_digest = symmetry.digest
    seconds = time.perf_counter() - started
    header.alignment.CopyFrom(alignment_message(found.report, seconds))
    if request.header.matcher == Matcher.learned.name:
        # What was learned is this very point of the path.
        return found.state
    return symmetry.translate(symmetry.fold(request.anchor), found.state)


def _matched(
    request: Request,
    symmetry: Symmetry,
    trained: State,
    model: nn.Module,
    data: Data | None,
    examples: float,
) -> Alignment:
    matcher = Matcher[request.header.matcher or Matcher.weights.name]
    if matcher is Matcher.activations:
        batches = required(data, "matching by activations")
        seen = correlations(symmetry, model, request.anchor, trained, batches())
        return match_activations(symmetry, request.anchor, trained, seen)
    if matcher is Matcher.learned:
        batches, merged = required(data, "learned matching"), request.header.merged_examples
        pair = (request.anchor, trained)
        return align_learned(
            symmetry, model, *pair, batches, examples=examples, merged_examples=merged
        )
    match = match_sinkhorn if matcher is Matcher.sinkhorn else match_weights
    return match(symmetry, request.anchor, trained, request.radii)


def _probe(
    request: Request,
    trained: State,
    aligned: State,
    model: nn.Module,
    data: Data | None,
    header: pb.UpdateHeader,
) -> None:
    points = request.path_points
    if not points:
        return
    batches = required(data, "the barrier to the anchor")
    start, end = completed(model, request.anchor), completed(model, trained)
    before = path_losses(model, start, end, batches(), points)
    after = before
    if aligned is not trained:
        after = path_losses(model, start, completed(model, aligned), batches(), points)
    header.path.CopyFrom(_sums(before, after))
    if request.header.align:
        _prove(before, after, trained, header)


def _compare_directions(
    request: Request, trained: State, aligned: State, header: pb.UpdateHeader
) -> None:
    """Singular-vector alignment with the anchor, as far as its budget goes.

    Where nothing was searched and no path is asked for, a reply is to cost what it cost without this.
    """
    searched = not all(site.certified for site in header.alignment.sites)
    layers = affordable(request.anchor, _PRODUCTS)
    if not (request.header.align and layers and (searched or request.path_points)):
        return
    before = spectral_alignment(request.anchor, trained, layers=layers)
    moved = any(aligned[name] is not trained[name] for name in layers)
    after = spectral_alignment(request.anchor, aligned, layers=layers) if moved else before
    header.alignment.spectral.CopyFrom(
        pb.Spectral(
            before=before.total,
            after=after.total,
            matrices=len(before.layers),
            of=len(matrices(request.anchor)),
        )
    )


def _prove(before: Path, after: Path, trained: State, header: pb.UpdateHeader) -> None:
    """Say how far alignment moved the client's own loss, and whether that is more than rounding."""
    dtypes = {tensor.dtype for tensor in floating(trained).values()}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    error = endpoint_error(before, after, coarsest)
    if error.verdict is not Verdict.undecided:
        header.alignment.endpoint_error = error.client
    header.function_changed = error.verdict is Verdict.broken


def _sums(before: Path, after: Path) -> pb.PathSums:
    return pb.PathSums(
        points=before.points,
        loss_before=before.loss,
        loss_after=after.loss,
        correct_before=before.correct,
        correct_after=after.correct,
        examples=before.examples,
    )


def _collect(
    request: Request,
    aligned: State,
    model: nn.Module,
    data: Data | None,
    header: pb.UpdateHeader,
    content: RecordDict,
) -> None:
    kind = request.header.precision
    if kind == pb.PRECISION_KIND_SCALAR:
        return
    batches = required(data, pb.PrecisionKind.Name(kind))
    model.load_state_dict(completed(model, aligned))
    if kind == pb.PRECISION_KIND_GRAM:
        write_grams(header, content, _gram_pieces(request, model, batches), {})
        return
    if kind == pb.PRECISION_KIND_KRONECKER:
        factors = kronecker_factors(model, batches(), _generator(request, model))
        pairs = {block: (found.inputs, found.outputs) for block, found in factors.items()}
        write_kroneckers(header, content, pairs)
        return
    fisher = diagonal_fisher(model, batches(), _generator(request, model))
    named = {name: _normalised(f, header.examples).float() for name, f in fisher.items()}
    content[wire.STATISTICS], specs = packing.pack(named)
    for name, spec in zip(named, specs, strict=True):
        header.precisions.add(tensors=(name,), kind=kind, statistic=spec)


def _generator(request: Request, model: nn.Module) -> torch.Generator:
    """Draws the same labels whenever this client is asked the same again."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.Generator(device).manual_seed(request.seed)


def _gram_pieces(request: Request, model: nn.Module, batches: Data) -> dict[Block, Pieces]:
    """Of the blocks that were asked for, under the names that they were asked by."""
    encodings, shrink = read_encodings(request.header.encodings), request.header.shrink
    asked = [tuple(block.tensors) for block in request.header.blocks]
    if not asked:
        return gram_pieces(model, batches(), shrink, encodings)
    names = model_names(model, request.anchor)
    own = {tuple(names[name] for name in block): block for block in asked}
    known = {block: encodings[asked] for block, asked in own.items() if asked in encodings}
    found = gram_pieces(model, batches(), shrink, known, own)
    return {own[block]: pieces for block, pieces in found.items()}


def _normalised(fisher: Tensor, examples: float) -> Tensor:
    """Fisher information with mean `examples`: clients weigh by their data, entries by what it says.

    A confident client's Fisher information is orders of magnitude below a hesitant one's, which says
    nothing about whose weights are right.
    """
    mean = fisher.double().mean()
    if not mean > 0:
        return torch.full_like(fisher, examples)
    return fisher * (examples / mean).to(fisher.dtype)


def required(data: Data | None, what: str) -> Data:
    """The data, or an error that says what it is needed for."""
    if data is None:
        raise MissingDataError(
            f"{what} needs the client's data; pass `data` to fedbasin.client.basin"
        )
    return data
