"""The accumulator of a merging rule: models are kept on disk until all are there, and then merged tensor by tensor.

It has the interface of `Accumulator`. At one time the memory holds one tensor of every client. BatchNorm's running
statistics, and tensors that are not floating, are summed as in the mean.
"""

import hashlib

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.precisions import Precision
from fedbasin.strategies.fusion.rules.federated_rule import FederatedRule
from fedbasin.strategies.fusion.rules.robust.client_distances import TooFewClientsError
from fedbasin.strategies.fusion.spool import Spool, SpoolEntry
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.tensors.state import MEASURED, State, floating


class RuleAccumulator:
    """Models of a round on disk, with the interface of `Accumulator`.

    Laws: models that are the anchor give the anchor; the order of the clients does not matter, also for rules that draw
    random numbers, because a draw depends on the seed, the tensor and the client's own model.
    """

    def __init__(self, anchor: State, rule: FederatedRule, spool: Spool, seed: str) -> None:
        """Begin without clients.

        Args:
            anchor: state that gives names and shapes, and from which the rule measures changes.
            rule: the rule.
            spool: an empty spool for the updates.
            seed: seed of rules that draw random numbers, another one in every round.
        """
        self._anchor, self._rule, self._seed = anchor, rule, seed
        self._merged = [name for name in floating(anchor) if not name.endswith(MEASURED)]
        self._spool = spool
        self._models: list[tuple[str, float, dict[str, SpoolEntry]]] = []
        self._sum = Accumulator.zero({name: t for name, t in anchor.items() if name not in self._merged})

    notes: tuple[str, ...] = ()

    @property
    def clients(self) -> int:
        """The number of models."""
        return len(self._models)

    @property
    def blocks(self) -> dict[Block, tuple[Precision, Tensor]]:
        """Nothing: a rule reads no statistics."""
        return {}

    def add(self, update: Update) -> None:
        """Keep one client's model on disk.

        Raises:
            SpoolError: the disk is full.
        """
        digest = hashlib.blake2b(digest_size=16)
        entries = {}
        for name in self._merged:
            tensor = update.parameters[name].detach().contiguous()
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            entries[name] = self._spool.write(tensor)
        self._models.append((digest.hexdigest(), update.examples, entries))
        rest = {name: tensor for name, tensor in update.parameters.items() if name not in entries}
        self._sum.add(Update(rest, update.examples))

    def total(self) -> Accumulator:
        """Return the sum of a single client that stands for all."""
        total = Accumulator.zero(self._anchor)
        total.add(Update(self.finalize(self._anchor), 1.0))
        return total

    def finalize(self, anchor: State, _ridge: Ridge | None = None) -> dict[str, Tensor]:
        """Return the fused model in the anchor's dtypes.

        Raises:
            TooFewClientsError: there are fewer clients than the rule needs.
            ValueError: the rule has no result, as where weights cancel.
        """
        if not self.clients:
            return dict(anchor)
        if self.clients < self._rule.least:
            raise TooFewClientsError(self._rule.name, self._rule.least, self.clients)
        # In an order that does not depend on which client was first.
        models = sorted(self._models, key=lambda model: model[:2])
        examples = sum(count for _, count, _ in models)
        weights = [count / examples for _, count, _ in models]
        rest = self._sum.finalize({name: t for name, t in anchor.items() if name not in self._merged})
        fused = {}
        for name in self._merged:
            tensors = [self._spool.read(entries[name]).to(anchor[name].dtype) for _, _, entries in models]
            seeds = [_seed(f"{self._seed} {name} {digest}") for digest, _, _ in models]
            fused[name] = self._rule.merge(anchor[name], tensors, weights, seeds)
        merged = {**rest, **fused}
        return {name: merged.get(name, tensor) for name, tensor in anchor.items()}


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
