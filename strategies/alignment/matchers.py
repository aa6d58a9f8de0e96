"""The matchers by the names that settings and messages use, and the match that each of them makes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import MappingProxyType

from torch import nn

from fedbasin.strategies.alignment.activation_matching import match_activations
from fedbasin.strategies.alignment.graph_matching import match_graph
from fedbasin.strategies.alignment.identity_bound import IdentityBounds
from fedbasin.strategies.alignment.learned_matching import Search, match_learned
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn
from fedbasin.strategies.alignment.weight_matching import Alignment, match_weights
from fedbasin.strategies.capture.feature_correlations import correlations
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batches
from fedbasin.strategies.tensors.state import State


class Matcher(Enum):
    """The criterion by which a client is aligned; the value explains it."""

    weights = "which weights agree; needs no data"
    sinkhorn = "which weights agree, all spaces deciding together before any is settled; needs no data"
    graph = "which weights agree, all layers as one graph; needs no data"
    activations = "which features agree on data"
    learned = "the loss on data between the two models"

    @property
    def reads_data(self) -> bool:
        """True if the matcher runs the models on data."""
        return self not in BY_WEIGHTS


AUTO = "auto"
"""The name by which a matcher is left to the client: activations where its data decide every space, else weights."""

BY_WEIGHTS: Mapping[Matcher, Callable[[Symmetry, State, State, IdentityBounds | None], Alignment]] = MappingProxyType(
    {Matcher.weights: match_weights, Matcher.sinkhorn: match_sinkhorn, Matcher.graph: match_graph}
)
"""The matchers that need no data, so that a server can align by them."""


@dataclass(frozen=True, eq=False)
class MatchingData:
    """The input of the matchers that read data.

    Attributes:
        model: module that runs the states; it is left as it was.
        batches: the data, from their beginning at every iteration.
        place: weight of the client in the merge, at which learned matching lowers the loss.
        task: the task of that loss; None takes the one that the first batch shows.
        search: settings of its search; None for the defaults.
    """

    model: nn.Module
    batches: Batches
    place: float = 0.5
    task: Task | None = None
    search: Search | None = None


def prepare_auto(
    symmetry: Symmetry, anchor: State, client: State, bounds: IdentityBounds | None, data: MatchingData | None
) -> Callable[[], Alignment]:
    """Return the match by activations where data are there and show every space, else the match by weights.

    Activation matching leaves a space as it is that no linear layer, convolution or embedding writes, such as the units
    of a recurrent layer. Models that share no start would then be averaged there as they are.

    Args:
        symmetry: the spaces; `symmetry.check(anchor)` must hold.
        anchor: the state to align to.
        client: the state to align.
        bounds: the anchor's identity bounds, for the match by weights.
        data: the data; None for none.

    Raises:
        ValueError: a state does not fit the model, or the data have no examples.
    """
    if data is not None:
        features = correlations(symmetry, data.model, anchor, client, data.batches)
        if features.keys() == {space.name for space in symmetry.spaces}:
            return partial(match_activations, symmetry, anchor, client, features)
    return prepare_match(Matcher.weights, symmetry, anchor, client, bounds)


def prepare_match(
    matcher: Matcher,
    symmetry: Symmetry,
    anchor: State,
    client: State,
    bounds: IdentityBounds | None = None,
    data: MatchingData | None = None,
) -> Callable[[], Alignment]:
    """Return the match of a matcher, for which features of the models have been computed where it needs them.

    Args:
        matcher: the matcher.
        symmetry: the spaces; `symmetry.check(anchor)` must hold.
        anchor: the state to align to.
        client: the state to align.
        bounds: the anchor's identity bounds, which are distances between weights: the other matchers use none.
        data: the data, which the matchers by weights do not read.

    Raises:
        ValueError: the matcher reads data and there is none, or a state does not fit the model.
    """
    if matcher in BY_WEIGHTS:
        return partial(BY_WEIGHTS[matcher], symmetry, anchor, client, bounds)
    if data is None:
        raise ValueError(f"matcher {matcher.name} reads data; give some, or choose another matcher")
    if matcher is Matcher.activations:
        features = correlations(symmetry, data.model, anchor, client, data.batches)
        return partial(match_activations, symmetry, anchor, client, features)
    return partial(
        match_learned, symmetry, data.model, anchor, client, data.batches, data.place, data.search, data.task
    )
