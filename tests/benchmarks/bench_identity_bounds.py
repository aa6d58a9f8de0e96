"""A client near the anchor: matching with the anchor's identity bounds against matching without."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.weight_matching import Alignment, match_weights
from fedbasin.strategies.symmetry.discover.discovery import discover
from tests.benchmarks.figures import Figure, Goal, Say, median_ratio

INPUTS, WIDTH = 768, 3072
NOISE = 0.1  # of each tensor's own scale
REPETITIONS = 5
GOAL = 30.0

HOW = f"""A feed-forward block {INPUTS} x {WIDTH} x {INPUTS} and a client that drifted from it by noise of {NOISE:.0%} of
each tensor's scale. `match_weights` with the anchor's identity bounds, which prove that no unit has to move,
against `match_weights` without, which searches; in turns, {REPETITIONS} times each; both must give the same weights bit for
bit. The bounds cost the server once per round what stands in the last column."""


def measure(say: Say) -> Figure:
    say(f"identity bounds: {REPETITIONS} alignments with and without bounds")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.GELU(), nn.Linear(WIDTH, INPUTS))
    anchor = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    client = {n: t + NOISE * t.std() * torch.randn_like(t) for n, t in anchor.items()}
    symmetry = discover(model, torch.zeros(1, INPUTS)).symmetry
    seconds: dict[str, list[float]] = {"bounds": [], "with": [], "without": []}
    for _ in range(REPETITIONS):
        bounds = _timed(seconds["bounds"], identity_bounds, symmetry, anchor)
        found = _timed(seconds["with"], match_weights, symmetry, anchor, client, bounds)
        searched = _timed(seconds["without"], match_weights, symmetry, anchor, client)
        _require_same(found, searched)
    ratio = median_ratio(seconds["without"], seconds["with"])
    row = tuple(f"{1e3 * statistics.median(seconds[name]):.0f}" for name in ("without", "with", "bounds"))
    goal = Goal(f"the same result at least {GOAL:g} times as fast", f"{ratio:.0f} times", ratio >= GOAL)
    columns = ("", "search, ms", "with bounds, ms", "ratio", "bounds, once per round, ms")
    rows = [(f"FFN {INPUTS} x {WIDTH}", row[0], row[1], f"{ratio:.0f}", row[2])]
    return Figure("Clients near the anchor", HOW, columns, rows, [goal])


def _timed(seconds: list[float], work: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = work(*arguments)
    seconds.append(time.perf_counter() - started)
    return result


def _require_same(found: Alignment, searched: Alignment) -> None:
    torch.testing.assert_close(found.state, searched.state, rtol=0, atol=0)
    if not all(space.certified for space in found.report.spaces) or not found.transform.is_identity:
        raise RuntimeError("the client drifted too far for the identity bounds: nothing was compared")
