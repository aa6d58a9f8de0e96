"""How an observer bears many readers: pushes, watches and scrapes at once."""

import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field

from grpc import aio

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
from fedbasin.proto.observer_service import RemoteObserver
from fedbasin.proto.report import AlignmentReport, ClientReport, RoundReport, SpaceReport, StageReport
from fedbasin.server.observe.push import connect
from tests.benchmarks.figures import Figure, Goal, Say

ROUNDS = 1000
READERS = 100
SLOW_READERS = 10  # of these, beside the others: one report every tenth of a second
CLIENTS = 50
KEPT_ROUNDS = 2000  # the history's own limit


@contextmanager
def observer_process():
    """`fedbasin observe` as a user starts it; yields its addresses."""
    command = [sys.executable, "-m", "fedbasin.server.cli", "observe", "--json"]
    process = subprocess.Popen([*command, "--port", "0", "--metrics-port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)


def report(number, run, last=False):
    """What a round of fifty clients with an aligned model each says: about 10 kB."""
    spaces = tuple(SpaceReport(f"layer.{i}", False, 0.5, 1.5) for i in range(4))
    alignment = AlignmentReport(spaces, distance_before=2, distance_after=1)
    clients = tuple(
        ClientReport(2**60 + i, "accepted", bytes_up=10**6, seconds=2, alignment=alignment) for i in range(CLIENTS)
    )
    stage = StageReport("fuse", 3, 0.1, clients)
    return RoundReport(run, number, rounds=ROUNDS, recipe="fedavg", stages=(stage,), last=last)


@dataclass
class Scraper(threading.Thread):
    """Scrapes without a pause but for a twentieth of a second."""

    url: str
    seconds: list[float] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self):
        while not self.stop.wait(0.05):
            began = time.perf_counter()
            page(self.url)
            self.seconds.append(time.perf_counter() - began)


def page(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def memory(url):
    """The observer's resident memory, MB, in its own words."""
    (line,) = [x for x in page(url).splitlines() if x.startswith("process_resident_memory_bytes ")]
    return float(line.split()[1]) / 1e6


async def read(address, pause):
    """One reader on a channel of its own: the rounds in the order in which it saw them."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    seen = []
    async with aio.insecure_channel(address, options) as channel:
        request = pb.RoundsRequest(run_id="load")
        async for one in ObserverStub(channel).WatchRounds(request):
            seen.append(one.round)
            if pause:
                await asyncio.sleep(pause)
    return seen


def push_all(address, rounds, run="load"):
    """Seconds of each push, one after the other."""
    seconds = []
    with connect(address) as channel:
        observer = RemoteObserver(channel)
        for number in range(1, rounds + 1):
            one = report(number, run, last=number == rounds)
            began = time.perf_counter()
            observer.push_round(one, timeout=60)
            seconds.append(time.perf_counter() - began)
    return seconds


async def push_to(addresses, readers, slow):
    """Pushes while all of them read, and waits until the last has the last."""
    watching = [asyncio.create_task(read(addresses["observer"], 0)) for _ in range(readers)]
    lagging = [asyncio.create_task(read(addresses["observer"], 0.1)) for _ in range(slow)]
    await asyncio.sleep(1)
    seconds = await asyncio.to_thread(push_all, addresses["observer"], ROUNDS)
    lag = time.perf_counter()
    views = await asyncio.gather(*watching)
    lag = time.perf_counter() - lag
    for task in lagging:
        task.cancel()
    await asyncio.gather(*lagging, return_exceptions=True)
    return seconds, views, lag


def share(seconds, percent):
    """A percentile, in milliseconds."""
    return 1000 * statistics.quantiles(seconds, n=100)[percent - 1]


@dataclass(frozen=True)
class Load:
    """What one load did to the observer: milliseconds, megabytes, and readers that missed something."""

    readers: int
    slow: int
    push: tuple[float, float]
    scrape: tuple[float, float]
    lost: int
    memory: tuple[float, float]

    def row(self) -> tuple[str, ...]:
        return (
            f"{self.readers} readers, {self.slow} slow",
            "{:.1f} / {:.1f}".format(*self.push),
            "{:.1f} / {:.1f}".format(*self.scrape),
            str(self.lost),
            "{:.0f} to {:.0f}".format(*self.memory),
        )


def load(readers: int, slow: int) -> Load:
    with observer_process() as addresses:
        before = memory(addresses["metrics"])
        scraper = Scraper(addresses["metrics"])
        scraper.start()
        seconds, views, _ = asyncio.run(push_to(addresses, readers, slow))
        scraper.stop.set()
        scraper.join()
        after = memory(addresses["metrics"])
    lost = sum(view != list(range(1, ROUNDS + 1)) for view in views)
    push = (share(seconds, 50), share(seconds, 99))
    scrape = (share(scraper.seconds, 50), share(scraper.seconds, 99))
    return Load(readers, slow, push, scrape, lost, (before, after))


def beyond_the_limit() -> list[float]:
    """Memory where the history is full and goes on forgetting, MB after each full length."""
    with observer_process() as addresses:
        sizes = []
        with connect(addresses["observer"]) as channel:
            for number in range(1, 3 * KEPT_ROUNDS + 1):
                RemoteObserver(channel).push_round(report(number, "long"), timeout=60)
                if number % KEPT_ROUNDS == 0:
                    sizes.append(memory(addresses["metrics"]))
    return sizes


def measure(say: Say) -> Figure:
    """Pushes, scrapes and memory without readers, with a hundred, and with ten slow ones beside them."""
    loads = []
    for readers, slow in ((0, 0), (READERS, 0), (READERS, SLOW_READERS)):
        say(f"observer: {ROUNDS} reports, {readers} readers, {slow} slow")
        loads.append(load(readers, slow))
    say("observer: a history beyond its limit")
    sizes = beyond_the_limit()
    growth = sizes[-1] / sizes[0] - 1
    crowded = loads[1]
    return Figure(
        "The observer under many readers",
        f"`fedbasin observe` as a process, {ROUNDS} reports of {len(report(1, 'load').to_bytes())} bytes pushed one after "
        "the other while all read and somebody scrapes; readers and pusher share the two cores with it. Memory of a "
        f"full history after {KEPT_ROUNDS}, {2 * KEPT_ROUNDS} and {3 * KEPT_ROUNDS} reports of one run: "
        f"{', '.join(f'{size:.0f}' for size in sizes)} MB.",
        ("", "push median / p99, ms", "scrape median / p99, ms", "readers that lost a report", "memory, MB"),
        [one.row() for one in loads],
        [
            Goal("no reader loses a report", f"{sum(one.lost for one in loads)}", not any(x.lost for x in loads)),
            Goal("p99 of a scrape below 50 ms with 100 readers", f"{crowded.scrape[1]:.0f} ms", crowded.scrape[1] < 50),
            Goal("memory of a full history grows by less than 5 %", f"{growth:+.1%}", growth < 0.05),
        ],
    )
