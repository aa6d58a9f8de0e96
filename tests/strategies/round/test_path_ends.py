"""The ends of a path among the models of one round: a line of them, or one through a point of it and beyond."""

from dataclasses import replace

import pytest
import torch

from fedbasin.proto.request import PathSpec
from fedbasin.strategies.round.path_ends import path_ends


def model(weight, variance, count=0):
    return {"w": torch.tensor([weight]), "norm.running_var": torch.tensor([variance]), "count": torch.tensor(count)}


START, FUSED, REFITTED = model(0.0, 1.0, 1), model(4.0, 2.0, 2), model(8.0, 4.0, 3)


def test_a_line_runs_from_the_fused_to_the_refitted_model():
    start, end = path_ends(PathSpec(), START, FUSED, REFITTED)
    assert (start, end) == (FUSED, REFITTED)
    assert start is not FUSED
    assert end is not REFITTED


def test_extrapolation_runs_from_the_global_model_through_the_mix():
    start, end = path_ends(PathSpec(0.5, 3.0), START, FUSED, REFITTED)
    assert (float(start["w"]), float(end["w"])) == (0.0, 18.0)
    # Of running statistics there is no beyond: a variance could become negative.
    assert float(end["norm.running_var"]) == 3.0
    assert int(end["count"]) == 3


@pytest.mark.parametrize("place", [PathSpec(), PathSpec(0.5), PathSpec(0.5, 3.0)])
def test_a_path_of_scaled_outputs_ends_in_the_same_model_and_begins_where_the_last_layer_is_zero(place):
    end = path_ends(place, START, FUSED, REFITTED)[1]
    zero, same = path_ends(replace(place, scaled=("w",)), START, FUSED, REFITTED)
    assert same == end
    assert zero == {**end, "w": torch.zeros(1)}
