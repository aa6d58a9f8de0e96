"""Which model is served, which one is trained on, and what follows for the rounds after."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto.report import Choice, ClientReport, Origin, RoundReport, StageReport
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.round.choice import (
    Candidate,
    Standing,
    best_candidate,
    best_scaled,
    candidates,
    gains,
    is_slow,
    kept,
    with_pause,
)

FITTED = Choice("fitted", 3, "fitted", loss=1.0, accuracy=0.8, average_loss=2.0, average_accuracy=0.5, examples=10)
AVERAGE = replace(FITTED, served="average", trained_on="average", loss=2.0, accuracy=0.5)

losses = st.floats(0, 10)
models = st.builds(
    Candidate, st.floats(0, 1), losses, st.floats(0, 1) | st.none(), st.just(Origin.fitted), st.booleans()
)


@given(models, st.lists(models), st.integers(0, 1000))
def test_what_is_served_is_the_mean_or_better_than_it_in_loss_and_no_worse_in_accuracy(average, others, examples):
    best = best_candidate(average, others, examples)
    assert best is average or best.loss < average.loss
    assert best.accuracy is None or average.accuracy is None or best.accuracy >= average.accuracy
    better = [model for model in others if model.matches(average) and model.is_below(average, examples)]
    assert best is average or best in better
    assert all(best.loss <= model.loss for model in better if not model.is_extended)
    assert not any(model.is_below(best, examples) for model in better)


def test_a_model_beyond_those_of_the_round_is_served_where_it_is_better_by_more_than_chance():
    average, fitted = Candidate(0.0, 2.0, 0.5), Candidate(1.0, 1.0, 0.8)
    little, much = (Candidate(2.0, loss, 0.8, is_extended=True) for loss in (0.95, 0.5))
    assert best_candidate(average, [fitted, little], 100) is fitted
    assert best_candidate(average, [fitted, little, much], 100) is much
    assert best_candidate(average, [little], 100) is little


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1) | st.none(), st.integers(1, 1000))
def test_a_difference_is_more_than_chance_where_there_are_examples_enough(low, high, accuracy, examples):
    models = Candidate(0.0, low, accuracy), Candidate(1.0, high, accuracy)
    if models[0].is_below(models[1], examples):
        assert low < high
        assert not models[1].is_below(models[0], examples)
        assert models[0].is_below(models[1], 2 * examples)
    if low < 0.9 * high:
        assert models[0].is_below(models[1], 1e6 / min(high, 1.0))


def test_two_errors_less_in_fifty_examples_are_chance():
    # Of breast cancer, seed 0, round 1: the mean's loss on the test is .16, the fitted model's .37.
    assert not Candidate(1.0, 0.051, 0.979).is_below(Candidate(0.0, 0.100, 0.957), 47)
    # Of the gaussian clusters, round 3.
    assert Candidate(1.0, 0.538, 0.864).is_below(Candidate(0.0, 0.720, 0.820), 272)


@given(st.lists(losses, min_size=2, max_size=11), st.integers(0, 1000))
def test_outputs_are_scaled_where_that_lowers_the_sum_of_the_losses_by_more_than_one(values, examples):
    models = [Candidate(index / (len(values) - 1), loss, 0.5) for index, loss in enumerate(values)]
    best = best_scaled(models, examples)
    if best is None:
        assert not any((values[-1] - loss) * examples > 1 for loss in values[1:-1])
    else:
        assert 0 < best.point < 1
        assert best.loss == min(values[1:-1])
        assert (values[-1] - best.loss) * examples > 1


def test_a_scaled_mean_gains_and_leaves_the_shortfall_of_averaging_alone():
    scaled = replace(AVERAGE, loss=1.5, scale=0.5, scale_gain=0.5)
    assert gains(scaled)
    assert not gains(AVERAGE)
    assert Standing(scaled).shortfall == Standing(AVERAGE).shortfall == 0.0


def test_a_model_that_is_kept_keeps_its_scale():
    earlier = replace(FITTED, loss=0.5, scale=0.7, scale_gain=0.1)
    stays = kept(replace(FITTED, served_round=4, accuracy=0.7), earlier, same_clients=True)
    assert (stays.served, stays.scale, stays.scale_gain) == ("kept", 0.7, 0.1)


def test_points_of_a_line_are_its_means():
    path = Path((0.0, 1.0), (4.0, 2.0), (1.0, 2.0), 4.0)
    assert candidates(path) == [Candidate(0.0, 1.0, 0.25), Candidate(1.0, 0.5, 0.5)]
    assert candidates(replace(path, correct=()))[0].accuracy is None
    assert candidates(None) == candidates(Path.zero((0.0, 1.0))) == []


@pytest.mark.parametrize(
    ("loss", "accuracy", "examples", "is_kept"),
    [
        (1.3, 0.7, 0, True),
        (1.3, 0.8, 0, True),
        (1.1, 0.7, 0, False),  # a loss that is higher by chance
        (0.9, 0.7, 0, False),  # lower loss
        (1.3, 0.9, 0, False),  # more accurate
        (1.0, 0.8, 0, False),  # as good
        # Judged by other clients, on as many examples.
        (1.9, 0.1, 1000, False),
        (2.1, 0.7, 10, False),  # a multiple, and an accuracy that differs by chance
        (2.1, 0.7, 1000, True),
        (2.1, 0.1, 10, True),
        (2.1, None, 10, True),
    ],
)
def test_the_model_served_so_far_is_kept_where_this_rounds_is_worse_in_both(loss, accuracy, examples, is_kept):
    earlier = replace(FITTED, examples=examples or 200)
    choice = replace(earlier, served_round=5, loss=loss, accuracy=accuracy)
    result = kept(choice, earlier, same_clients=not examples)
    assert result == (replace(choice, served="kept", served_round=3, loss=1.0, accuracy=0.8) if is_kept else choice)
    assert kept(choice, None, same_clients=not examples) == choice


@pytest.mark.parametrize("nodes", [(1,), (1, 2), (1, 2, 3)])
def test_a_client_that_fails_or_comes_back_does_not_cost_the_model_that_is_served(nodes):
    before = Standing().after(report(1, replace(FITTED, loss=0.2, examples=500.0), nodes=(1, 2)))
    now = report(2, replace(FITTED, loss=0.4, average_loss=2.0, examples=500.0), nodes=nodes)
    assert before.settled(now.choice, 2, now.stages).served == "kept"
    # Other clients may have other examples.
    other = report(2, now.choice, nodes=(2, 3))
    assert before.settled(other.choice, 2, other.stages).served == "fitted"


def test_averaging_alone_follows_for_longer_and_longer_until_closed_forms_pay():
    pauses, pause = [], 0
    for _ in range(7):
        pause = with_pause(AVERAGE, pause).pause
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 16, 16, 16]
    better = replace(AVERAGE, served="fitted", loss=1.9)
    assert with_pause(FITTED, 16).pause == with_pause(better, 16).pause == 0
    # The best of ten points is always a little better than the first.
    assert with_pause(replace(better, loss=1.99), 1).pause == 2


@given(losses, losses, losses)
def test_averaging_is_slow_where_it_does_not_close_a_quarter_of_the_gap(mean, served, shortfall):
    average, best = Candidate(0.0, mean + served), Candidate(1.0, served)
    gap = average.loss - best.loss
    assert is_slow(average, best, shortfall) == (gap > 0.75 * shortfall)
    # A round without an earlier comparison gives the mean its chance.
    assert not is_slow(average, best, Standing().shortfall)


@given(losses, losses, losses)
def test_averaging_is_slow_at_first_where_it_has_not_lowered_the_loss(mean, begin, served):
    average, start = Candidate(0.0, mean), Candidate(0.0, begin, is_extended=True)
    slow = is_slow(average, Candidate(1.0, served), Standing().shortfall, start, 100.0)
    assert slow == (not average.is_below(start, 100.0))
    # Later on the comparison before tells.
    assert is_slow(average, Candidate(1.0, mean), 1.0, start, 100.0) is False


def test_the_shortfall_is_that_of_the_last_comparison():
    averaged = replace(FITTED, trained_on="average")
    assert Standing().after(report(1, averaged)).shortfall == FITTED.average_loss - FITTED.loss == 1.0
    # What a round on fitted layers has gained says nothing of averaging.
    assert Standing().after(report(1, FITTED)).shortfall == 0
    assert Standing().after(report(1, None)).shortfall == math.inf


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


@pytest.mark.parametrize(("loss", "trained_on", "stays"), [(1.0, "average", True), (1.99, "fitted", False)])
def test_after_ten_rounds_of_sampled_clients_a_comparison_that_pays_is_made_every_seventh_round(
    loss, trained_on, stays
):
    choice = replace(FITTED, loss=loss, trained_on=trained_on)
    before = Standing().after(report(9, choice))
    assert before.resumes == 10
    # The same clients compare in every round, and so does the first round after a pause.
    assert before.after(report(10, choice)).resumes == Standing().after(report(10, choice)).resumes == 11
    standing = before.after(report(10, choice, nodes=(1, 3)))
    assert standing.resumes == 17
    assert standing.resting(17) is None
    resting = standing.resting(11)
    assert resting == (replace(choice, served="kept", trained_on="average") if stays else None)
    # What is kept meanwhile is still what the next comparison is held against.
    assert standing.after(report(11, resting)).choice == (choice if stays else None)


def test_a_scaled_mean_is_compared_again_in_the_next_round_and_is_not_served_while_averaging_goes_on():
    scaled = replace(AVERAGE, loss=1.5, scale=0.5, scale_gain=0.5)
    standing = Standing().after(report(9, scaled)).after(report(10, scaled, nodes=(1, 3)))
    assert standing.resumes == 11
    assert standing.resting(11) is None


ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(ANY, ANY, ANY)
def test_losses_that_are_no_numbers_end_no_run(loss, mean, mean_before):
    before = Standing().after(report(9, replace(FITTED, average_loss=mean_before)))
    choice = replace(FITTED, loss=loss, average_loss=mean)
    assert before.after(report(10, choice)).resumes == 11
    is_slow(Candidate(0.0, mean), Candidate(1.0, loss), before.shortfall)
    Candidate(0.0, loss, 0.5).is_below(Candidate(0.0, mean, 0.5), 10)
    Candidate(0.0, loss).is_below(Candidate(0.0, mean), 10)


@pytest.mark.parametrize("number", [1, 9, 10, 30])
def test_a_choice_between_two_means_of_products_is_made_in_every_round(number):
    # However little the better one gains: it is the fusion itself.
    products = replace(FITTED, served="products", trained_on="products", loss=1.99)
    standing = Standing().after(report(number, with_pause(products, 0)))
    assert standing.resumes == number + 1


def test_a_round_that_trained_on_fitted_layers_in_vain_goes_back():
    standing = Standing().after(report(3, FITTED))
    worse = replace(FITTED, served="kept", average_loss=2.5)
    assert standing.goes_back(worse)
    assert not standing.goes_back(replace(worse, average_loss=1.5))
    assert not standing.goes_back(replace(worse, served="average"))
    assert not Standing().after(report(3, AVERAGE)).goes_back(worse)
