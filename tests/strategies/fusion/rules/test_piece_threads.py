"""Threads that share the pieces of a tensor change no bit of what a rule returns."""

import pytest
import torch

from fedbasin.strategies.fusion.rules.merging_rules import ARGUMENTS, RULES
from fedbasin.strategies.tensors import pieces

OF_WEIGHTS = sorted(name for name, rule in RULES.items() if not rule.statistic)
VALUES = {"density": 0.4, "epsilon": 0.1, "gamma": 0.1, "t": 0.3}


def merged(name: str) -> torch.Tensor:
    rule = RULES[name]
    anchor, *tensors = torch.randn(4, 60, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = tensors[: rule.most or 3]
    given = {ARGUMENTS.get(key, key): VALUES.get(key, value) for key, value in rule.shared.items()}
    given |= {key: [VALUES.get(key, value)] * len(tensors) for key, value in rule.per_model.items()}
    given |= {"seeds": list(range(len(tensors)))} if rule.random else {}
    return rule.function(anchor if rule.anchor == "required" else None, tensors, [1.0] * len(tensors), **given)


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_threads_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 32)
    monkeypatch.setattr(pieces, "_SAMPLE", 64)
    alone = merged(name)
    with pieces.piece_threads(3):
        assert torch.equal(merged(name), alone)


def test_threads_share_the_pieces_of_a_long_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 8)
    rows: list[int] = []
    with pieces.piece_threads(2):
        pieces.map_pieces(lambda stacked: (rows.append(stacked.shape[1]), stacked[0])[1], [torch.ones(100)])
    assert sorted(rows) == [4] + [8] * 12
    assert pieces._threads == 1
