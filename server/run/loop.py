"""The loop of a run, written once for all recipes.

    sample -> [bootstrap] -> fuse -> [merge, measure, refit, head, probe, trial] -> server optimizer
           -> check -> evaluate -> report -> checkpoint

The stages of a round come from `strategies/round/round.py`. The stage in which clients train goes through the strategy's
own `configure_train` and `aggregate_train`, so that a subclass, a wrapper and Flower's own loop run the same code.
"""

import json
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial, reduce
from operator import or_

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError

from fedbasin.proto.observer_service import RunSummary
from fedbasin.proto.reply import read_metrics
from fedbasin.proto.report import Choice, Incident, IncidentKind, RoundReport, StageReport, Step
from fedbasin.server.exchange.quorum import QuorumLostError, StageFailedError
from fedbasin.server.exchange.stage_attempt import StageAttempt
from fedbasin.server.exchange.streaming_grid import NodeReplies, StageReplies, StreamingGrid
from fedbasin.server.observe.access import AccessError
from fedbasin.server.observe.push import ObserverClient, connect
from fedbasin.server.run.averaging import NO_JUDGES, is_lasting, reason_of_round
from fedbasin.server.run.dry_run import dry_run, model_signature
from fedbasin.server.run.first_message import ask_first
from fedbasin.server.run.log_lines import end_lines, incident_line, round_lines, start_lines
from fedbasin.server.run.patience import Patience
from fedbasin.server.run.probe_set import ProbeRun, ProbeSet
from fedbasin.server.run.reporter import Measurements, Reporter
from fedbasin.server.run.result import RunResult
from fedbasin.server.run.resumption import checkpoint
from fedbasin.server.run.resumption.checkpoint import Checkpoint, CheckpointError
from fedbasin.server.run.resumption.resume import check_resumable, damaged_reports
from fedbasin.server.run.resumption.run_folder import (
    RunFolder,
    RunRecord,
    app_of,
    check_writable,
    open_run_folder,
    read_run_key,
    run_id_of,
)
from fedbasin.server.run.resumption.stop_signal import stop_signal
from fedbasin.server.run.run_models import RunModels
from fedbasin.server.run.run_state import RunState
from fedbasin.server.run.settings import PREFIX, Settings, SettingsError
from fedbasin.strategies.judging.direction_agreement import DirectionAgreement
from fedbasin.strategies.judging.finite_model import NonFiniteModelError
from fedbasin.strategies.judging.influence import small_norm
from fedbasin.strategies.round.choice import Standing
from fedbasin.strategies.round.divergence import client_incidents, global_losses, loss_rise
from fedbasin.strategies.round.evaluate import Evaluate
from fedbasin.strategies.round.fuse import Fuse
from fedbasin.strategies.round.round import run_round
from fedbasin.strategies.round.round_stages import RoundResult
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
        self._settings = self._state.settings = self._state.settings.with_timeout(timeout)
        composition = self._state.compose(arrays)
        self._limits = composition.limits
        self._grid = StreamingGrid(grid, self._settings.poll_seconds, max_bytes=self._settings.max_update_bytes)
        self._rounds = _whole(rounds)
        self._run_id = run_id_of(context, grid)
        self._app = app_of(grid) or model_signature(arrays)
        self._app_config = {} if context is None else dict(context.run_config)
        self._probe_set = probe_set
        self._reporter = Reporter(self._run_id, rounds, self._settings.recipe)
        _check_observer(self._settings)
        self._done = 0
        # Losses of the last good model, by name.
        self._losses: dict[str, float] = {}
        self._incidents: list[Incident] = []
        self._left_out = ""
        self._standing = Standing()
        self._patience = Patience(self._settings.patience)
        self._choice: Choice | None = None
        self._step: Step | None = None
        self._said_judges = False
        self._train_anchor: State = {}
        dry_run(composition, self._state.state(arrays), arrays)
        self._models = RunModels(self._state, arrays)

    def run(
        self, train_config: ConfigRecord, evaluate_config: ConfigRecord, evaluate_fn: EvaluateFn | None
    ) -> RunResult:
        """Run every round that is not done yet; see `FedBasin.start`."""
        self._train_config, self._evaluate_config = train_config, evaluate_config
        self._evaluate_fn = evaluate_fn
        self._patience.check(evaluates=self._settings.fraction_evaluate > 0 or evaluate_fn is not None)
        record = self._record(train_config)
        with stop_signal(), open_run_folder(self._settings, self._run_id, record) as folder:
            self._open(folder)
            started = time.perf_counter()
            self._run_all()
            self._serve_best()
            folder.write(finished=True)
            result = self._complete_result()
            seconds = time.perf_counter() - started
            for line in end_lines(result.reports, seconds, self._folder, self._settings.observer, result.served_round):
                _LOG.info("%s", line)
            return result

    def _record(self, train_config: ConfigRecord) -> RunRecord:
        """Return this run as its folder is to know it."""
        app_values = {key: value for key, value in self._app_config.items() if not key.startswith(PREFIX)}
        told = {f"train_config[{key!r}]": value for key, value in train_config.items()}
        distillation = self._state.parts.distillation
        lesson = {} if distillation is None else {"distillation": [distillation.passes, distillation.rate]}
        configuration = {**json.loads(self._settings.decisive), **app_values, **told, **lesson}
        # Through JSON, as the folder has it.
        return RunRecord(self._app, self._rounds, json.loads(json.dumps(configuration, default=str)))

    def _open(self, folder: RunFolder) -> None:
        """Go on after the folder's last finished round, if it has any."""
        self._folder = folder.path
        if folder.resumes:
            self._resume(checkpoint.load(self._folder))
        check_writable(self._folder)
        settings = self._settings
        run_key = read_run_key(self._folder) if settings.observer else ""
        self._observer = ObserverClient(settings.observer, settings.observer_pass, run_key)
        self._probe = ProbeRun(self._probe_set, settings.probe_clients, settings.probe_points, self._folder)
        self._probe.check(self._models.state, self._state.composition.align)
        # Its model is set at the end: the initial one would stay in memory for the whole run.
        self._result = RunResult(folder=self._folder)
        folder.write()

    def _run_all(self) -> None:
        """Run every round that is not done yet."""
        for line in start_lines(self._settings, self._models.arrays, self._rounds, self._folder):
            _LOG.info("%s", line)
        self._state.in_start, self._state.probe = True, self._probe
        try:
            with closing(self._observer):
                if self._settings.observer:
                    self._observer.attend(RunSummary(self._run_id, self._settings.recipe, rounds=self._rounds))
                self._run_rounds()
        finally:
            self._state.in_start, self._state.probe, self._state.stream = False, None, None

    def _resume(self, saved: Checkpoint) -> None:
        """Go on after a checkpoint of the same settings and the same model."""
        check_resumable(self._folder, saved, self._settings, self._models.state, self._rounds)
        self._done = saved.server_round
        if not self._settings.resume:
            _LOG.info("%s is unfinished: the run goes on after its round %d", self._folder, self._done)
        self._restore(saved)
        reports = checkpoint.read_reports(self._folder)
        self._note(*damaged_reports(self._folder, reports, self._done))
        for report in reports:
            if report.round > saved.server_round:
                break
            for stage in report.stages:
                self._state.strikes.record(report.round, stage)
            if not _is_rolled_back(report):
                self._losses = global_losses(report)
                self._patience = self._patience.after(report)

    def _restore(self, saved: Checkpoint) -> None:
        """Take the models of a checkpoint, and what belongs to them."""
        self._models.restore(saved)
        self._state.optimizer_state = saved.optimizer_state
        self._state.memory.restore(saved.memory)
        self._standing = Standing()
        for report in checkpoint.read_reports(self._folder):
            compares = self._state.composition.recipe.compares
            if compares and report.round <= saved.server_round and not _is_rolled_back(report):
                self._standing = self._standing.after(report)
        self._note(*(Incident(IncidentKind.damaged_checkpoint.name, damage) for damage in saved.passed_over))

    def _note(self, *incidents: Incident) -> None:
        """Log incidents, and keep them for the round's report."""
        for incident in incidents:
            _LOG.warning("%s", incident_line(incident))
        self._incidents.extend(incidents)

    def _run_rounds(self) -> None:
        if not self._done:
            losses = {name: v for name, v in self._evaluate_on_server(0).items() if "loss" in name.lower()}
            self._losses = {f"{name} (server)": value for name, value in losses.items()}
        if self._done < self._rounds and self._settings.fraction_evaluate and self._settings.fraction_train:
            ask_first(
                self._state, self._grid, self._models.state, self._models.digest, self._train_config, self._done + 1
            )
        previous: RoundReport | None = None
        for number in range(self._done + 1, self._rounds + 1):
            if self._patience.is_over(number - 1):
                break
            previous = self._reported_round(number, previous)

    def _serve_best(self) -> None:
        """Serve the model of the best round, where the run was to end without a better one."""
        best = self._patience.best_round
        if best and best < checkpoint.load(self._folder).server_round:
            self._models.serve(checkpoint.serve(self._folder, best))

    def _complete_result(self) -> RunResult:
        """Add the reports of all rounds to the result, and the metrics of the rounds before a resume."""
        result = self._result
        result.arrays, result.state_dict = self._models.served, dict(self._state.state(self._models.served))
        result.trained_arrays = self._models.arrays
        result.reports = checkpoint.read_reports(self._folder)
        newest = result.reports[-1:]
        result.served_round = self._patience.best_round or sum(
            r.choice.served_round if r.choice else r.round for r in newest
        )
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
        self._state.functions.round = number
        recipe = self._state.composition.recipe
        self._state.recipe = recipe if number >= self._standing.resumes else recipe.averaging
        try:
            report = self._round(number)
        except BaseException as error:  # Flower ends apps with one that is no Exception
            _LOG.warning(
                "round %d is abandoned (%s); the rounds before it are in %s, and the same app goes on after them when "
                "it is started again",
                number,
                type(error).__name__ if str(error) in ("", "0") else error,
                self._folder,
            )
            self._probe.stop()
            self._push(self._reporter.failed(number, error))
            raise
        for line in round_lines(report, previous):
            _LOG.info("%s", line)
        report = self._guarded(report)
        if not _is_rolled_back(report):
            self._standing = self._standing.after(report) if recipe.compares else self._standing
            self._patience = self._patience.after(report)
        report = replace(report, last=report.last or self._patience.is_over(number))
        try:
            self._save(report)
        except (OSError, SafetensorError) as error:
            unsaved = CheckpointError(
                f"round {number} cannot be saved in {self._folder}: {error}; make room there, or let this process write, "
                "and start the same app again: it goes on after the rounds that are there"
            )
            self._push(self._reporter.failed(number, unsaved))
            raise unsaved from error
        failure = self._state.functions.failure
        self._push(report if failure is None else replace(report, problem=f"{type(failure).__name__}: {failure}"))
        self._state.functions.raise_failure()
        return report

    def _save(self, report: RoundReport) -> None:
        # The report first: a round without its model is repeated, a model without its report is not.
        checkpoint.append_report(self._folder, report)
        saved = Checkpoint(
            report.round,
            dict(self._state.state(self._models.served)),
            self._settings.decisive,
            self._state.optimizer_state,
            {} if self._models.arrays is self._models.served else dict(self._models.state),
            dict(self._models.average or {}),
            dict(self._models.before),
            self._state.memory.tensors(),
        )
        checkpoint.save(self._folder, saved, max(self._settings.checkpoints, self._settings.patience + 1))

    def _push(self, report: RoundReport) -> None:
        if self._settings.observer:
            self._observer.send(report)

    def _round(self, number: int) -> RoundReport:
        started = time.perf_counter()
        self._choice = self._step = None
        self._probe.begin(self._models.state, number)
        results = self._train_stages(number) if self._settings.fraction_train else []
        evaluated = self._evaluate_on_clients(number)
        server_metrics = self._evaluate_on_server(number)
        fused = next((result for result in results if result.report.stage == Fuse.stage), None)
        measured = fused.cosines(self._models.state) if fused and fused.cosines else None
        cosines, self._state.movement = measured or (None, None)
        measurements = Measurements(
            path=fused.path if fused else None,
            fused_path=evaluated.path if evaluated else None,
            update_cosines=cosines,
            variance=evaluated.variance if evaluated else {},
            probe=self._probe.finish(self._state.state(self._models.served), fused.nodes if fused else []),
            train_metrics=fused.metrics if fused else {},
            evaluate_metrics=evaluated.metrics if evaluated else {},
            server_metrics=server_metrics,
            digest=self._models.served_digest,
            choice=self._choice,
            step=self._step,
            seconds=time.perf_counter() - started,
        )
        reports = [result.report for result in (*results, evaluated) if result is not None]
        return self._reporter.finished(number, reports, measurements)

    def _train_stages(self, number: int) -> list[StageResult]:
        """Train, and return the stages that came to an end; a round without a model is rolled back."""
        results: list[StageResult] = []
        try:
            self._train(number, results)
        except (StageFailedError, NonFiniteModelError) as error:
            if self._settings.guard != "roll back":
                raise
            if self._state.failure is not None and self._state.trained is not None:
                results.append(self._state.trained)
            elif isinstance(error, StageFailedError):
                results.append(StageResult({}, error.report))
            self._note(Incident(IncidentKind.rolled_back.name, f"{error}; the model of the round before stays"))
            self._models.go_back()
        return results

    def _guarded(self, report: RoundReport) -> RoundReport:
        """Return a round's report with what the guard has seen; a round that made the model worse is rolled back."""
        number, guard = report.round, self._settings.guard
        for node, until in self._state.strikes.quarantined(number).items():
            self._note(Incident(IncidentKind.quarantined.name, f"node {node} is not asked up to round {until}"))
        if guard != "off":
            small = partial(small_norm, self._models.state)
            self._note(*(incident for stage in report.stages for incident in client_incidents(stage, small)))
            losses = global_losses(report)
            rise = loss_rise(losses, self._losses, self._settings.loss_rise)
            if rise is not None:
                self._note(rise)
            # Before round 1 there is no checkpoint to go back to.
            if rise is not None and guard == "roll back" and number > 1 and (saved := self._last_whole()):
                self._restore(saved)
                self._models.go_back()
                detail = f"{rise.detail}; the model of round {saved.server_round} is used again"
                self._note(Incident(IncidentKind.rolled_back.name, detail))
            else:
                self._losses |= losses
        incidents, self._incidents = tuple(self._incidents), []
        return replace(report, incidents=incidents, model_digest=self._models.served_digest)

    def _last_whole(self) -> Checkpoint | None:
        """Return the last checkpoint; None, and an incident, where none can be read any more."""
        try:
            return checkpoint.load(self._folder)
        except CheckpointError as error:
            self._note(Incident(IncidentKind.damaged_checkpoint.name, f"the round cannot be rolled back: {error}"))
            return None

    def _train(self, number: int, results: list[StageResult]) -> None:
        """Run the stages of a round up to its model, and take that; results are added as stages end."""
        settings, recipe = self._settings, self._state.recipe
        nodes = self._state.sample(self._grid, number, settings.fraction_train, settings.min_train_nodes)
        stages = self._state.composition.round_stages(number, recipe, self._state.memory)
        stages = replace(stages, shortfall=self._standing.shortfall, before=self._models.before)
        plans = run_round(self._models.state, recipe, stages, nodes)
        try:
            plan = next(plans)
            while True:
                results.append(self._run_stage(number, plan, nodes, results))
                plan = plans.send(results[-1])
        except StopIteration as end:
            self._take_round(number, end.value, results)

    def _take_round(self, number: int, outcome: RoundResult, results: list[StageResult]) -> None:
        """Take the round's models: as the strategy returned it, or as the last of several stages left them."""
        # Kept for longer, the anchor would be one more model in memory.
        anchor, self._train_anchor = self._train_anchor, {}
        if self._state.is_single_stage(number):
            trained = self._trained
        else:
            trained = self._state.arrays(self._state.follow(number, anchor, outcome.model))
        if self._state.recipe.fits_or_compares:
            self._say_left_out(outcome, results)
            if outcome.choice is None and self._standing.choice is not None:
                # The mean is not to be compared with a model that was served for its closed forms.
                self._losses = {}
        reports = [result.report for result in results]
        self._choice = self._models.take_round(number, outcome, trained, anchor, self._standing, reports)
        self._step = outcome.step
        self._say_no_judges(results)

    def _say_no_judges(self, results: list[StageResult]) -> None:
        """Say once that rounds go no farther than the mean, where the clients of the first could judge nothing."""
        can_evaluate = any(result.layer_graph is not None for result in results)
        if self._state.recipe.step is not None and can_evaluate and not self._said_judges:
            self._said_judges = True
            if not any(result.judges for result in results):
                _LOG.info("%s", NO_JUDGES)

    def _say_left_out(self, outcome: RoundResult, results: list[StageResult]) -> None:
        """Say what a recipe has left out, once; where that is all it adds to the mean, it only averages from now on."""
        left_out = outcome.left_out
        if left_out and left_out != self._left_out:
            fused = next(result for result in results if result.report.stage == Fuse.stage)
            reason = reason_of_round(fused, left_out)
            if self._state.recipe.chooses and outcome.choice is None and is_lasting(fused):
                self._state.average(reason, steps=fused.layer_graph is not None)
            else:
                name = self._state.recipe.name
                _LOG.warning("recipe %s: %s; the rest of the recipe is used", name, reason)
        self._left_out = left_out

    def _run_stage(self, number: int, plan: StagePlan, sampled: list[int], earlier: list[StageResult]) -> StageResult:
        """Run one stage; one that may fail leaves the model as it is where too few clients reply."""
        if plan.trains:
            return self._run_training(number, plan.carries)
        nodes = sampled if plan.nodes is None else list(plan.nodes)
        tries = self._limits.attempts
        attempt = StageAttempt(
            plan.make,
            plan.carries,
            nodes,
            self._state.round_context(number, self._train_config),
            self._limits,
            digest=self._models.digest if plan.carries is self._models.state else None,
            agreement=reduce(or_, (result.agreement for result in earlier), DirectionAgreement()),
        )
        late = self._collect(attempt)
        while attempt.accepted < attempt.needed and (tries := tries - 1):
            self._state.note(attempt.report(), number)
            online = self._state.online(self._grid, number, 1)
            # A stage that builds on what its clients have kept can ask nobody else.
            attempt.ask_again(online, late, others=plan.nodes is None)
            late = self._collect(attempt)
        if attempt.accepted >= attempt.needed:
            result = _finished(attempt, plan)
            self._state.note(result.report, number)
            return result
        report = attempt.report()
        self._state.note(report, number)
        if plan.may_fail:
            _LOG.warning("%s", self._quorum_lost(report, attempt))
            return StageResult(dict(plan.carries), report, failed=True)
        # A search for an anchor asks client by client: its end names all who failed before.
        failed = [r.report for r in earlier if r.failed and r.report.stage == report.stage]
        clients = [client for stage in (*failed, report) for client in stage.clients]
        report = replace(report, clients=tuple(clients))
        raise self._quorum_lost(report, attempt)

    def _quorum_lost(self, report: StageReport, attempt: StageAttempt) -> QuorumLostError:
        by_rule = self._limits.is_by_rule(len(attempt.nodes))
        return QuorumLostError(report, attempt.needed, self._limits.attempts, by_rule=by_rule)

    def _collect(self, attempt: StageAttempt) -> dict[str, int]:
        """Ask and add what comes; return the nodes that have not answered, by the id of the message."""
        replies = self._stream(attempt.messages, attempt)
        attempt.add_all(replies)
        return replies.unanswered

    def _stream(self, messages: list[Message], attempt: StageAttempt | None) -> NodeReplies:
        """Send messages and return the replies to them, and to those of a stage that were sent before."""
        limits = self._limits
        if attempt is None:  # a strategy that asks without this project's code
            return self._grid.stream(messages, limits.timeout_seconds, limits.early_end(len(messages)))
        early_end = limits.early_end(len(attempt.nodes), attempt.accepted)
        return self._grid.stream(
            messages, limits.timeout_seconds, early_end, awaited=attempt.awaited, late=attempt.late
        )

    def _run_training(self, number: int, anchor: State) -> StageResult:
        """Run the stage in which clients train, through the strategy's own methods."""
        strategy, limits = self._strategy, self._limits
        arrays = self._models.arrays if anchor is self._models.state else self._state.arrays(anchor)
        self._train_anchor = self._state.state(arrays)
        report, needed, by_rule = StageReport(Fuse.stage), 1, False
        self._state.training = None
        for _ in range(limits.attempts):
            messages = list(strategy.configure_train(number, arrays, self._train_config, self._grid))
            attempt = self._state.training
            asked = len(attempt.nodes if attempt else messages)
            needed, by_rule = limits.needed(asked), limits.is_by_rule(asked)
            self._state.stream = stream = StageReplies(self._stream(messages, attempt))
            trained, metrics = strategy.aggregate_train(number, stream)
            if attempt is not None:
                self._state.remember(stream.unanswered, attempt)
                del attempt
            result = self._state.trained or StageResult({}, stream.report(Fuse.stage))
            report = result.report
            if self._state.failure is not None:
                raise self._state.failure
            if trained is not None:
                self._trained: ArrayRecord = trained
                return self._with_metrics(
                    replace(result, model=dict(self._state.state(trained))),
                    metrics,
                    self._result.train_metrics_clientapp,
                    number,
                )
        raise QuorumLostError(report, needed, limits.attempts, by_rule=by_rule)

    def _evaluate_on_clients(self, number: int) -> StageResult | None:
        """Evaluate the new model on clients; it stands also where none of them can evaluate it."""
        messages = list(
            self._strategy.configure_evaluate(number, self._models.served, self._evaluate_config, self._grid)
        )
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
        metrics = self._state.functions.metrics("evaluate_fn", self._evaluate_fn, number, self._models.served)
        if not number:
            self._state.functions.raise_failure()
        if not metrics:
            return {}
        self._result.evaluate_metrics_serverapp[number] = metrics
        return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}


def _finished(attempt: StageAttempt, plan: StagePlan) -> StageResult:
    """Return the result of a stage with enough clients; one that may fail also where its model cannot be solved for."""
    try:
        return attempt.finish()
    except StageFailedError as error:
        if not plan.may_fail:
            raise
        _LOG.warning("%s", error)
        return StageResult(dict(plan.carries), error.report, failed=True)


def _whole(rounds: object) -> int:
    """Return a number of rounds; raises a SettingsError for what is none."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise SettingsError(
            f"num_rounds = {rounds!r}: give the number of rounds, as a whole number that is not negative"
        )
    return rounds


def _is_rolled_back(report: RoundReport) -> bool:
    return any(incident.kind == IncidentKind.rolled_back.name for incident in report.incidents)


def _check_observer(settings: Settings) -> None:
    """Check that the files for the observer can be used; whether it answers is not a condition."""
    try:
        if settings.observer:
            connect(settings.observer, settings.observer_pass).close()
    except AccessError as error:
        raise SettingsError(f"observer = {settings.observer!r}: {error}") from error
