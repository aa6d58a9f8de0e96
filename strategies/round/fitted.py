"""A model whose layers clients fit, stage by stage, and what further stages on it need."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

from fedbasin.proto.request import PathSpec, Refit
from fedbasin.strategies.recipes import ClosedForm
from fedbasin.strategies.round.fit_plan import refit_stage
from fedbasin.strategies.round.refit import ProbePath
from fedbasin.strategies.round.round_stages import RoundStages
from fedbasin.strategies.round.stage import StagePlan, StageResult
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model with fitted layers, and what a further stage on it needs.

    Attributes:
        start: the model that the fit began with.
        model: the fitted model.
        carries: the tensors that clients lack of it.
        sequence: number of the piece in which these travel.
        nodes: the clients that have the rest.
    """

    start: State
    model: State
    carries: State
    sequence: int
    nodes: Sequence[int]

    def probe(self, path: PathSpec, points: int, *, again: bool = False) -> StagePlan:
        """Return the stage in which clients evaluate a path; `again` where they have the model already."""
        make = partial(ProbePath, self.model, self.sequence, path, points)
        return StagePlan(make, {} if again else self.carries, self.nodes)


def fit(
    start: State, nodes: Sequence[int], refit: ClosedForm, requests: Sequence[Refit], stages: RoundStages
) -> Generator[StagePlan, StageResult, Fitted]:
    """Fit layers of a model, stage by stage."""
    blocks = [block for request in requests for block in request.blocks]
    encodings = stages.encode(blocks) if stages.encode and blocks else None
    # Each request brings the tensors that the stage before has changed, and clients keep the rest.
    model, carries = start, start
    for request in requests:
        make = partial(refit_stage, refit, model, request, encodings, stages.accumulate, stages.memory, stages.number)
        result = yield StagePlan(make, carries, nodes)
        carries = {name: t for name, t in result.model.items() if t is not model[name]}
        model, nodes = result.model, result.nodes
    return Fitted(start, model, carries, len(requests), nodes)
