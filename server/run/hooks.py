"""What an app may add to a run: numbers of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedbasin.server.run.probe_set import Probe
from fedbasin.server.run.stage_loop import Observe
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class Hooks:
    """What the app may add to a run.

    Attributes:
        evaluate: metrics of each new global model, by round; round 0 is the anchor that a run starts from.
        observe: metrics of one client's accepted model, by node id; called as it is folded.
        score: of a model, lower is better; for `bootstrap = "best"`.
        probe: a probe set of the server's own, on which it compares some accepted clients' models.
    """

    evaluate: Callable[[int, State], Mapping[str, float]] | None = None
    observe: Observe | None = None
    score: Callable[[State], float] | None = None
    probe: Probe | None = None
