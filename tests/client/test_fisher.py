"""The diagonal Fisher information against loops, closed forms and what drawing must give on average."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

import fedbasin.strategies.statistics.fisher as fisher_module
from fedbasin.strategies.statistics.fisher import diagonal_fisher
from fedbasin.strategies.tasks.model_task import TASKS

W = torch.float64


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


DRAWN = replace(TASKS["classification"], exact_scores=0)
EXACT_TOKENS = replace(TASKS["tokens"], exact_scores=32)


def labels(count):
    return torch.zeros(count, dtype=torch.long)


def slow_fisher(model, batches):
    """One backward pass for each example and class."""
    model.eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, _ in batches:
        for x in inputs:
            logs = model(x.unsqueeze(0)).log_softmax(-1)[0]
            for log in logs:
                gradients = torch.autograd.grad(log, list(model.parameters()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        sums[name] += log.exp().detach() * gradient**2
    return sums


def convolutional():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(12, 4))


class TestDiagonalFisher:
    def test_it_equals_the_loop_over_examples_and_classes(self):
        model = convolutional().to(W)
        model(normal(8, 1, 4, 4, dtype=W))  # running statistics that are not those of a new layer
        data = [(normal(5, 1, 4, 4, dtype=W), labels(5)), (normal(2, 1, 4, 4, seed=1, dtype=W), labels(2))]
        found = diagonal_fisher(model, data)
        expected = slow_fisher(model, data)
        assert list(found) == [name for name, _ in model.named_parameters()]
        for name, fisher in found.items():
            torch.testing.assert_close(fisher, expected[name], rtol=1e-10, atol=1e-14)

    def test_a_model_that_decides_by_its_inputs_gives_the_same(self):
        class Deciding(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Linear(4, 3)

            def forward(self, x):
                return self.body(-x if x.sum() > 0 else x)

        torch.manual_seed(0)
        model = Deciding().to(W)
        # One example to a batch, because the decision is about all that is in it.
        data = [(normal(1, 4, seed=seed, dtype=W), labels(1)) for seed in range(6)]
        expected = slow_fisher(model, data)
        for name, fisher in diagonal_fisher(model, data).items():
            torch.testing.assert_close(fisher, expected[name], rtol=1e-10, atol=1e-14)

    def test_it_equals_the_closed_form_of_softmax_regression(self):
        model, x = nn.Linear(5, 4).to(W), normal(30, 5, dtype=W)
        p = model(x).softmax(-1).detach()
        # sum_y p_y (1[y=c] - p_c)^2 = p_c (1 - p_c)
        variance = p * (1 - p)
        found = diagonal_fisher(model, [(x, labels(30))])
        torch.testing.assert_close(found["weight"], variance.T @ x**2, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found["bias"], variance.sum(0), rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize(("elements", "most"), [(1, 256), (150, 256), (2**24, 1), (2**24, 3)])
    def test_bounded_memory_gives_the_same_sum(self, monkeypatch, elements, most):
        model, data = nn.Linear(5, 4).to(W), [(normal(7, 5, dtype=W), labels(7))]
        whole = diagonal_fisher(model, data)
        monkeypatch.setattr(fisher_module, "GRADIENT_ELEMENTS", elements)
        monkeypatch.setattr(fisher_module, "MOST_GRADIENTS", most)
        for name, fisher in diagonal_fisher(model, data).items():
            torch.testing.assert_close(fisher, whole[name], rtol=1e-12, atol=1e-14)

    def test_the_batch_size_does_not_show(self):
        model, x = convolutional().to(W), normal(12, 1, 4, 4, dtype=W)
        whole = diagonal_fisher(model, [(x, labels(12))])
        single = diagonal_fisher(model, [(part, labels(1)) for part in x.split(1)])
        for name, fisher in whole.items():
            torch.testing.assert_close(single[name], fisher, rtol=1e-10, atol=1e-14)

    def test_drawn_labels_are_right_on_average(self):
        model, x = nn.Linear(3, 3).to(W), normal(4, 3, dtype=W)
        exact = diagonal_fisher(model, [(x, labels(4))])["weight"]
        many = [(x.repeat(5000, 1), labels(20000))]
        generator = torch.Generator().manual_seed(0)
        drawn = diagonal_fisher(model, many, generator, DRAWN)["weight"] / 5000
        torch.testing.assert_close(drawn, exact, rtol=0.05, atol=0.0)

    def test_drawn_labels_follow_the_generator(self):
        model, data = nn.Linear(3, 3), [(normal(9, 3), labels(9))]
        once, again, other = (
            diagonal_fisher(model, data, torch.Generator().manual_seed(seed), DRAWN)["bias"] for seed in (1, 1, 2)
        )
        assert torch.equal(once, again)
        assert not torch.equal(once, other)

    def test_a_drawn_label_gives_its_own_squared_gradient(self):
        model, x = nn.Linear(3, 3).to(W), normal(1, 3, dtype=W)
        found = diagonal_fisher(model, [(x, labels(1))], task=DRAWN)["bias"]
        p = model(x).softmax(-1).detach()
        candidates = (one_hot(torch.arange(3), 3) - p) ** 2
        assert any(torch.allclose(found, candidate) for candidate in candidates)

    def test_only_trainable_parameters_are_described_and_tied_ones_once(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).to(W)
        model[2].weight = model[0].weight
        model[3].weight.requires_grad_(False)
        data = [(normal(5, 4, dtype=W), labels(5))]
        found = diagonal_fisher(model, data)
        model[3].weight.requires_grad_(True)
        expected = slow_fisher(model, data)
        assert list(found) == ["0.weight", "0.bias", "2.bias", "3.bias"]
        for name, fisher in found.items():
            torch.testing.assert_close(fisher, expected[name], rtol=1e-10, atol=1e-14)

    def test_transformers_and_inputs_by_name_are_read_too(self):
        class Classifier(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
                self.head = nn.Linear(8, 3)

            def forward(self, x):
                return self.head(self.body(x).mean(1))

        model, x = Classifier().to(W), normal(4, 5, 8, dtype=W)
        found = diagonal_fisher(model, [({"x": x}, labels(4))])
        expected = slow_fisher(model, [(x, labels(4))])
        for name, fisher in found.items():
            torch.testing.assert_close(fisher, expected[name], rtol=1e-8, atol=1e-14)

    def test_half_precision_comes_back_as_float32(self):
        model = nn.Linear(4, 3).to(torch.bfloat16)
        found = diagonal_fisher(model, [(normal(5, 4).to(torch.bfloat16), labels(5))])
        assert {fisher.dtype for fisher in found.values()} == {torch.float32}

    def test_the_model_is_left_as_it_was(self):
        model = convolutional()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        diagonal_fisher(model, [(normal(5, 1, 4, 4), labels(5))])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(module.training for module in model.modules())

    def test_what_is_no_classifier_is_refused(self):
        with pytest.raises(ValueError, match=r"outputs \[2, 5, 3\] and targets .*\[2\]"):
            diagonal_fisher(nn.Linear(4, 3), [(normal(2, 5, 4), labels(2))])
        with pytest.raises(ValueError, match="no examples"):
            diagonal_fisher(nn.Linear(4, 3), [])


class Tagger(nn.Module):
    """Logits at every token, of the tokens before it and its own."""

    def __init__(self, classes=3):
        super().__init__()
        self.read, self.head = nn.Linear(4, 5), nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.read(x).tanh().cumsum(1))


def slow_token_fisher(model, x, counted):
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example, counts in zip(x, counted, strict=True):
        logs = model(example.unsqueeze(0)).log_softmax(-1)[0]
        for log in logs[counts].flatten():
            gradients = torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += log.exp().detach() * gradient**2
    return sums


class TestModelsOfTokens:
    x = normal(3, 4, 4, dtype=W)
    targets = torch.tensor([[0, 1, 2, 0], [1, -100, -100, 2], [2, 2, 1, 0]])

    def test_every_label_of_every_token_is_counted_where_there_are_few(self):
        model = Tagger().to(W)
        found = diagonal_fisher(model, [(self.x, self.targets)], task=EXACT_TOKENS)
        expected = slow_token_fisher(model, self.x, self.targets >= 0)
        for name, fisher in found.items():
            torch.testing.assert_close(fisher, expected[name], rtol=1e-10, atol=1e-14)

    def test_padding_is_left_out(self):
        model, keep = Tagger().to(W), torch.arange(4) < torch.tensor([[4], [2], [3]])
        found = diagonal_fisher(model, [(self.x, self.targets.clamp(min=0), keep)], task=EXACT_TOKENS)
        expected = slow_token_fisher(model, self.x, keep)
        for name, fisher in found.items():
            torch.testing.assert_close(fisher, expected[name], rtol=1e-10, atol=1e-14)

    def test_labels_drawn_at_all_tokens_together_are_right_on_average(self):
        model = Tagger().to(W)
        exact = diagonal_fisher(model, [(self.x, self.targets)], task=EXACT_TOKENS)["head.weight"]
        many = [(self.x.repeat(4000, 1, 1), self.targets.repeat(4000, 1))]
        generator = torch.Generator().manual_seed(0)
        drawn = diagonal_fisher(model, many, generator, replace(EXACT_TOKENS, exact_scores=0))["head.weight"] / 4000
        torch.testing.assert_close(drawn, exact, rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    ("model", "x", "targets", "problem"),
    [
        (nn.Linear(4, 1), normal(2, 4), labels(2), r"outputs \[2, 1\]"),
        (Tagger(), normal(2, 5, 4), labels(10).view(2, 5)[:, :4], r"outputs \[2, 5, 3\]"),
    ],
)
def test_what_has_no_fisher_information_is_refused_with_what_to_do(model, x, targets, problem):
    with pytest.raises(ValueError, match=f"{problem}.*pass basin"):
        diagonal_fisher(model, [(x, targets)])
