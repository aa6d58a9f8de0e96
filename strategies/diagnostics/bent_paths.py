"""Bent paths between two models: where the straight line crosses a barrier, a path with one bend may not.

    bezier    (1 - t)^2 a + 2 t (1 - t) bend + t^2 b
    chain     a to bend for t in [0, 1/2], bend to b for t in [1/2, 1], both straight

Source: Garipov et al. 2018, arXiv 1802.10026. The bend is trained on data (`fedbasin.client.measure.train_bend`); here is
the geometry. A curve of low loss says that two models lie in one valley, not that their mean does.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from fedbasin.strategies.tensors.state import State, interpolate

Kind: TypeAlias = Literal["bezier", "chain"]


@dataclass(frozen=True, eq=False)
class Bent:
    """A path from `start` (t = 0) to `end` (t = 1) that is pulled towards `bend`.

    Law: with the bend in the middle of the ends, both kinds are the straight line.
    """

    kind: Kind
    start: State
    bend: State
    end: State

    def at(self, t: float) -> dict[str, Tensor]:
        """The state at `t`; tensors that are not floating are those of the end."""
        if self.kind == "bezier":
            # De Casteljau: three interpolations are exact at both ends, the polynomial is not.
            early, late = interpolate(self.start, self.bend, t), interpolate(self.bend, self.end, t)
            return interpolate(early, late, t)
        if t <= 0.5:
            return interpolate(self.start, self.bend, 2 * t)
        return interpolate(self.bend, self.end, 2 * t - 1)


def straight(start: State, end: State, kind: Kind = "bezier") -> Bent:
    """The curve before it is bent: training starts here."""
    return Bent(kind, start, interpolate(start, end, 0.5), end)
