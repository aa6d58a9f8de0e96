"""The head of a model behind every operation that treats its features alike, and the sums that determine it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedbasin.client.refit.head_sums import head_equations
from fedbasin.client.refit.regression import select_layers
from fedbasin.client.refit.used_layers import read_layer_graph
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import closed_form
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.tasks.guess import guess_task
from fedbasin.strategies.tasks.likelihoods import MARGIN, TaskError
from fedbasin.strategies.tasks.model_task import TASKS

W = torch.float64
HEAD = ("head.weight", "head.bias")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def classes(*shape, count=3):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(1))


class Headed(nn.Module):
    """A body, a head, and what a function makes of the head's output."""

    def __init__(self, body, head, tail):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.tail = body, head, tail
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.to(W)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        return self.tail(self, self.head(self.body(x).relu()))


def flat(tail, width=3):
    return lambda: Headed(nn.Linear(6, 8), nn.Linear(8, width), tail)


def images(tail, width=3, kernel=1):
    return lambda: Headed(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, width, kernel, padding=kernel // 2), tail)


ROWS, TOKENS, IMAGES = draw(20, 6), draw(5, 7, 6), draw(4, 2, 5, 5)
LABELS = (draw(20, 4, seed=2) > 0).double()

FOUND = {
    "the output itself": (flat(lambda m, z: z), ROWS, classes(20)),
    "log-softmax": (flat(lambda m, z: nn.LogSoftmax(dim=1)(z)), ROWS, classes(20)),
    "a temperature": (flat(lambda m, z: z / 0.5), ROWS, classes(20)),
    "a trained temperature": (flat(lambda m, z: m.scale.exp() * z), ROWS, classes(20)),
    "a temperature and log-softmax": (flat(lambda m, z: F.log_softmax(2 * z / m.scale, -1)), ROWS, classes(20)),
    "as many outputs as inputs": (flat(lambda m, z: 2 * z, 9), ROWS, classes(20, count=9)),
    "a mean over tokens": (flat(lambda m, z: z.mean(1)), TOKENS, classes(5)),
    "the last token": (flat(lambda m, z: z[:, -1]), TOKENS, classes(5)),
    "every token": (flat(lambda m, z: z), TOKENS, classes(5, 7)),
    "classes second": (flat(lambda m, z: z.transpose(1, 2)), TOKENS, classes(5, 7)),
    "pooled 1x1 convolution": (images(lambda m, z: F.adaptive_avg_pool2d(z, 1).flatten(1)), IMAGES, classes(4)),
    "every pixel": (images(lambda m, z: z), IMAGES, classes(4, 5, 5)),
    "every pixel of a wide kernel": (images(lambda m, z: z, 3, 3), IMAGES, classes(4, 5, 5)),
    "interpolation": (images(lambda m, z: F.interpolate(z, scale_factor=2, mode="bilinear")), IMAGES, classes(4, 10, 10)),
    "an auxiliary output": (flat(lambda m, z: (z, m.body.weight.sum())), ROWS, classes(20)),
    "outputs by name": (flat(lambda m, z: {"out": z, "aux": -z}), ROWS, classes(20)),
    "numbers": (flat(lambda m, z: z, 2), ROWS, draw(20, 2, seed=3)),
    "one number": (flat(lambda m, z: z, 1), ROWS, draw(20, seed=3)),
    "one number, squeezed": (flat(lambda m, z: z.squeeze(-1), 1), ROWS, draw(20, seed=3)),
    "one number, indexed": (flat(lambda m, z: 3 * z[:, 0], 1), ROWS, draw(20, seed=3)),
    "one number of every pixel": (images(lambda m, z: z.squeeze(1), 1), IMAGES, draw(4, 5, 5, seed=3)),
    "labels": (flat(lambda m, z: z / 2, 4), ROWS, LABELS),
}  # fmt: skip

NONE = {
    "an activation": (flat(lambda m, z: z.relu()), ROWS, classes(20)),
    "an activation in place": (flat(lambda m, z: (z.relu_(), z)[1]), ROWS, classes(20)),
    "a factor from the output": (flat(lambda m, z: z * z.sigmoid(), 1), ROWS, draw(20, 1)),
    "a norm": (flat(lambda m, z: z / z.norm(dim=-1, keepdim=True)), ROWS, classes(20)),
    "a factor of each class": (flat(lambda m, z: z * torch.arange(1.0, 4.0, dtype=W)), ROWS, classes(20)),
    "another order of classes": (flat(lambda m, z: z[:, torch.tensor([2, 1, 0])]), ROWS, classes(20)),
    "a soft cap": (flat(lambda m, z: 30 * z.tanh()), ROWS, classes(20)),
    "classes of several tokens": (flat(lambda m, z: z.flatten(1)), TOKENS, classes(5, count=21)),
    "something added": (flat(lambda m, z: z + m.scale), ROWS, classes(20)),
    "log-softmax of the batch": (flat(lambda m, z: z.log_softmax(0)), ROWS, classes(20)),
    "a head that is used twice": (flat(lambda m, z: m.head(F.pad(z, (0, 5)))), ROWS, classes(20)),
}


def sums_of(model, data, task=None):
    task = task or guess_task(model, data)
    (layer,) = select_layers(model, [read_layer_graph(model, data, task).head])
    return head_equations(model, model.state_dict(), layer, task, data)


@pytest.mark.parametrize(("make", "x", "targets"), FOUND.values(), ids=FOUND)
def test_the_rows_of_a_head_give_the_gradient_of_its_task(make, x, targets):
    model, data = make(), [(x, targets)]
    task = guess_task(model, data)
    graph = read_layer_graph(model, data, task)
    assert graph.head == HEAD
    sums = sums_of(model, data)
    outputs = model(x)
    outputs = outputs["out"] if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else outputs
    if task.head == "values":
        goals = targets.reshape(outputs.shape) if task.name == "regression" else MARGIN * (2 * targets - 1)
        loss = (outputs - goals).square().sum() / 2
        expected = -gradient(model, loss)
    else:
        # The sum of each class is the gradient of its own logits' sum, whatever lies between.
        classes_last = outputs if outputs.shape[:-1] == targets.shape else outputs.movedim(1, -1)
        if "log-softmax" in (name := next(n for n, v in FOUND.items() if v[0] is make)):
            pytest.skip(f"{name}: its gradient mixes classes; the closed form is compared below")
        expected = gradient(model, classes_last.gather(-1, targets.unsqueeze(-1)).sum())
    torch.testing.assert_close(sums.moment, expected)


def gradient(model, value):
    weight, bias = torch.autograd.grad(value, [model.head.weight, model.head.bias])
    return torch.cat([weight.flatten(1), bias.unsqueeze(1)], 1)


@pytest.mark.parametrize(
    "name", ["a temperature", "a trained temperature", "log-softmax", "a temperature and log-softmax"]
)
def test_a_closed_form_head_has_the_same_function_behind_a_temperature(name):
    make, x, targets = FOUND[name]
    model, plain = make(), FOUND["the output itself"][0]()
    logits = []
    for each in (model, plain):
        sums = sums_of(each, [(x, targets)])
        head = closed_form(HEAD, Gram(sums.gram), sums.moment, Ridge(1e-2, "anchor"))
        with torch.no_grad():
            each.head.weight.copy_(head[:, :-1])
            each.head.bias.copy_(head[:, -1])
        logits.append(each(x).log_softmax(-1))
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(("make", "x", "targets"), NONE.values(), ids=NONE)
def test_a_layer_before_any_other_operation_is_no_head(make, x, targets):
    model, data = make(), [(x, targets)]
    graph = read_layer_graph(model, data)
    assert graph.head is None
    assert HEAD in [block for level in graph.levels for block in level]


def test_a_table_that_embeds_too_is_no_head():
    model = nn.Module()
    model.embed, model.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    model.head.weight = model.embed.weight
    model.forward = lambda tokens: model.head(model.embed(tokens))
    assert read_layer_graph(model, [(classes(5, 7), classes(5, 7))]).head is None


def test_numbers_have_no_head_behind_log_softmax():
    model = flat(lambda m, z: z.log_softmax(-1))()
    assert read_layer_graph(model, [(ROWS, draw(20, 3))], TASKS["regression"]).head is None


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, 19), max_size=4), name=st.sampled_from(["a temperature", "numbers", "labels"]))
def test_the_split_over_batches_does_not_show(cuts, name):
    make, x, targets = FOUND[name]
    model = make()
    whole = sums_of(model, [(x, targets)])
    parts = [part.tolist() for part in torch.arange(20).tensor_split(sorted(cuts))]
    task = guess_task(model, [(x, targets)])
    split = sums_of(model, [(x[p], targets[p]) for p in parts], task)
    torch.testing.assert_close(split.gram, whole.gram)
    torch.testing.assert_close(split.moment, whole.moment)


@pytest.mark.parametrize("task", ["tokens", "regression", "language-modelling"])
def test_padding_is_left_out(task):
    model = flat(lambda m, z: z, 1 if task == "regression" else 3)()
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 2, 6]).unsqueeze(1)
    targets = draw(5, 7, 1) if task == "regression" else classes(5, 7).masked_fill(~mask, -100)
    padded = TOKENS.masked_fill(~mask.unsqueeze(-1), 1e6)
    found = sums_of(model, [(padded, targets, mask)], TASKS[task])
    if task == "language-modelling":
        # The place before a counted target, whose mask is one further.
        rows, goals = TOKENS[:, :-1][mask[:, 1:]], targets[:, 1:][mask[:, 1:]]
        alone = sums_of(model, [(rows, goals)], TASKS["classification"])
    else:
        alone = sums_of(
            model, [(TOKENS[mask], targets[mask])], replace(TASKS["classification" if task == "tokens" else task])
        )
    torch.testing.assert_close(found.gram, alone.gram)
    torch.testing.assert_close(found.moment, alone.moment)


WRONG = {
    "of every token": (classes(10, 3), r"logits \[10, 3\] for targets torch.int64 \[10, 3\]"),
    "soft": (draw(10), r"logits \[10, 3\] for targets torch.float64"),
    "beyond the classes": (classes(10, count=9), "targets from 0 to 8 for 3 logits"),
    "below them": (classes(10) - 1, "targets from -1 to 1 for 3 logits"),
}


@pytest.mark.parametrize(("targets", "message"), WRONG.values(), ids=WRONG)
def test_targets_that_are_no_classes_are_refused(targets, message):
    model = flat(lambda m, z: z)()
    (layer,) = select_layers(model, [HEAD])
    with pytest.raises(TaskError, match=message):
        head_equations(model, model.state_dict(), layer, TASKS["classification"], [(draw(10, 6), targets)])


def test_a_layer_that_is_no_head_is_refused_by_name():
    model = flat(lambda m, z: z)()
    (layer,) = select_layers(model, [("body.weight", "body.bias")])
    with pytest.raises(TaskError, match=r"body\.weight is not a last layer that the task 'classification' can fit"):
        head_equations(model, model.state_dict(), layer, TASKS["classification"], [(ROWS, classes(20))])
