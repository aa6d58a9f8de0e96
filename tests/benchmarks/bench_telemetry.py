"""What telemetry takes of the server's time in a round, and what probing barriers takes of a client's."""

import hashlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin.proto.reply import Reply
from fedbasin.proto.report import AlignmentReport, LayerVariance, PathSums, SingularVectors, SpaceReport
from fedbasin.proto.request import Request
from fedbasin.server.exchange import stage_attempt
from fedbasin.server.exchange.stage_attempt import StageAttempt
from fedbasin.server.exchange.update_directions import UpdateDirections
from fedbasin.server.observe.push import ObserverClient
from fedbasin.server.run.reporter import Reporter
from fedbasin.server.run.resumption import checkpoint
from fedbasin.server.run.run_models import RunModels
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.capture.preactivations import preactivation_moments
from fedbasin.strategies.diagnostics.barrier import grid as equally_spaced
from fedbasin.strategies.diagnostics.loss_path import path_losses
from fedbasin.strategies.symmetry.discover.discovery import discover
from tests.benchmarks.bench_observer import observer_process
from tests.benchmarks.figures import Figure, Goal, Say
from tests.benchmarks.grid import PulledGrid

CLIENTS = 10
ROUNDS = 5
RUNS = 3
HIDDEN = 12
WIDTHS = (784, *[1024] * HIDDEN, 10)  # 49 MB
POINTS = 11
EXAMPLES = 512
SHARE = 0.02

HOW = f"""`FedBasin` over {ROUNDS} rounds, the median of {RUNS} runs, with {CLIENTS} clients and a network of 49 MB with {HIDDEN} hidden
layers: once with every diagnostic on (each client reports the alignment of all layers, hidden variances and paths of {POINTS}
points to the anchor and from the fused model), once without alignment and paths; updates are compared in both. The
grid is in the same process and makes each reply's bytes when it is pulled, which does not count. Telemetry is building
the reports, checking and adding the clients' paths, comparing their updates, writing rounds.jsonl and pushing to
`fedbasin observe`, a process of its own on loopback. The rest of the server's work is the anchor's identity bounds, decoding, validating, adding, solving, the model's digest and the
checkpoint. A client's point was timed in turns with an epoch of training of the same network, {EXAMPLES} examples in
batches of 64; a barrier evaluates each point before and after alignment."""

SETTINGS: dict[str, dict[str, object]] = {
    "every diagnostic": {"barrier-points": POINTS, "fused-points": POINTS},
    "no alignment": {"align": "off"},
}

# Where telemetry happens in the server: (row, owner, attribute).
_TELEMETRY = (
    ("reports of clients", StageAttempt, "_describe"),
    ("paths of clients", stage_attempt, "checked_path"),
    ("paths of clients", stage_attempt, "checked_variance"),
    ("paths of clients", PathSums, "__add__"),
    ("directions of updates", UpdateDirections, "__init__"),
    ("directions of updates", UpdateDirections, "add"),
    ("directions of updates", UpdateDirections, "finish"),
    ("report of the round", Reporter, "finished"),
    ("rounds.jsonl", checkpoint, "append_report"),
    ("push", ObserverClient, "send"),
)
# What the server does beside stages: the new model's digest, which the next requests carry and the report repeats, and
# the checkpoint.
_WORK = ((RunModels, "take_round"), (checkpoint, "save"))
_RUNNING: list[str] = []
_ROWS = (*dict.fromkeys(row for row, *_ in _TELEMETRY), "work")


class ReportingGrid(PulledGrid):
    """A grid whose clients report everything that the request asks for."""

    def _answer(self, message: Message) -> Message:
        request = Request.from_message(message.content)
        reply = Reply.from_message(super()._answer(message).content, request)
        if request.aligns:
            digest = hashlib.sha256(request.symmetry.encode()).digest()
            reply = replace(reply, symmetry_digest=digest, alignment=alignment())
        if request.path_points:
            variance = tuple(LayerVariance(f"{2 * i}.weight", 0.5) for i in range(HIDDEN))
            reply = replace(reply, path=path(request.path_points), variance=variance)
        return Message(reply.to_content(request, packed=True), reply_to=message)


def alignment() -> AlignmentReport:
    spaces = [
        SpaceReport(f"{2 * i}.out", certified=False, moved=0.5, gain=1.5, fixed_points=0.5) for i in range(HIDDEN)
    ]
    return AlignmentReport(
        tuple(spaces),
        distance_before=2,
        distance_after=1,
        endpoint_error=0,
        singular_vectors=SingularVectors(0.1, 0.5, measured=2, matrices=HIDDEN),
    )


def path(points: int) -> PathSums:
    curve = (10.0,) * points
    return PathSums(tuple(equally_spaced(points)), curve, curve, curve, curve, examples=10)


def network() -> nn.Sequential:
    layers = [m for i, o in pairwise(WIDTHS) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@contextmanager
def timed(seconds: dict[str, float], row: str, owner: object, name: str) -> Iterator[None]:
    """Add up what the calls of a function take, none of which may be inside of another that is measured."""
    function: Callable[..., object] = getattr(owner, name)

    def measured(*args: object, **more: object) -> object:
        if _RUNNING:
            raise RuntimeError(f"{name} runs inside of {_RUNNING[-1]}, and its time would count twice")
        _RUNNING.append(name)
        began = time.perf_counter()
        try:
            return function(*args, **more)
        finally:
            seconds[row] += time.perf_counter() - began
            _RUNNING.pop()

    with patch.object(owner, name, measured):
        yield


def server_seconds(settings: Mapping[str, object]) -> dict[str, float]:
    """Seconds of a round by what they go to; the rest of the server's work under "work"."""
    model, seconds = network(), defaultdict[str, float](float)
    with ExitStack() as stack:
        observer = stack.enter_context(observer_process())["observer"]
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for row, owner, name in (*_TELEMETRY, *(("work", *place) for place in _WORK)):
            stack.enter_context(timed(seconds, row, owner, name))
        config = {"recipe": "fedavg", "folder": folder, "observer": observer, "packed": True, **settings}
        run_config = {f"fedbasin.{key}": value for key, value in config.items()}
        context = Context(1, 1, {}, RecordDict(), run_config)
        symmetry = discover(model, torch.zeros(1, WIDTHS[0])).symmetry
        strategy = FedBasin(symmetry=symmetry, model=model, context=context)
        start = ArrayRecord(model.state_dict())
        reports = strategy.start(ReportingGrid(CLIENTS), start, ROUNDS).reports
    clients = [c for report in reports for stage in report.stages for c in stage.clients]
    if any(client.outcome != "accepted" for client in clients):
        raise RuntimeError(f"a client was refused: {clients[0].outcome}, {clients[0].detail}")
    inside = sum(seconds[row] for row in ("reports of clients", "paths of clients", "directions of updates"))
    stages = sum(stage.server_seconds for report in reports for stage in report.stages)
    seconds["work"] += stages - inside
    return {row: value / ROUNDS for row, value in seconds.items()}


def client_seconds() -> dict[str, float]:
    """Seconds of one epoch of training, and of what the diagnostics evaluate on the same data."""
    torch.manual_seed(0)
    model, anchor = network(), network().state_dict()
    inputs, targets = torch.randn(EXAMPLES, WIDTHS[0]), torch.randint(10, (EXAMPLES,))
    batches = list(zip(inputs.split(64), targets.split(64), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def train() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()

    def walk() -> None:
        path_losses(model, anchor, model.state_dict(), batches, 3)

    def vary() -> None:
        for state in (anchor, model.state_dict()):
            preactivation_moments(model, state, batches)

    train()
    walk()
    vary()
    turns = [(seconds_of(train), seconds_of(walk) / 3, seconds_of(vary)) for _ in range(RUNS)]
    epoch, point, varied = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    return {
        "an epoch of training": epoch,
        "a point of a path": point,
        "barrier, 3 points": 6 * point,
        f"barrier, {POINTS} points": 2 * POINTS * point,
        "path from the fused model, 3 points": 3 * point,
        "hidden variance, both models": varied,
    }


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(say: Say) -> Figure:
    spent = {}
    for name, settings in SETTINGS.items():
        say(f"telemetry: {RUNS} runs of {ROUNDS} rounds with {CLIENTS} clients, {name}")
        runs = sorted((server_seconds(settings) for _ in range(RUNS)), key=telemetry_share)
        spent[name] = runs[RUNS // 2]
    shares = {name: telemetry_share(seconds) for name, seconds in spent.items()}
    say("telemetry: probing on a client")
    client = client_seconds()
    epoch = client["an epoch of training"]
    rows = [
        *(_server_row(row, [seconds.get(row, 0.0) for seconds in spent.values()]) for row in _ROWS),
        ("server: share of telemetry", *(f"{share:.2%}" for share in shares.values())),
        *(
            (f"client: {name}", f"{1000 * took:.0f}", f"{took / epoch:.0%} of an epoch")
            for name, took in client.items()
        ),
    ]
    worst = max(shares.values())
    goal = Goal(f"less than {SHARE:.0%} of the server's time in a round", f"{worst:.2%}", worst < SHARE)
    return Figure("Telemetry", HOW, ("ms, a round", *SETTINGS), rows, [goal])


def telemetry_share(seconds: Mapping[str, float]) -> float:
    return 1 - seconds["work"] / sum(seconds.values())


def _server_row(name: str, seconds: list[float]) -> tuple[str, ...]:
    return f"server: {name}", *(f"{1000 * value:.1f}" for value in seconds)
