"""Recurrent layers step by step against PyTorch's own function, and their Fisher information against loops."""

import pytest
import torch
from torch import nn

from fedbasin.strategies.capture.recurrent_steps import RecurrentSteps, recurrent_layers
from fedbasin.strategies.statistics.fisher import diagonal_fisher

W = torch.float64
KINDS = {
    "lstm": lambda **how: nn.LSTM(3, 4, **how),
    "gru": lambda **how: nn.GRU(3, 4, **how),
    "tanh": lambda **how: nn.RNN(3, 4, **how),
    "relu": lambda **how: nn.RNN(3, 4, nonlinearity="relu", **how),
}
FORMS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "two layers both ways": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=W)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_steps_give_what_the_whole_gives(make, form):
    layer, x = make(**form).to(W), normal(5, 2, 3)
    expected = layer(x)
    with RecurrentSteps():
        found = layer(x)
    torch.testing.assert_close(found, expected)
    named = [name for each in recurrent_layers(layer) for name in each.block]
    assert sorted(named) == sorted(name for name, _ in layer.named_parameters())


def test_packed_sequences_are_computed_as_always():
    layer = nn.GRU(3, 4).to(W)
    packed = nn.utils.rnn.pack_padded_sequence(normal(5, 2, 3), torch.tensor([5, 3]))
    expected = layer(packed)[0].data
    with RecurrentSteps():
        torch.testing.assert_close(layer(packed)[0].data, expected)


class Reader(nn.Module):
    def __init__(self, body, axis):
        super().__init__()
        self.body, self.head, self.axis = body, nn.Linear(body.hidden_size * (1 + body.bidirectional), 3), axis

    def forward(self, x):
        return self.head(self.body(x if self.axis else x.transpose(0, 1))[0].mean(self.axis))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_fisher_information_equals_the_loop_over_examples_and_classes(make, form):
    torch.manual_seed(0)
    model, x = Reader(make(**form), 1 if "batch_first" in form else 0).to(W), normal(4, 5, 3)
    found = diagonal_fisher(model, [(x, torch.zeros(4, dtype=torch.long))])
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example in x:
        logs = model(example.unsqueeze(0)).log_softmax(-1)[0]
        for log in logs:
            gradients = torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] += log.exp().detach() * gradient**2
    for name, fisher in found.items():
        torch.testing.assert_close(fisher, expected[name], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("sizes", [(5, 5, 5), (4, 1, 2), (200, 100)])
def test_small_batches_are_run_as_one_and_give_the_same(sizes, monkeypatch):
    torch.manual_seed(0)
    model = Reader(nn.LSTM(3, 4, batch_first=True), 1).to(W)
    # The last batch is longer, and no part of another.
    shapes = [*((size, 5, 3) for size in sizes), (2, 6, 3)]
    data = [(torch.randn(shape, dtype=W), torch.zeros(shape[0], dtype=torch.long)) for shape in shapes]
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    joined, count = diagonal_fisher(model, data), len(runs)
    monkeypatch.setattr("fedbasin.strategies.statistics.fisher.JOINED_EXAMPLES", 0)
    for name, fisher in diagonal_fisher(model, data).items():
        torch.testing.assert_close(joined[name], fisher)
    assert len(runs) - count - count == (2 if sum(sizes) <= 256 else 0)
