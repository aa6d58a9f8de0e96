"""The finish of RegMean at the size of RoBERTa-base: one factorisation for each input, against an inverse for each layer."""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update
from tests.benchmarks.figures import Figure, Goal, Say, in_fresh_process, median_ratio, peak_resident_bytes

WIDTH, INNER, LAYERS = 768, 3072, 12
READS = dict.fromkeys(("query", "key", "value"), "stream")
READS |= {"output": "attended", "up": "normed", "down": "hidden"}
INPUTS = {"stream": WIDTH, "attended": WIDTH, "normed": WIDTH, "hidden": INNER}
OUTPUTS = {name: INNER if name == "up" else WIDTH for name in READS}
CLIENTS, COUNTS = 8, (4, 8, 16)
REPETITIONS = 3
THREADS = 2
FASTER, GROWTH = 3.0, 0.10
WAYS = {"inverses, float64": torch.float64, "inverses, float32": torch.float32, "fedbasin": None}


CLOSE = {"inverses, float64": 1e-6, "inverses, float32": 1e-2}


class Reply(NamedTuple):
    """What a client sends of one layer of the transformer, in float32: weights, and Gram matrices by what is read."""

    weights: dict[str, Tensor]
    grams: dict[str, Tensor]


class Seconds(NamedTuple):
    """Of one merge: the sums over the clients, of these those for the last client's reply, and all that comes after."""

    sums: float
    last: float
    solve: float


HOW = f"""One of the {LAYERS} layers of a transformer of width {WIDTH} with a feed-forward part of {INNER}; all are alike, so the model
takes {LAYERS} times as long. {CLIENTS} clients send weights and Gram matrices in float32, without biases. The usual way keeps all replies,
and then stacks and sums the Gram matrices of each of six linear maps, sums `W_k G_k` and multiplies by `torch.inverse`.
fedbasin's `Accumulator` adds replies as they come, in float64, and solves with one Cholesky factor for query, key and value. Both make the
same products `W_k G_k`; fedbasin makes them while it waits for other clients, so from the last reply on there is one addition and
`finalize`. Results agree to 1e-6, in float32 to 1e-2. Seconds of the processor, as other work runs beside, on {THREADS} threads together;
{REPETITIONS} times in turns, medians. Operations are counted as 2 for a product and its sum: `2 n^2 m` for a product, `8/3 n^3` for an inverse (LU, then as many right-hand sides as
columns), `n^3 / 3` for a Cholesky factor, `2 n^2 m` for solving with it. What bounds the second goal: 22 Gflop multiply by the inverse or solve
with the factor, which both ways need, and a factorisation of 3072 rows ran at half the rate of a product (21 to 45 Gflop/s). Peak
resident memory is that of a fresh process, less what it needs without replies."""


def measure(say: Say) -> Figure:
    say(f"finish: {CLIENTS} clients")
    found = in_fresh_process("bench_finish", "time", CLIENTS)
    seconds = {way: [Seconds(*each) for each in of] for way, of in found.items()}
    base = in_fresh_process("bench_finish", "fedbasin", 0)
    peaks: dict[str, list[int]] = {}
    for way in ("inverses, float64", "fedbasin"):
        say(f"finish: memory of {way}")
        peaks[way] = [in_fresh_process("bench_finish", way, count) - base for count in COUNTS]
    columns = ("", "sums, s", "then, s", "last reply on, s", "sums, Gflop", "then, Gflop")
    columns += tuple(f"MB, {count} clients" for count in COUNTS)
    rows = [_row(way, of, peaks.get(way)) for way, of in seconds.items()]
    return Figure("The finish of RegMean", HOW, columns, rows, _goals(seconds, peaks["fedbasin"]))


def _row(way: str, of: Sequence[Seconds], peaks: Sequence[int] | None) -> tuple[str, ...]:
    ours = way == "fedbasin"
    medians = (
        statistics.median(each.sums for each in of),
        statistics.median(each.solve for each in of),
        statistics.median(_from_the_last(each, ours=ours) for each in of),
    )
    return (
        way,
        *(f"{value:.2f}" for value in medians),
        f"{CLIENTS * _products() / 1e9:.0f}",
        f"{(_solving() if ours else _inverting()) / 1e9:.0f}",
        *([f"{peak / 1e6:.0f}" for peak in peaks] if peaks else [""] * len(COUNTS)),
    )


def _goals(seconds: Mapping[str, Sequence[Seconds]], peaks: Sequence[int]) -> list[Goal]:
    usual, ours = seconds["inverses, float64"], seconds["fedbasin"]
    last = median_ratio(
        [_from_the_last(each, ours=False) for each in usual], [_from_the_last(each, ours=True) for each in ours]
    )
    solve = median_ratio([each.solve for each in usual], [each.solve for each in ours])
    whole = median_ratio([s.sums + s.solve for s in usual], [s.sums + s.solve for s in ours])
    growth = peaks[-1] / peaks[0] - 1
    return [
        Goal(
            f"from the last reply on at least {FASTER:g} times as fast as inverses in float64",
            f"{last:.1f}; {whole:.1f} with all that was done before",
            last >= FASTER,
        ),
        Goal(
            f"once the sums are there at least {FASTER:g} times as fast",
            f"{solve:.1f}; by operations {_inverting() / _solving():.1f}",
            solve >= FASTER,
        ),
        Goal(
            f"memory grows by less than {GROWTH:.0%} from {COUNTS[0]} clients to {COUNTS[-1]}",
            f"{growth:+.1%}",
            growth < GROWTH,
        ),
    ]


def _from_the_last(seconds: Seconds, *, ours: bool) -> float:
    return (seconds.last if ours else seconds.sums) + seconds.solve


def _products() -> int:
    return sum(2 * OUTPUTS[name] * INPUTS[reads] ** 2 for name, reads in READS.items())


def _inverting() -> float:
    return _products() + sum(8 / 3 * INPUTS[reads] ** 3 for reads in READS.values())


def _solving() -> float:
    return _products() + sum(size**3 / 3 for size in INPUTS.values())


def replies(count: int) -> Iterator[Reply]:
    """Made one by one. Features have a few common directions, and each its own noise."""
    for client in range(count):
        draw = torch.Generator().manual_seed(client)
        weights = {name: torch.randn(OUTPUTS[name], INPUTS[reads], generator=draw) for name, reads in READS.items()}
        factors = {reads: torch.randn(size, 64, generator=draw) for reads, size in INPUTS.items()}
        grams = {reads: x @ x.T + 10 * torch.eye(len(x)) for reads, x in factors.items()}
        yield Reply(weights, grams)


def inverses(kept: Sequence[Reply], dtype: torch.dtype) -> tuple[dict[str, Tensor], Seconds]:
    """The usual way: layer by layer, over all replies."""
    fused, sums, solve = {}, 0.0, 0.0
    for name, reads in READS.items():
        started = time.process_time()
        grams = torch.stack([reply.grams[reads].to(dtype) for reply in kept])
        total = grams.sum(0)
        pairs = zip(kept, grams, strict=True)
        moment = sum((reply.weights[name].to(dtype) @ gram for reply, gram in pairs), torch.zeros(()))
        summed = time.process_time()
        fused[name] = (moment @ torch.inverse(total)).float()
        sums, solve = sums + summed - started, solve + time.process_time() - summed
    return fused, Seconds(sums, sums, solve)


def folded(arriving: Iterator[Reply]) -> tuple[dict[str, Tensor], Seconds]:
    """What a server does: each reply is added, and let go."""
    anchor = {name: torch.zeros(OUTPUTS[name], INPUTS[reads]) for name, reads in READS.items()}
    accumulator, sums, last = Accumulator.zero(anchor), 0.0, 0.0
    for reply in arriving:
        started = time.process_time()
        grams = {reads: Gram(gram.double()) for reads, gram in reply.grams.items()}
        known = {(name,): grams[reads] for name, reads in READS.items()}
        accumulator.add(Update(reply.weights, 1.0, known))
        last = time.process_time() - started
        sums += last
    started = time.process_time()
    fused = accumulator.finalize(anchor)
    return fused, Seconds(sums, last, time.process_time() - started)


def seconds(clients: int) -> dict[str, list[Seconds]]:
    """All ways in turns, each time in another order."""
    kept = list(replies(clients))
    found: dict[str, list[Seconds]] = {way: [] for way in WAYS}
    for repetition in range(REPETITIONS):
        models = {}
        turn = repetition % len(WAYS)
        for way, dtype in [*WAYS.items()][turn:] + [*WAYS.items()][:turn]:
            ours = dtype is None
            models[way], took = folded(iter(kept)) if ours else inverses(kept, dtype)
            found[way].append(took)
        for way, close in CLOSE.items():
            torch.testing.assert_close(models[way], models["fedbasin"], rtol=close, atol=close)
    return found


def main(way: str, clients: int) -> None:
    torch.set_num_threads(THREADS)
    answer: object
    if way == "time":
        answer = seconds(clients)
    elif clients:
        dtype = WAYS[way]
        _ = folded(replies(clients)) if dtype is None else inverses([*replies(clients)], dtype)
        answer = peak_resident_bytes()
    else:
        answer = peak_resident_bytes()
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
