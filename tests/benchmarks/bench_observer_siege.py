"""How an observer answers Prometheus while readers, slow readers, half-sent requests and large reports press on it."""

import asyncio
import multiprocessing as mp
import selectors
import socket
import time
import urllib.parse
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import httpx

from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
from fedbasin.proto.observer_service import RUN_KEY, RemoteObserver
from fedbasin.proto.report import ClientReport, RoundReport, StageReport
from fedbasin.server.observe.push import connect
from tests.benchmarks.bench_observer import memory, observer_process, page, read, report, share
from tests.benchmarks.figures import Figure, Goal, Say

READERS, SLOW, HALF_OPEN = 100, 10, 600
ROUNDS = 400
PAUSE = 0.05  # between two reports, which are otherwise faster than any run
LARGE_CLIENTS = 60_000
FILLING = 22  # large reports that fill the history


@contextmanager
def beside(work, *arguments):
    """Another process, so that it shares no interpreter with the readers; yields the end of its pipe."""
    here, there = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=work, args=(there, *arguments), daemon=True)
    process.start()
    assert here.recv() == "ready"
    try:
        yield here
    finally:
        process.terminate()
        process.join()


def scrape(pipe, url):
    """Scrape twenty times a second until the pipe says stop; answer with the seconds of each."""
    seconds = []
    pipe.send("ready")
    while not pipe.poll(0.05):
        began = time.perf_counter()
        page(url)
        seconds.append(time.perf_counter() - began)
    pipe.send(seconds)


def hold_half_open(pipe, url):
    """Hold connections whose request never ends, and open new ones for those that are closed."""
    address = urllib.parse.urlsplit(url)
    held = selectors.DefaultSelector()
    pipe.send("ready")
    while not pipe.poll(0):
        while len(held.get_map()) < HALF_OPEN:
            peer = socket.create_connection((address.hostname, address.port), 10)
            peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ")
            held.register(peer, selectors.EVENT_READ)
        for key, _ in held.select(timeout=0.1):  # nothing but the end is ever to be read
            held.unregister(key.fileobj)
            key.fileobj.close()


def push_large(pipe, address):
    """Push large reports one after the other; answer with their number and those that were refused."""
    clients = tuple(ClientReport(i, "accepted", detail="x" * 200) for i in range(LARGE_CLIENTS))
    large = RoundReport("large", 1, rounds=9, recipe="fedavg", stages=(StageReport("fuse", clients=clients),))
    message = large.to_message()
    taken, refused = 0, 0
    with connect(address) as channel:
        stub = ObserverStub(channel)

        def push():
            message.round += 1
            try:
                stub.PushRound(message, timeout=120, metadata=((RUN_KEY, "k" * 32),))
            except grpc.RpcError:
                return False
            return True

        for _ in range(FILLING):
            assert push()
        pipe.send("ready")
        while not pipe.poll(0):
            good = push()
            taken, refused = taken + good, refused + (not good)
    pipe.send((taken, refused))


async def read_events(url, pause):
    """One reader of events on a connection of its own: the rounds in the order in which it saw them."""
    seen = []
    async with (
        httpx.AsyncClient(timeout=60, trust_env=False) as client,
        client.stream("GET", f"{url}api/runs/load/events") as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                seen.append(int(line[4:]))
                await asyncio.sleep(pause)
    return seen


def push_slowly(address):
    """Push a round every twentieth of a second: seconds of each."""
    seconds = []
    with connect(address) as channel:
        observer = RemoteObserver(channel)
        for number in range(1, ROUNDS + 1):
            told = report(number, "load", last=number == ROUNDS)
            began = time.perf_counter()
            observer.push_round(told, timeout=60)
            seconds.append(time.perf_counter() - began)
            time.sleep(PAUSE)
    return seconds


async def push_to_readers(addresses):
    """Push while half of the readers watch over gRPC and half read events; the slow ones take a tenth of a second each."""
    pushing = asyncio.create_task(asyncio.to_thread(push_slowly, addresses["observer"]))
    await asyncio.sleep(1)  # a run must have reported before its events can be read
    readers = [
        (read(addresses["observer"], pause), read_events(addresses["page"], pause))
        for pause in [0] * (READERS // 2) + [0.1] * (SLOW // 2)
    ]
    views = await asyncio.gather(*(view for pair in readers for view in pair))
    return await pushing, views


@dataclass(frozen=True)
class Siege:
    """What one load did to the observer: seconds of pushes and scrapes, readers that missed a round, megabytes."""

    name: str
    pushes: list[float]
    scrapes: list[float]
    lost: int
    large: tuple[int, int]
    memory: tuple[float, float]

    def row(self) -> tuple[str, ...]:
        return (
            self.name,
            f"{share(self.pushes, 50):.1f} / {share(self.pushes, 99):.1f}",
            f"{share(self.scrapes, 50):.1f} / {share(self.scrapes, 99):.1f}",
            str(self.lost),
            "{} / {}".format(*self.large),
            "{:.0f} to {:.0f}".format(*self.memory),
        )


def quiet() -> Siege:
    """Nobody but a pusher and a scraper, on a full history."""
    with observer_process() as addresses:
        with beside(push_large, addresses["observer"]) as pusher:
            pusher.send("stop")
            pusher.recv()
        before = memory(addresses["metrics"])
        with beside(scrape, addresses["metrics"]) as scraper:
            pushes = push_slowly(addresses["observer"])
            scraper.send("stop")
            scrapes = scraper.recv()
        return Siege("nobody else", pushes, scrapes, 0, (0, 0), (before, memory(addresses["metrics"])))


def besieged() -> Siege:
    """Everybody at once, on a full history."""
    with observer_process() as addresses, beside(push_large, addresses["observer"]) as pusher:
        before = memory(addresses["metrics"])
        with beside(hold_half_open, addresses["metrics"]), beside(scrape, addresses["metrics"]) as scraper:
            pushes, views = asyncio.run(push_to_readers(addresses))
            scraper.send("stop")
            scrapes = scraper.recv()
            pusher.send("stop")
            large = pusher.recv()
        after = memory(addresses["metrics"])
    lost = sum(view != list(range(1, ROUNDS + 1)) for view in views)
    return Siege("all of them", pushes, scrapes, lost, large, (before, after))


def measure(say: Say) -> Figure:
    """Scrapes, pushes and memory without anybody else, and with all who press on an observer."""
    say("siege: nobody else")
    alone = quiet()
    say(f"siege: {READERS} readers, {SLOW} slow ones, {HALF_OPEN} half-sent requests, and large reports")
    crowded = besieged()
    growth = crowded.memory[1] / crowded.memory[0] - 1
    return Figure(
        "The observer besieged",
        f"`fedbasin observe` as a process with a full history. A run pushes {ROUNDS} rounds, one every "
        f"{1000 * PAUSE:.0f} ms, and somebody scrapes. `all of them`: {READERS} readers, {SLOW} that take a tenth of a second "
        f"for each round, half of both over gRPC and half of events over HTTP; {HALF_OPEN} half-sent requests, held and "
        f"opened anew when they are closed; and another run that pushes reports of {LARGE_CLIENTS} clients without a "
        "pause. All share the two cores with the observer.",
        (
            "",
            "push median / p99, ms",
            "scrape median / p99, ms",
            "readers that lost a round",
            "large reports taken / refused",
            "memory, MB",
        ),
        [alone.row(), crowded.row()],
        [
            Goal(
                "p99 of a scrape below 100 ms", f"{share(crowded.scrapes, 99):.0f} ms", share(crowded.scrapes, 99) < 100
            ),
            Goal("no reader loses a round", str(crowded.lost), not crowded.lost),
            Goal("no large report is refused", str(crowded.large[1]), not crowded.large[1]),
            Goal("memory grows by less than 10 %", f"{growth:+.1%}", growth < 0.1),
        ],
    )
