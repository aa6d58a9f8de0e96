import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.tensors.state import added_prefix, distance, extrapolate, floating, interpolate


def test_only_floating_tensors_can_be_averaged() -> None:
    state = {"w": torch.zeros(2), "half": torch.zeros(2).half(), "count": torch.tensor(3)}
    assert set(floating(state)) == {"w", "half"}


def test_the_distance_is_euclidean_over_all_shared_floating_tensors() -> None:
    a = {"w": torch.tensor([3.0]), "b": torch.zeros(2), "only": torch.ones(1), "n": torch.tensor(1)}
    b = {"w": torch.zeros(1), "b": torch.tensor([0.0, 4.0]), "n": torch.tensor(9)}
    assert distance(a, b) == pytest.approx(5.0)
    assert distance(a, a) == 0.0
    assert distance({}, b) == 0.0


def test_a_long_distance_in_half_precision_does_not_overflow() -> None:
    a, b = torch.full((100,), 60000.0).half(), torch.zeros(100).half()
    assert distance({"w": a}, {"w": b}) == pytest.approx(600000.0, rel=1e-2)


def test_interpolation_goes_from_one_end_to_the_other() -> None:
    a = {"w": torch.zeros(2), "count": torch.tensor(1)}
    b = {"w": torch.tensor([2.0, 4.0]), "count": torch.tensor(5)}
    assert torch.equal(interpolate(a, b, 0.0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 1.0)["w"], b["w"])
    middle = interpolate(a, b, 0.5)
    assert torch.equal(middle["w"], torch.tensor([1.0, 2.0]))
    assert middle["count"] == 5


def test_beyond_its_end_a_path_takes_running_statistics_from_there() -> None:
    a = {"norm.weight": torch.tensor([1.0]), "norm.running_var": torch.tensor([4.0])}
    b = {"norm.weight": torch.tensor([2.0]), "norm.running_var": torch.tensor([1.0])}
    moved = extrapolate(a, b, 2.0)
    assert moved["norm.weight"] == 3.0  # a gain is learned, and positive only for once
    assert moved["norm.running_var"] == 1.0


@given(st.lists(st.sampled_from(["a.weight", "a.bias", "b.0.weight", "c"]), min_size=1, unique=True))
def test_a_prefix_is_found_where_it_stands_before_every_name(names: list[str]) -> None:
    for prefix in ("module.", "_orig_mod.", "model.encoder."):
        wrapped = {prefix + name for name in names}
        assert added_prefix(wrapped, names) == prefix
        assert added_prefix(wrapped | {"other"}, names) == prefix
        assert added_prefix(wrapped, [*names, "another"]) == ""
    assert added_prefix(names, names) == added_prefix([], names) == added_prefix(names, []) == ""
