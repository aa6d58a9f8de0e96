"""Adapters fused by their products, their factors and the inputs that they read: accuracy round by round.

`PYTHONPATH=. .venv/bin/python -m tests.benchmarks lora`. Every curve is one of the protocol's: `python -m tests.protocol
run --model 'lora(rank=16)'` measures the same.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from tests.benchmarks.figures import Figure, Goal, Say
from tests.protocol import rules
from tests.protocol.setting import Point, Setting
from tests.protocol.training import Training

RECIPES = ("lora", "lora-products", "lora-gram", "lorm", "lora-rotated", "lora-factors")
CLIENTS = 10
SEEDS = (0, 1)
ROUNDS = 4
SHOWN = (1, 2, 3, 4)
GOAL = 0.93

SCENES = {
    "digits": Setting("digits", "dirichlet(0.3)", "lora(rank=16)", "", training=Training(20)),
    "topics": Setting("topics", "dirichlet(0.3)", "lora_bert", "", training=Training(10)),
}

HOW = f"""{CLIENTS} clients with label shares from Dirichlet(0.3), a base that was trained on the first half of the classes and stays at
home, adapters from a shared initialisation, AdamW at 0.002 in batches of 32; test accuracy of the global model after each round, and what a
client sends in a round; mean of {len(SEEDS)} seeds. `digits`: a perceptron 64-256-256-10, adapters of rank 16 on all layers, 20 local
epochs. `topics`: a BERT of two layers and width 32 from `transformers` reads texts of 16 words, whose odds the class decides;
adapters of rank 8 by `peft` on all its linear layers, 10 local epochs. `lorm` trains one factor in a round."""

Curve = list[Point]


def curve(scene: Setting, recipe: str, seed: int) -> Curve:
    """Points after each round; the first is the start."""
    points: Curve = []
    training = replace(scene.training, rate=2e-3)
    setting = replace(scene, rule=recipe, seed=seed, clients=CLIENTS, training=training)
    with tempfile.TemporaryDirectory() as folder:
        rules.run(setting, ROUNDS, Path(folder), points.append)
    return points


def runs(say: Say) -> Iterator[tuple[tuple[str, str], list[Curve]]]:
    """The curves of all seeds, for every scene and recipe."""
    for name, scene in SCENES.items():
        for recipe in RECIPES:
            say(f"lora: {name}, {recipe}")
            yield (name, recipe), [curve(scene, recipe, seed) for seed in SEEDS]


def measure(say: Say) -> Figure:
    torch.set_num_threads(1)
    found = dict(runs(say))
    rows = [(f"{scene}, `{recipe}`", *_cells(curves)) for (scene, recipe), curves in found.items()]
    third = {key: _accuracy(curves, 3) for key, curves in found.items()}
    goals = [
        Goal(
            f"`lora` reaches {GOAL} on the digits in round 3",
            f"{third['digits', 'lora']:.3f}; factors {third['digits', 'lora-factors']:.3f}",
            third["digits", "lora"] >= GOAL,
        ),
        *(
            Goal(
                f"`lora` is ahead of `lora-products` in round 3, {scene}",
                f"{third[scene, 'lora'] - third[scene, 'lora-products']:+.3f}",
                third[scene, "lora"] > third[scene, "lora-products"],
            )
            for scene in SCENES
        ),
    ]
    columns = ("", *(f"round {number}" for number in SHOWN), "kB up a client")
    return Figure("Adapters of low rank", HOW, columns, rows, goals)


def _cells(curves: list[Curve]) -> Iterable[str]:
    yield from (f"{_accuracy(curves, number):.3f}" for number in SHOWN)
    yield f"{fmean(points[-1].bytes_up for points in curves) / ROUNDS / CLIENTS / 1e3:.0f}"


def _accuracy(curves: list[Curve], number: int) -> float:
    return fmean(points[number].accuracy for points in curves)
