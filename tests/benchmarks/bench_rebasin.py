"""Unrelated digit classifiers: the barrier after our weight matching and after that of rebasin from PyPI.

`FEDBASIN_REBASIN` names a Python that has rebasin, in an environment of its own:

    python -m venv rebasin-env && rebasin-env/bin/pip install rebasin==0.0.47 torch scipy
    FEDBASIN_REBASIN=rebasin-env/bin/python PYTHONPATH=. .venv/bin/python -m tests.benchmarks rebasin
"""

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedbasin.strategies.alignment.graph_matching import match_graph
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.diagnostics.barrier import grid, linear_barrier
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.tensors.state import State, interpolate
from tests.benchmarks.figures import Figure, Goal, Say

WIDTH, EPOCHS, PAIRS, POINTS = 512, 20, 3, 11
PYTHON = "FEDBASIN_REBASIN"
# Differences of barriers below this are noise of 360 test images.
SLACK = 0.01

HOW = f"""{PAIRS} pairs of MLPs 64-{WIDTH}-{WIDTH}-10, trained on the same digits from independent initialisations ({EPOCHS} epochs of Adam).
The barrier is the largest rise of the test loss over the chord, at {POINTS} points of the straight path. Both read the same
checkpoints; rebasin 0.0.47 runs in an environment of its own (`{PYTHON}`, see the script), where it is
absent its column is empty. Seconds are of matching alone, medians."""

# Run by the other Python, which has no fedbasin.
_THEIRS = """
import sys, time, torch
from torch import nn
from rebasin import PermutationCoordinateDescent
def model(path):
    made = nn.Sequential(nn.Linear(64, {width}), nn.ReLU(), nn.Linear({width}, {width}), nn.ReLU(), nn.Linear({width}, 10))
    made.load_state_dict(torch.load(path))
    return made
anchor, client = model(sys.argv[1]), model(sys.argv[2])
matching = PermutationCoordinateDescent(anchor, client, torch.zeros(1, 64))
started = time.perf_counter()
matching.rebasin()
print(time.perf_counter() - started)
torch.save(client.state_dict(), sys.argv[3])
"""


def measure(say: Say) -> Figure:
    inputs, targets = digits()
    barriers: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for pair in range(PAIRS):
        say(f"rebasin: pair {pair + 1} of {PAIRS}")
        anchor, client = (trained(2 * pair + which) for which in (0, 1))
        for name, (state, taken) in aligned(anchor, client).items():
            barriers.setdefault(name, []).append(barrier(anchor, state, inputs, targets))
            seconds.setdefault(name, []).append(taken)
    rows = [
        (
            name,
            *(f"{value:.3f}" for value in found),
            f"{statistics.fmean(found):.3f}",
            f"{statistics.median(seconds[name]):.2f}",
        )
        for name, found in barriers.items()
    ]
    columns = ("", *(f"pair {pair + 1}" for pair in range(PAIRS)), "mean", "seconds")
    return Figure("Barriers beside rebasin", HOW, columns, rows, [_goal(barriers)])


def _goal(barriers: dict[str, list[float]]) -> Goal:
    text = f"after weight matching a barrier at most {SLACK} above rebasin's, in the mean"
    if "rebasin 0.0.47" not in barriers:
        return Goal(text, f"skipped: {PYTHON} names no Python with rebasin", met=False)
    ours, theirs = (statistics.fmean(barriers[n]) for n in ("weights", "rebasin 0.0.47"))
    return Goal(text, f"{ours:.3f} against {theirs:.3f}", ours <= theirs + SLACK)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def split() -> tuple[Tensor, Tensor, int]:
    data = load_digits()
    inputs = torch.tensor(data.data / 16, dtype=torch.float32)
    return inputs, torch.tensor(data.target), int(0.8 * len(inputs))


def digits() -> tuple[Tensor, Tensor]:
    """The test part."""
    inputs, targets, count = split()
    return inputs[count:], targets[count:]


def trained(seed: int) -> dict[str, Tensor]:
    inputs, targets, count = split()
    torch.manual_seed(seed)
    model = network()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(count).split(64):
            optimiser.zero_grad()
            cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimiser.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def aligned(anchor: State, client: State) -> dict[str, tuple[State, float]]:
    """The client as each method leaves it, and the seconds that it took."""
    symmetry = discover(network(), torch.zeros(1, 64)).symmetry
    found: dict[str, tuple[State, float]] = {"unaligned": (client, 0.0)}
    for name, match in (("weights", match_weights), ("sinkhorn", match_sinkhorn), ("graph", match_graph)):
        started = time.perf_counter()
        state = match(symmetry, anchor, client).state
        found[name] = (state, time.perf_counter() - started)
    if os.environ.get(PYTHON):
        found["rebasin 0.0.47"] = rebasin(anchor, client)
    return found


def rebasin(anchor: State, client: State) -> tuple[State, float]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("anchor.pt", "client.pt", "aligned.pt")]
        for state, path in zip((anchor, client), paths, strict=False):
            torch.save(dict(state), path)
        script = _THEIRS.format(width=WIDTH)
        command = [os.environ[PYTHON], "-c", script, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return torch.load(paths[2]), float(done.stdout.splitlines()[-1])


def barrier(anchor: State, client: State, inputs: Tensor, targets: Tensor) -> float:
    points = grid(POINTS)
    model, losses = network(), []
    for t in points:
        model.load_state_dict(interpolate(anchor, client, t))
        with torch.no_grad():
            losses.append(float(cross_entropy(model(inputs), targets)))
    return linear_barrier(points, tuple(losses))
