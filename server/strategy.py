"""The Flower Strategy `FedBasin`: a thin adapter from Flower's calls to a stage."""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedbasin.proto import plain
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.stage_budget import fuse_encodings
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.messages import (
    Broadcast,
    Received,
    broadcast,
    receive,
    receive_metrics,
    requests,
)
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.checks import check_examples
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.round.stages import Align, Ask, Stage, fusing
from fedbasin.strategies.round.weighted_means import WeightedMeans
from fedbasin.strategies.symmetry.symmetry import Symmetry

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


class _Asked(NamedTuple):
    """What the last `configure_train` sent."""

    stage: Stage
    sent: Broadcast
    messages: list[Message]


class FedBasin(Strategy):
    """A Flower Strategy that aligns and fuses; nodes are sampled by Flower's FedAvg.

    For Flower's own `start` and for its wrappers, which call only `configure_*` and `aggregate_*`. The
    whole server, with streaming, deadlines, checkpoints and reports, is `fedbasin.server.run.serve`. Recipes
    of several stages and own starts need that; this adapter runs those of one stage.

    Differential privacy by Flower's fixed-clipping wrappers works with the recipe `fedavg` and `packed`
    off: statistics are neither clipped nor noised. On the client, `ClientApp(mods=[basin(...)])` and
    `@app.train(mods=[fixedclipping_mod])`: alignment then follows clipping, and never takes a model
    further from the anchor. Flower's clipping raises on buffers of integers that have more than zero
    dimensions (a scalar counter, as BatchNorm's, passes): keep such buffers out of the state dict with
    `register_buffer(..., persistent=False)`. A client's error makes those wrappers skip the round.

    Attributes:
        refusals: of the last round, by node id.
    """

    def __init__(
        self,
        recipe: str = "fedavg",
        symmetry: Symmetry | None = None,
        *,
        align: Align = "client",
        blocks: Collection[Block] | None = None,
        packed: bool = False,
        max_update_bytes: int = 2**31,
        layers: Sequence[Layer] | None = None,
        statistics_budget_bytes: int = 0,
        sampling: FedAvg | None = None,
    ) -> None:
        """Compose a strategy.

        Args:
            recipe: a name of the catalogue.
            symmetry: of the model; None leaves clients as they are.
            align: who aligns.
            blocks: the blocks that every client must send statistics of; None lets the first decide.
            packed: few flat arrays instead of one array per tensor. Faster where many tensors travel;
                Flower's differential-privacy wrappers and mods need them plain.
            max_update_bytes: larger replies are refused.
            layers: `gram_layers(model)`, which say what Gram matrices cost; needed for a budget.
            statistics_budget_bytes: what a client may send in them in a round; 0 for no bound.
            sampling: the FedAvg that samples nodes; Flower's defaults if None.

        Raises:
            ValueError: no recipe has that name, its statistics cannot follow where `align` takes them, it has
                several stages, or no forms of its statistics fit the budget.
        """
        if recipe not in RECIPES:
            raise ValueError(f"no recipe is called {recipe!r}; there are {', '.join(RECIPES)}")
        RECIPES[recipe].check_align(align)
        if RECIPES[recipe].fits:
            raise ValueError(
                f"recipe {recipe!r} asks clients several times a round, which Flower's loop does not; run it with "
                "fedbasin.server.run.serve, or choose fedavg, fisher or regmean"
            )
        if statistics_budget_bytes and layers is None:
            raise ValueError(
                f"statistics_budget_bytes = {statistics_budget_bytes} without layers; pass "
                "layers=gram_layers(model), by which the forms of Gram matrices are chosen"
            )
        self.refusals: dict[int, Refusal] = {}
        self._recipe = RECIPES[recipe]
        self._encodings = fuse_encodings(self._recipe, layers or (), statistics_budget_bytes)
        self._symmetry = symmetry
        self._align = align
        self._blocks = blocks
        self._packed = packed
        self._max_update_bytes = max_update_bytes
        self._flower = sampling or FedAvg()
        self._asked: _Asked | None = None

    def summary(self) -> None:
        """Log how the strategy is composed, and Flower's sampling."""
        _LOG.info("\t├──> fedbasin: recipe %s, align %s", self._recipe.name, self._align)
        self._flower.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask the nodes that FedAvg samples to train from `arrays`."""
        asked = self._flower.configure_train(server_round, arrays, config, grid)
        nodes = [message.metadata.dst_node_id for message in asked]
        anchor = plain.read(arrays)
        frozen = self._recipe.frozen(server_round)
        ask = Ask(symmetry=self._symmetry, encodings=self._encodings, frozen=frozen)
        stage = fusing(anchor, self._recipe, ask, self._align, self._blocks)
        sent = broadcast(stage, anchor, server_round, config, packed=self._packed)
        self._asked = _Asked(stage, sent, requests(sent, nodes))
        return self._asked.messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies one by one; bad ones are refused by name and the round goes on."""
        if self._asked is None:
            raise RuntimeError(
                f"round {server_round} was not configured; call configure_train first"
            )
        asked, self._asked, self.refusals = self._asked, None, {}
        metrics = WeightedMeans()
        for node, reply in _by_node(asked.messages, replies):
            try:
                received = self._folded(asked, node, reply)
            except Refusal as refusal:
                _LOG.warning("node %d: %s", node, refusal)
                self.refusals[node] = refusal
            else:
                metrics.add(received.metrics, received.update.examples)
        if not metrics.weight:
            return None, None
        return plain.write(asked.stage.finish()), MetricRecord({**metrics.means()})

    def _folded(self, asked: _Asked, node: int, reply: Message | None) -> Received:
        if reply is None:
            raise Refusal(Outcome.timeout, "no reply")
        received = receive(reply, asked.sent, self._max_update_bytes)
        asked.stage.accept(node, received.update)
        return received

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As Flower's FedAvg does."""
        return self._flower.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self,
        server_round: int,  # noqa: ARG002 - Flower's signature
        replies: Iterable[Message],
    ) -> MetricRecord | None:
        """Means of the clients' metrics, weighted by their examples; bad replies are left out."""
        metrics = WeightedMeans()
        for reply in replies:
            try:
                received = receive_metrics(reply)
                check_examples(received.update.examples)
            except Refusal as refusal:
                _LOG.warning("node %d: %s", reply.metadata.src_node_id, refusal)
            else:
                metrics.add(received.metrics, received.update.examples)
        return MetricRecord({**metrics.means()}) if metrics.weight else None


def _by_node(
    messages: Iterable[Message], replies: Iterable[Message]
) -> Iterator[tuple[int, Message | None]]:
    """The first reply to each message with the node that was asked; None for silent nodes, last.

    The SuperLink signs the errors that it makes with its own id, so the sender says too little.
    """
    waiting = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    for reply in replies:
        node = waiting.pop(reply.metadata.reply_to_message_id, None)
        if node is not None:
            yield node, reply
    for node in waiting.values():
        yield node, None
