"""Bounds on the losses that one client reports where clients choose between models."""

from dataclasses import replace
from functools import reduce
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto.report import PathSums
from fedbasin.strategies.judging.loss_claims import bounded_claims

POINTS = (0.0, 0.5, 1.0)
CLIENTS = 10


def path(losses, errors=(), examples=20.0):
    correct = tuple(examples * (1 - error) for error in errors)
    return PathSums(POINTS, (), tuple(examples * loss for loss in losses), (), correct, examples, 1)


def total(paths):
    bounded = bounded_claims(paths)
    return reduce(add, (bounded[node][0] if node in bounded else path for node, path in paths.items()))


HONEST = path((1.0, 0.5, 0.2), (0.5, 0.2, 0.1))


def federation(*liars, clients=CLIENTS):
    return dict(enumerate([*[HONEST] * (clients - len(liars)), *liars]))


losses = st.lists(st.floats(0.0, 1e30), min_size=3, max_size=3)
shares = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)
claims = st.builds(path, losses, shares, st.floats(1.0, 1e12))


@given(st.lists(claims, min_size=1, max_size=2))
def test_two_of_ten_move_the_sums_by_no_more_than_a_multiple_of_the_others(liars):
    sums, honest = total(federation(*liars)), total(federation(clients=CLIENTS - len(liars)))
    examples = sums.examples - honest.examples
    assert examples <= len(liars) * 8 * HONEST.examples * (1 + 1e-9)
    for index, loss in enumerate(honest.loss_after):
        most = 4 * loss / honest.examples * examples + 20 * len(liars)
        assert sums.loss_after[index] - loss <= most * (1 + 1e-6)
        wrong, usual = sums.examples - sums.correct_after[index], honest.examples - honest.correct_after[index]
        assert wrong - usual <= 4 * usual / honest.examples * examples + 5 * len(liars) + 1e-6 * sums.examples


def test_two_of_ten_cannot_keep_the_others_from_a_model_that_is_far_better():
    liar = path((0.0, 1e6, 1e6), (0.0, 1.0, 1.0))
    plain = reduce(add, federation(liar, liar).values())
    assert plain.loss_after[0] < plain.loss_after[2]
    far_better = path((4.0, 1.0, 0.2), (0.9, 0.2, 0.1))
    sums = total({node: far_better if honest is HONEST else honest for node, honest in federation(liar, liar).items()})
    assert sums.loss_after[2] < sums.loss_after[0]
    assert sums.correct_after[2] > sums.correct_after[0]


@given(
    st.lists(
        st.builds(
            lambda level, errors, examples: path([level, level / 2, level / 4], errors, examples),
            st.floats(0.5, 2.0),
            st.lists(st.floats(0.1, 0.4), min_size=3, max_size=3),
            st.floats(10.0, 80.0),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_clients_that_are_alike_up_to_a_factor_of_four_count_as_they_are(paths):
    assert not bounded_claims(dict(enumerate(paths)))


def test_a_few_confident_errors_of_one_client_are_left_as_they_are():
    few = path((4.0, 4.0, 4.0), (1.0, 1.0, 1.0), examples=4.0)
    assert not bounded_claims(federation(few))


def test_who_is_cut_back_is_named_with_what_was_claimed():
    bounded = bounded_claims(
        federation(path((1.0, 1e6, 1e6), (0.5, 0.2, 0.1)), path((1.0, 0.5, 0.2), (0.5, 0.2, 0.1), 1e9))
    )
    assert bounded.keys() == {8, 9}
    assert bounded[8][1] == "loss under 2 of 3 models cut, from 1e+06 to 3"
    assert bounded[9][1] == "examples cut from 1e+09 to 160"
    assert bounded[9][0].loss_after == pytest.approx([160.0, 80.0, 32.0])


@given(claims, st.integers(0, 2))
def test_fewer_than_three_judges_have_no_majority(claim, silent):
    nobody = replace(HONEST, loss_after=(0.0,) * 3, correct_after=(0.0,) * 3, examples=0.0)
    paths = {1: HONEST, 2: claim, **{3 + index: nobody for index in range(silent)}}
    assert not bounded_claims(paths)


def test_of_squared_errors_a_multiple_of_what_is_usual_takes_the_place_of_nats():
    exact, liar = path((1e-4, 5e-5, 2e-5)), path((1e-4, 1.0, 1.0))
    ((bounded, _),) = bounded_claims({**dict.fromkeys(range(4), exact), 4: liar}).values()
    assert bounded.loss_after == pytest.approx([20e-4, 4 * 20 * 5e-5 + 5 * 5e-5, 4 * 20 * 2e-5 + 5 * 2e-5])


def test_who_counts_no_correct_examples_does_not_take_those_of_the_others():
    silent = path((1.0, 0.5, 0.2))
    bounded = bounded_claims(federation(silent))
    assert bounded == {9: (PathSums(), "its losses do not count: it lacks the correct examples that most report")}
    assert total(federation(silent)).correct_after == total(federation(clients=CLIENTS - 1)).correct_after


def test_who_counts_them_where_most_do_not_has_no_nats_to_lose():
    exact, liar = path((1e-4, 5e-5, 2e-5)), path((1e-4, 1.0, 1.0), (0.0, 0.0, 0.0))
    ((bounded, _),) = bounded_claims({**dict.fromkeys(range(4), exact), 4: liar}).values()
    assert bounded.loss_after[1] == pytest.approx(4 * 20 * 5e-5 + 5 * 5e-5)


@given(st.lists(claims, min_size=3, max_size=8))
def test_nothing_is_raised_and_what_is_not_cut_is_as_it_was(paths):
    for node, (bounded, note) in bounded_claims(dict(enumerate(paths))).items():
        claimed = paths[node]
        assert note
        assert bounded.examples <= claimed.examples
        assert all(after <= before for after, before in zip(bounded.loss_after, claimed.loss_after, strict=True))
        assert all(0 <= correct <= bounded.examples * (1 + 1e-9) for correct in bounded.correct_after)
