"""The accumulator of a robust rule: updates are kept on disk until all are there, and then fused tensor by tensor.

It has the interface of `Accumulator`. A model's tensors are fused by the rule. Statistics are fused layer by layer as
combinations of the clients' pairs of a precision and the residual that belongs to it,

    Lambda = sum_k c_k Lambda_k / s_k        Lambda . (theta - theta_0) = sum_k c_k Lambda_k . (theta_k - theta_0) / s_k

with one coefficient c_k for a client in a layer: positive semi-definite matrices stay so, and clients with equal
weights give those weights. s_k is the mean of Lambda_k's diagonal. A layer's solution does not depend on the scale of
its statistics: a client with tiny ones would be near to all others, and alone it would still decide everything. A rule
that combines whole models combines pairs as well. In place of a rule that decides entry by entry, which would make a
matrix of parts of many, the geometric median takes over: the median of the clients' means. Pairs are compared with
both parts scaled to their median norm.

Running variances are fused as any other tensor. Pooled with the spread of the clients' means they would not be
bounded, because a mean enters with its square.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial, reduce
from operator import add, mul
from typing import TypeAlias

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Gram, Precision, Sketched, common
from fedbasin.strategies.fusion.rules.robust.bulyan import Bulyan
from fedbasin.strategies.fusion.rules.robust.client_distances import Products, TooFewClientsError, Weights, capped
from fedbasin.strategies.fusion.rules.robust.geometric_median import GeometricMedian
from fedbasin.strategies.fusion.rules.robust.median import Median, middle
from fedbasin.strategies.fusion.rules.robust.robust_rules import CombinationRule, RobustRule
from fedbasin.strategies.fusion.rules.robust.trimmed_mean import TrimmedMean
from fedbasin.strategies.fusion.spool import Spool, SpoolEntry
from fedbasin.strategies.fusion.update import Update, join, tensor_names
from fedbasin.strategies.tensors.parallel import zeros
from fedbasin.strategies.tensors.state import State, floating

# A tensor of the model by its name, a part of a block's precision by its number, or a block's cross-moment.
_Key: TypeAlias = str | tuple[Block, int] | Block
# A share from which on all of an update counts as taken.
_WHOLE = 0.995

_Entrywise: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class RobustAccumulator:
    """Updates of a round on disk, with the interface of `Accumulator`.

    Laws: K equal updates give that update; the order of the clients does not matter; while the hostile clients are as
    few as the rule withstands, they move the result by a bounded distance, whatever finite numbers they send.

    Attributes:
        blocks: precision and cross-moment of each block of the first client, whose shapes the others must have.
        notes: for each client the share of its update that the rule has taken, once the clients are fused.
        clients: number of updates.
    """

    def __init__(self, anchor: State, rule: RobustRule, spool: Spool) -> None:
        """Begin without clients.

        Args:
            anchor: state that gives names and shapes, and from which updates are measured.
            rule: the rule.
            spool: an empty spool for the updates.
        """
        self._anchor = anchor
        self._rule = rule
        self._spool = spool
        self._examples: list[float] = []
        self._updates: list[dict[_Key, SpoolEntry]] = []
        self._scales: list[dict[Block, float]] = []
        self._first: dict[Block, tuple[Precision, Tensor]] = {}
        # Shares of each client in the model and in the layers with statistics.
        self._shares: list[Weights] = []
        # What has been fused since the last update came: all of it is read from disk once.
        self._fused: Accumulator | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._shares:
            return ()
        return tuple(_note(self._rule.name, float(share)) for share in torch.stack(self._shares).mean(0))

    @property
    def clients(self) -> int:
        return len(self._updates)

    @property
    def blocks(self) -> dict[Block, tuple[Precision, Tensor]]:
        return {
            # As many products as the sum would have, all of them views of the first.
            block: (_repeated(precision, self.clients), moment)
            for block, (precision, moment) in self._first.items()
        }

    def add(self, update: Update) -> None:
        """Keep one client's update on disk.

        Raises:
            SpoolError: the disk is full.
        """
        places: dict[_Key, SpoolEntry] = {
            name: self._spool.write(tensor) for name, tensor in update.parameters.items() if name in self._anchor
        }
        scales: dict[Block, float] = {}
        for blocks in common(update.precisions):
            precision = _comparable(update.precisions[blocks[0]])
            scales |= dict.fromkeys(blocks, precision.isotropic(1.0).weight)
            parts = [self._spool.write(part) for part in _parts(precision)]
            for block in blocks:
                residual = _residual(update, block, self._anchor)
                places |= {(block, number): place for number, place in enumerate(parts)}
                places[block] = self._spool.write(residual)
                # Copied where it is kept, because it may be a view of the reply, which must be freed.
                self._first.setdefault(block, (precision.scaled(1.0), residual.clone()))
        self._fused = None
        self._updates.append(places)
        self._scales.append(scales)
        self._examples.append(update.examples)

    def total(self) -> Accumulator:
        """Return the sum of a single client that stands for all.

        Raises:
            TooFewClientsError: there are fewer clients than the rule needs.
        """
        if self.clients < self._rule.least:
            raise TooFewClientsError(self._rule.name, self._rule.least, self.clients)
        if self._fused is None:
            self._shares = []
            self._fused = Accumulator.zero(self._anchor)
            self._fused.add(Update(self._fused_model(), 1.0))
            self._fused.blocks = self._fused_blocks()
        return self._fused

    def finalize(self, anchor: State, ridge: Ridge | None = None) -> dict[str, Tensor]:
        """Return the fused model in the anchor's dtypes; see `Accumulator.finalize`."""
        return self._with_counters(self.total().finalize(anchor, ridge))

    def average(self, anchor: State) -> dict[str, Tensor]:
        """Return the model that the rule takes of the clients' models, without their statistics."""
        return self._with_counters(self.total().average(anchor))

    def _with_counters(self, fused: dict[str, Tensor]) -> dict[str, Tensor]:
        counters = (name for name, tensor in self._anchor.items() if not tensor.is_floating_point())
        sent = (name for name in counters if all(name in update for update in self._updates))
        return {**fused, **{name: self._fused_counter(name) for name in sent}}

    def _fused_model(self) -> dict[str, Tensor]:
        fuse = self._entrywise()
        fused = zeros(floating(self._anchor), torch.float64)
        taken = torch.zeros(self.clients, dtype=torch.float64)
        for name, total in fused.items():
            centre = self._anchor[name].double().reshape(-1)
            for entries, values in self._spool.pieces(self._places(name)):
                total.view(-1)[entries] = fuse(centre[entries], values.double())
                if isinstance(self._rule, Median | TrimmedMean):
                    taken += _taken(values, self._rule.trimmed(self.clients))
        if fused and isinstance(self._rule, Median | TrimmedMean):
            self._shares.append(taken / sum(total.numel() for total in fused.values()))
        return fused

    def _fused_counter(self, name: str) -> Tensor:
        places = self._places(name)
        pieces = [middle(values) for _, values in self._spool.pieces(places)]
        return torch.cat(pieces).view(places[0].shape) if pieces else self._anchor[name]

    def _entrywise(self) -> _Entrywise:
        """Return the function that fuses pieces of the clients' tensors, once whole models have been compared."""
        rule, weights = self._rule, torch.tensor(self._examples, dtype=torch.float64)
        if isinstance(rule, CombinationRule):
            coefficients = _coefficients(rule, self._model_products(), weights)
            self._take(coefficients, weights, floating(self._anchor))
            return partial(_combine, coefficients)
        if isinstance(rule, Bulyan):
            selected = rule.select(self._model_products())
            self._take(torch.zeros_like(weights).index_fill(0, selected, 1.0), weights, floating(self._anchor))
            return lambda anchor, tensors: rule(anchor, tensors[selected], weights[selected])
        return lambda anchor, tensors: rule(anchor, tensors, weights)

    def _take(self, coefficients: Weights, weights: Weights, fused: Collection[object]) -> None:
        """Remember the clients' shares; not of a model without tensors, as where layers alone are fused."""
        if fused:
            weights = capped(weights)
            self._shares.append((coefficients * weights.sum() / weights).clamp(max=1.0))

    def _model_products(self) -> Products:
        total = torch.zeros(self.clients, self.clients, dtype=torch.float64)
        for name, tensor in floating(self._anchor).items():
            total += self._products(name, tensor)
        return total

    def _products(self, key: _Key, centre: Tensor | None = None) -> Products:
        """Return the inner products of the clients' tensors, as differences from a centre."""
        total = torch.zeros(self.clients, self.clients, dtype=torch.float64)
        flat = None if centre is None else centre.double().reshape(-1)
        for entries, values in self._spool.pieces(self._places(key)):
            rows = values.double() if flat is None else values.double() - flat[entries]
            total += rows @ rows.mT
        return total

    def _places(self, key: _Key) -> list[SpoolEntry]:
        return [update[key] for update in self._updates]

    def _fused_blocks(self) -> dict[Block, tuple[Precision, Tensor]]:
        fused: dict[Block, tuple[Precision, Tensor]] = {}
        for blocks in self._sharing():
            factors = self._factors(blocks)
            precision = reduce(add, (self._precision(k, blocks[0]).scaled(f) for k, f in factors.items()))
            for block in blocks:
                moment = reduce(add, (f * self._spool.read(self._updates[k][block]) for k, f in factors.items()))
                if tensor_names(block)[0] in self._anchor:
                    moment = moment + precision.weigh(join(block, self._anchor).double())
                fused[block] = precision, moment
        return fused

    def _sharing(self) -> list[list[Block]]:
        """Return the blocks in groups that share one precision in every client."""
        groups: dict[tuple[SpoolEntry, ...], list[Block]] = {}
        for block in self._first:
            groups.setdefault(tuple(self._places((block, 0))), []).append(block)
        return list(groups.values())

    def _factors(self, blocks: Sequence[Block]) -> dict[int, float]:
        """Return the factors on clients' statistics of blocks that share a precision; clients without one are left out."""
        examples = torch.tensor(self._examples, dtype=torch.float64)
        weights = capped(examples)
        scales = torch.tensor([client[blocks[0]] for client in self._scales], dtype=torch.float64)
        # Of a layer that no example has reached, which has nothing to scale.
        scales = torch.where(scales > 0, scales, 1.0)
        parts = _parts(self._first[blocks[0]][0])
        # The inner product of Kronecker products is the product of their factors' inner products.
        precisions = reduce(mul, (self._products((blocks[0], number)) for number in range(len(parts))))
        residuals = reduce(add, (self._products(block) for block in blocks))
        pairs = reduce(add, (_scaled(matrix / scales / scales[:, None]) for matrix in (precisions, residuals)))
        rule = self._rule if isinstance(self._rule, CombinationRule) else GeometricMedian()
        # A closed-form head reads the number of examples, so the typical scale of as many is restored.
        typical = weights.sum() * (scales / examples).median()
        coefficients = _coefficients(rule, pairs, weights)
        self._take(coefficients, weights, blocks)
        factors = typical * coefficients / scales
        return {number: factor for number, factor in enumerate(factors.tolist()) if factor}

    def _precision(self, client: int, block: Block) -> Precision:
        kind = self._first[block][0]
        parts = (self._spool.read(self._updates[client][block, number]) for number in range(len(_parts(kind))))
        return type(kind)(*parts)


def _note(rule: str, share: float) -> str:
    if not share:
        return f"left out by {rule}"
    return f"{rule} has taken {share:.0%} of it" if share < _WHOLE else ""


def _taken(values: Tensor, trimmed: int) -> Weights:
    """Return the number of each client's values that are among those kept of an entry; equal values are all kept."""
    ordered = values.sort(0).values
    low, high = ordered[trimmed], ordered[len(values) - 1 - trimmed]
    return ((values >= low) & (values <= high)).sum(1).double()


def _coefficients(rule: CombinationRule, products: Products, weights: Weights) -> Weights:
    """Return the coefficients of clients; zero for one whose distance from the others overflows."""
    coefficients = torch.zeros_like(weights)
    near = products.diagonal().isfinite()
    coefficients[near] = rule.coefficients(products[near][:, near], weights[near])
    return coefficients


def _combine(coefficients: Weights, anchor: Tensor, tensors: Tensor) -> Tensor:
    """Return the combination of the clients' differences from the anchor."""
    # Without those of coefficient zero, whose entries can be too large to multiply.
    part = coefficients != 0
    return anchor + coefficients[part] @ (tensors[part] - anchor)


def _scaled(products: Products) -> Products:
    """Return the inner products of vectors that are divided by their median norm."""
    scale = float(products.diagonal().median())
    return products / scale if scale > 0 else products


def _residual(update: Update, block: Block, anchor: State) -> Tensor:
    # In a refit the client sends the residual itself.
    if block in update.cross_moments:
        return update.cross_moments[block]
    difference = join(block, update.parameters).double() - join(block, anchor).double()
    return update.precisions[block].weigh(difference)


def _comparable(precision: Precision) -> Precision:
    """Return the precision in a form whose entries can be compared; sums of sketches become squares as well."""
    return Gram(precision.matrix) if isinstance(precision, Sketched) else precision


def _parts(precision: Precision) -> list[Tensor]:
    return [value for value in vars(precision).values() if isinstance(value, Tensor)]


def _repeated(precision: Precision, clients: int) -> Precision:
    if not isinstance(precision, Kronecker):
        return precision
    return Kronecker(precision.inputs.expand(clients, -1, -1), precision.outputs.expand(clients, -1, -1))
