"""Peak memory of aligning a space of 7168 units, in a fresh process."""

import json
import sys

import torch
from torch import Tensor

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.symmetry import parse
from tests.benchmarks.figures import Figure, Goal, Say, in_fresh_process, peak_resident_bytes

WIDTH, INPUTS = 7168, 896
MODEL = 2 * WIDTH * INPUTS * 4
MATRIX = WIDTH * WIDTH * 8
SYMMETRY = parse(f"hidden S({WIDTH}) up[0] down[1]")

HOW = f"""A feed-forward block {INPUTS} x {WIDTH} x {INPUTS} in float32 and an unrelated client of the same shape, each
{MODEL / 1e6:.0f} MB. Peak resident memory of a fresh process that makes both and runs `match_weights`, less that of one
that stops before both. The score of all units with all units is {MATRIX / 1e6:.0f} MB in double, which SciPy's dense
assignment needs, twice where it maximises; here it is kept in single and only candidates leave it."""


def measure(say: Say) -> Figure:
    say(f"matching memory: {WIDTH} units")
    base, models, peak = (in_fresh_process("bench_matching_memory", kind) for kind in ("nothing", "models", "match"))
    limit = 2 * MODEL + MATRIX
    rows = [
        ("anchor and update", f"{(models - base) / 1e6:.0f}"),
        ("while aligning", f"{(peak - base) / 1e6:.0f}"),
        ("anchor, update and one space's matrix in double", f"{limit / 1e6:.0f}"),
        ("anchor, update and one space's matrix in single", f"{(limit - MATRIX / 2) / 1e6:.0f}"),
    ]
    goal = Goal(
        "aligning needs less than anchor, update and one space's matrix",
        f"{(peak - base) / 1e6:.0f} of {limit / 1e6:.0f} MB",
        peak - base < limit,
    )
    return Figure("Memory while aligning", HOW, ("", "MB"), rows, [goal])


def _model(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up": (WIDTH, INPUTS), "down": (INPUTS, WIDTH)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def main(kind: str) -> None:
    if kind != "nothing":
        anchor, client = _model(0), _model(1)
    if kind == "match":
        report = match_weights(SYMMETRY, anchor, client).report
        if report.distance_after >= report.distance_before:
            raise RuntimeError("nothing was aligned, so nothing was measured")
    sys.stdout.write(json.dumps(peak_resident_bytes()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
