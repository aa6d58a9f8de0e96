"""The loop of a run: each round's stages, its report, its checkpoint.

A round is a bootstrap where clients start on their own, then the fusion, then the clients' evaluation; what
each ends in is the next one's model.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import InitVar, dataclass
from functools import partial
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing
from fedbasin.server.observe.push import Line
from fedbasin.server.run import checkpoint
from fedbasin.server.run.agenda import Agenda
from fedbasin.server.run.checkpoint import Checkpoint
from fedbasin.server.run.hooks import Hooks
from fedbasin.server.run.probe_set import Probing
from fedbasin.server.run.reporter import Measured, Reporter, summary
from fedbasin.server.run.stage_loop import Question, QuorumLostError, StageResult, run_stage
from fedbasin.server.run.streaming_grid import StreamingGrid, available
from fedbasin.strategies.diagnostics.update_cosines import Vector
from fedbasin.strategies.round.round import Next, Planned
from fedbasin.strategies.round.stages import Bootstrap, Evaluate, Fuse
from fedbasin.strategies.tensors.state import State

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


@dataclass(frozen=True, eq=False)
class Result:
    """What a run ended in.

    Attributes:
        model: the global model after the last round.
        reports: of every round, those before a resume included.
        folder: where the model and the reports are.
    """

    model: dict[str, Tensor]
    reports: list[pb.RoundReport]
    folder: Path


@dataclass(frozen=True, eq=False)
class Round:
    """One round, and who can be asked in it.

    Attributes:
        grid: to the clients.
        config: the app's own settings for them.
        number: from 1.
        online: all nodes that are there.
        nodes: those that are asked to train.
    """

    grid: StreamingGrid
    config: ConfigRecord
    number: int
    online: list[int]
    nodes: list[int]


@dataclass(eq=False)
class Run:
    """The state of a run between two rounds.

    Attributes:
        agenda: what it asks.
        reporter: what it says.
        hooks: what the app adds.
        ties: each tensor's name to the first name of the same tensor.
        folder: for checkpoints and reports.
        begun: where it begins, or goes on.
    """

    agenda: Agenda
    reporter: Reporter
    hooks: Hooks
    ties: Mapping[str, str]
    folder: Path
    begun: InitVar[Checkpoint]

    def __post_init__(self, begun: Checkpoint) -> None:
        self.settings = settings = self.agenda.settings
        self.rounds = self.reporter.rounds
        self.done, self.memory = begun.server_round, begun.memory
        self.probing = Probing(
            self.hooks.probe, settings.probe_clients, settings.probe_points, self.folder
        )
        self.recipe = settings.composed
        if begun.handed_over and self.recipe.then is not None:
            self.recipe = self.recipe.then
        self.line = Line(settings.observer, settings.observer_pass)
        # What the round before moved the model by, at a few entries.
        self.movement: Vector | None = None
        self._take(begun.model)

    def _take(self, model: dict[str, Tensor]) -> None:
        """A new global model; hashed once, for the requests that carry it and for the report."""
        self.model, self.digest = model, packing.digest(model)

    def all_rounds(self, grid: StreamingGrid, config: ConfigRecord) -> Result:
        """Every round that is not done yet."""
        with closing(self.line):
            self.probing.check(self.model, self.settings.align)
            if not self.done:
                self._evaluated(0)
            for number in range(self.done + 1, self.rounds + 1):
                self._reported(grid, config, number)
        return Result(self.model, checkpoint.read_reports(self.folder), self.folder)

    def _reported(self, grid: StreamingGrid, config: ConfigRecord, number: int) -> None:
        """One round; the observer is told also of one that fails."""
        try:
            report = self._round(grid, config, number)
        except BaseException as error:  # Flower ends apps with one that is no Exception
            self.probing.stop()
            self._push(self.reporter.failed(number, error))
            raise
        self._finish_round(report)

    def _round(self, grid: StreamingGrid, config: ConfigRecord, number: int) -> pb.RoundReport:
        started = time.perf_counter()
        now = self._begin(grid, config, number)
        results = self._bootstrapped(now)
        planned = self._planned(now, results)
        self._step(number, planned)
        fused = next(result for result in results if result.report.stage == Fuse.name)
        drift = self._moved(fused)
        metrics = dict(fused.metrics)
        if self.settings.fraction_evaluate:
            results.append(self._federated_evaluation(now))
            metrics |= results[-1].metrics
        metrics |= self._evaluated(number)
        probe = self.probing.finish(self.model, fused.nodes)
        seconds = time.perf_counter() - started
        measured = Measured(metrics, drift, probe, self.digest, seconds)
        return self.reporter.finished(number, results, measured)

    def _begin(self, grid: StreamingGrid, config: ConfigRecord, number: int) -> Round:
        """Wait for the nodes and choose among them."""
        online = available(grid, self.settings.nodes, self.settings.wait_timeout_seconds)
        nodes = self.agenda.sampled(online, number, self.settings.fraction_train)
        self.probing.begin(self.model, number)
        return Round(grid, config, number, online, nodes)

    def _bootstrapped(self, now: Round) -> list[StageResult]:
        """The search for an anchor, where the round has one."""
        if not self.agenda.bootstraps(now.number):
            return []
        found = self._bootstrap(now)
        self._take(found.model)
        return [found]

    def _bootstrap(self, now: Round) -> StageResult:
        make = partial(self.agenda.bootstrap, self.model)
        if self.settings.bootstrap != "first":
            return self._ask(now, Next(make, nodes=now.nodes))
        failed = pb.StageReport(stage=Bootstrap.name)
        for node in now.nodes:
            found = self._ask(now, Next(make, nodes=[node], may_fail=True))
            if found.nodes:
                found.report.clients.extend(failed.clients)
                return found
            failed.clients.extend(found.report.clients)
        raise QuorumLostError(failed, needed=1, attempts=self.settings.attempts)

    def _planned(self, now: Round, results: list[StageResult]) -> Planned:
        """Drive the recipe's plan to its end; every stage's result is added to `results`."""
        plan = self.agenda.plan(now.number, self.model, self.recipe)
        step = next(plan)
        while True:
            results.append(self._ask(now, step))
            try:
                step = plan.send(results[-1])
            except StopIteration as end:
                return cast("Planned", end.value)

    def _step(self, number: int, planned: Planned) -> None:
        """The server's step to the round's model, and whether the recipe stays."""
        # A statistic speaks of a tensor under its first name; the others are the same tensor.
        model = {name: planned.model[self.ties[name]] for name in planned.model}
        stepped, self.memory = self.recipe.step(self.model, model, number, self.memory)
        self._take(stepped)
        self._hand_over(number, planned.gain)

    def _hand_over(self, number: int, gain: float | None) -> None:
        """Go over to the recipe that takes over, once fitting no longer pays."""
        then = self.recipe.then
        if then is None or gain is None or gain >= self.recipe.pays:
            return
        _LOG.info(
            "round %d/%d fitting took %.0f %% of the loss away, less than %.0f %%: %s takes over",
            number,
            self.rounds,
            100 * gain,
            100 * self.recipe.pays,
            then.name,
        )
        self.recipe, self.memory = then, {}

    def _moved(self, fused: StageResult) -> pb.Drift | None:
        """How the clients' updates lie to what the round has moved the model by."""
        found = fused.directions and fused.directions.finish(self.model)
        drift, self.movement = found or (None, None)
        return drift

    def _federated_evaluation(self, now: Round) -> StageResult:
        """The clients' metrics of the new model, which stands also where too few could evaluate it."""
        share = self.settings.fraction_evaluate
        nodes = self.agenda.sampled(now.online, now.number, share)
        make = partial(Evaluate, self.model, self.settings.fused_points)
        return self._ask(now, Next(make, nodes=nodes, may_fail=True))

    def _ask(self, now: Round, step: Next) -> StageResult:
        """One stage; one that may fail leaves the model as it is where too few answered."""
        question = Question(
            step.make,
            self.model if step.carries is None else step.carries,
            now.number,
            now.config,
            # Where the round's own nodes are asked, they train.
            self._observe if step.nodes is None else None,
            self.digest if step.carries is None else None,
            self.movement,
        )
        nodes = now.nodes if step.nodes is None else step.nodes
        try:
            result = run_stage(now.grid, question, nodes, self.agenda.budget)
        except QuorumLostError as lost:
            if not step.may_fail:
                raise
            _LOG.warning("round %d/%d %s", now.number, self.rounds, lost)
            return StageResult(self.model, lost.report, {}, pb.PathSums())
        _LOG.info("round %d/%d %s", now.number, self.rounds, summary(result.report))
        return result

    def _observe(self, node: int, parameters: State) -> Mapping[str, float]:
        self.probing.keep(node, parameters)
        return {} if self.hooks.observe is None else self.hooks.observe(node, parameters)

    def _evaluated(self, number: int) -> dict[str, float]:
        if self.hooks.evaluate is None:
            return {}
        return dict(self.hooks.evaluate(number, self.model))

    def _push(self, report: pb.RoundReport) -> None:
        if self.settings.observer:
            self.line.send(report)

    def _finish_round(self, report: pb.RoundReport) -> None:
        # The report first: a round without its model is repeated, a model without its report is not.
        checkpoint.append_report(self.folder, report)
        kept = Checkpoint(
            report.round,
            self.model,
            self.settings.decisive,
            self.memory,
            handed_over=self.recipe.name != self.settings.recipe,
        )
        checkpoint.save(self.folder, kept)
        self._push(report)
