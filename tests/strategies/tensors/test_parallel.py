import math

import pytest
import torch

from fedbasin.strategies.tensors import parallel

SHAPES = {"matrix": (3, 5), "scalar": (), "empty": (0, 4), "long": (70, 100)}


@pytest.fixture(params=["in one go", "in many pieces, shared among threads"])
def _pieces(request, monkeypatch):
    if request.param != "in one go":
        monkeypatch.setattr(parallel, "_PIECE", 64)
        monkeypatch.setattr(parallel, "_BATCH", 256)


def state(dtype=torch.float32):
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("of_sums", [torch.float64, torch.float32])
def test_sums_and_means_are_those_of_whole_tensors(dtype, of_sums):
    values = state(dtype)
    totals = parallel.zeros(values, of_sums)
    for weight in (3.0, 4.0):
        parallel.add_scaled([(totals[name], values[name]) for name in values], weight)
    expected = {n: v.to(of_sums) * 3 + v.to(of_sums) * 4 for n, v in values.items()}
    torch.testing.assert_close(totals, expected)
    means = parallel.divide(totals, 7.0, values)
    torch.testing.assert_close(means, {n: (t / 7.0).to(dtype) for n, t in totals.items()})


def test_values_in_any_layout_are_added():
    total = torch.zeros(4, 3, dtype=torch.float64)
    value = torch.arange(12.0).reshape(3, 4).mT
    parallel.add_scaled([(total, value)], 2.0)
    torch.testing.assert_close(total, 2 * value.double())


def test_means_of_several_dtypes_keep_their_own():
    like = {"half": torch.ones(2).half(), "single": torch.ones(3)}
    totals = {name: 6 * tensor.double() for name, tensor in like.items()}
    means = parallel.divide(totals, 2.0, like)
    torch.testing.assert_close(means, {name: 3 * tensor for name, tensor in like.items()})


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_distances_are_those_of_whole_tensors_in_double_precision(dtype):
    first, second = state(dtype), {name: tensor + 0.01 for name, tensor in state(dtype).items()}
    measured = parallel.distances({name: (first[name], second[name]) for name in first})
    expected = {name: float((first[name].double() - second[name].double()).norm()) for name in first}
    assert measured == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(
    ("entries", "others", "distance"),
    [
        ((float("nan"), 0.0), (0.0, 0.0), None),
        ((float("inf"), 0.0), (0.0, 0.0), None),
        ((float("inf"), 0.0), (-float("inf"), 0.0), None),
        ((float("nan"), 0.0), (float("nan"), 0.0), None),
        ((-float("inf"), 3.0), (-float("inf"), 0.0), 3.0),
        ((-float("inf"), 3.0), (-float("inf"), 3.0), 0.0),
        ((3e38, 0.0), (-3e38, 0.0), 6e38),
    ],
)
def test_a_distance_is_finite_only_if_all_entries_that_differ_are(entries, others, distance):
    a, b = (torch.cat([torch.zeros(500), torch.tensor(pair), torch.zeros(500)]) for pair in (entries, others))
    (measured,) = parallel.distances({"": (a, b)}).values()
    assert measured == pytest.approx(distance) if distance is not None else not math.isfinite(measured)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_is_found_wherever_it_is(bad):
    tensor = torch.zeros(1000)
    for index in (0, 500, 999):
        spoilt = tensor.clone()
        spoilt[index] = bad
        assert not parallel.is_finite(spoilt)


def test_finite_entries_whose_sum_overflows_are_finite():
    assert parallel.is_finite(torch.full((10,), 3e38))
    assert parallel.is_finite(torch.full((10,), 6e4, dtype=torch.float16))


def test_the_number_of_threads_is_as_before_whatever_happens():
    def fail():
        with parallel.one_core():
            seen.append(torch.get_num_threads())
            raise KeyError

    before, seen = torch.get_num_threads(), []
    with pytest.raises(KeyError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == before
