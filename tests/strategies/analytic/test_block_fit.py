"""The closed form of a block, held to the objective that it minimises."""

import pytest
import torch
from torch.nn.functional import one_hot, pad

from fedbasin.strategies.analytic.block_fit import fit_block
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.tasks.likelihoods import MARGIN

WIDTH, ROWS = 12, 1000


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def last_layer(stream, goals, strength):
    gram = stream.T @ stream
    ridge = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, stream.T @ goals).T


def gradient(stream, features, goals, head, matrix):
    """Half the derivative of the squared error by the block's matrix, with its sign turned."""
    residual = goals - stream @ head.T - features @ (head[:, :-1] @ matrix).T
    return head[:, :-1].T @ residual.T @ features


def sums(stream, features, goals):
    inputs = torch.cat([stream[:, :-1], features, stream[:, -1:]], 1)
    return inputs.T @ inputs, goals.T @ inputs


def streams(seed):
    stream = pad(draw(seed, ROWS, WIDTH).relu(), (0, 1), value=1.0)
    return stream, (stream[:, :-1] @ draw(seed + 1, WIDTH, WIDTH)).relu()


@pytest.mark.parametrize("outputs", [1, 3, 9])
@pytest.mark.parametrize("seed", range(3))
def test_of_values_the_regularised_error_is_least(seed, outputs):
    stream, features = streams(seed)
    goals = stream @ draw(seed + 2, WIDTH + 1, outputs) + (features @ draw(seed + 3, WIDTH, outputs)).square()
    matrix = fit_block(*sums(stream, features, goals), Ridge(1e-3), has_labels=False)
    head = last_layer(stream, goals, 1e-3)
    squares, values = torch.linalg.svdvals(head[:, :-1]).square(), torch.linalg.eigvalsh(features.T @ features)
    prior = 1e-2 * torch.outer(squares, values).mean()
    assert float(matrix.norm()) > 1e-3
    torch.testing.assert_close(gradient(stream, features, goals, head, matrix), prior * matrix)


@pytest.mark.parametrize("seed", range(3))
def test_of_labels_the_regularised_error_is_least_for_some_regulariser(seed):
    stream, features = streams(seed)
    labels = (features @ draw(seed + 3, WIDTH, 4)).argmax(1)
    classes = one_hot(labels, 4).double()
    matrix = fit_block(*sums(stream, features, classes), Ridge(1e-2), has_labels=True)
    goals = MARGIN * (2 * classes - 1)
    slope = gradient(stream, features, goals, last_layer(stream, goals, 1e-2), matrix)
    prior = float((slope * matrix).sum() / matrix.square().sum())
    assert prior > 0
    torch.testing.assert_close(slope, prior * matrix)


@pytest.mark.parametrize("ridge", [Evidence(), Ridge(1e-3)])
def test_features_that_tell_nothing_of_the_labels_leave_the_block_at_zero(ridge):
    of_noise, of_features = [], []
    for seed in range(0, 120, 10):
        stream, features = streams(seed)
        linear = stream @ draw(seed + 2, WIDTH + 1, 4)
        labels = one_hot((linear + 3 * draw(seed + 3, ROWS, 4)).argmax(1), 4).double()
        of_noise.append(fit_block(*sums(stream, draw(seed + 4, ROWS, WIDTH), labels), ridge, has_labels=True))
        told = (linear + features @ draw(seed + 5, WIDTH, 4)).square().argmax(1)
        of_features.append(fit_block(*sums(stream, features, one_hot(told, 4).double()), ridge, has_labels=True))
    # Evidence errs as any test does, on both sides.
    assert sum(not matrix.any() for matrix in of_noise) >= 9
    assert sum(bool(matrix.any()) for matrix in of_features) >= 9


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_block_that_no_example_reaches_stays_at_zero(has_labels):
    size = 2 * WIDTH + 1
    matrix = fit_block(torch.zeros(size, size), torch.zeros(3, size), Evidence(), has_labels=has_labels)
    assert matrix.shape == (WIDTH, WIDTH)
    assert not matrix.any()


@pytest.mark.parametrize("has_labels", [True, False])
def test_features_that_are_always_zero_leave_the_block_at_zero(has_labels):
    stream, _ = streams(0)
    labels = one_hot(torch.arange(ROWS) % 3, 3).double()
    assert not fit_block(*sums(stream, torch.zeros(ROWS, WIDTH), labels), Evidence(), has_labels=has_labels).any()
