"""Round reports as a real run would send them: losses that fall, clients that fail, spaces that settle."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np

from fedbasin.proto.report import (
    AlignmentReport,
    ClientReport,
    LayerVariance,
    PathSums,
    ProbedPath,
    RoundReport,
    ServerProbe,
    SingularVectors,
    SpaceReport,
    StageReport,
    UpdateCosines,
)

SITES = ("stem.hidden", "blocks.0.attention.heads", "blocks.0.ffn.hidden", "blocks.1.attention.heads",
         "blocks.1.ffn.hidden", "head.hidden")  # fmt: skip
BEGAN = datetime(2026, 11, 22, 9, 30, tzinfo=UTC)


def run_of(run_id="regmean-aligned", rounds=12, clients=6, spaces=SITES, recipe="regmean", seed=0, of=None):
    """A run's reports; unfinished where `of` is more than `rounds`."""
    random = np.random.default_rng(seed)
    of = of or rounds
    return [_round(random, run_id, number, of, clients, spaces, recipe) for number in range(1, rounds + 1)]


def many_spaces(number):
    return tuple(f"encoder.layer.{index:02}.ffn.hidden" for index in range(number))


def _round(random, run_id, number, of, clients, spaces, recipe):
    skill = 1 - math.exp(-number / (0.25 * of + 1))
    stages = tuple(_stage(random, name, clients, spaces, skill) for name in _stages(number))
    accuracy = 0.31 + 0.62 * skill + random.normal(0, 0.004)
    return RoundReport(
        run_id=run_id,
        round=number,
        rounds=of,
        recipe=recipe,
        finished=BEGAN + timedelta(seconds=41 * number),
        seconds=sum(stage.seconds for stage in stages) + 0.2,
        stages=stages,
        path=_path(random, skill, 60 * clients),
        fused_path=_fused(skill, 60 * clients),
        update_cosines=_cosines(random, number, skill, clients),
        variance=tuple(LayerVariance(f"blocks.{i}.weight", 0.5 + 0.4 * skill - 0.1 * i) for i in range(3)),
        probe=_probe(random, skill),
        evaluate_metrics={"test-accuracy": accuracy, "test-loss": 2.1 * (1 - skill) + 0.21},
        model_digest=bytes(random.bytes(32)),
        peak_rss_bytes=int(812e6 + 1e6 * number),
        last=number == of,
    )


def _stages(number):
    return ("bootstrap", "fuse", "evaluate") if number == 1 else ("fuse", "evaluate")


def _stage(random, name, clients, spaces, skill):
    replies = tuple(_client(random, name, node, spaces, skill) for node in range(1, clients + 1))
    slowest = max(client.seconds for client in replies)
    return StageReport(name, slowest + 0.4, 0.4 * random.random(), replies)


def _client(random, stage, node, spaces, skill):
    client = ClientReport(
        node_id=10**18 + 7919 * node,
        outcome="accepted",
        examples=200 + 40 * node,
        bytes_up=4_200_000 if stage == "fuse" else 900,
        bytes_down=2_100_000,
        seconds={"bootstrap": 9, "fuse": 22, "evaluate": 3}.get(stage, 1) * random.uniform(0.7, 1.1),
        probe_seconds={"fuse": 3, "evaluate": 1}.get(stage, 0) * random.uniform(0.7, 1.1),
        probe_bytes=400,
    )
    return _fused_client(random, client, spaces, skill) if stage == "fuse" else client


def _fused_client(random, client, spaces, skill):
    if random.random() < 0.06:
        outcome = str(random.choice(["timeout", "non_finite", "wrong_round"]))
        detail = {"non_finite": "blocks.0.ffn.weight has 3 NaN of 4096"}.get(outcome, "")
        return replace(client, outcome=outcome, detail=detail)
    alignment = AlignmentReport(
        tuple(_space(random, index, name, len(spaces), skill) for index, name in enumerate(spaces)),
        sweeps=4,
        singular_vectors=SingularVectors(0.3 * skill, 0.4 + 0.4 * skill, 3, 9),
    )
    return replace(client, update_norm=9 - 6 * skill, update_cosine=0.7 - 0.6 * skill, alignment=alignment)


def _space(random, index, name, count, skill):
    moved = max(0.0, (1 - skill) * (0.95 - 0.6 * index / count) + random.normal(0, 0.03))
    space = SpaceReport(name, moved < 0.08, min(moved, 1.0), 40 * moved * (1 + index % 3), 1 - min(moved, 1.0))
    if "heads" in name:
        space = replace(space, largest_angle=3 * (1 - skill), skew_before=1.2, skew_after=0.01)
    return space


def _fused(skill, examples):
    points = tuple(index / 4 for index in range(5))
    dip = [-0.2 * (1 - skill) * 4 * t * (1 - t) for t in points]
    ends = [0.3 + 0.1 * t for t in points]
    return PathSums(
        points=points,
        loss_after=tuple(examples * (y + low) for y, low in zip(ends, dip, strict=True)),
        correct_after=tuple(examples * (0.9 - 0.1 * t) for t in points),
        examples=examples,
        clients=5,
    )


def _cosines(random, number, skill, clients):
    return UpdateCosines(
        clients,
        16384,
        1_200_000,
        norm=9 - 6 * skill,
        fused=0.8 - 0.4 * skill,
        previous=0.7 - 0.6 * skill + random.normal(0, 0.02) if number > 1 else None,
        clients_mean=0.6 - 0.5 * skill,
        seconds=0.02,
    )


def _probe(random, skill):
    def walked(a, b, height):
        sums = PathSums(
            points=(0, 0.5, 1),
            loss_after=tuple(100 * y for y in (0.4, 0.4 + height, 0.5)),
            correct_after=tuple(100 * y for y in (0.88, 0.86 - height / 4, 0.85)),
            examples=100,
            clients=1,
        )
        return ProbedPath(a, b, sums)

    return ServerProbe(
        nodes=(1, 2, 3),
        accepted=6,
        pairs=tuple(walked(a, b, 0.9 * (1 - skill)) for a, b in ((1, 2), (1, 3), (2, 3))),
        fused=tuple(walked(0, b, 0.2 * (1 - skill)) for b in (1, 2, 3)),
        ensemble_loss=0.3,
        ensemble_accuracy=0.93 + random.normal(0, 0.002),
        seconds=0.8,
        spooled_bytes=12_600_000,
    )


def _path(random, skill, examples):
    points = tuple(index / 10 for index in range(11))
    ends = [2.2 * (1 - skill) + 0.3 - 0.25 * (1 - skill) * t for t in points]
    bump = [4 * t * (1 - t) for t in points]
    far, near = 1.9 * (1 - 0.55 * skill), 0.22 * (1 - skill) + 0.01 * random.random()
    right = [0.3 + 0.6 * skill + 0.05 * t for t in points]
    return PathSums(
        points=points,
        loss_before=tuple(examples * (end + far * up) for end, up in zip(ends, bump, strict=True)),
        loss_after=tuple(examples * (end + near * up) for end, up in zip(ends, bump, strict=True)),
        correct_before=tuple(examples * max(y - 0.5 * skill * up, 0.1) for y, up in zip(right, bump, strict=True)),
        correct_after=tuple(examples * (y - 0.03 * up) for y, up in zip(right, bump, strict=True)),
        examples=examples,
    )
