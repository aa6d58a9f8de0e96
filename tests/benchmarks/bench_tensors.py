"""A deployed round with a model of 300 tensors against the same bytes in one, through fedbasin and through FedAvg."""

import json
import statistics
import tempfile
from pathlib import Path

from fedbasin.deploy.local import Deployment, deployment
from tests.benchmarks.figures import Figure, Goal, Say

APP = Path(__file__).parent / "noise"
NODES = 3
MEGABYTES = 4
ROUNDS = 3
TENSORS = (1, 300)
GOAL = 1.3

HOW = f"""A real deployment on loopback: a SuperLink, {NODES} SuperNodes, {ROUNDS} rounds, a model of {MEGABYTES} MB, clients that add noise
to each array. fedbasin: `FedBasin` with `packed = true` and its mod on the client, seconds of the round reports. Flower: `FedAvg().start`
without evaluation, seconds between the ends of two rounds; its clients import no torch, which starts them faster.
Medians of the rounds. Flower moves every array as objects of its own; fedbasin packs them into one."""


def measure(say: Say) -> Figure:
    medians = {}
    with tempfile.TemporaryDirectory() as folder, deployment(NODES, node_config, Path(folder)) as flower:
        for strategy in ("fedbasin", "FedAvg"):
            for tensors in TENSORS:
                seconds = rounds_of(flower, strategy, tensors)
                medians[strategy, tensors] = statistics.median(seconds)
                shown = ", ".join(f"{s:.1f}" for s in seconds)
                say(f"tensors: {strategy}, {tensors} tensors: rounds of {shown} s")
    one, many = TENSORS
    ratios = {name: medians[name, many] / medians[name, one] for name in ("fedbasin", "FedAvg")}
    rows = [
        (name, *(f"{medians[name, tensors]:.1f}" for tensors in TENSORS), f"{ratio:.2f}")
        for name, ratio in ratios.items()
    ]
    goal = Goal(
        f"through fedbasin at most {GOAL:g} times as long with {many} tensors",
        f"{ratios['fedbasin']:.2f} times; Flower's FedAvg {ratios['FedAvg']:.2f} times",
        ratios["fedbasin"] <= GOAL,
    )
    columns = ("", "1 tensor, s", f"{many} tensors, s", "ratio")
    return Figure("Rounds by number of tensors", HOW, columns, rows, [goal])


def node_config(index: int) -> str:
    return f"partition-id={index} num-partitions={NODES}"


def rounds_of(flower: Deployment, strategy: str, tensors: int) -> list[float]:
    config = {
        "strategy": strategy,
        "tensors": tensors,
        "megabytes": MEGABYTES,
        "num-server-rounds": ROUNDS,
        "fedbasin.folder": str(flower.folder / f"runs-{tensors}"),
    }
    run = flower.run(APP, config, timeout_seconds=900)
    (line,) = (line for line in run.log if line.startswith("measured "))
    seconds: list[float] = json.loads(line.removeprefix("measured "))["seconds"]
    return seconds
