"""What one client's statistics may weigh follows from how alike the clients' are."""

from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.influence import Measure, judge, measure

LAYER = ("0.weight",)


def factors(values):
    """The factor on each client's statistic of one layer, 0 for one that is left out; each has ten examples."""
    measures = {node: Measure(10.0, statistics={LAYER: 10.0 * value}) for node, value in enumerate(values)}
    verdicts = judge(measures, {}, shared_start=True).values()
    return [0.0 if verdict.refusal else verdict.statistics.get(LAYER, 1.0) for verdict in verdicts]


@pytest.mark.parametrize("times", [1.5, 4.0, 40.0])
def test_a_statistic_among_alike_ones_is_cut_back_to_little_more_than_theirs(times):
    *honest, hostile = factors([0.98, 0.99, 1.0, 1.01, 1.02, 1.0, 1.0, times])
    assert honest == [1.0] * 7
    assert times * hostile == pytest.approx(1.1)


def test_the_same_statistic_is_kept_where_clients_differ_as_much():
    assert factors([0.5, 0.8, 1.0, 1.3, 2.0, 3.0]) == [1.0] * 6


@given(st.lists(st.floats(0.9, 1.1), min_size=3, max_size=12))
def test_clients_within_a_tenth_of_the_median_are_never_cut_back(values):
    # The median may be as far from the largest as the range is wide, so the range is halved.
    assert factors([1 + (value - 1) / 2.1 for value in values]) == [1.0] * len(values)


@given(st.lists(st.floats(0.01, 100.0), min_size=3, max_size=12))
def test_no_statistic_weighs_more_than_five_times_the_median(values):
    taken = [value * factor for value, factor in zip(values, factors(values), strict=True)]
    assert max(taken) <= 5 * median(values) * (1 + 1e-9)


@given(st.lists(st.floats(0.0, 0.05), min_size=3, max_size=12), st.floats(1e-3, 1e3))
def test_an_update_that_is_small_beside_the_model_is_not_judged_by_its_norm(norms, scale):
    anchor = {"0.weight": torch.full((2, 2), 0.5 * scale)}  # of the norm `scale`
    measures = {node: Measure(10.0, {"0.weight": 0.999 * norm * scale}) for node, norm in enumerate(norms)}
    verdicts = judge(measures, anchor, shared_start=True).values()
    assert all(verdict.refusal is None and verdict.update == 1.0 for verdict in verdicts)


@given(st.floats(1e-6, 1.0))
def test_where_the_model_fits_most_clients_an_update_is_cut_back_to_a_small_one_and_left_out_far_above(norm):
    anchor = {"0.weight": torch.full((2, 2), 0.5)}
    norms = [1e-4, 1e-4, 1e-4, norm]
    verdicts = judge({node: Measure(10.0, {"0.weight": n}) for node, n in enumerate(norms)}, anchor, shared_start=True)
    assert [verdict.refusal is None for verdict in verdicts.values()] == [True, True, True, norm <= 2.4 * 0.05]
    assert verdicts[3].update * norm <= 0.05 * (1 + 1e-9) or norm > 2.4 * 0.05
    assert verdicts[3].update == 1.0 or norm > 0.05


def test_where_clients_still_learn_one_above_a_small_update_is_held_against_the_median():
    anchor = {"0.weight": torch.full((2, 2), 0.5)}
    norms = [0.021, 0.021, 0.021, 0.13]
    verdicts = judge({node: Measure(10.0, {"0.weight": n}) for node, n in enumerate(norms)}, anchor, shared_start=True)
    assert [verdict.refusal is None for verdict in verdicts.values()] == [True, True, True, False]


def test_beside_a_model_whose_norm_overflows_nothing_is_small():
    anchor = {"0.weight": torch.full((2, 2), 1e30)}
    norms = [1.0, 1.0, 1.0, 1e28]
    verdicts = judge({node: Measure(10.0, {"0.weight": n}) for node, n in enumerate(norms)}, anchor, shared_start=True)
    assert [verdict.refusal is None for verdict in verdicts.values()] == [True, True, True, False]


@given(st.floats(0.01, 1e6), st.booleans())
def test_an_update_that_agrees_is_cut_back_where_others_are_left_out(length, compared):
    anchor = {"0.weight": torch.full((2, 2), 1e-3)}
    measures = {node: Measure(10.0, {"0.weight": 1.0}) for node in range(5)}
    measures[5] = Measure(1000.0, {"0.weight": length})
    judged = judge(measures, anchor, shared_start=True, agreeing={5}, compared=compared)[5]
    others = judge(measures, anchor, shared_start=True, compared=compared)[5]
    # Multiples of the median: what counts, of the length and of the examples, and where a client is left out.
    counts, examples, left_out = (6.0, 120.0, 14.4) if compared else (2.5, 50.0, 14.4)
    assert (judged.refusal is None) == (length <= left_out)
    assert (others.refusal is None) == (length <= 6.0)
    if judged.refusal is None:
        assert length * judged.update == pytest.approx(min(length, counts))
        assert judged.examples == examples
    if others.refusal is None:
        assert length * others.update == pytest.approx(min(length, 2.5))
        assert others.examples == 50.0


def test_the_statistics_of_a_client_weigh_as_its_examples_count():
    measures = {node: Measure(10.0, statistics={LAYER: 10.0}) for node in range(5)}
    measures[5] = Measure(100.0, statistics={LAYER: 100.0})
    whole, part = (judge(measures, {}, shared_start=True, agreeing=a, compared=True)[5] for a in ({5}, ()))
    assert (whole.examples, whole.statistics) == (100.0, {})
    assert (part.examples, part.statistics[LAYER]) == (50.0, pytest.approx(0.55))


@pytest.mark.parametrize("norm", [0.0, 1e-4])
def test_running_statistics_are_held_against_the_median_beside_a_small_update(norm):
    anchor = {"0.weight": torch.full((2, 2), 0.5), "1.running_mean": torch.zeros(2)}
    norms = [{"0.weight": norm, "1.running_mean": mean} for mean in (0.1, 0.1, 0.1, 1e6)]
    verdicts = judge({node: Measure(10.0, n) for node, n in enumerate(norms)}, anchor, shared_start=True)
    assert [verdict.refusal is None for verdict in verdicts.values()] == [True, True, True, False]


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def counted(values, dtype, start):
    """What is added of each client's counter, after the server has sent `start`."""
    anchor = {"count": torch.tensor([start], dtype=dtype)}
    updates = [Update({"count": torch.tensor([value], dtype=dtype)}, 10.0) for value in values]
    measures = {node: measure(update, {}, anchor) for node, update in enumerate(updates)}
    verdicts = judge(measures, anchor, shared_start=True)
    return [int(v.apply(updates[n], anchor).parameters["count"]) for n, v in verdicts.items()]


@given(st.data(), st.sampled_from(INTEGERS), st.integers(3, 9))
def test_no_integer_changes_by_more_than_five_times_the_median(data, dtype, clients):
    limits = torch.iinfo(dtype)
    start = data.draw(st.integers(limits.min, limits.max))
    values = data.draw(st.lists(st.integers(limits.min, limits.max), min_size=clients, max_size=clients))
    most = 5 * median(abs(float(value) - float(start)) for value in values)
    for value, added in zip(values, counted(values, dtype, start), strict=True):
        assert abs(added - start) <= most * (1 + 1e-15) + 2048 * (dtype is torch.int64)
        assert added == value or abs(value - start) > most * (1 - 1e-15) - 2048


@pytest.mark.parametrize("extreme", [2**63 - 1, -(2**63)])
def test_an_index_that_one_client_alone_changes_stays(extreme):
    assert counted([7, 7, extreme, 7], torch.int64, 7) == [7] * 4


def test_counters_of_clients_with_more_data_are_kept():
    assert counted([3, 12, 15, 40], torch.int64, 0) == [3, 12, 15, 40]
