"""What the clients that a round has asked say of a model is corrected by the sums of the others, and by nothing else."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.head_memory import HeadSums
from fedbasin.strategies.round import absent_clients
from fedbasin.strategies.round.absent_clients import expected_score, for_all_clients

W = torch.float64
CLASSES, FEATURES = 3, 5
PATH = Path((0.0, 0.5, 1.0), (20.0, 10.0, 30.0), (5.0, 8.0, 4.0), 10.0)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def rows(seed, classes=CLASSES, count=2000):
    labels = torch.arange(count) % classes
    centres = 2 * normal(CLASSES, FEATURES, seed=0)
    return torch.cat([centres[labels] + normal(count, FEATURES, seed=seed), torch.ones(count, 1, dtype=W)], 1), labels


def sums(inputs, labels):
    return HeadSums(inputs.T @ inputs, torch.zeros(CLASSES, FEATURES + 1, dtype=W).index_add_(0, labels, inputs))


def head(seed):
    return normal(CLASSES, FEATURES + 1, seed=seed)


@given(st.integers(0, 2**16))
@example(52464)
def test_of_normal_inputs_it_is_the_loss_and_the_accuracy(seed):
    inputs, labels = rows(seed)
    weights, logits = head(seed + 1), inputs @ head(seed + 1).T
    with pytest.MonkeyPatch.context() as patch:
        # The 64 draws of a class in a run are a rough mean for a head that is sure and wrong.
        patch.setattr(absent_clients, "_DRAWS", 4096)
        loss, accuracy = expected_score(weights, sums(inputs, labels))
    assert float(loss) == pytest.approx(float(cross_entropy(logits, labels)), rel=0.25, abs=0.1)
    assert float(accuracy) == pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=0.1)


@given(st.integers(0, 2**16))
def test_where_nobody_is_absent_nothing_changes(seed):
    asked = sums(*rows(seed))
    assert for_all_clients(PATH, head(1), head(2), asked, asked) == PATH


def test_a_head_that_does_not_know_the_classes_of_absent_clients_loses_by_them():
    asked, everybody = sums(*rows(1, classes=2)), sums(*rows(1))
    centres = torch.cat([2 * normal(CLASSES, FEATURES, seed=0), torch.zeros(CLASSES, 1, dtype=W)], 1)
    centres[:, -1] = -centres.square().sum(1) / 2
    ignorant = centres.clone()
    ignorant[2, -1] -= 100.0
    path = for_all_clients(PATH, ignorant, centres, asked, everybody)
    changes = [after - before for before, after in zip(PATH.loss, path.loss, strict=True)]
    assert changes[0] > changes[1] > changes[2]
    assert path.correct[0] < PATH.correct[0] <= PATH.examples
    assert all(0 <= correct <= path.examples for correct in path.correct)
    assert min(path.loss) >= 0
    assert for_all_clients(Path((0.0, 1.0), (1.0, 1.0), (), 10.0), ignorant, centres, asked, everybody).correct == ()
