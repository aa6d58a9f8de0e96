import math

from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.round.weighted_means import WeightedMeans

numbers = st.floats(-1e6, 1e6)
weights = st.floats(0.1, 1e6)


@given(st.lists(st.tuples(numbers, weights), min_size=1))
def test_a_mean_is_weighted_and_lies_between_the_values(clients):
    means = WeightedMeans()
    for value, weight in clients:
        means.add({"loss": value}, weight)
    values = [value for value, _ in clients]
    exact = math.fsum(v * w for v, w in clients) / math.fsum(w for _, w in clients)
    found = means.means()["loss"]
    assert math.isclose(found, exact, rel_tol=1e-9, abs_tol=1e-3)
    assert min(values) - 1e-3 <= found <= max(values) + 1e-3


def test_a_metric_is_the_mean_of_those_who_sent_it():
    means = WeightedMeans()
    means.add({"a": 1.0, "b": 10.0}, 1)
    means.add({"a": 4.0}, 3)
    assert means.means() == {"a": 3.25, "b": 10.0}
    assert means.weight == 4


def test_one_clients_overflow_is_not_everybodys():
    means = WeightedMeans()
    means.add({"loss": math.nan, "norm": math.inf}, 1)
    means.add({"loss": 2.0}, 1)
    assert means.means() == {"loss": 2.0}


def test_nothing_has_no_means():
    assert WeightedMeans().means() == {}
    assert WeightedMeans().weight == 0
