"""The evaluation of a model by clients, which adds nothing to it."""

import pytest

from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.round.evaluate import Evaluate
from tests.accepting import accept
from tests.strategies.round.two_layers import assert_same, state


def test_ends_in_the_model_that_it_sent():
    stage = Evaluate(state(0))
    accept(stage, 1, Update({}, 3.0))
    assert_same(stage.finish(), state(0))
    assert (stage.request.stage, stage.request.kind) == ("evaluate", "evaluate")


def test_refuses_a_client_without_examples():
    with pytest.raises(Refusal) as refused:
        accept(Evaluate(state(0)), 1, Update({}, 0.0))
    assert refused.value.outcome is Outcome.bad_weight


def test_it_requests_the_path_to_the_models_that_clients_sent():
    assert Evaluate(state(0), 5).request.path_points == 5
    assert Evaluate(state(0)).request.path_points == 0
