from dataclasses import replace
from functools import partial

import pytest
import torch

from fedbasin.strategies.diagnostics.barrier import Path, along
from fedbasin.strategies.diagnostics.endpoint_proof import TOLERANCES, EndpointVerdict, endpoint_error
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random
from fedbasin.strategies.tensors.state import interpolate
from tests.strategies.diagnostics.models import SITES, examples, learnt, on

ROTATED = "hidden  O(16)  0.weight[0] 0.bias[0] 2.weight[1]"


def path(client, dtype=torch.float64):
    anchor = {name: tensor.to(dtype) for name, tensor in learnt(1).items()}
    end = {name: tensor.to(dtype) for name, tensor in client.items()}
    return along(partial(interpolate, anchor, end), on(*examples(1)), 3)


def moved(state, spaces, seed=0):
    return random(parse(spaces), torch.Generator().manual_seed(seed)).act(state)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_permuted_client_is_the_same_function(dtype):
    client = learnt(2)
    error = endpoint_error(path(client, dtype), path(moved(client, SITES), dtype), dtype)
    assert error.verdict is EndpointVerdict.holds
    assert error.anchor == 0


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seed", range(3))
def test_a_transform_that_forgets_a_tensor_is_found_in_every_precision(dtype, seed):
    client = learnt(2)
    forgetful = {**moved(client, SITES, seed), "2.weight": client["2.weight"]}
    error = endpoint_error(path(client, dtype), path(forgetful, dtype), dtype)
    assert error.verdict is EndpointVerdict.broken


def test_a_rotation_through_a_nonlinearity_is_found():
    client = learnt(2)
    error = endpoint_error(path(client), path(moved(client, ROTATED)), torch.float64)
    assert error.verdict is EndpointVerdict.broken
    assert "leave this client unaligned" in error.verdict.value


def test_data_that_changes_between_the_passes_decides_nothing():
    before = Path((0.0, 1.0), (2.0, 4.0), (1.0, 1.0), 2.0)
    error = endpoint_error(before, replace(before, loss=(2.2, 4.4)))
    assert error.client == pytest.approx(0.4 / 4.4)
    assert error.anchor == pytest.approx(0.2 / 2.2)
    assert error.verdict is EndpointVerdict.undecided


def test_losses_that_are_rounding_alone_are_not_compared_by_their_digits():
    before = Path((0.0, 1.0), (2.0, 1e-7), (1.0, 2.0), 2.0)
    assert endpoint_error(before, replace(before, loss=(2.0, 2e-7))).client == pytest.approx(5e-5)


def test_paths_over_other_examples_are_refused():
    before = Path((0.0, 1.0), (2.0, 1.0), (1.0, 1.0), 2.0)
    with pytest.raises(ValueError, match="evaluate both on the same data"):
        endpoint_error(before, replace(before, examples=3.0))


def test_a_type_without_a_tolerance_is_refused():
    before = Path((0.0, 1.0), (2.0, 1.0), (1.0, 1.0), 2.0)
    with pytest.raises(ValueError, match=r"no tolerance for torch\.int8"):
        endpoint_error(before, before, torch.int8)
