import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin.strategies.diagnostics.barrier import linear_barrier
from fedbasin.strategies.diagnostics.evaluation import evaluate
from fedbasin.strategies.diagnostics.loss_path import path_losses


def mlp(seed: int, hidden: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, 3))


def examples(seed: int, count: int = 40):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs @ torch.randn(6, 3, generator=torch.Generator().manual_seed(9))).argmax(1)


def in_batches(inputs, targets, size=16):
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def trained(seed: int) -> nn.Sequential:
    model, (inputs, targets) = mlp(seed).eval(), examples(0, 200)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


def directly(model, inputs, targets):
    with torch.no_grad():
        logits = model.eval()(inputs)
    correct = float((logits.argmax(1) == targets).sum())
    return float(cross_entropy(logits, targets, reduction="sum")), correct


def permuted(model, order):
    state = dict(model.state_dict())
    state["0.weight"], state["0.bias"] = state["0.weight"][order], state["0.bias"][order]
    state["3.weight"] = state["3.weight"][:, order]
    return state


def test_the_path_equals_a_direct_computation():
    anchor, end, middle = mlp(1), mlp(2), mlp(3)
    inputs, targets = examples(0)
    middle.load_state_dict(
        {k: (a + b) / 2 for (k, a), b in zip(anchor.state_dict().items(), end.state_dict().values(), strict=True)}
    )
    path = path_losses(mlp(4), anchor.state_dict(), end.state_dict(), in_batches(inputs, targets), 3)
    assert path.points == (0.0, 0.5, 1.0)
    assert path.examples == 40
    for i, model in enumerate((anchor, middle, end)):
        loss, correct = directly(model, inputs, targets)
        assert path.loss[i] == pytest.approx(loss, rel=1e-6)
        assert path.correct[i] == correct


def test_sums_of_clients_equal_the_pooled_data():
    anchor, end = mlp(1).state_dict(), mlp(2).state_dict()
    mine, yours = examples(0, 30), examples(1, 70)
    pooled = [torch.cat(parts) for parts in zip(mine, yours, strict=True)]
    whole = path_losses(mlp(3), anchor, end, in_batches(*pooled), 5)
    parts = [path_losses(mlp(3), anchor, end, in_batches(*data), 5) for data in (mine, yours)]
    summed = parts[0] + parts[1]
    assert summed.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (summed.correct, summed.examples) == (whole.correct, whole.examples)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in before.items()}
    path_losses(model, before, other, in_batches(*examples(0)), 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True]
    assert model.training


def test_equal_models_have_no_barrier():
    state = mlp(1).state_dict()
    path = path_losses(mlp(2), state, state, in_batches(*examples(0)), 7)
    assert len(set(path.loss)) == 1
    assert linear_barrier(path.points, path.mean_loss) == 0


def test_a_planted_permutation_raises_a_barrier_between_equal_functions():
    model = trained(1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    data = in_batches(*examples(3, 200))
    path = path_losses(mlp(4), model.state_dict(), permuted(model, order), data, 11)
    assert path.loss[0] == pytest.approx(path.loss[-1], rel=1e-5)
    assert path.correct[0] == path.correct[-1]
    assert linear_barrier(path.points, path.mean_loss) > 0.05
    assert path.accuracy[0] - path.accuracy[5] > 0


def test_integer_buffers_come_from_the_end():
    class Shifted(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.register_buffer("shift", torch.tensor(shift))

        def forward(self, inputs):
            return self.linear(inputs).roll(int(self.shift), 1)

    anchor, end = Shifted(0), Shifted(1)
    end.linear.load_state_dict(anchor.linear.state_dict())
    inputs, targets = examples(0)
    path = path_losses(Shifted(2), anchor.state_dict(), end.state_dict(), [(inputs, targets)], 3)
    assert path.loss == pytest.approx([directly(end, inputs, targets)[0]] * 3, rel=1e-6)


def test_running_statistics_are_interpolated():
    def normed(mean):
        model = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
        model[0].running_mean.fill_(mean)
        return model

    anchor, middle, end = normed(0.0), normed(1.0), normed(2.0)
    for model in (middle, end):
        model[1].load_state_dict(anchor[1].state_dict())
    inputs, targets = examples(0)
    path = path_losses(normed(5.0), anchor.state_dict(), end.state_dict(), [(inputs, targets)], 3)
    assert path.loss[1] == pytest.approx(directly(middle, inputs, targets)[0], rel=1e-6)


@pytest.mark.parametrize("names", [["a.weight", "b.weight"], ["a.weight"], ["b.weight"]])
def test_tied_weights_move_together_under_either_name(names):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, inputs):
            return self.b(torch.relu(self.a(inputs)))

    inputs, targets = examples(0)
    start, other = Tied(), Tied()
    anchor, end = ({n: m.state_dict()[n] for n in names} for m in (start, other))
    path = path_losses(Tied(), anchor, end, [(inputs, targets)], 2)
    expected = [directly(model, inputs, targets)[0] for model in (start, other)]
    assert path.loss == pytest.approx(expected, rel=1e-6)


def test_tokens_are_examples_and_padding_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5))
    tokens, targets = torch.randint(11, (4, 6)), torch.randint(5, (4, 6))
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 2]).unsqueeze(1)
    targets[0, 0] = -100
    score = evaluate(model, model.state_dict(), [(tokens, targets, mask)])
    with torch.no_grad():
        logits = model(tokens)
    expected = cross_entropy(logits[mask], targets[mask], reduction="sum")
    assert score.loss == pytest.approx(float(expected), rel=1e-6)
    assert score.examples == 11
    assert score.correct == (logits.argmax(-1) == targets)[mask].sum()


def test_states_of_another_model_are_refused_by_name():
    model, data = mlp(1), [examples(0)]
    state = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"no tensor '7\.weight'"):
        evaluate(model, state | {"7.weight": torch.zeros(1)}, data)
    with pytest.raises(ValueError, match=r"'0\.bias' is \[16\] in the model and \[5\]"):
        evaluate(model, state | {"0.bias": torch.zeros(5)}, data)
    del state["3.bias"]
    with pytest.raises(ValueError, match=r"the state has no tensor '3\.bias'"):
        path_losses(model, model.state_dict(), state, data, 3)


def test_data_that_cannot_be_walked_along_the_path_is_refused():
    model = mlp(1)
    state = model.state_dict()
    with pytest.raises(ValueError, match="no examples"):
        evaluate(model, state, [])
    with pytest.raises(TypeError, match="not an iterator"):
        path_losses(model, state, state, iter([examples(0)]), 3)
    with pytest.raises(ValueError, match="at least the two ends"):
        path_losses(model, state, state, [examples(0)], 1)
    with pytest.raises(ValueError, match="class indices"):
        evaluate(model, state, [(examples(0)[0], torch.zeros(40, 3))], "classification")


def test_data_that_changes_between_readings_is_refused():
    class Shrinking:
        count = 40

        def __iter__(self):
            self.count -= 1
            yield examples(0, self.count)

    model = mlp(1)
    with pytest.raises(ValueError, match="same each time"):
        path_losses(model, model.state_dict(), model.state_dict(), Shrinking(), 3)
