"""Stages of real rounds with the replies of honest clients, and one of the replies mutated."""

import copy
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

import torch
from flwr.app import Message

from fedbasin.proto.report import ClientReport
from fedbasin.server.exchange.cohort import Cohort
from fedbasin.server.exchange.quorum import StageFailedError
from fedbasin.server.exchange.stage_attempt import StageAttempt
from fedbasin.server.exchange.streaming_grid import NodeReply
from fedbasin.strategies.fusion.spool import SpoolFiles
from fedbasin.strategies.judging.finite_model import changed, check_finite
from fedbasin.strategies.judging.outcomes import Outcome
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.tensors.state import State
from tests import running, tiny
from tests.fuzz.mutations import mutate

CLIENTS = 4
# Larger replies are refused; nothing that a reply claims may make the server allocate more than twice as much.
MOST_BYTES = 2**20


def _valid(recipe: str, align: str) -> bool:
    try:
        RECIPES[recipe].check_align(align)
    except ValueError:
        return False
    return True


RUNS: dict[str, dict[str, object]] = {
    f"{recipe} {align}": {"recipe": recipe, "align": align}
    for recipe in tiny.OF_ANY_MODEL
    for align in ("off", "client", "server")
    if _valid(recipe, align)
}
RUNS |= {
    "regmean in cheaper forms": {"recipe": "regmean", "align": "off", "statistics_budget_bytes": 400},
    "features in cheaper forms": {"recipe": "features", "align": "off", "statistics_budget_bytes": 400},
    "independent starts": {"recipe": "fedavg", "align": "client", "start": "own"},
    "pairs": {"recipe": "fedavg", "align": "client", "start": "own", "merge": "chain"},
    "the path from the fused model": {"recipe": "fedavg", "align": "client", "fused_points": 3},
    "packed": {"recipe": "fedavg", "align": "client", "packed": True},
    "fast sums": {"recipe": "fedavg", "align": "off", "sum": "fast"},
    "adapters' bounds off": {"recipe": "regmean", "align": "off", "bounds": False},
}


@dataclass(frozen=True, eq=False)
class RecordedStage:
    """A stage with the replies that it received.

    Attributes:
        attempt: the attempt, before its first reply.
        replies: the replies of honest clients.
    """

    attempt: StageAttempt
    replies: list[NodeReply]

    def run(self, replies: list[NodeReply]) -> tuple[list[ClientReport], State | None]:
        """Return the outcomes of some replies, and the stage's model; None where too few replies give one."""
        attempt = copy.copy(self.attempt)
        attempt._clients, attempt._cohort, attempt._candidates = {}, Cohort(SpoolFiles()), {}
        attempt._begin_sum()
        attempt.add_all(iter(replies))
        if not attempt.accepted:
            return list(attempt.report().clients), None
        try:
            result = attempt.finish()
        except StageFailedError as error:
            return list(error.report.clients), None
        return list(result.report.clients), result.model


@contextmanager
def _recording(stages: list[RecordedStage]) -> Iterator[None]:
    original = StageAttempt.add_all

    def add_all(attempt: StageAttempt, replies: Iterator[NodeReply]) -> None:
        received = list(replies)
        stages.append(RecordedStage(copy.copy(attempt), received))
        original(attempt, iter(received))

    with mock.patch.object(StageAttempt, "add_all", add_all):
        yield


@cache
def record(run: str) -> list[RecordedStage]:
    """Return the stages of one round of a run."""
    settings = RUNS[run]
    stages: list[RecordedStage] = []
    with tempfile.TemporaryDirectory() as folder, _recording(stages):
        points = 0 if settings.get("merge") else 3
        federation = tiny.federation(
            CLIENTS, folder=folder, barrier_points=points, max_update_bytes=MOST_BYTES, **settings
        )
        symmetry = None if settings["align"] == "off" else tiny.symmetry()
        running.run(federation, tiny.net(), symmetry=symmetry)
    return [stage for stage in stages if any(reply.message is not None for reply in stage.replies)]


def try_reply(run: str, place: int, seed: int) -> str:
    """Mutate one reply of a stage, as the seed says, and check what must hold; return the outcome of the reply.

    Args:
        run: the run.
        place: place of the stage in the run's round.
        seed: seed of the mutation.
    """
    rng = random.Random(f"{run}/{place}/{seed}")
    stage = record(run)[place]
    victim = rng.randrange(len(stage.replies))
    reply = stage.replies[victim]
    assert reply.message is not None
    message = object.__new__(Message)
    message.__dict__.update(reply.message.__dict__)
    message.__dict__["_content"] = mutate(rng, reply.message.content)
    replies = [*stage.replies]
    replies[victim] = replace(reply, message=message)
    clients, model = stage.run(replies)
    (client,) = [client for client in clients if client.node_id == reply.node_id]
    _check_report(client, len(clients), len(replies))
    if model is not None:
        check_finite(changed(model, stage.attempt._anchor), "the model", stage.attempt._anchor)
    if not client.is_accepted and len(replies) > 1:
        _check_untouched(run, place, victim, clients, model)
    return client.outcome


def _check_report(client: ClientReport, reports: int, replies: int) -> None:
    assert reports == replies
    assert client.outcome in Outcome.__members__
    assert client.outcome != Outcome.not_handled.name, client.detail
    assert client.is_accepted or client.detail, client.outcome
    assert len(client.detail) < 10_000


@cache
def _without(run: str, place: int, left_out: frozenset[int]) -> State | None:
    stage = record(run)[place]
    return stage.run([reply for reply in stage.replies if reply.node_id not in left_out])[1]


def _check_untouched(run: str, place: int, victim: int, clients: list[ClientReport], model: State | None) -> None:
    """Check that a refused reply leaves the model as it is without the client, to the bit."""
    refused = frozenset(client.node_id for client in clients if not client.is_accepted)
    expected = _without(run, place, refused)
    assert (model is None) == (expected is None)
    if model is not None and expected is not None:
        for name, tensor in expected.items():
            assert torch.equal(model[name], tensor), name


def count_outcomes(run: str, tries: int, first_seed: int) -> Counter[str]:
    """Mutate replies of all stages of a run in turn, and count the outcomes."""
    stages = len(record(run))
    return Counter(try_reply(run, seed % stages, first_seed + seed) for seed in range(tries))
