"""Ten replies of 170 MB become one model: Flower's `aggregate_arrayrecords` against receive, accept, finish."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedbasin.proto import packing, plain
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import Request
from fedbasin.server.exchange.receive import receive
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import Fuse
from fedbasin.strategies.tensors.state import State
from tests.accepting import accept
from tests.benchmarks.figures import Figure, Goal, Say, in_fresh_process, median_ratio

REPLIES = 10
BYTES = 170_000_000
REPETITIONS = 7
GROWTH = 1.5  # of each tensor over the one before, where there are twelve
CASES = ((1, "plain"), (12, "plain"), (300, "plain"), (300, "packed"))
GOALS = {"float32": 3.0, "float64": 2.0}

HOW = f"""{REPLIES} replies of {BYTES // 10**6} MB float32, each with bytes of its own, to one averaged model.
Flower: `aggregate_arrayrecords`, which decodes and adds. fedbasin: `receive` (headers and decoding), `accept`
(names, shapes, dtypes, finite values, norms of updates, then the sum) and `finish`, in sums of float32 (`sum = "fast"`) and of
float64 (`"reproducible"`, the default). Both read the same `Message` objects, in turns, {REPETITIONS} times, and must
agree. Plain: one array per tensor, as Flower's own clients reply. Packed: all tensors in one array, as
fedbasin's do. Seconds are medians, ratios medians of neighbours. Flower's result is serialised already and
fedbasin's is not: what packing it for the next round takes stands beside it, and in the ratio in brackets."""


def measure(say: Say) -> Figure:
    rows, ratios = [], {}
    for tensors, layout in CASES:
        case = f"{tensors}, {layout}"
        say(f"fold: {REPLIES} replies of {case}")
        seconds = in_fresh_process("bench_fold", tensors, layout)
        ratios[case] = {kind: median_ratio(seconds["flwr"], seconds[kind]) for kind in GOALS}
        rows.append(_row(case, seconds, ratios[case]))
    goals = [
        Goal(
            f"sums of {kind}: at least {GOALS[kind]:g} times as fast as Flower, in each case",
            "; ".join(f"{case}: {found[kind]:.1f}" for case, found in ratios.items()),
            all(found[kind] >= GOALS[kind] for found in ratios.values()),
        )
        for kind in GOALS
    ]
    times = ("Flower, s", "float32, s", "float64, s", "packing, s")
    columns = ("tensors", *times, "ratio float32", "ratio float64")
    return Figure("Adding replies", HOW, columns, rows, goals)


def _row(case: str, seconds: dict[str, list[float]], ratios: dict[str, float]) -> tuple[str, ...]:
    kinds = ("flwr", *GOALS, "packing")
    medians = {kind: statistics.median(seconds[kind]) for kind in kinds}
    packed = {
        kind: median_ratio(seconds["flwr"], [a + b for a, b in zip(seconds[kind], seconds["packing"], strict=True)])
        for kind in GOALS
    }
    return (
        case,
        *(f"{medians[kind]:.2f}" for kind in kinds),
        *(f"{ratios[kind]:.1f} ({packed[kind]:.1f})" for kind in GOALS),
    )


def sizes(tensors: int) -> list[int]:
    """Elements of each tensor: of very different sizes where there are a dozen."""
    growth = GROWTH if tensors == 12 else 1.0
    shares = growth ** np.arange(tensors)
    return [int(share) for share in shares / shares.sum() * BYTES / 4]


def random_state(tensors: int, seed: int) -> dict[str, Tensor]:
    draw = np.random.default_rng(seed)
    return {
        f"tensor {index}": torch.from_numpy(draw.standard_normal(size, np.float32))
        for index, size in enumerate(sizes(tensors))
    }


class Round:
    """The replies to the request of one round."""

    def __init__(self, tensors: int, layout: str, replies: int = REPLIES) -> None:
        # What Flower sets in the process of a ServerApp; messages cannot be made without.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.anchor = random_state(tensors, 0)
        self.request = replace(
            self.stage(torch.float32).request, round=1, anchor=self.anchor, anchor_digest=packing.digest(self.anchor)
        )
        content = self.request.to_content(packed=True)
        messages = self.request.to_messages(content, range(1, replies + 1))
        self.replies = [self._reply(message, tensors, layout) for message in messages]

    def stage(self, dtype: torch.dtype) -> Fuse:
        return Fuse(self.anchor, RECIPES["fedavg"], Request(""), [], dtype)

    def _reply(self, message: Message, tensors: int, layout: str) -> Message:
        node = message.metadata.dst_node_id
        reply = Reply(
            self.request.round,
            self.request.stage,
            self.request.anchor_digest,
            parameters=random_state(tensors, node),
            examples=50 + node,
        )
        content = reply.to_content(self.request, packed=layout == "packed")
        return Message(content, reply_to=message)

    def flwr(self) -> ArrayRecord:
        return aggregate_arrayrecords([m.content for m in self.replies], "num-examples")

    def fedbasin(self, dtype: torch.dtype) -> dict[str, Tensor]:
        stage = self.stage(dtype)
        for message in self.replies:
            received = receive(message, self.request, 2**31)
            accept(stage, message.metadata.src_node_id, received.update)
        return stage.finish()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def flat(state: State) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def main(tensors: int, layout: str) -> None:
    of_round = Round(tensors, layout)
    ours = of_round.fedbasin(torch.float64)
    torch.testing.assert_close(flat(plain.read_arrays(of_round.flwr())), flat(ours))
    works: dict[str, Callable[[], object]] = {
        "flwr": of_round.flwr,
        "float32": lambda: of_round.fedbasin(torch.float32),
        "float64": lambda: of_round.fedbasin(torch.float64),
        "packing": lambda: packing.pack(ours),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(REPETITIONS):
        for name in list(works)[:: 1 if repetition % 2 else -1]:
            seconds[name].append(_seconds(works[name]))
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
