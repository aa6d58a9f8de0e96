"""The ServerApp's peak memory with 3 and with 30 clients of 100 MB, through fedbasin and through Flower's FedAvg."""

import json
import sys
import tempfile

import numpy as np
from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedbasin.server.strategy import FedBasin
from tests.benchmarks.figures import Figure, Goal, Say, in_fresh_process, peak_resident_bytes
from tests.benchmarks.grid import PulledGrid

CLIENTS = (3, 30)
BYTES = 100_000_000
ROUNDS = 2
GROWTH = 0.10

HOW = f"""Peak resident memory of a fresh process that runs {ROUNDS} rounds over clients with models of {BYTES // 10**6} MB, less
what the process needs with a model of four bytes. Not a deployment, because 30 SuperNodes do not fit the machine: a
grid in the same process makes each reply's bytes when it is pulled and keeps none. fedbasin: `FedBasin` with checkpoints
and float64 sums. Flower: `FedAvg().start`, whose grids collect the replies in a list. What Flower's transport itself
needs comes on top for both."""


def measure(say: Say) -> Figure:
    peaks = {}
    for strategy in ("fedbasin", "FedAvg"):
        base = in_fresh_process("bench_memory", strategy, CLIENTS[0], 4)
        for clients in CLIENTS:
            say(f"memory: {strategy} with {clients} clients")
            peak = in_fresh_process("bench_memory", strategy, clients, BYTES)
            peaks[strategy, clients] = peak - base
    rows = [
        (
            strategy,
            *(f"{peaks[strategy, clients] / 1e6:.0f}" for clients in CLIENTS),
            *(f"{peaks[strategy, clients] / BYTES:.1f}" for clients in CLIENTS),
            f"{_growth(peaks, strategy):+.0%}",
        )
        for strategy in ("fedbasin", "FedAvg")
    ]
    few, many = CLIENTS
    columns = (
        "",
        *(f"{clients} clients, MB" for clients in CLIENTS),
        *(f"{clients} clients, models" for clients in CLIENTS),
        "growth",
    )
    growth = _growth(peaks, "fedbasin")
    goal = Goal(
        f"less than {GROWTH:.0%} more with {many} clients than with {few}",
        f"{growth:+.1%}; Flower's FedAvg {_growth(peaks, 'FedAvg'):+.0%}",
        growth < GROWTH,
    )
    return Figure("Memory of the ServerApp", HOW, columns, rows, [goal])


def _growth(peaks: dict[tuple[str, int], int], strategy: str) -> float:
    few, many = (peaks[strategy, clients] for clients in CLIENTS)
    return many / few - 1


def run_fedbasin(grid: PulledGrid, start: ArrayRecord) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "fedbasin.align": "off",
            "fedbasin.fraction-evaluate": 0.0,
            "fedbasin.folder": folder,
            "fedbasin.packed": True,
        }
        strategy = FedBasin(context=Context(1, 1, {}, RecordDict(), config))
        strategy.start(grid, start, ROUNDS)


def run_fedavg(grid: PulledGrid, start: ArrayRecord) -> None:
    FedAvg(fraction_evaluate=0.0).start(grid, start, num_rounds=ROUNDS)


def main(strategy: str, clients: int, size: int) -> None:
    start = ArrayRecord({"weights": Array(np.zeros(size // 4, np.float32))})
    run = {"fedbasin": run_fedbasin, "FedAvg": run_fedavg}[strategy]
    run(PulledGrid(clients), start)
    sys.stdout.write(json.dumps(peak_resident_bytes()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
