"""The directions of clients' updates, held against those of most others.

The cosine of an update with the sum of the others' directions tells them (as in FLTrust: Cao et al. 2021, arXiv
2012.13995, whose server has a direction of its own). An update whose sign a hostile client has turned points against
that sum, and so does that of an honest client with labels that few others have: nothing in the numbers tells one from
the other for certain. They therefore count less the more they point against the others, and nobody is refused for the
labels it has. A client with far more data than the others makes a longer update, and one that agrees with theirs.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.diagnostics.update_cosines import Sample
from fedbasin.strategies.fusion.lora.lora_factors import adapter_pairs
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.influence import Measure
from fedbasin.strategies.tensors.state import MEASURED, State

# Fewer are not weighed: the labels of a few clients decide where most of them go. With two classes by Dirichlet(0.3),
# honest clients of five have cosines of -.65.
_FEWEST = 8
# Where half of the clients agree with the others less than this, directions tell nobody who points against them; and
# nobody agrees with the others by less.
_AGREEMENT = 0.2
# Cosines from which an update counts less, and from which it has the least weight. Two of ten clients of digits by
# Dirichlet(0.5) that turn their updates have -.5 to -.6. Honest clients have .1 and more with ten classes, and -.4 at
# the least with two classes and twenty clients by Dirichlet(0.3).
_FULL, _LEAST = -0.25, -0.5
_LEAST_WEIGHT = 0.05
_ENTRIES = 2**12


@dataclass(frozen=True)
class DirectionAgreement:
    """What the directions of the clients' updates say; nothing where nobody is judged by them.

    Attributes:
        weights: factor on the weight of each client whose update points against the others'; 1 where none is listed.
        agreeing: the clients whose updates agree with the others' at least half as much as the median client's.
    """

    weights: Mapping[int, float] = field(default_factory=dict)
    agreeing: frozenset[int] = frozenset()

    def __or__(self, other: "DirectionAgreement") -> "DirectionAgreement":
        """Return what two stages of a round say together; of a client that both have weighed, the later weight."""
        return DirectionAgreement({**self.weights, **other.weights}, self.agreeing | other.agreeing)


def direction_agreement(
    updates: Mapping[int, Callable[[], Update]], measures: Mapping[int, Measure], anchor: State
) -> DirectionAgreement:
    """Return what the directions of updates from one model say of each client.

    Args:
        updates: gives the update of each client.
        measures: their sizes.
        anchor: the model that the clients were sent.
    """
    if len(updates) < 2:
        return DirectionAgreement()
    cosines = _cosines_with_others(_moves((get() for get in updates.values()), anchor, _seed(measures)))
    usual = float(cosines.quantile(0.5))
    agrees = cosines >= max(usual / 2, _AGREEMENT)
    agreeing = frozenset(node for node, it_does in zip(updates, agrees.tolist(), strict=True) if it_does)
    # The few entries of adapters follow each client's labels: honest clients reach a cosine of -.6.
    if len(updates) < _FEWEST or usual < _AGREEMENT or adapter_pairs(anchor):
        return DirectionAgreement(agreeing=agreeing)
    weights = ((cosines - _LEAST) / (_FULL - _LEAST)).clamp(min=_LEAST_WEIGHT)
    opposing = {node: weight for node, weight in zip(updates, weights.tolist(), strict=True) if weight < 1}
    return DirectionAgreement(opposing, agreeing)


def _seed(measures: Mapping[int, Measure]) -> int:
    """Return a seed that follows from the sizes of all updates, so that no client knows it when it replies."""
    sizes = repr([(node, measure.norm, measure.examples) for node, measure in sorted(measures.items())])
    return int.from_bytes(hashlib.sha256(sizes.encode()).digest()[:7])


def _moves(updates: Iterable[Update], anchor: State, seed: int) -> Float[Tensor, "clients entries"]:
    """Return each client's update at a few entries of the model."""
    learned = {name: tensor for name, tensor in anchor.items() if not name.endswith(MEASURED)}
    sample = Sample.draw(learned, _ENTRIES, seed)
    start = sample.gather(learned)
    return torch.stack([(sample.gather(update.parameters) - start).nan_to_num(0.0) for update in updates])


def _cosines_with_others(moves: Float[Tensor, "clients entries"]) -> Float[Tensor, " clients"]:
    """Return the cosine of each update with the sum of the others', each of length one, so that none outweighs them."""
    directions = torch.nn.functional.normalize(moves, dim=1, eps=1e-300)
    others = directions.sum(0) - directions
    return torch.nn.functional.cosine_similarity(directions, others, eps=1e-300)
