"""`FedBasin`: a Flower strategy that aligns the clients' models before it fuses them."""

import logging
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedbasin.proto.report import ClientReport
from fedbasin.server.exchange.stage_attempt import ClientMetricsFn, MetricsFn
from fedbasin.server.run.averaging import OWN_METHODS
from fedbasin.server.run.composition import ScoreFn
from fedbasin.server.run.distillation_set import DistillationSet
from fedbasin.server.run.log_lines import settings_lines
from fedbasin.server.run.loop import EvaluateFn, RunLoop
from fedbasin.server.run.probe_set import ProbeSet
from fedbasin.server.run.result import RunResult
from fedbasin.server.run.run_state import AppParts, RunState
from fedbasin.server.run.settings import Settings, read_settings
from fedbasin.strategies.symmetry.example_inputs import Example
from fedbasin.strategies.symmetry.symmetry import Symmetry

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


class FedBasin(Strategy):
    """A Flower strategy that aligns the clients' models by the model's symmetry and fuses them by a recipe.

    Used as Flower's `FedAvg`: `start` runs all rounds, with checkpoints, reports, deadlines and resume.
    `configure_train`, `aggregate_train`, `configure_evaluate` and `aggregate_evaluate` are the first stage of the same
    round, for subclasses and for Flower's wrappers, whose own `start` calls them; recipes of several stages need this
    class's `start`.

    Differential privacy by Flower's clipping wrappers works with recipes that send weights alone and with `packed`
    off: statistics are neither clipped nor noised. A wrapper skips the round in which any client fails.

    Attributes:
        run: the state of the run.
        context: Flower's context, if it was given.
        probe_set: data of the server's own, if there is any.
    """

    def __init__(
        self,
        recipe: str | None = None,
        symmetry: Symmetry | None = None,
        *,
        model: nn.Module | None = None,
        example: Example | None = None,
        context: Context | None = None,
        train_metrics_aggr_fn: MetricsFn | None = None,
        evaluate_metrics_aggr_fn: MetricsFn | None = None,
        client_metrics_fn: ClientMetricsFn | None = None,
        score_fn: ScoreFn | None = None,
        probe_set: ProbeSet | None = None,
        distillation: DistillationSet | None = None,
        **settings: Any,
    ) -> None:
        """Compose a strategy.

        Args:
            recipe: name of the recipe, as `regmean`; `auto` by default, which is `fedavg` where the app lacks what a
                comparison needs.
            symmetry: symmetry of the model; None derives it from model and example.
            model: the app's model. With it recipes with statistics know the layers, tied tensors stay tied, and the
                symmetry can be derived.
            example: inputs of the model, a batch of zeros will do: a tensor, a tuple of them, or a mapping by the names
                of the model's arguments. With it the symmetry is traced, and proven by execution before the first
                message.
            context: Flower's context of the ServerApp; the keys `fedbasin.*` of its run config are settings too.
            train_metrics_aggr_fn: aggregates the metrics of training, as in Flower's FedAvg; None for weighted means.
            evaluate_metrics_aggr_fn: aggregates the metrics of evaluation; None for weighted means.
            client_metrics_fn: makes further metrics of one client's accepted model, by node id and parameters.
            score_fn: scores a model, lower is better; for `bootstrap = "best"`.
            probe_set: data of the server's own, on which it compares some accepted clients' models.
            distillation: inputs of the server's own, without labels, on which each round's model learns the outputs of
                the clients' ensemble.
            settings: every setting of docs/reference/settings.md, by its name with underscores: those of FedAvg
                (`fraction_train`, `fraction_evaluate`, `min_train_nodes`, `min_evaluate_nodes`,
                `min_available_nodes`, `weighted_by_key`, `arrayrecord_key`, `configrecord_key`) and those of fedbasin.

        Raises:
            SettingsError: a setting is unknown, cannot be used, or differs from the run config's.
        """
        arguments = settings if recipe is None else {"recipe": recipe, **settings}
        self.context = context
        self.probe_set = probe_set
        self._settings = read_settings(context.run_config if context else {}, arguments)
        self._parts = AppParts(
            model,
            example,
            symmetry,
            score_fn,
            distillation,
            client_metrics_fn,
            train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn,
        )
        self.run = RunState(self._settings, self._parts)

    @property
    def _trains_by_itself(self) -> bool:
        """True if a subclass has its own way of asking clients to train, or of summing what they reply."""
        methods = (
            (getattr(cls, name) for cls in (type(self), FedBasin)) for name in ("configure_train", "aggregate_train")
        )
        return any(own is not ours for own, ours in methods)

    @property
    def settings(self) -> Settings:
        """The settings of the run."""
        return self.run.settings

    @property
    def refusals(self) -> dict[int, ClientReport]:
        """Reports of the clients that the last stage refused, by node id."""
        return self.run.refusals

    def summary(self) -> None:
        """Log the settings that differ from their defaults."""
        for line in settings_lines(self.settings):
            _LOG.info("%s", line)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> RunResult:
        """Run all rounds.

        Args:
            grid: Flower's grid.
            initial_arrays: the global model that the run starts from.
            num_rounds: number of rounds that the run has, those before a resume included.
            timeout: deadline of one stage in seconds; the setting `round_timeout_seconds` is the same.
            train_config: the app's settings for its clients' training.
            evaluate_config: the app's settings for its clients' evaluation.
            evaluate_fn: evaluates a global model on the server, by round; round 0 is the initial model.

        Returns:
            Flower's result: arrays and metrics, with the reports of all rounds and the folder of the run.

        Raises:
            SettingsError: before the first message, for a configuration that cannot be run.
            SymmetryError: before the first message, for a symmetry that does not fit the model.
            CheckpointError: before the first message, for a folder that cannot be resumed.
            QuorumLostError: a stage failed; the rounds before it are in the run's folder.
        """
        # Each start is a run of its own: no optimizer state, deadline or choice of an earlier one is left.
        self.run = RunState(self._settings, self._parts)
        loop = RunLoop(
            self, self.run, grid, initial_arrays, num_rounds, timeout, context=self.context, probe_set=self.probe_set
        )
        if self._trains_by_itself:
            self.run.average(OWN_METHODS)
        return loop.run(train_config or ConfigRecord(), evaluate_config or ConfigRecord(), evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled nodes to train from `arrays`."""
        return self.run.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the replies one by one; bad ones are refused by name and the round goes on."""
        return self.run.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled nodes to evaluate `arrays`."""
        return self.run.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregate the clients' metrics of the new global model; bad replies are left out by name."""
        return self.run.aggregate_evaluate(server_round, replies)
