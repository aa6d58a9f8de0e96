"""A product's output is followed through what can be undone, and every undo gives the output back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedbasin.client.refit.invertible_path import InvertiblePaths

W = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def followed(output, steps):
    """The path of `output` through `steps`, and what the output was before them."""
    before = output.clone()
    with torch.no_grad(), (paths := InvertiblePaths()):
        path = paths.follow(output)
        end = steps(output)
    return path, before, end


@pytest.mark.parametrize(
    "steps",
    [
        lambda y, skip: y,
        lambda y, skip: y + skip,
        lambda y, skip: y.flatten(1) + skip.flatten(1),
        lambda y, skip: y.add_(skip),
    ],
)
def test_where_it_ends_another_models_value_is_read(steps):
    own, fused = (normal(2, 4, 3, 3, seed=s) for s in (2, 3))
    with torch.no_grad():
        with (paths := InvertiblePaths()):
            lead = paths.follow(own)
            goal = steps(own, normal(2, 4, 3, 3, seed=4))
        before = fused.clone()
        with (paths := InvertiblePaths()):
            path = paths.follow(fused, lead)
            end = steps(fused, SKIP)
    assert torch.equal(end, goal)
    assert not torch.equal(steps(before, SKIP), goal)
    torch.testing.assert_close(path.invert(goal).shape, before.shape)


def batch_norm(features, training=False):
    norm = nn.BatchNorm2d(features, dtype=W).train(training)
    norm.running_mean.copy_(normal(features, seed=5))
    norm.running_var.copy_(normal(features, seed=6).exp())
    norm.weight.data.copy_(normal(features, seed=7))
    norm.bias.data.copy_(normal(features, seed=8))
    return norm


SKIP = normal(2, 4, 3, 3, seed=1)
UNDONE = {
    "nothing": lambda y: y,
    "a residual sum": lambda y: y + SKIP,
    "a residual sum from the left": lambda y: SKIP + y,
    "torch.add": lambda y: torch.add(y, SKIP),
    "an in-place sum": lambda y: y.add_(SKIP),
    "an in-place sum by its operator": lambda y: y.__iadd__(SKIP),
    "a number": lambda y: y + 2.5,
    "a skip that is broadcast": lambda y: y + normal(4, 1, 1),
    "normalisation in evaluation": batch_norm(4),
    "normalisation by its function": lambda y: F.batch_norm(y, SKIP[0, :, 0, 0], SKIP[0, :, 1, 1] ** 2),
    "normalisation, then a sum": lambda y: batch_norm(4)(y) + SKIP,
    "dropout that is off": nn.Dropout(0.5).eval(),
    "channel dropout that is off": nn.Dropout2d(0.5).eval(),
    "transpose": lambda y: y.transpose(1, 3),
    "transpose by keywords": lambda y: y.transpose(dim0=1, dim1=-1),
    "torch.transpose": lambda y: torch.transpose(y, 0, 2),
    "swapaxes": lambda y: y.swapaxes(1, 2),
    "flatten": lambda y: y.flatten(1),
    "torch.flatten": lambda y: torch.flatten(y, 2),
    "reshape": lambda y: y.reshape(2, -1),
    "view": lambda y: y.view(2, 2, 2, 9),
    "unflatten": lambda y: y.unflatten(1, (2, 2)),
    "unsqueeze": lambda y: y.unsqueeze(1),
    "squeeze": lambda y: y.unsqueeze(1).squeeze(1),
    "contiguous": lambda y: y.transpose(1, 2).contiguous(),
    "clone": lambda y: y.clone(),
    "all of it": lambda y: (batch_norm(4)(y).flatten(2).transpose(1, 2) + 1.0).unflatten(1, (3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("steps", UNDONE.values(), ids=UNDONE)
def test_an_output_is_followed_to_the_end_of_such_steps_and_back(steps):
    path, before, end = followed(normal(2, 4, 3, 3), steps)
    torch.testing.assert_close(path.value, end.detach(), rtol=0, atol=0)
    torch.testing.assert_close(path.invert(path.value), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", UNDONE.values(), ids=UNDONE)
def test_the_way_back_is_affine_so_another_value_is_reached_as_well(steps):
    """What the output would have to be for another client's value is an output that paths it."""
    path, _, _ = followed(normal(2, 4, 3, 3), steps)
    wanted = path.value + normal(*path.value.shape, seed=3)
    again, _, _ = followed(path.invert(wanted), steps)
    torch.testing.assert_close(again.value, wanted, rtol=1e-10, atol=1e-10)


def summed_relu(y):
    return F.relu(y + SKIP, inplace=True)


STOPPED = {
    "an activation": (lambda y: F.relu(y), lambda y: y),
    "an activation in place": (lambda y: F.relu(y, inplace=True), lambda y: y.clone()),
    "an activation in place after a sum": (summed_relu, lambda y: y + SKIP),
    "a normalisation over features": (lambda y: F.layer_norm(y, (3,)), lambda y: y),
    "a normalisation of the batch's own": (batch_norm(4, training=True), lambda y: y),
    "a product": (lambda y: y * 2, lambda y: y),
    "a sum with itself": (lambda y: y + y, lambda y: y),
    "a sum with a factor": (lambda y: torch.add(y, SKIP, alpha=2), lambda y: y),
    "a sum that widens it": (lambda y: y + normal(5, 2, 4, 3, 3), lambda y: y),
    "a part": (lambda y: y[:, :2], lambda y: y),
    "pooling": (lambda y: y.mean((2, 3)), lambda y: y),
    "a concatenation": (lambda y: torch.cat([y, SKIP]), lambda y: y),
}  # fmt: skip


@pytest.mark.parametrize(("steps", "reached"), STOPPED.values(), ids=STOPPED)
def test_what_cannot_be_undone_ends_it(steps, reached):
    y = normal(2, 4, 3, 3)
    expected = reached(y.clone())
    path, before, _ = followed(y, steps)
    torch.testing.assert_close(path.value, expected, rtol=0, atol=0)
    torch.testing.assert_close(path.invert(path.value), before)


def test_the_first_reader_ends_it_though_others_could_be_followed_further():
    y = normal(3, 4)

    def block(y):
        stream = y + 1.0
        return stream + F.layer_norm(stream, (4,))

    path, before, _ = followed(y, block)
    assert torch.equal(path.value, before + 1.0)


def test_both_operands_of_a_sum_are_followed():
    left, right = normal(2, 3), normal(2, 3, seed=1)
    with InvertiblePaths() as paths:
        ends = [paths.follow(left), paths.follow(right)]
        total = left + right
    for path, output in zip(ends, (left, right), strict=True):
        assert torch.equal(path.value, total)
        torch.testing.assert_close(path.invert(total), output)


def test_later_steps_in_place_do_not_reach_back():
    y, skip = normal(2, 3), normal(2, 3, seed=1)
    with InvertiblePaths() as paths:
        path = paths.follow(y)
        total = y + skip
        total.relu_()
        skip.zero_()
    torch.testing.assert_close(path.invert(path.value), y)
    assert path.value.min() < 0


def test_a_channel_that_a_normalisation_hides_keeps_what_the_product_gave():
    norm = batch_norm(4)
    norm.weight.data[1] = 0.0
    path, before, _ = followed(normal(2, 4, 3, 3), norm)
    back = path.invert(path.value + 1.0)
    assert torch.equal(back[:, 1], before[:, 1])
    assert (back[:, [0, 2, 3]] != before[:, [0, 2, 3]]).all()
    assert back.isfinite().all()


def residual(x, f, norm, *, first):
    return x + f(norm(x)) if first else norm(x + f(x))


@pytest.mark.parametrize("first", [True, False], ids=["pre-LN", "post-LN"])
def test_a_residual_branch_reaches_the_stream(first):
    f, norm, x = nn.Linear(4, 4, dtype=W), nn.LayerNorm(4, dtype=W), normal(3, 4)
    found = []
    paths = InvertiblePaths()

    def followed_linear(rows):
        output = f(rows)
        found.append((output.clone(), paths.follow(output)))
        return output

    with torch.no_grad(), paths:
        residual(x, followed_linear, norm, first=first)
    ((output, path),) = found
    torch.testing.assert_close(path.value, x + output)
    torch.testing.assert_close(path.invert(path.value), output)


def test_what_is_not_followed_is_left_alone():
    y = normal(2, 3)
    with InvertiblePaths() as paths:
        path = paths.follow(y)
        torch.add(normal(2, 3), 1.0)
    assert torch.equal(path.value, y)
    assert path.inverses == []
