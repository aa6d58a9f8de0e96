"""The state of a run, and the stage in which clients train: what Flower's loop and ours have in common."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedbasin.proto import packing
from fedbasin.proto.report import ClientReport, StageReport
from fedbasin.server.exchange.late_replies import Unanswered, remember
from fedbasin.server.exchange.quorum import StageFailedError
from fedbasin.server.exchange.stage_attempt import ClientMetricsFn, MetricsFn, RoundContext, StageAttempt
from fedbasin.server.exchange.streaming_grid import NodeReply, StageReplies, await_nodes, match_replies
from fedbasin.server.run.app_functions import AppFunctions
from fedbasin.server.run.averaging import FLOWERS_LOOP
from fedbasin.server.run.composition import Composition, ScoreFn, averaging, compose
from fedbasin.server.run.distillation_set import DistillationSet
from fedbasin.server.run.log_lines import stage_line
from fedbasin.server.run.model_arrays import arrays_of, state_of
from fedbasin.server.run.probe_set import ProbeRun
from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.strategies.diagnostics.update_cosines import Vector
from fedbasin.strategies.fusion.head_memory import HeadMemory
from fedbasin.strategies.judging.finite_model import NonFiniteModelError, changed, check_finite
from fedbasin.strategies.judging.outcomes import Outcome
from fedbasin.strategies.judging.strikes import Strikes
from fedbasin.strategies.recipes import Recipe
from fedbasin.strategies.round.evaluate import Evaluate
from fedbasin.strategies.round.stage import StageResult
from fedbasin.strategies.server_optimizers import OptimizerState
from fedbasin.strategies.symmetry.example_inputs import Example
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


@dataclass(frozen=True, eq=False)
class AppParts:
    """The parts of a run that the app gives beside settings; see `FedBasin`."""

    model: nn.Module | None = None
    example: Example | None = None
    symmetry: Symmetry | None = None
    score_fn: ScoreFn | None = None
    distillation: DistillationSet | None = None
    client_metrics_fn: ClientMetricsFn | None = None
    train_metrics_fn: MetricsFn | None = None
    evaluate_metrics_fn: MetricsFn | None = None


@dataclass(eq=False)
class RunState:
    """The state of a run between two calls of Flower.

    Attributes:
        settings: the settings of the run.
        parts: what the app gives beside settings.
        recipe: the recipe of the next round; averaging, where nothing else has paid in the rounds before.
        optimizer_state: the state of the server optimizer.
        memory: sums of the head by client, of the rounds so far.
        movement: the movement of the global model in the last round, at sampled entries.
        stream: the replies that are being read; None where Flower's own loop reads them.
        probe: keeps accepted models for the server's probe set; None outside of `FedBasin.start`.
        in_start: whether `FedBasin.start` drives the rounds, so that a round may have several stages.
        trained: the result of the last training stage; without a model where too few clients were accepted.
        evaluated: the result of the last evaluation.
        refusals: reports of the clients that the last stage refused, by node id.
        training: the training stage that has asked and lacks a quorum; None where the next one asks from the start.
        functions: the calls of the app's own functions.
        without_evaluate: nodes whose app has no function that evaluates.
        unanswered: messages of training stages whose replies may still come, by their ids.
        strikes: the clients that were refused again and again.
        failure: why the last training stage ended without a model though enough clients were accepted.
    """

    settings: Settings
    parts: AppParts
    recipe: Recipe = field(init=False)
    optimizer_state: OptimizerState = field(default_factory=dict)
    memory: HeadMemory = field(init=False)
    movement: Vector | None = None
    stream: StageReplies | None = None
    probe: ProbeRun | None = None
    in_start: bool = False
    trained: StageResult | None = None
    evaluated: StageResult | None = None
    refusals: dict[int, ClientReport] = field(default_factory=dict)
    training: StageAttempt | None = None
    functions: AppFunctions = field(default_factory=AppFunctions)
    without_evaluate: set[int] = field(default_factory=set)
    unanswered: dict[str, Unanswered] = field(default_factory=dict)
    strikes: Strikes = field(init=False)
    failure: StageFailedError | NonFiniteModelError | None = None

    def __post_init__(self) -> None:
        self.recipe = self.settings.composed
        # Where every round asks everybody there is nobody to remember.
        self.memory = HeadMemory(self.settings.remembered_bytes if self.settings.fraction_train < 1 else 0)
        self.strikes = Strikes(self.settings.strikes, self.settings.quarantine_rounds)
        self._composition: Composition | None = None
        self._evaluation: StageAttempt | None = None
        self._read: tuple[ArrayRecord, State] | None = None
        self._hashed: tuple[ArrayRecord, bytes] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled nodes to train from `arrays`."""
        settings, composition = self.settings, self.compose(arrays)
        if settings.fraction_train == 0:
            return []
        self._check_single_stage()
        if self.in_start and self.training is not None:
            return self._ask_again(self.training, grid, server_round)
        nodes = self.sample(grid, server_round, settings.fraction_train, settings.min_train_nodes)
        anchor = self.state(arrays)
        self.trained = self.failure = None
        self.training = StageAttempt(
            partial(composition.fuse_stage, server_round, self.recipe, anchor),
            anchor,
            nodes,
            self.round_context(server_round, config),
            composition.limits,
            arrays=None if settings.packed else arrays,
            digest=self.digest(arrays),
            client_metrics_fn=self._measure_client,
            unanswered=self.unanswered,
        )
        return self.training.messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the replies one by one; bad ones are refused by name and the round goes on."""
        attempt, self.training = self.training, None
        if attempt is None and self.settings.fraction_train == 0:
            return None, None
        if attempt is None:
            raise RuntimeError(f"round {server_round} was not configured; call configure_train before aggregate_train")
        attempt.add_all(self._node_replies(replies, attempt.messages))
        if attempt.accepted < attempt.needed:
            report = attempt.report()
            self.note(report, server_round)
            self.trained, self.training = StageResult({}, report), attempt
            return None, None
        anchor = attempt.request.anchor
        try:
            result = attempt.finish(self._guarded("train_metrics_aggr_fn", self.parts.train_metrics_fn))
            model: State = result.model
            # The model is returned as arrays, and the sums are done with: held on to, each would be one more model.
            self.trained = replace(result, model={})
            del attempt
            self.note(result.report, server_round)
            if self.is_single_stage(server_round):
                model = self.follow(server_round, anchor, model)
        except (StageFailedError, NonFiniteModelError) as error:
            _LOG.error("round %d: %s; the global model stays as it is", server_round, error)
            self.failure = error
            self.trained = StageResult({}, self.trained.report if self.trained else attempt.report())
            return None, None
        metrics = MetricRecord(dict(result.metrics))
        return self.arrays(model), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled nodes to evaluate `arrays`."""
        settings, composition = self.settings, self.compose(arrays)
        if settings.fraction_evaluate == 0:
            return []
        sampled = self.sample(grid, server_round, settings.fraction_evaluate, settings.min_evaluate_nodes)
        nodes = [node for node in sampled if node not in self.without_evaluate]
        model = self.state(arrays)
        self._evaluation = StageAttempt(
            partial(Evaluate, model, settings.fused_points if self.in_start else 0),
            model,
            nodes,
            self.round_context(server_round, config),
            composition.limits,
            arrays=None if settings.packed else arrays,
            digest=self.digest(arrays),
        )
        return self._evaluation.messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregate the clients' metrics of the new global model; bad replies are left out by name."""
        attempt, self._evaluation = self._evaluation, None
        if attempt is None and self.settings.fraction_evaluate == 0:
            return None
        if attempt is None:
            raise RuntimeError(
                f"round {server_round} was not configured; call configure_evaluate before aggregate_evaluate"
            )
        attempt.add_all(self._node_replies(replies, attempt.messages))
        self._log_stage(attempt.report())
        self.exclude_from_evaluation(attempt.report())
        self.evaluated = StageResult({}, attempt.report())
        if not attempt.accepted:
            return None
        self.evaluated = attempt.finish(self._guarded("evaluate_metrics_aggr_fn", self.parts.evaluate_metrics_fn))
        return MetricRecord(dict(self.evaluated.metrics))

    def is_single_stage(self, server_round: int) -> bool:
        """Return whether a round ends with the stage in which clients train."""
        merges = server_round == 1 and self.settings.start == "own" and self.settings.merge != "star"
        # Flower's own loop has no stage in which statistics could be measured.
        measures = self.in_start and self.composition.measured_norms(server_round)
        steps = self.in_start and self.recipe.step is not None
        return not self.recipe.fits_or_compares and not merges and not measures and not steps

    def follow(self, server_round: int, anchor: State, model: State) -> dict[str, Tensor]:
        """Return the new global model: the server optimizer's step from the anchor towards a round's model.

        Raises:
            NonFiniteModelError: the new model has entries that are not finite; nothing has changed.
        """
        composition = self.composition
        check_finite(changed(model, anchor), "the fused model", anchor)
        stepped, state = self.recipe.server_optimizer(
            anchor, composition.untied(model), server_round, self.optimizer_state
        )
        check_finite(changed(stepped, model), "the server optimizer's model", anchor)
        check_finite(state, "the server optimizer's state", {})
        self.optimizer_state = state
        return stepped

    def compose(self, arrays: ArrayRecord) -> Composition:
        """Return the fixed parts of the run, composed when the first arrays are known."""
        if self._composition is None:
            parts = self.parts
            self._composition = compose(
                self.settings, parts.model, parts.example, parts.symmetry, arrays, parts.score_fn, parts.distillation
            )
            self.recipe = self._composition.recipe
        return self._composition

    def average(self, reason: str, *, steps: bool = False) -> None:
        """Only average from now on, where the recipe compares models, and say why; `steps` keeps the search for steps."""
        if self.composition.recipe.compares:
            self.recipe = averaging(self.composition.recipe, reason, steps=steps)
            self._composition = replace(self.composition, recipe=self.recipe)

    @property
    def composition(self) -> Composition:
        """The fixed parts of the run."""
        if self._composition is None:
            raise RuntimeError("no round was configured; call configure_train first")
        return self._composition

    def _check_single_stage(self) -> None:
        """Refuse what only `start` can run: further stages of a round."""
        if self.in_start:
            return
        settings = self.settings
        if settings.patience:
            raise SettingsError(
                f"patience = {settings.patience}: Flower's own loop and its wrappers run all rounds; run it with "
                "FedBasin.start, or set patience = 0"
            )
        self.average(FLOWERS_LOOP)
        if self.recipe.refit is not None:
            raise SettingsError(
                f"recipe = {self.recipe.name!r} asks clients several times a round, which Flower's own loop and its "
                "wrappers do not; run it with FedBasin.start, or choose auto, fedavg, fedavgm, fisher or regmean"
            )
        if settings.start == "own" and settings.align != "off":
            raise SettingsError(
                "start = 'own' searches for an anchor before round 1, which Flower's own loop and its wrappers do not; "
                "run it with FedBasin.start, or set align = 'off'"
            )

    def sample(self, grid: Grid, server_round: int, fraction: float, minimum: int) -> list[int]:
        """Wait for nodes and return the sampled ones."""
        online = self.online(grid, server_round, minimum)
        # A client that is gone may come back under another id, and would count twice. What a client sent before it was
        # refused is not trusted either.
        self.memory.keep(set(online) - self.strikes.strikes.keys())
        return self.composition.sample(online, server_round, fraction, minimum)

    def _ask_again(self, attempt: StageAttempt, grid: Grid, server_round: int) -> Iterable[Message]:
        """Ask whoever is online now for what a stage still lacks."""
        self.trained = None
        online = self.online(grid, server_round, self.settings.min_train_nodes)
        late = {key: message.node_id for key, message in self.unanswered.items()}
        attempt.ask_again(self.composition.shuffled(online, server_round), late)
        return attempt.messages

    def remember(self, waiting: Mapping[str, int], attempt: StageAttempt) -> None:
        """Keep the messages of a training stage that nobody has answered yet."""
        self.unanswered = remember(waiting, self.unanswered, attempt.request, self.settings.late_rounds)

    def online(self, grid: Grid, server_round: int, minimum: int) -> list[int]:
        """Wait for nodes and return those that are online and not in quarantine."""
        settings = self.settings
        nodes = await_nodes(grid, max(settings.min_available_nodes, minimum), settings.wait_timeout_seconds)
        return self.strikes.admitted(nodes, server_round, minimum)

    def round_context(self, server_round: int, config: ConfigRecord) -> RoundContext:
        settings = self.settings
        return RoundContext(
            server_round,
            dict(config),
            settings.packed,
            settings.weighted_by_key,
            settings.arrayrecord_key,
            settings.configrecord_key,
            self.composition.array_names or {},
            self.movement,
            self.composition.files,
            compares=self.recipe.chooses,
        )

    def state(self, arrays: ArrayRecord) -> State:
        """Return arrays under the model's names; read once for each record."""
        if self._read is None or self._read[0] is not arrays:
            names = self.composition.array_names or {}
            self._read = arrays, state_of(arrays, names)
        return self._read[1]

    def digest(self, arrays: ArrayRecord) -> bytes:
        """Return the SHA-256 of a model; computed once for each record."""
        if self._hashed is None or self._hashed[0] is not arrays:
            self._hashed = arrays, packing.digest(self.state(arrays))
        return self._hashed[1]

    def arrays(self, state: State) -> ArrayRecord:
        return arrays_of(state, self.composition.array_names or {})

    def exclude_from_evaluation(self, report: StageReport) -> None:
        """Ask nobody again to evaluate whose app cannot."""
        lacking = {c.node_id for c in report.clients if c.outcome == Outcome.no_evaluate.name}
        self.without_evaluate |= lacking

    def note(self, report: StageReport, server_round: int) -> None:
        """Record the refusals of a stage, and log it."""
        self.strikes.record(server_round, report)
        self.refusals = {c.node_id: c for c in report.clients if not c.is_accepted}
        self._log_stage(report)

    def _log_stage(self, report: StageReport) -> None:
        log = _LOG.warning if any(not c.is_accepted for c in report.clients) else _LOG.info
        log("%s", stage_line(report))

    def _node_replies(self, replies: Iterable[Message], messages: list[Message]) -> Iterable[NodeReply]:
        """Return replies with the nodes that were asked, also where Flower or a subclass has collected them."""
        if isinstance(replies, StageReplies):
            return replies.node_replies()
        return self.stream.restored(replies) if self.stream else match_replies(messages, replies)

    def _measure_client(self, node: int, parameters: State) -> Mapping[str, float]:
        if self.probe is not None:
            self.probe.keep(node, parameters)
        function = self.parts.client_metrics_fn
        if function is None or not self.in_start:
            return {} if function is None else function(node, parameters)
        return self.functions.numbers("client_metrics_fn", function, node, parameters)

    def _guarded(self, name: str, function: MetricsFn | None) -> MetricsFn | None:
        """Return a function of the app whose failure is raised once the round is saved; Flower's loop saves nothing."""
        if function is None or not self.in_start:
            return function
        return partial(self.functions.metrics, name, function)
