"""RoBERTa-base: matching of all layers against the plain way, near the anchor and unrelated, and against folding."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State, distance
from tests.benchmarks.figures import Figure, Goal, Say, in_fresh_process, median_ratio
from tests.strategies.symmetry.by_hand.families import family

LAYERS, HEADS, WIDTH = 12, 12, 768
SIZE = WIDTH // HEADS
NOISE = 0.1  # of each tensor's own scale
REPETITIONS = {"unrelated": 2, "near": 5}
GOALS = {"unrelated": 2.5, "near": 20.0}
REPLIES = 3
Tensors = dict[str, Tensor]

HOW = f"""Models of RoBERTa-base's shape ({LAYERS} layers, {WIDTH} wide, {HEADS} heads, feed-forward 3072) with random
weights; the residual stream is left as it is, so every space is independent and both ways end in the same
distance, which is checked. The client is another random model, or the anchor with noise of {NOISE:.0%} of each
tensor's scale. Plain: for each layer the score matrix of the feed-forward units, SciPy's `linear_sum_assignment`, units
permuted by products with the permutation matrix; for the heads loops over pairs of heads, a singular value
decomposition each. fedbasin: `match_weights`, near the anchor with the identity bounds, which cost the server once
a round what the last row says; the reports are made in both cases. In turns; seconds are medians, ratios medians
of neighbours. Flower: `aggregate_arrayrecords` over {REPLIES} replies of that size, per reply; beside it
`match_weights` and adding to the float64 sum, per reply."""


def measure(say: Say) -> Figure:
    found = {}
    for kind in REPETITIONS:
        say(f"matching: {LAYERS} layers, {kind}")
        found[kind] = in_fresh_process("bench_matching", kind)
    ratios = {k: median_ratio(found[k]["plain"], found[k]["fedbasin"]) for k in REPETITIONS}
    near = found["near"]
    against_flwr = median_ratio(near["flwr"], near["folded"])
    rows = [_row(kind, found[kind], ratios[kind]) for kind in REPETITIONS]
    rows.append(
        (
            "near, aligned and added against Flower's sum",
            _median(near["flwr"]),
            _median(near["folded"]),
            f"{against_flwr:.2f}",
        )
    )
    rows.append(("identity bounds, once a round", "", _median(near["bounds"]), ""))
    goals = [
        Goal(f"{kind}: at least {goal:g} times as fast", f"{ratios[kind]:.1f} times", ratios[kind] >= goal)
        for kind, goal in GOALS.items()
    ]
    goals.append(
        Goal(
            "near: aligning and adding no slower than Flower's sum alone",
            f"{against_flwr:.2f} times as fast",
            against_flwr >= 1,
        )
    )
    columns = ("client", "plain, s", "fedbasin, s", "ratio")
    return Figure("Matching all layers of RoBERTa-base", HOW, columns, rows, goals)


def _median(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f}"


def _row(kind: str, seconds: dict[str, list[float]], ratio: float) -> tuple[str, ...]:
    return kind, _median(seconds["plain"]), _median(seconds["fedbasin"]), f"{ratio:.1f}"


def models(kind: str) -> tuple[Symmetry, Tensors, Tensors]:
    """The symmetry, the anchor and a client."""
    torch.manual_seed(0)
    config = RobertaConfig(num_hidden_layers=LAYERS)
    anchor = dict(RobertaModel(config).state_dict())
    symmetry = family("roberta", config, anchor, residual=False)
    return symmetry, anchor, {name: _drawn(kind, tensor) for name, tensor in anchor.items()}


def _drawn(kind: str, tensor: Tensor) -> Tensor:
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor.clone()
    noise = tensor.std() * torch.randn_like(tensor)
    return noise if kind == "unrelated" else tensor + NOISE * noise


def plain(anchor: State, client: State) -> Tensors:
    """All layers the plain way."""
    state = dict(client)
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}."
        _plain_feed_forward(anchor, state, prefix)
        _plain_heads(anchor, state, f"{prefix}attention.")
    return state


def _plain_feed_forward(anchor: State, state: Tensors, prefix: str) -> None:
    up, bias, down = (
        f"{prefix}{name}" for name in ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight")
    )
    score = anchor[up] @ state[up].T + anchor[down].T @ state[down]
    score += torch.outer(anchor[bias], state[bias])
    order = linear_sum_assignment(score.numpy(), maximize=True)[1]
    permutation = torch.eye(len(order))[order]
    state[up], state[bias] = permutation @ state[up], permutation @ state[bias]
    state[down] = state[down] @ permutation.T


def _plain_heads(anchor: State, state: Tensors, prefix: str) -> None:
    queries, keys, values = (f"{prefix}self.{name}.weight" for name in ("query", "key", "value"))
    output = f"{prefix}output.dense.weight"
    rows = [slice(head * SIZE, (head + 1) * SIZE) for head in range(HEADS)]
    turns: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    gains = torch.zeros(HEADS, HEADS)
    for i, ours in enumerate(rows):
        for j, theirs in enumerate(rows):
            of_queries = anchor[queries][ours] @ state[queries][theirs].T
            of_queries += anchor[keys][ours] @ state[keys][theirs].T
            of_values = anchor[values][ours] @ state[values][theirs].T
            of_values += anchor[output][:, ours].T @ state[output][:, theirs]
            found = [torch.linalg.svd(score) for score in (of_queries, of_values)]
            gains[i, j] = sum(sizes.sum() for _, sizes, _ in found)
            turns[i, j] = (found[0][0] @ found[0][2], found[1][0] @ found[1][2])
    order = linear_sum_assignment(gains.numpy(), maximize=True)[1]
    old = {name: state[name] for name in (queries, keys, values, output)}
    for name in (queries, keys, values):
        role = int(name == values)
        state[name] = torch.cat([turns[i, j][role] @ old[name][rows[j]] for i, j in enumerate(order)])
    turned = [old[output][:, rows[j]] @ turns[i, j][1].T for i, j in enumerate(order)]
    state[output] = torch.cat(turned, dim=1)


def _timed(seconds: list[float], work: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = work(*arguments)
    seconds.append(time.perf_counter() - started)
    return result


def _require_same(anchor: State, ours: State, theirs: State) -> None:
    a, b = distance(anchor, ours), distance(anchor, theirs)
    if abs(a - b) > 1e-4 * b:
        raise RuntimeError(f"fedbasin ends at distance {a}, the plain way at {b}")


def _replies(client: State) -> list[RecordDict]:
    record = ArrayRecord(dict(client))
    return [
        RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1 + index})}) for index in range(REPLIES)
    ]


def main(kind: str) -> None:
    symmetry, anchor, client = models(kind)
    names = ("plain", "fedbasin", "bounds", "flwr", "folded")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sent = None
    if kind == "near":
        sent = _timed(seconds["bounds"], identity_bounds, symmetry, anchor)
    replies = _replies(client) if kind == "near" else []

    def folded() -> None:
        for index in range(REPLIES):
            found = match_weights(symmetry, anchor, client, sent)
            accumulator.add(Update(found.state, 1.0 + index))

    match_weights(symmetry, anchor, client, sent)  # threads and memory warm up
    accumulator = Accumulator.zero(anchor)
    for _ in range(REPETITIONS[kind]):
        theirs = _timed(seconds["plain"], plain, anchor, client)
        found = _timed(seconds["fedbasin"], match_weights, symmetry, anchor, client, sent)
        _require_same(anchor, found.state, theirs)
        if replies:
            _timed(seconds["flwr"], aggregate_arrayrecords, replies, "num-examples")
            _timed(seconds["folded"], folded)
    for name in ("flwr", "folded"):
        seconds[name] = [value / REPLIES for value in seconds[name]]
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
