"""Updates that point against the direction in which the median client moves.

The cosine with that direction tells them (as in FLTrust: Cao et al. 2021, arXiv 2012.13995). An update whose sign a
hostile client has turned is one of them, and so is that of an honest client with labels that few others have: nothing
in the numbers tells one from the other. They are therefore cut back and not left out, so that a minority of any size
takes back a part of the majority's step, and nobody is refused for the labels it has.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.diagnostics.update_cosines import Sample
from fedbasin.strategies.fusion.lora.lora_factors import adapter_pairs
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.influence import Measure, Verdict
from fedbasin.strategies.tensors.state import MEASURED, State

# Among fewer, the labels of a few clients decide what the median is: with two classes by Dirichlet(0.3), honest clients
# of five have cosines of -.65.
_FEWEST = 8
# Where the median client's direction means little to half of the clients, nobody is judged by it. An update with the
# sign turned has about the median cosine, negative; honest clients of many classes reach -.21 (a transformer on digits,
# twelve clients by Dirichlet), and of two classes -.54.
_AGREEMENT = 0.2
_AGAINST = 0.75
_LEAST_AGAINST = 0.3
# The part of the median client's step along the direction that a client may move against it.
_OPPOSING = 0.25
_ENTRIES = 2**12


def cut_opposing(
    verdicts: Mapping[int, Verdict],
    updates: Mapping[int, Callable[[], Update]],
    measures: Mapping[int, Measure],
    anchor: State,
) -> dict[int, Verdict]:
    """Return verdicts by which no update moves far against the median client's direction.

    Args:
        verdicts: the verdicts on all clients.
        updates: gives the update of each.
        measures: their sizes.
        anchor: the model that the clients were sent.
    """
    # The few entries of adapters follow each client's labels: honest clients reach a cosine of -.6.
    if len(verdicts) < _FEWEST or adapter_pairs(anchor):
        return dict(verdicts)
    moves = _moves((updates[node]() for node in verdicts), anchor, _seed(measures))
    direction = torch.nn.functional.normalize(moves.median(0).values, dim=0)
    steps = moves @ direction
    cosines = steps / torch.linalg.vector_norm(moves, dim=1).clamp_min(1e-300)
    agreement = float(cosines.quantile(0.5))
    if agreement < _AGREEMENT:
        return dict(verdicts)
    limit = -max(_AGAINST * agreement, _LEAST_AGAINST)
    factors = (_OPPOSING * steps.quantile(0.5) / -steps).tolist()
    return {
        node: _cut(verdict, cosine, factor) if cosine < limit else verdict
        for (node, verdict), cosine, factor in zip(verdicts.items(), cosines.tolist(), factors, strict=True)
    }


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


def _cut(verdict: Verdict, cosine: float, factor: float) -> Verdict:
    if verdict.update <= factor:
        return verdict
    what = f"update cut to {factor:.2g} of its length: its cosine with the median client's direction is {cosine:.2f}"
    return replace(verdict, update=factor, notes=(*verdict.notes, what))
