"""The part of the examples that no layer is fitted to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.client.held_out import MOST, DataPart, held_out
from fedbasin.strategies.tensors.batches import Batch


def rows(batches):
    return sorted(tuple(row.tolist()) for batch in batches for row in batch.inputs)


def data(count, seed=0):
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return inputs, torch.arange(count)


@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 3))
def test_the_two_parts_are_all_examples_and_the_same_in_any_order(count, share, seed):
    inputs, targets = data(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    orders = [[(inputs, targets)], [(inputs[part], targets[part]) for part in order.split(7)]]
    fitting, judging = ([rows(DataPart(batches, share, held)) for batches in orders] for held in (False, True))
    assert fitting[0] == fitting[1]
    assert judging[0] == judging[1]
    every = sorted(map(tuple, inputs.tolist()))
    # A part that would leave nothing to fit is not taken away.
    assert sorted(fitting[0] + judging[0]) == every or fitting[0] == judging[0] == every


def test_a_share_is_held_out_on_average_and_copies_stay_together():
    inputs, targets = data(5000)
    chosen = held_out(Batch(inputs, targets % 2), 0.1)
    assert 400 < int(chosen.sum()) < 600
    assert torch.equal(held_out(Batch(inputs, targets % 2), 0.1), chosen)
    assert not held_out(Batch(inputs, targets), 0.0).any()


def test_examples_of_several_tensors_are_told_apart_by_all_of_them():
    tokens = torch.zeros(200, 2, dtype=torch.long)
    chosen = held_out(Batch({"input_ids": tokens, "types": torch.arange(200).view(-1, 1)}, tokens[:, 0]), 0.3)
    assert 20 < int(chosen.sum()) < 120


@pytest.mark.parametrize("size", [MOST - 300, 3 * MOST])
def test_a_comparison_reads_so_many_examples_at_most(size):
    inputs, targets = data(size)
    judged = rows(DataPart([(part, part[:, 0]) for part in inputs.split(128)], 0.9, is_held_out=True))
    assert len(judged) == min(int(held_out(Batch(inputs, inputs[:, 0]), 0.9).sum()), MOST)
    assert len(targets) == size
