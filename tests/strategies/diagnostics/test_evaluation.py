import pytest
import torch
from torch.nn.functional import nll_loss

from fedbasin.strategies.diagnostics.evaluation import evaluate, predict
from fedbasin.strategies.tasks.likelihoods import IGNORED
from tests import tiny


def batches(count=3):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(7, 4, generator=draw), torch.randint(3, (7,), generator=draw)) for _ in range(count)]


def test_probabilities_and_sums_are_of_the_same_predictions():
    model, state = tiny.net(1), tiny.net(2).state_dict()
    probabilities, targets = predict(model, state, batches())
    score = evaluate(model, state, batches())
    assert score.examples == len(targets) == 21
    assert score.loss == pytest.approx(float(nll_loss(probabilities.log(), targets)) * 21, rel=1e-5)
    assert score.correct == float((probabilities.argmax(-1) == targets).sum())


def test_examples_that_do_not_count_have_no_prediction():
    (inputs, targets), *_ = batches(1)
    targets[2] = IGNORED
    probabilities, kept = predict(tiny.net(1), tiny.net(1).state_dict(), [(inputs, targets)])
    assert len(probabilities) == len(kept) == 6
    assert torch.equal(kept, targets[targets != IGNORED])


def test_the_model_is_left_as_it_was():
    model = tiny.net(1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predict(model, tiny.net(2).state_dict(), batches())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
