"""The loop of a run: each round's stages, its report, its checkpoint.

A round is a bootstrap where clients start on their own, then the fusion, then the clients' evaluation; what
each ends in is the next one's model.
"""

import logging
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch
from flwr.app import ConfigRecord
from google.protobuf.timestamp_pb2 import Timestamp
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.server import checkpoint
from fedbasin.server.grid import StreamingGrid, available
from fedbasin.server.paths import variance_message
from fedbasin.server.probing import Probe, Probing
from fedbasin.server.push import Line
from fedbasin.server.rounds import (
    Budget,
    Observe,
    Question,
    QuorumLostError,
    StageResult,
    run_stage,
)
from fedbasin.server.settings import Settings
from fedbasin.strategies.alignment.matcher import Matcher
from fedbasin.strategies.allotment import fit_encodings, fuse_encodings
from fedbasin.strategies.diagnostics.drift import Vector
from fedbasin.strategies.encodings import read_encodings
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.update import Block
from fedbasin.strategies.linking import linked_plan
from fedbasin.strategies.outcome import Outcome
from fedbasin.strategies.plans import Next, Plan, Planned, round_plan
from fedbasin.strategies.stages import Ask, Bootstrap, Evaluate, Fuse, Stage, Start, fusing
from fedbasin.strategies.state import State
from fedbasin.strategies.steps import Memory
from fedbasin.strategies.symmetry.sites import Symmetry

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")

Metrics = Mapping[str, float]


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
class Hooks:
    """What the app may add to a run.

    Attributes:
        evaluate: metrics of each new global model, by round; round 0 is the anchor that a run starts from.
        observe: metrics of one client's accepted model, by node id; called as it is folded.
        score: of a model, lower is better; for `bootstrap = "best"`.
        probe: a probe set of the server's own, on which it compares some accepted clients' models.
    """

    evaluate: Callable[[int, State], Metrics] | None = None
    observe: Observe | None = None
    score: Callable[[State], float] | None = None
    probe: Probe | None = None


def decisive(settings: Settings) -> str:
    """The settings that decide what a run computes; a run can only be resumed with the same."""
    keys = {
        "recipe",
        "fit",
        "step",
        "ridge",
        "shrink",
        "align",
        "start",
        "bootstrap",
        "merge",
        "sum",
        "fraction_train",
        "statistics_budget_bytes",
        "seed",
    }
    return settings.model_dump_json(include=keys)


@dataclass(eq=False)
class Run:
    """The state of a run between two rounds."""

    settings: Settings
    run_id: str
    rounds: int
    symmetry: Symmetry | None
    hooks: Hooks
    blocks: list[Block]
    ties: Mapping[str, str]
    folder: Path
    done: int
    model: dict[str, Tensor]
    memory: Memory = field(default_factory=dict)
    handed_over: bool = False  # to the recipe that follows the settings' own
    layers: Sequence[Layer] = ()  # those whose inputs clients may speak of
    movement: Vector | None = None  # what the round before moved the model by, at a few entries

    def __post_init__(self) -> None:
        settings = self.settings
        self.probing = Probing(
            self.hooks.probe, settings.probe_clients, settings.probe_points, self.folder
        )
        self.recipe = settings.composed
        if self.handed_over and self.recipe.then is not None:
            self.recipe = self.recipe.then
        self.line = Line(settings.observer, settings.observer_pass)
        self._take(self.model)

    def _take(self, model: dict[str, Tensor]) -> None:
        """A new global model; hashed once, for the requests that carry it and for the report."""
        self.model, self.digest = model, packing.digest(model)

    def all_rounds(self, grid: StreamingGrid, config: ConfigRecord) -> Result:
        with closing(self.line):
            return self._all_rounds(grid, config)

    def _all_rounds(self, grid: StreamingGrid, config: ConfigRecord) -> Result:
        self.probing.check(self.model, self.settings.align)
        if not self.done:
            self._evaluated(0)
        for number in range(self.done + 1, self.rounds + 1):
            try:
                report = self._round(grid, number, config)
            except BaseException as error:  # Flower ends apps with one that is no Exception
                self.probing.stop()
                self._push(self._failure(number, error))
                raise
            self._finish_round(report)
        return Result(self.model, checkpoint.read_reports(self.folder), self.folder)

    def _round(self, grid: StreamingGrid, number: int, config: ConfigRecord) -> pb.RoundReport:
        started = time.perf_counter()
        online = available(grid, self.settings.nodes, self.settings.wait_timeout_seconds)
        nodes = self._sampled(online, number, self.settings.fraction_train)
        self.probing.begin(self.model, number)
        results = [*self._bootstrapped(grid, number, config, nodes)]
        planned = self._planned(grid, number, config, nodes, results)
        # A statistic speaks of a tensor under its first name; the others are the same tensor.
        model = {name: planned.model[self.ties[name]] for name in planned.model}
        stepped, self.memory = self.recipe.step(self.model, model, number, self.memory)
        self._take(stepped)
        self._hand_over(number, planned.gain)
        fused = next(result for result in results if result.report.stage == Fuse.name)
        found = fused.directions and fused.directions.finish(self.model)
        drift, self.movement = found or (None, None)
        metrics = dict(fused.metrics)
        if self.settings.fraction_evaluate:
            asked = self._sampled(online, number, self.settings.fraction_evaluate)
            results.append(self._federated_evaluation(grid, number, config, asked))
            metrics |= results[-1].metrics
        metrics |= self._evaluated(number)
        probe = self.probing.finish(self.model, fused.nodes)
        return self._report(number, results, metrics, drift, probe, time.perf_counter() - started)

    def _observe(self, node: int, parameters: State) -> Metrics:
        self.probing.keep(node, parameters)
        return {} if self.hooks.observe is None else self.hooks.observe(node, parameters)

    def _federated_evaluation(
        self, grid: StreamingGrid, number: int, config: ConfigRecord, nodes: list[int]
    ) -> StageResult:
        """The clients' metrics of the new model, which stands also where too few could evaluate it."""
        try:
            points = self.settings.fused_points
            return self._ask(grid, lambda: Evaluate(self.model, points), number, config, nodes)
        except QuorumLostError as lost:
            _LOG.warning("round %d/%d %s", number, self.rounds, lost)
            return StageResult(self.model, lost.report, {}, pb.PathSums())

    def _bootstrapped(
        self, grid: StreamingGrid, number: int, config: ConfigRecord, nodes: list[int]
    ) -> Iterator[StageResult]:
        needed = self.settings.align != "off" and not self._is_paired(number)
        if self._is_own(number) and needed:
            found = self._bootstrap(grid, number, config, nodes)
            self._take(found.model)
            yield found

    def _is_own(self, number: int) -> bool:
        return number == 1 and self.settings.start == "own"

    def _is_paired(self, number: int) -> bool:
        return self._is_own(number) and self.settings.merge != "star"

    def _planned(
        self,
        grid: StreamingGrid,
        number: int,
        config: ConfigRecord,
        nodes: list[int],
        results: list[StageResult],
    ) -> Planned:
        """Drive the recipe's plan to its end; every stage's result is added to `results`."""
        plan = self._plan(number)
        step = next(plan)
        while True:
            asked = nodes if step.nodes is None else list(step.nodes)
            observe = self._observe if step.nodes is None else None
            try:
                found = self._ask(grid, step.make, number, config, asked, observe, step.carries)
            except QuorumLostError as lost:
                if not step.may_fail:
                    raise
                _LOG.warning("round %d/%d %s", number, self.rounds, lost)
                found = StageResult(self.model, lost.report, {}, pb.PathSums())
            results.append(found)
            try:
                step = plan.send(results[-1])
            except StopIteration as end:
                return cast("Planned", end.value)

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

    def _plan(self, number: int) -> Plan:
        settings = self.settings
        if self._is_paired(number):
            link = Ask(
                start=Start.own,
                symmetry=self.symmetry,
                matcher=Matcher[settings.matcher],
                path_points=settings.barrier_points,
                keep=True,
            )
            first = Next(lambda: self._fuse(number))
            return linked_plan(first, self.model, settings.merge, link)
        return round_plan(
            self.model,
            self.recipe,
            lambda: self._fuse(number),
            settings.fit,
            encode=partial(fit_encodings, self.layers, settings.statistics_budget_bytes),
        )

    def _fuse(self, number: int) -> Stage:
        settings, recipe = self.settings, self.recipe
        ask = Ask(
            start=Start.own if self._is_own(number) else Start.shared,
            symmetry=self.symmetry,
            matcher=Matcher[settings.matcher],
            path_points=settings.barrier_points,
            order=recipe.fits,
            # For fits, for links, and for the path that goes with an evaluation.
            keep=recipe.fits or settings.fused_points > 0 or self._is_paired(number),
            encodings=fuse_encodings(recipe, self.layers, settings.statistics_budget_bytes),
            frozen=recipe.frozen(number),
        )
        dtype = torch.float64 if settings.sum == "reproducible" else torch.float32
        # Pairs are aligned to each other, later.
        align = "off" if self._is_paired(number) else settings.align
        return fusing(self.model, recipe, ask, align, self.blocks, dtype)

    def _bootstrap(
        self, grid: StreamingGrid, number: int, config: ConfigRecord, nodes: list[int]
    ) -> StageResult:
        choice, score = self.settings.bootstrap, self.hooks.score

        def make() -> Stage:
            return Bootstrap(self.model, choice, self.symmetry, score)

        if choice != "first":
            return self._ask(grid, make, number, config, nodes)
        failed = pb.StageReport(stage=Bootstrap.name)
        for node in nodes:
            try:
                found = self._ask(grid, make, number, config, [node])
            except QuorumLostError as lost:
                _LOG.warning("round %d/%d %s", number, self.rounds, lost)
                failed.clients.extend(lost.report.clients)
            else:
                found.report.clients.extend(failed.clients)
                return found
        raise QuorumLostError(failed, needed=1, attempts=self.settings.attempts)

    def _ask(
        self,
        grid: StreamingGrid,
        make: Callable[[], Stage],
        number: int,
        config: ConfigRecord,
        nodes: list[int],
        observe: Observe | None = None,
        carries: State | None = None,
    ) -> StageResult:
        settings = self.settings
        budget = Budget(
            settings.round_timeout_seconds,
            settings.quorum,
            settings.attempts,
            settings.max_update_bytes,
            settings.grace_seconds,
            settings.probe_share,
        )
        anchor = self.model if carries is None else carries
        digest = self.digest if carries is None else None
        question = Question(make, anchor, number, config, observe, digest, self.movement)
        result = run_stage(grid, question, nodes, budget)
        _LOG.info("round %d/%d %s", number, self.rounds, summary(result.report))
        return result

    def _sampled(self, online: list[int], number: int, share: float) -> list[int]:
        """The same nodes for the same round, also after a resume."""
        size = max(1, round(share * len(online)))
        return sorted(random.Random(f"{self.settings.seed}/{number}").sample(online, size))  # noqa: S311 - no secret

    def _evaluated(self, number: int) -> dict[str, float]:
        if self.hooks.evaluate is None:
            return {}
        return dict(self.hooks.evaluate(number, self.model))

    def _report(
        self,
        number: int,
        results: list[StageResult],
        metrics: dict[str, float],
        drift: pb.Drift | None,
        probe: pb.ServerProbe | None,
        seconds: float,
    ) -> pb.RoundReport:
        by_stage = {result.report.stage: result for result in results}
        fused, evaluated = by_stage[Fuse.name], by_stage.get(Evaluate.name)
        report = self._heading(number)
        report.MergeFrom(
            pb.RoundReport(
                seconds=seconds,
                stages=[result.report for result in results],
                path=fused.path,
                fused_path=evaluated.path if evaluated else None,
                drift=drift,
                variance=variance_message(evaluated.variance if evaluated else {}),
                probe=probe,
                metrics=metrics,
                model_digest=self.digest,
                peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                last=number == self.rounds,
            )
        )
        return report

    def _failure(self, number: int, error: BaseException) -> pb.RoundReport:
        """What the observer is told of a round that ended the run; the run's folder stays as it was."""
        report = self._heading(number)
        report.problem = f"{type(error).__name__}: {error}"
        if isinstance(error, QuorumLostError):
            report.stages.append(error.report)
        return report

    def _heading(self, number: int) -> pb.RoundReport:
        """What every report of this run says."""
        finished = Timestamp()
        finished.GetCurrentTime()
        return pb.RoundReport(
            schema_version=wire.SCHEMA_VERSION,
            run_id=self.run_id,
            round=number,
            rounds=self.rounds,
            recipe=self.settings.recipe,
            finished=finished,
        )

    def _push(self, report: pb.RoundReport) -> None:
        if self.settings.observer:
            self.line.send(report)

    def _finish_round(self, report: pb.RoundReport) -> None:
        # The report first: a round without its model is repeated, a model without its report is not.
        checkpoint.append_report(self.folder, report)
        kept = checkpoint.Checkpoint(
            report.round,
            self.model,
            decisive(self.settings),
            self.memory,
            handed_over=self.recipe.name != self.settings.recipe,
        )
        checkpoint.save(self.folder, kept)
        self.done = report.round
        self._push(report)


def summary(report: pb.StageReport) -> str:
    """One line about a stage, for the log."""
    outcomes = [client.outcome for client in report.clients]
    accepted = outcomes.count(Outcome.accepted.name)
    refused = ", ".join(sorted({o for o in outcomes if o != Outcome.accepted.name}))
    line = f"{report.stage}: {accepted} of {len(outcomes)} clients in {report.seconds:.1f} s"
    line = f"{line} ({refused})" if refused else line
    forms = Counter(str(e.gram) for e in read_encodings(report.encodings).values())
    sent = ", ".join(f"{count} as {form}" for form, count in forms.items())
    return f"{line}; Gram matrices: {sent}" if sent else line
