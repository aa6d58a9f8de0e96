"""The reply to a refit: nothing is trained; the client sends the normal equations of layers on its own data.

The client needs what it kept in this round: its own model as it was sent, and the fused model so far, of which every
request brings the new piece.
"""

from collections.abc import Mapping, Sequence

from flwr.app import Context
from torch import Tensor, nn

from fedbasin.client.client_state import fused_pieces, local_optimizer, round_start, sent_reply
from fedbasin.client.collect import gram_statistics
from fedbasin.client.held_out import DataPart
from fedbasin.client.lora_names import complete_state
from fedbasin.client.measure import path_sums
from fedbasin.client.refit.head_sums import head_equations
from fedbasin.client.refit.local_steps import stepped, trial
from fedbasin.client.refit.regression import NormalEquations, load, regress, select_layers
from fedbasin.client.request_reader import Data, required
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block
from fedbasin.proto.reply import LayerStatistic, Reply
from fedbasin.proto.report import PathSums
from fedbasin.proto.request import STEPS, TRIAL, Refit, Request
from fedbasin.strategies.capture.batchnorm_statistics import measure_anew, measuring
from fedbasin.strategies.diagnostics.barrier import grid
from fedbasin.strategies.diagnostics.loss_path import path_losses
from fedbasin.strategies.fusion.compression.formats import encode_cross_moment
from fedbasin.strategies.fusion.lora.adapter_scales import scales_of, set_scales
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.round.path_ends import path_ends
from fedbasin.strategies.statistics.finite import check_statistic
from fedbasin.strategies.statistics.gram_accumulators import finish_shared
from fedbasin.strategies.tasks.guess import guess_task
from fedbasin.strategies.tasks.likelihoods import TaskError
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.state import State, tied


def refit_reply(
    request: Request,
    refit: Refit,
    context: Context,
    model: nn.Module,
    data: Data | None,
    held_out: Data | float = 0.0,
    task: Task | None = None,
) -> Reply:
    """Build the reply to a refit: sums over the client's own examples, and losses of models.

    Args:
        request: the request.
        refit: the refit that it asks for.
        context: context with the models that the client kept, including the piece that came with the request.
        model: module that runs the states; its tensors are replaced.
        data: gives the client's own batches, anew at every call.
        held_out: gives the batches on which models are compared; or the share of the client's own that no layer is
            fitted to.
        task: the task; None takes the one that the first batch shows.

    Raises:
        MissingDataError: there is no data.
    """
    sent, pieces = sent_reply(context, request), fused_pieces(context, request)
    if sent is None or sent.parameters is None or not pieces:
        return Reply(request.round, request.stage, request.anchor_digest, lost=True)
    batches = required(data, "a refit")
    fitting, judging = _parts(batches, held_out)
    fused = _merge(pieces, model)
    # Nothing is forgotten yet: the server repeats a stage to which too few clients could reply.
    measured: State | None = None
    statistics: tuple[LayerStatistic, ...] = ()
    if refit.blocks:
        fitted = fitting if request.keep else batches
        statistics, measured = _fit(request, refit, sent.parameters, fused, model, fitted, task)
    elif request.stage == STEPS:
        task = task or guess_task(model, batches())
        measured = stepped(model, fused, fitting(), local_optimizer(context), request.seed, task)
    elif refit.norms:
        measured = measure_anew(model, fused, refit.norms, batches())
    path: PathSums | None = None
    if request.path_points and refit.path is not None:
        anchor = round_start(context) if refit.path.extrapolate else {}
        ends = path_ends(refit.path, anchor, _merge(pieces[:1], model), fused)
        if next(iter(judging()), None) is None:
            path = _without_examples(request.path_points)
        elif request.stage == TRIAL:
            task = task or guess_task(model, batches())
            optimizer = local_optimizer(context)
            path = trial(model, ends[1], fitting(), judging(), optimizer, request.seed, task)
        else:
            set_scales(model, scales_of(fused))
            start, end = (complete_state(model, state) for state in ends)
            path = path_sums(path_losses(model, start, end, judging(), request.path_points, task))
    return Reply(
        request.round,
        request.stage,
        request.anchor_digest,
        parameters=measured or None,
        statistics=statistics,
        path=path,
        examples=sent.examples,
    )


def _parts(batches: Data, held_out: Data | float) -> tuple[Data, Data]:
    """Return the batches that layers are fitted to, and those on which models are compared."""
    if not isinstance(held_out, float):
        return batches, held_out
    if not held_out:
        return batches, batches
    return (
        lambda: DataPart(batches(), held_out, is_held_out=False),
        lambda: DataPart(batches(), held_out, is_held_out=True),
    )


def _without_examples(count: int) -> PathSums:
    """Return the sums of a client none of whose few examples is held out."""
    points, zeros = grid(count), (0.0,) * count
    return PathSums(points, zeros, zeros, zeros, zeros, 0.0, clients=1)


def _fit(
    request: Request, refit: Refit, own: State, fused: State, model: nn.Module, batches: Data, task: Task | None
) -> tuple[tuple[LayerStatistic, ...], dict[str, Tensor]]:
    """Return the layers' statistics, and the running statistics that the fused model has on the client's data."""
    encodings = request.encodings
    with measuring(model, refit.norms) as norms:
        sums = _equations(refit, own, fused, model, batches, task, encodings)
    accumulators = {block: s.inputs for block, s in sums.items()}
    grams = finish_shared(accumulators, lambda total: total.dominating_pieces())
    moments = {
        block: encode_cross_moment(check_statistic(block, s.moment), encodings.get(block, Encoding()).moment)
        for block, s in sums.items()
    }
    measured = {
        name: tensor
        for norm, inputs in norms.items()
        for name, tensor in zip(
            norm.statistics, inputs.statistics(*(fused[name] for name in norm.statistics)), strict=True
        )
    }
    return gram_statistics(grams, moments), measured


def _equations(
    refit: Refit,
    own: State,
    fused: State,
    model: nn.Module,
    batches: Data,
    task: Task | None,
    encodings: Mapping[Block, Encoding],
) -> dict[Block, NormalEquations]:
    target = Target[refit.target]
    if target in (Target.features, Target.weights):
        return regress(model, own, fused, refit.blocks, target, batches(), encodings)
    load(model, {**own, **fused})
    task = task or guess_task(model, batches())
    if task.head != target.name:
        raise TaskError(
            f"the server fits the head to {target.name}, and this client's task {task.name!r} gives {task.head or 'none'}; "
            "pass the same task to basin(task=...) on every client"
        )
    (layer,) = select_layers(model, refit.blocks)
    return {layer.block: head_equations(model, fused, layer, task, batches(), encodings.get(layer.block))}


def _merge(pieces: Sequence[State], model: nn.Module) -> dict[str, Tensor]:
    """Return the pieces as one state.

    A piece holds a layer under its first name only, so the layer's other names follow that one.
    """
    tensors = {name: tensor for piece in pieces for name, tensor in piece.items()}
    names: Mapping[str, str] = tied(model.state_dict())
    return {name: tensors[names.get(name, name)] for name in tensors}
