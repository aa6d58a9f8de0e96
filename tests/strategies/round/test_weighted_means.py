"""Means of clients' metrics, weighted by the clients' weights."""

import math

from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.round.weighted_means import weighted_means

numbers = st.floats(-1e6, 1e6)
weights = st.floats(0.1, 1e6)


@given(st.lists(st.tuples(numbers, weights), min_size=1))
def test_a_mean_is_weighted_and_lies_between_the_values(clients):
    mean = weighted_means([({"loss": value}, weight) for value, weight in clients])["loss"]
    values = [value for value, _ in clients]
    exact = math.fsum(v * w for v, w in clients) / math.fsum(w for _, w in clients)
    assert math.isclose(mean, exact, rel_tol=1e-9, abs_tol=1e-3)
    assert min(values) - 1e-3 <= mean <= max(values) + 1e-3


def test_a_metric_is_the_mean_of_those_who_sent_it():
    means = weighted_means([({"a": 1.0, "b": 10.0}, 1), ({"a": 4.0}, 3)])
    assert means == {"a": 3.25, "b": 10.0}


def test_one_clients_overflow_is_not_everybodys():
    means = weighted_means([({"loss": math.nan, "norm": math.inf}, 1), ({"loss": 2.0}, 1)])
    assert means == {"loss": 2.0}


@given(st.lists(st.tuples(st.floats(-1.7e308, 1.7e308), weights), min_size=1))
def test_no_finite_values_have_a_mean_that_is_not(clients):
    means = weighted_means([({"loss": 1.0}, 1.0), *(({"loss": value}, weight) for value, weight in clients)])
    assert math.isfinite(means["loss"])


@given(st.permutations([2.0, 2.0, [5.0], [5.0, 6.0], []]))
def test_one_client_cannot_change_the_form_of_a_metric(values):
    assert weighted_means([({"loss": value}, 1.0) for value in values]) == {"loss": 2.0}


def test_lists_are_averaged_entry_by_entry_with_those_of_the_commonest_length():
    clients = [
        ({"curve": [1.0, 2.0]}, 1),
        ({"curve": [4.0, 6.0]}, 3),
        ({"curve": [1.0]}, 5),
        ({"curve": [1.0, math.nan]}, 5),
        ({"curve": 7.0}, 5),
    ]
    assert weighted_means(clients) == {"curve": [3.25, 5.0]}


def test_a_list_of_one_number_stays_a_list():
    assert weighted_means([({"curve": [2.0]}, 1)]) == {"curve": [2.0]}


def test_nothing_has_no_means():
    assert weighted_means([]) == {}
    assert weighted_means([({"loss": 1.0}, 0)]) == {}
