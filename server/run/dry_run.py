"""What is known before the first message: sizes against limits, the model's own way through a message, hooks.

A fault that is found here costs nothing. Found later, it costs the training of every client.
"""

import hashlib
import logging
import math

from flwr.app import ArrayRecord
from torch import Tensor

from fedbasin.proto.packing import PackingError
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import Request
from fedbasin.server.run.composition import Composition
from fedbasin.server.run.settings import SettingsError
from fedbasin.strategies.fusion.compression.budget import choose, spent
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.fusion.weighting import Statistic
from fedbasin.strategies.judging.checks import check_update
from fedbasin.strategies.judging.outcomes import Refusal
from fedbasin.strategies.recipes import BlockRefit, HeadRefit
from fedbasin.strategies.tensors.state import State

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")

_MANY_TIMES = 10  # statistics of more than this many times the model are pointed out


def model_signature(arrays: ArrayRecord) -> str:
    """Return a name of a model by the names, shapes and dtypes of its tensors."""
    text = repr([(name, array.dtype, tuple(array.shape)) for name, array in arrays.items()])
    return f"{len(arrays)} arrays, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def dry_run(composition: Composition, model: State, arrays: ArrayRecord) -> None:
    """Check the sizes of a reply, and send the server's own model through a message and the checks of a reply.

    Args:
        composition: the fixed parts of the run.
        model: the initial model.
        arrays: the same as arrays.

    Raises:
        SettingsError: no client's reply could be accepted, or a function of the app returns what cannot be used.
    """
    _check_sizes(composition, sum(len(array.data) for array in arrays.values()))
    _check_message(composition, model)
    _check_score(composition, model)


def _check_sizes(composition: Composition, model_bytes: int) -> None:
    limit = composition.settings.max_update_bytes
    most, least = _statistics_bytes(composition)
    if model_bytes + least > limit:
        statistics = f" and its largest statistic {least}" if least else ""
        remedy = ", or bound the statistics with statistics-budget-bytes" if least else ""
        raise SettingsError(
            f"max-update-bytes = {limit}: the model has {model_bytes} bytes{statistics}, so that every reply would be "
            f"refused; set at least {model_bytes + max(most, least)}{remedy}"
        )
    if most > _MANY_TIMES * model_bytes:
        _LOG.warning(
            "the statistics of recipe = %r have up to %.2f MB, %.0f times the model: every client sends them in every "
            "round; set statistics-budget-bytes to bound them, or choose a recipe without",
            composition.recipe.name,
            most / 1e6,
            most / model_bytes,
        )


def _statistics_bytes(composition: Composition) -> tuple[int, int]:
    """Return the bytes of all layers' Gram matrices, and of the largest one.

    Layers that read the same inputs send one matrix for all, so that the sum of all is an upper bound.
    """
    recipe, layers = composition.recipe, composition.layers
    if isinstance(recipe.refit, HeadRefit | BlockRefit):
        return 0, 0  # the last layer's alone, which only clients can tell
    if not layers or (recipe.statistic is not Statistic.gram and recipe.refit is None):
        return 0, 0
    budget = composition.settings.statistics_budget_bytes
    moments = recipe.refit is not None
    chosen = choose(layers, budget, cross_moments=moments)
    sizes = [spent([layer], chosen, cross_moments=moments) for layer in layers]
    return sum(sizes), max(sizes) if recipe.statistic is Statistic.gram else 0


def _check_message(composition: Composition, model: State) -> None:
    """Send an element of every tensor through request and reply, and the whole model through the checks of a reply."""
    settings = composition.settings
    sample: dict[str, Tensor] = {name: tensor.reshape(-1)[:1] for name, tensor in model.items()}
    request = Request("fuse", anchor=sample, array_names=composition.array_names or {})
    try:
        content = request.to_content(packed=settings.packed)
        request = Request.from_message(content)
        reply = Reply(0, request.stage, parameters=request.anchor, examples=1.0)
        received = Reply.from_message(reply.to_content(request, packed=settings.packed), request)
        check_update(Update(received.parameters or {}, received.examples), sample)
        check_update(Update(model, 1.0), model)
    except PackingError as error:
        raise SettingsError(f"the initial model cannot be sent: {error}") from error
    except Refusal as error:
        raise SettingsError(
            f"the initial model, sent back as it is, would be refused: {error.outcome.name}, {error.detail}; start from a "
            "model that can be a client's"
        ) from error


def _check_score(composition: Composition, model: State) -> None:
    settings = composition.settings
    if composition.score_fn is None or settings.bootstrap != "best" or settings.start != "own":
        return
    score = composition.score_fn(dict(model))
    if not isinstance(score, int | float) or math.isnan(score):
        raise SettingsError(f"score_fn returned {score!r} for the initial model; return a number, lower is better")
