"""Losses against PyTorch's, and the scores of Fisher information against the likelihoods that they come from."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedbasin.strategies.diagnostics.loss_path import barrier
from fedbasin.strategies.tasks.likelihoods import MARGIN, TaskError
from fedbasin.strategies.tasks.model_task import TASKS, Task
from fedbasin.strategies.tensors.batches import Batch
from tests.tasks import EXAMPLES, draw_laplace, laplace

W = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def whole(*shape, below=3):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


OUTPUTS = {
    "classification": (draw(6, 3), whole(6)),
    "tokens": (draw(2, 3, 4), whole(2, 3)),
    "pixels": (draw(2, 3, 2, 2), whole(2, 2, 2)),
    "language-modelling": (draw(2, 4, 3), whole(2, 4)),
    "multi-label": (draw(6, 2), (draw(6, 2, seed=2) > 0).to(W)),
    "regression": (draw(6, 3), draw(6, 3, seed=2)),
}
TORCH = {
    "classification": F.cross_entropy,
    "tokens": lambda z, y: F.cross_entropy(z.mT, y),
    "pixels": F.cross_entropy,
    "language-modelling": lambda z, y: F.cross_entropy(z[:, :-1].mT, y[:, 1:]),
    "multi-label": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
}


def batch_of(name):
    outputs, targets = OUTPUTS[name]
    return outputs, Batch(torch.zeros(len(targets)), targets)


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_those_of_pytorch(name):
    outputs, batch = batch_of(name)
    torch.testing.assert_close(TASKS[name].losses(outputs, batch).mean(), TORCH[name](outputs, batch.targets))


@pytest.mark.parametrize("name", TASKS)
def test_exact_scores_are_the_expectation_of_drawn_ones(name):
    outputs, batch = batch_of(name)
    exact = replace(TASKS[name], exact_scores=1000).label_scores(outputs, batch)
    drawn = replace(TASKS[name], exact_scores=0)
    times = 20000
    many, wide = (torch.cat([t[:1]] * times) for t in (batch.targets, outputs))
    samples = drawn.label_scores(wide, Batch(many, many), torch.Generator().manual_seed(0))[:, 0]
    expected = exact[0].T @ exact[0]
    torch.testing.assert_close(samples.T @ samples / times, expected, rtol=0.0, atol=0.04)


@settings(deadline=None, max_examples=40)
@given(classes=st.integers(2, 7), scale=st.floats(0.1, 40), seed=st.integers(0, 99))
def test_exact_scores_of_classes_make_their_covariance(classes, scale, seed):
    outputs = scale * draw(3, classes, seed=seed)
    task = replace(TASKS["classification"], exact_scores=classes)
    scores = task.label_scores(outputs, Batch(outputs, whole(3, below=2)))
    assert scores.shape == (3, classes - 1, classes)
    p = outputs.softmax(-1)
    expected = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    torch.testing.assert_close(scores.mT @ scores, expected, rtol=1e-9, atol=1e-12)


def test_scores_of_a_users_likelihood_are_its_gradients():
    task = Task.of_loss(laplace, draw_laplace)
    outputs = draw(7, 2)
    scores = task.label_scores(outputs, Batch(outputs, outputs), torch.Generator().manual_seed(0))
    again = task.label_scores(outputs, Batch(outputs, outputs), torch.Generator().manual_seed(0))
    assert torch.equal(scores, again)
    assert set(scores.flatten().tolist()) == {-1.0, 1.0}
    with pytest.raises(TaskError, match="pass draw="):
        Task.of_loss(laplace).label_scores(outputs, Batch(outputs, outputs))


def test_a_loss_that_is_one_number_is_refused():
    outputs = draw(7, 2)
    with pytest.raises(TaskError, match=r"returned \[\] for 7 examples.*reduction='none'"):
        Task.of_loss(F.mse_loss).losses(outputs, Batch(outputs, outputs))


def test_labels_out_of_their_range_are_refused():
    with pytest.raises(TaskError, match="labels are 0 or 1"):
        TASKS["multi-label"].losses(draw(3, 2), Batch(draw(3), 2 * torch.ones(3, 2)))


def test_a_head_of_labels_is_fitted_to_both_margins():
    goals, counted = TASKS["multi-label"].goals(*batch_of("multi-label"), axis=1)
    assert set(goals.flatten().tolist()) == {-MARGIN, MARGIN}
    assert counted.all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_task_has_a_barrier(name):
    example = EXAMPLES[name]
    a, b = (example.model(seed).state_dict() for seed in (0, 1))
    found = barrier(example.model(), a, b, [example.batch(0)], 3, example.task)
    assert found.linear >= 0
    assert (found.accuracy is None) == (example.name in ("regression", "own loss"))
