"""The Flower Strategy `FedBasin`: a thin adapter from Flower's calls to a stage."""

import logging
from collections.abc import Collection, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedbasin.proto import plain
from fedbasin.strategies.fusion.update import Block
from fedbasin.strategies.messages import Broadcast, broadcast, receive, requests
from fedbasin.strategies.metrics import WeightedMeans
from fedbasin.strategies.outcome import Refusal
from fedbasin.strategies.recipe import RECIPES
from fedbasin.strategies.stages import Align, Ask, Stage, plan
from fedbasin.strategies.symmetry.sites import Symmetry

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


class FedBasin(Strategy):
    """A Flower Strategy that aligns and fuses; everything else is Flower's FedAvg.

    For Flower's own `start` and for its wrappers, which call only `configure_*` and `aggregate_*`. The
    whole server, with streaming, deadlines, checkpoints and reports, is `fedbasin.server.serve`. Recipes
    of several stages and own starts need that; this adapter runs those of one stage.

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
            sampling: the FedAvg that samples nodes and runs evaluation; Flower's defaults if None.

        Raises:
            ValueError: no recipe has that name.
        """
        if recipe not in RECIPES:
            raise ValueError(f"no recipe is called {recipe!r}; there are {', '.join(RECIPES)}")
        self.refusals: dict[int, Refusal] = {}
        self._recipe = RECIPES[recipe]
        self._symmetry = symmetry
        self._align = align
        self._blocks = blocks
        self._packed = packed
        self._max_update_bytes = max_update_bytes
        self._flower = sampling or FedAvg()
        self._stage: tuple[Stage, Broadcast] | None = None

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
        ask = Ask(symmetry=self._symmetry)
        stage = plan(anchor, self._recipe, ask, self._align, self._blocks)
        sent = broadcast(stage, anchor, server_round, config, packed=self._packed)
        self._stage = stage, sent
        return requests(sent, nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies one by one; bad ones are refused by name and the round goes on."""
        if self._stage is None:
            raise RuntimeError(
                f"round {server_round} was not configured; call configure_train first"
            )
        stage, sent = self._stage
        self._stage, self.refusals = None, {}
        metrics = WeightedMeans()
        for reply in replies:
            try:
                received = receive(reply, sent, self._max_update_bytes)
                stage.accept(reply.metadata.src_node_id, received.update)
            except Refusal as refusal:
                _LOG.warning("node %d: %s", reply.metadata.src_node_id, refusal)
                self.refusals[reply.metadata.src_node_id] = refusal
            else:
                metrics.add(received.metrics, received.update.examples)
        if not metrics.weight:
            return None, None
        return plain.write(stage.finish()), MetricRecord({**metrics.means()})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As Flower's FedAvg does."""
        return self._flower.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As Flower's FedAvg does."""
        return self._flower.aggregate_evaluate(server_round, replies)
