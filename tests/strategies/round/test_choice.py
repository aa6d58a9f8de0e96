"""Which model is served, which one is trained on, and what follows for the rounds after."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto.report import Choice, ClientReport, RoundReport, StageReport
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.round.choice import Candidate, Standing, best_candidate, candidates, kept, with_pause

FITTED = Choice("fitted", 3, "fitted", loss=1.0, accuracy=0.8, average_loss=2.0, average_accuracy=0.5, examples=10)
AVERAGE = replace(FITTED, served="average", trained_on="average", loss=2.0, accuracy=0.5)

losses = st.floats(0, 10)
models = st.builds(Candidate, st.floats(0, 1), losses, st.floats(0, 1) | st.none())


@given(models, st.lists(models))
def test_what_is_served_is_never_worse_than_the_mean_in_loss_or_accuracy(average, others):
    best = best_candidate(average, others)
    assert best.loss <= average.loss
    assert best.accuracy is None or average.accuracy is None or best.accuracy >= average.accuracy
    assert all(best.loss <= model.loss for model in others if model.matches(average))


def test_points_of_a_line_are_its_means():
    path = Path((0.0, 1.0), (4.0, 2.0), (1.0, 2.0), 4.0)
    assert candidates(path) == [Candidate(0.0, 1.0, 0.25), Candidate(1.0, 0.5, 0.5)]
    assert candidates(replace(path, correct=()))[0].accuracy is None
    assert candidates(None) == candidates(Path.zero((0.0, 1.0))) == []


@pytest.mark.parametrize(
    ("loss", "accuracy", "same_clients", "is_kept"),
    [
        (1.1, 0.7, True, True),
        (1.1, 0.8, True, True),
        (0.9, 0.7, True, False),  # lower loss
        (1.1, 0.9, True, False),  # more accurate
        (1.0, 0.8, True, False),  # as good
        (1.1, 0.7, False, False),  # of other clients
        (2.1, 0.7, False, True),  # a multiple
    ],
)
def test_the_model_served_so_far_is_kept_where_this_rounds_is_worse_in_both(loss, accuracy, same_clients, is_kept):
    choice = replace(FITTED, served_round=5, loss=loss, accuracy=accuracy)
    result = kept(choice, FITTED, same_clients=same_clients)
    assert result == (replace(choice, served="kept", served_round=3, loss=1.0, accuracy=0.8) if is_kept else choice)
    assert kept(choice, None, same_clients=same_clients) == choice


def test_averaging_alone_follows_for_longer_and_longer_until_closed_forms_pay():
    pauses, pause = [], 0
    for _ in range(7):
        pause = with_pause(AVERAGE, pause).pause
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 16, 16, 16]
    assert with_pause(FITTED, 16).pause == with_pause(replace(AVERAGE, served="fitted"), 16).pause == 0


def report(number, choice, nodes=(1, 2)):
    clients = tuple(ClientReport(node, "accepted") for node in nodes)
    return RoundReport("run", number, stages=(StageReport("probe", clients=clients),), choice=choice)


def test_the_standing_follows_from_the_reports():
    standing = Standing().after(report(1, with_pause(AVERAGE, 0)))
    assert (standing.pause, standing.resumes) == (1, 3)
    paused = standing.after(report(2, None))
    # A model that nobody compared cannot be kept by comparison.
    assert (paused.choice, paused.pause, paused.resumes) == (None, 1, 3)
    assert paused.settled(AVERAGE, 3, ()).pause == 2


def test_a_round_that_trained_on_fitted_layers_in_vain_goes_back():
    standing = Standing().after(report(3, FITTED))
    worse = replace(FITTED, served="kept", average_loss=2.5)
    assert standing.goes_back(worse)
    assert not standing.goes_back(replace(worse, average_loss=1.5))
    assert not standing.goes_back(replace(worse, served="average"))
    assert not Standing().after(report(3, AVERAGE)).goes_back(worse)
