"""The cost of robust rules beside a sum: seconds of the processor, and memory by the number of clients."""

import json
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch

from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.rules.robust.robust_accumulator import RobustAccumulator
from fedbasin.strategies.fusion.rules.robust.robust_rules import COUNTED, ROBUST_RULES, robust_rule
from fedbasin.strategies.fusion.spool import SpoolFiles
from fedbasin.strategies.fusion.update import Update
from tests.benchmarks.figures import Figure, Goal, Say, in_fresh_process, peak_resident_bytes

LAYERS, WIDTH = 4, 1024
COUNTS = (11, 33)
GROWTH = 0.25

HOW = f"""A model of {LAYERS} matrices of {WIDTH} x {WIDTH} in float32, {LAYERS * WIDTH**2 * 4 / 1e6:.0f} MB, from {COUNTS[0]} and from {COUNTS[1]} clients. `sum` is the `Accumulator` of plain
averaging. The rules are told of two hostile clients where they are told a number. Seconds of the processor on one thread, of all
clients together: for adding the replies, which robust rules write to a file, and for the end of the stage. Peak resident memory is that of a fresh
process, less what it needs without clients."""


def measure(say: Say) -> Figure:
    base = in_fresh_process("bench_robust", "sum", 0)[2]
    rows, growth = [], {}
    for name in ("sum", *ROBUST_RULES):
        say(f"robust: {name}")
        runs = [in_fresh_process("bench_robust", name, count) for count in COUNTS]
        peaks = [run[2] - base for run in runs]
        growth[name] = peaks[1] / peaks[0] - 1
        seconds = (f"{value:.1f}" for run in runs for value in run[:2])
        rows.append((name, *seconds, *(f"{peak / 1e6:.0f}" for peak in peaks)))
    columns = tuple(f"{what}, {count} clients" for count in COUNTS for what in ("adding, s", "end, s"))
    columns += tuple(f"MB, {count} clients" for count in COUNTS)
    most = max(growth, key=growth.__getitem__)
    goal = Goal(
        f"memory of every rule grows by at most {GROWTH:.0%} from {COUNTS[0]} to {COUNTS[1]} clients",
        f"{growth[most]:.0%} ({most})",
        growth[most] <= GROWTH,
    )
    return Figure("Robust rules", HOW, ("", *columns), rows, [goal])


def _updates(clients: int) -> Iterator[Update]:
    for client in range(clients):
        draw = torch.Generator().manual_seed(client)
        yield Update({f"{n}": torch.rand(WIDTH, WIDTH, generator=draw) for n in range(LAYERS)}, 100.0)


def _run(name: str, clients: int) -> tuple[float, float, int]:
    torch.set_num_threads(1)
    anchor = {f"{n}": torch.zeros(WIDTH, WIDTH) for n in range(LAYERS)}
    make = partial(Accumulator.zero, anchor)
    if name != "sum":
        rule = robust_rule(name, 2 if name in COUNTED else 0)
        make = partial(RobustAccumulator, anchor, rule, SpoolFiles().open())
    accumulator, adding = make(), 0.0
    for update in _updates(clients):
        began = time.process_time()
        accumulator.add(update)
        adding += time.process_time() - began
    began = time.process_time()
    if clients:
        accumulator.finalize(anchor)
    return adding, time.process_time() - began, peak_resident_bytes()


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], int(sys.argv[2]))))
