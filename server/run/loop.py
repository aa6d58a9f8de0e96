"""The loop of a run, written once for all recipes.

    sample -> [bootstrap] -> fuse -> [refit, head, probe] -> server optimizer -> check -> evaluate -> report -> checkpoint

The stages of a round come from `strategies/round/round.py`. The stage in which clients train goes through the strategy's
own `configure_train` and `aggregate_train`, so that a subclass, a wrapper and Flower's own loop run the same code.
"""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedbasin.proto.reply import read_metrics
from fedbasin.proto.report import RoundReport, StageReport
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.exchange.stage_attempt import StageAttempt
from fedbasin.server.exchange.streaming_grid import StageReplies, StreamingGrid
from fedbasin.server.observe.access import AccessError
from fedbasin.server.observe.push import ObserverClient, connect
from fedbasin.server.run import checkpoint
from fedbasin.server.run.checkpoint import Checkpoint
from fedbasin.server.run.log_lines import round_lines, start_lines
from fedbasin.server.run.probe_set import ProbeRun, ProbeSet
from fedbasin.server.run.reporter import Measurements, Reporter
from fedbasin.server.run.result import RunResult
from fedbasin.server.run.run_folder import check_writable, run_id_of
from fedbasin.server.run.run_state import RunState
from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.strategies.round.evaluate import Evaluate
from fedbasin.strategies.round.fuse import Fuse
from fedbasin.strategies.round.round import RoundResult, run_round
from fedbasin.strategies.round.stage import StagePlan, StageResult
from fedbasin.strategies.tensors.state import State

_LOG = logging.getLogger("flwr.fedbasin")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class RunLoop:
    """The loop of one run."""

    def __init__(
        self,
        strategy: Strategy,
        state: RunState,
        grid: Grid,
        arrays: ArrayRecord,
        rounds: int,
        timeout: float,
        *,
        context: Context | None = None,
        probe_set: ProbeSet | None = None,
    ) -> None:
        """Check everything that can be refused before the first message.

        Args:
            strategy: the strategy, whose methods train and evaluate.
            state: the state behind those methods.
            grid: Flower's grid.
            arrays: the initial model.
            rounds: number of rounds that the run has, those before a resume included.
            timeout: deadline of one stage in seconds.
            context: Flower's context, whose id names the run's folder.
            probe_set: data of the server's own, if there is any.

        Raises:
            SettingsError: the configuration cannot be run.
            CheckpointError: the folder cannot be resumed.
        """
        self._strategy = strategy
        self._state = state
        self._settings = self._state.settings = _with_timeout(self._state.settings, timeout)
        self._composition = self._state.compose(arrays)
        self._limits = self._composition.limits
        self._grid = StreamingGrid(grid, self._settings.poll_seconds)
        self._rounds = rounds
        run_id = run_id_of(context, grid)
        resumed = self._settings.resume
        self._folder = Path(resumed) if resumed else self._settings.folder / run_id
        self._reporter = Reporter(run_id, rounds, self._settings.recipe)
        _check_observer(self._settings)
        self._observer = ObserverClient(self._settings.observer, self._settings.observer_pass)
        self._done = 0
        self._left_out = ""
        self._take(arrays)
        if resumed:
            self._resume(checkpoint.load(self._folder))
        check_writable(self._folder)
        self._probe = ProbeRun(probe_set, self._settings.probe_clients, self._settings.probe_points, self._folder)
        self._probe.check(self._model, self._composition.align)
        # Its model is set at the end: the initial one would stay in memory for the whole run.
        self._result = RunResult(folder=self._folder)

    def run(
        self, train_config: ConfigRecord, evaluate_config: ConfigRecord, evaluate_fn: EvaluateFn | None
    ) -> RunResult:
        """Run every round that is not done yet; see `FedBasin.start`."""
        self._train_config, self._evaluate_config = train_config, evaluate_config
        self._evaluate_fn = evaluate_fn
        started = time.perf_counter()
        for line in start_lines(self._settings, self._arrays, self._rounds, self._folder):
            _LOG.info("%s", line)
        self._state.in_start, self._state.probe = True, self._probe
        try:
            with closing(self._observer):
                self._run_rounds()
        finally:
            self._state.in_start, self._state.probe, self._state.stream = False, None, None
        _LOG.info(
            "Finished %d rounds in %.1f s. Model and reports are in %s; next: fedbasin report %s",
            self._rounds,
            time.perf_counter() - started,
            self._folder,
            self._folder,
        )
        return self._complete_result()

    def _take(self, arrays: ArrayRecord) -> None:
        """Take a new global model: as arrays, as a state that shares their bytes, and its digest."""
        self._arrays = arrays
        self._model = self._state.state(arrays)
        self._digest = self._state.digest(arrays)
        # The anchor of the round before would be one more model in memory.
        self._train_anchor: State = {}

    def _resume(self, saved: Checkpoint) -> None:
        """Go on after a checkpoint of the same settings and the same model."""
        decisive = self._settings.decisive
        if decisive != saved.settings:
            raise SettingsError(
                f"{self._folder} was made with {saved.settings}, and this run has {decisive}; use the same settings"
            )
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self._model.items()}
        if shapes != {name: (t.shape, t.dtype) for name, t in saved.model.items()}:
            raise SettingsError(f"{self._folder} holds another model; resume with the model class that made it")
        self._done = saved.server_round
        self._take(self._state.arrays({name: saved.model[name] for name in self._model}))
        self._state.optimizer_state = saved.optimizer_state
        hand_over = self._state.recipe.hand_over
        if saved.handed_over and hand_over is not None:
            self._state.recipe = hand_over.recipe

    def _run_rounds(self) -> None:
        if not self._done:
            self._evaluate_on_server(0)
        previous: RoundReport | None = None
        for number in range(self._done + 1, self._rounds + 1):
            previous = self._reported_round(number, previous)

    def _complete_result(self) -> RunResult:
        """Add the reports of all rounds to the result, and the metrics of the rounds before a resume."""
        result = self._result
        result.arrays, result.state_dict = self._arrays, dict(self._model)
        result.reports = checkpoint.read_reports(self._folder)
        for report in result.reports:
            for metrics, records in (
                (report.train_metrics, result.train_metrics_clientapp),
                (report.evaluate_metrics, result.evaluate_metrics_clientapp),
                (report.server_metrics, result.evaluate_metrics_serverapp),
            ):
                if metrics:
                    records.setdefault(report.round, MetricRecord(dict(metrics)))
        return result

    def _reported_round(self, number: int, previous: RoundReport | None) -> RoundReport:
        """Run one round; the observer also hears of one that fails."""
        _LOG.info("[ROUND %d/%d]", number, self._rounds)
        try:
            report = self._round(number)
        except BaseException as error:  # Flower ends apps with one that is no Exception
            self._probe.stop()
            self._push(self._reporter.failed(number, error))
            raise
        for line in round_lines(report, previous):
            _LOG.info("%s", line)
        # The report first: a round without its model is repeated, a model without its report is not.
        checkpoint.append_report(self._folder, report)
        saved = Checkpoint(
            number,
            dict(self._model),
            self._settings.decisive,
            self._state.optimizer_state,
            handed_over=self._state.recipe.name != self._settings.recipe,
        )
        checkpoint.save(self._folder, saved)
        self._push(report)
        return report

    def _push(self, report: RoundReport) -> None:
        if self._settings.observer:
            self._observer.send(report)

    def _round(self, number: int) -> RoundReport:
        started = time.perf_counter()
        self._probe.begin(self._model, number)
        results = self._train(number) if self._settings.fraction_train else []
        evaluated = self._evaluate_on_clients(number)
        server_metrics = self._evaluate_on_server(number)
        fused = next((result for result in results if result.report.stage == Fuse.stage), None)
        measured = fused.cosines(self._model) if fused and fused.cosines else None
        cosines, self._state.movement = measured or (None, None)
        probe = self._probe.finish(self._model, fused.nodes if fused else [])
        measurements = Measurements(
            path=fused.path if fused else None,
            fused_path=evaluated.path if evaluated else None,
            update_cosines=cosines,
            variance=evaluated.variance if evaluated else {},
            probe=probe,
            train_metrics=fused.metrics if fused else {},
            evaluate_metrics=evaluated.metrics if evaluated else {},
            server_metrics=server_metrics,
            digest=self._digest,
            seconds=time.perf_counter() - started,
        )
        reports = [result.report for result in (*results, evaluated) if result is not None]
        return self._reporter.finished(number, reports, measurements)

    def _train(self, number: int) -> list[StageResult]:
        """Run the stages of a round up to its model, and take that."""
        settings, recipe = self._settings, self._state.recipe
        nodes = self._state.sample(self._grid, number, settings.fraction_train, settings.min_train_nodes)
        stages = self._composition.round_stages(number, recipe)
        plans = run_round(self._model, recipe, stages, nodes)
        results: list[StageResult] = []
        try:
            plan = next(plans)
            while True:
                results.append(self._run_stage(number, plan, nodes, results))
                plan = plans.send(results[-1])
        except StopIteration as end:
            self._take_round(number, end.value)
        return results

    def _take_round(self, number: int, outcome: RoundResult) -> None:
        """Take the round's model: as the strategy returned it, or as the last of several stages left it."""
        if self._state.is_single_stage(number):
            self._take(self._trained)
            return
        model = self._state.follow(number, self._train_anchor, outcome.model)
        self._take(self._state.arrays(model))
        self._say_left_out(outcome.left_out)
        self._hand_over(number, outcome.gain)

    def _say_left_out(self, left_out: str) -> None:
        if left_out and left_out != self._left_out:
            _LOG.warning(
                "recipe %s: the clients' model has no %s; the rest of the recipe is used",
                self._state.recipe.name,
                left_out.removeprefix("a "),
            )
        self._left_out = left_out

    def _hand_over(self, number: int, gain: float | None) -> None:
        """Change to the recipe that takes over, once fitting no longer pays."""
        hand_over = self._state.recipe.hand_over
        if hand_over is None or gain is None or gain >= hand_over.threshold:
            return
        _LOG.info(
            "round %d/%d: fitting took %.0f %% of the loss away, less than %.0f %%: %s takes over",
            number,
            self._rounds,
            100 * gain,
            100 * hand_over.threshold,
            hand_over.recipe.name,
        )
        self._state.recipe, self._state.optimizer_state = hand_over.recipe, {}

    def _run_stage(self, number: int, plan: StagePlan, sampled: list[int], earlier: list[StageResult]) -> StageResult:
        """Run one stage; one that may fail leaves the model as it is where too few clients reply."""
        if plan.trains:
            return self._run_training(number, plan.carries)
        nodes = sampled if plan.nodes is None else list(plan.nodes)
        report = StageReport("")
        for _ in range(self._limits.attempts):
            attempt = StageAttempt(
                plan.make,
                plan.carries,
                nodes,
                self._state.round_context(number, self._train_config),
                self._limits,
                digest=self._digest if plan.carries is self._model else None,
            )
            self._collect(attempt)
            report = attempt.report()
            self._state.note(report)
            if attempt.accepted >= attempt.needed:
                return attempt.finish()
        if plan.may_fail:
            _LOG.warning("%s", QuorumLostError(report, self._limits.needed(len(nodes)), self._limits.attempts))
            return StageResult(dict(plan.carries), report)
        # A search for an anchor asks client by client: its end names all who failed before.
        failed = [r.report for r in earlier if r.report.stage == report.stage]
        clients = [client for stage in (*failed, report) for client in stage.clients]
        report = replace(report, clients=tuple(clients))
        raise QuorumLostError(report, self._limits.needed(len(nodes)), self._limits.attempts)

    def _collect(self, attempt: StageAttempt) -> None:
        early_end = self._limits.early_end(len(attempt.nodes))
        attempt.add_all(self._grid.stream(attempt.messages, self._limits.timeout_seconds, early_end))

    def _run_training(self, number: int, anchor: State) -> StageResult:
        """Run the stage in which clients train, through the strategy's own methods."""
        strategy, limits = self._strategy, self._limits
        arrays = self._arrays if anchor is self._model else self._state.arrays(anchor)
        self._train_anchor = self._state.state(arrays)
        report, needed = StageReport(Fuse.stage), 1
        for _ in range(limits.attempts):
            messages = list(strategy.configure_train(number, arrays, self._train_config, self._grid))
            needed, early_end = limits.needed(len(messages)), limits.early_end(len(messages))
            replies = self._grid.stream(messages, limits.timeout_seconds, early_end)
            self._state.stream = stream = StageReplies(replies)
            trained, metrics = strategy.aggregate_train(number, stream)
            result = self._state.trained or StageResult({}, stream.report(Fuse.stage))
            report = result.report
            if trained is not None:
                self._trained = trained
                return self._with_metrics(
                    replace(result, model=dict(self._state.state(trained))),
                    metrics,
                    self._result.train_metrics_clientapp,
                    number,
                )
        raise QuorumLostError(report, needed, limits.attempts)

    def _evaluate_on_clients(self, number: int) -> StageResult | None:
        """Evaluate the new model on clients; it stands also where none of them can evaluate it."""
        messages = list(self._strategy.configure_evaluate(number, self._arrays, self._evaluate_config, self._grid))
        if not messages:
            return None
        early_end = self._limits.early_end(len(messages))
        replies = self._grid.stream(messages, self._limits.timeout_seconds, early_end)
        self._state.stream = stream = StageReplies(replies)
        metrics = self._strategy.aggregate_evaluate(number, stream)
        result = self._state.evaluated or StageResult({}, stream.report(Evaluate.stage))
        records = self._result.evaluate_metrics_clientapp
        return self._with_metrics(result, metrics, records, number)

    def _with_metrics(
        self, result: StageResult, metrics: MetricRecord | None, records: dict[int, MetricRecord], number: int
    ) -> StageResult:
        """Complete a stage with the metrics that the strategy returned, which a subclass may have changed."""
        if metrics is None:
            return replace(result, metrics={})
        records[number] = metrics
        return replace(result, metrics=read_metrics(metrics))

    def _evaluate_on_server(self, number: int) -> dict[str, float]:
        if self._evaluate_fn is None:
            return {}
        metrics = self._evaluate_fn(number, self._arrays)
        if metrics is None:
            return {}
        if not isinstance(metrics, MetricRecord):
            raise SettingsError(
                f"evaluate_fn returned a {type(metrics).__name__} in round {number}; return a MetricRecord or None"
            )
        self._result.evaluate_metrics_serverapp[number] = metrics
        return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}


def _with_timeout(settings: Settings, timeout: float) -> Settings:
    """Return the settings with the deadline that `start` was given."""
    default = Settings.model_fields["round_timeout_seconds"].default
    if timeout in (default, settings.round_timeout_seconds):
        return settings
    if settings.round_timeout_seconds != default:
        raise SettingsError(
            f"start(timeout={timeout:g}) and round_timeout_seconds = {settings.round_timeout_seconds:g}: both are given "
            "and differ; remove one of them"
        )
    return settings.model_copy(update={"round_timeout_seconds": timeout})


def _check_observer(settings: Settings) -> None:
    """Check that the files for the observer can be used; whether it answers is not a condition."""
    try:
        if settings.observer:
            connect(settings.observer, settings.observer_pass).close()
    except AccessError as error:
        raise SettingsError(f"observer = {settings.observer!r}: {error}") from error
