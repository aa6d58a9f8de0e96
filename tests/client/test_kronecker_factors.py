"""Kronecker factors against loops over examples and labels, and against the whole Fisher information."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbasin.strategies.statistics.fisher import diagonal_fisher
from fedbasin.strategies.statistics.gram import grams
from fedbasin.strategies.statistics.kronecker_factors import kronecker_factors
from fedbasin.strategies.tasks.model_task import TASKS

W = torch.float64
DRAWN = replace(TASKS["classification"], exact_scores=0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def labels(*shape):
    return torch.zeros(*shape, dtype=torch.long)


def net(*, inplace=False):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 3, bias=False)).to(W)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Kept(nn.Module):
    """A layer whose last output is kept."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.output = self.layer(x)
        return self.output.clone()


def slow_gradients(model, name, x):
    """Second moments of the gradients at a layer's output, one backward pass for each example and label."""
    total, kept = 0, Kept(model.get_submodule(name))
    model.set_submodule(name, kept)
    for example in x:
        log_p = model(example.unsqueeze(0)).log_softmax(-1).flatten()
        for log in log_p:
            (gradient,) = torch.autograd.grad(log, kept.output, retain_graph=True)
            columns = gradient.flatten(2).mT if gradient.dim() == 4 else gradient
            columns = columns.reshape(-1, columns.shape[-1])
            total = total + log.exp().detach() * columns.T @ columns
    model.set_submodule(name, kept.layer)
    return total


@pytest.mark.parametrize("inplace", [False, True])
def test_they_equal_the_loop_over_examples_and_labels(inplace):
    model, x = net(inplace=inplace), normal(7, 4)
    found = kronecker_factors(model, [(x[:4], labels(4)), (x[4:], labels(3))])
    inputs = grams(model, [(x, labels(7))])
    assert list(found) == [("0.weight", "0.bias"), ("2.weight",)]
    for block, factors in found.items():
        close(factors.inputs, inputs[block])
        close(factors.gradients, slow_gradients(net(), block[0][0], x))
        assert factors.rows == 7


def test_writing_over_tokens_does_not_show():
    x, targets = normal(3, 2, 4), labels(3, 2)
    plain, written = (kronecker_factors(net(inplace=i), [(x, targets)]) for i in (False, True))
    for block, factors in plain.items():
        close(written[block].gradients, factors.gradients)
        close(written[block].inputs, factors.inputs)


def test_of_one_example_the_last_layers_product_is_its_whole_fisher_information():
    model, x = nn.Linear(4, 3).to(W), normal(1, 4)
    (factors,) = kronecker_factors(model, [(x, labels(1))]).values()
    whole = torch.kron(factors.gradients, factors.inputs)
    fisher = diagonal_fisher(model, [(x, labels(1))])
    joined = torch.cat([fisher["weight"], fisher["bias"][:, None]], 1)
    close(whole.diagonal().view(3, 5), joined)


def test_a_row_of_a_convolution_is_a_position():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
    model, x = model.to(W), normal(4, 2, 2, 2)
    factors = kronecker_factors(model, [(x, labels(4))])["0.weight", "0.bias"]
    assert factors.rows == 4 * 9
    close(factors.inputs, grams(model, [(x, labels(4))])["0.weight", "0.bias"])
    close(factors.gradients, slow_gradients(model, "0", x))


def test_tokens_of_a_transformer_are_rows_and_padding_is_none():
    torch.manual_seed(3)
    body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, keep = (nn.Sequential(body, nn.Linear(8, 3)).to(W), torch.arange(5) < torch.tensor([[5], [3]]))
    found = kronecker_factors(model, [(normal(2, 5, 8), labels(2, 5), keep)])
    assert {factors.rows for factors in found.values()} == {8}
    assert all(float(factors.gradients.trace()) > 0 for factors in found.values())
    assert len(found) == 5


def test_drawn_labels_are_right_on_average_and_follow_the_generator():
    model, x = net(), normal(4, 4)
    exact = kronecker_factors(model, [(x, labels(4))])["0.weight", "0.bias"].gradients
    many = [(x.repeat(5000, 1), labels(20000))]
    once, again = (
        kronecker_factors(model, many, torch.Generator().manual_seed(0), DRAWN)["0.weight", "0.bias"] for _ in "ab"
    )
    assert torch.equal(once.gradients, again.gradients)
    assert float((once.gradients / 5000 - exact).norm()) < 0.05 * float(exact.norm())


def test_what_is_sent_of_the_outputs_does_not_say_how_confident_the_client_is():
    model, x = net(), normal(6, 4)
    found = kronecker_factors(model, [(x, labels(6))])
    for factors in found.values():
        assert float(factors.outputs.diagonal().mean()) == pytest.approx(1)
        assert float(factors.gradients.diagonal().mean()) != pytest.approx(1)
    silent = kronecker_factors(model, [(x.unsqueeze(1), torch.full((6, 1), -100))])
    for factors in silent.values():
        close(factors.outputs, torch.eye(len(factors.outputs), dtype=W))


def test_frozen_wide_and_grouped_layers_are_left_out_and_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1, groups=2), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(3, 5000), nn.Linear(5000, 2)
    ).to(W)
    model[1].weight.requires_grad_(False)
    assert not kronecker_factors(model, [(normal(2, 2, 1, 1), labels(2))])
    model[1].weight.requires_grad_(True)
    assert list(kronecker_factors(model, [(normal(2, 2, 1, 1), labels(2))])) == [("1.weight", "1.bias")]
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_no_data_and_no_classes_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        kronecker_factors(net(), [])
    with pytest.raises(ValueError, match="not plain"):
        kronecker_factors(nn.Linear(4, 1).to(W), [(normal(2, 4), labels(2))])
