"""Flower's own robust strategies and ours on the same messages, and where they differ.

- Krum's tie: of equal scores Flower takes the one that its sort puts first, we the smaller update.
- Flower's distances are over all arrays, ours over floating tensors: a counter is no place in space.
- Flower's median of integers is a float64 array; ours is an integer of some client.
- Flower's median and trimmed mean work in the arrays' dtype, ours in double.
"""

import copy

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.server.flowers_loop import fed_basin, grid_of

SHAPES = {"fc.weight": (5, 4), "fc.bias": (5,), "head.weight": (3, 5), "scale": ()}
FLOWERS = {
    "median": lambda clients, hostile: FedMedian(),
    "trimmed-mean": lambda clients, hostile: FedTrimmedAvg(beta=(hostile + 0.5) / clients),
    "krum": lambda clients, hostile: Krum(num_malicious_nodes=hostile),
    "multi-krum": lambda clients, hostile: MultiKrum(
        num_malicious_nodes=hostile, num_nodes_to_select=clients - hostile
    ),
    "bulyan": lambda clients, hostile: Bulyan(num_malicious_nodes=hostile),
}


def state(seed, counter=False):
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return tensors | ({"count": torch.randint(1000, (), generator=draw)} if counter else {})


def exchange(name, clients, hostile, states, examples, anchor=None):
    """Our strategy's result and Flower's, on copies of the same replies."""
    grid = grid_of(tiny.federation(clients))
    ours = fed_basin(
        nodes=clients, robust=name, hostile_clients=hostile if name != "median" else 0, align="off", quorum=1.0
    )
    arrays = ArrayRecord(anchor or state(999, "count" in states[0]))
    messages = list(ours.configure_train(1, arrays, ConfigRecord(), grid))
    grid.push_messages(messages)
    replies = [
        Message(
            RecordDict({"arrays": ArrayRecord(tensors), "metrics": MetricRecord({"num-examples": number})}),
            reply_to=message,
        )
        for message, tensors, number in zip(messages, states, examples, strict=True)
    ]
    theirs, _ = FLOWERS[name](clients, hostile).aggregate_train(1, copy.deepcopy(replies))
    fused, _ = ours.aggregate_train(1, replies)
    assert ours.refusals == {}
    return fused.to_torch_state_dict(), theirs.to_torch_state_dict()


@pytest.mark.parametrize("name", FLOWERS)
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    hostile=st.integers(1, 2),
    more=st.integers(0, 2),
    power=st.sampled_from((0, 2, 6)),
    examples=st.lists(st.integers(1, 900), min_size=13, max_size=13),
)
def test_the_same_messages_give_the_same_model(name, seed, hostile, more, power, examples):
    clients = 4 * hostile + 3 + more
    states = [state(seed + index) for index in range(clients)]
    for index in range(hostile):
        states[index] = {name: 10.0**power * tensor for name, tensor in states[index].items()}
    ours, theirs = exchange(name, clients, hostile, states, examples[:clients])
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("places", [(0, 1, 2, 10, 11, 12), (12, 11, 10, 2, 1, 0)], ids=["near first", "far first"])
def test_of_two_equal_scores_the_smaller_update_is_taken_whatever_the_order(places):
    # The inner ones of each group have three neighbours at squared distances of 1, 4 and 64.
    states = [{"scale": torch.tensor(float(place))} for place in places]
    ours, theirs = exchange("krum", 6, 1, states, [10] * 6, anchor={"scale": torch.tensor(0.0)})
    assert float(ours["scale"]) == 2
    assert float(theirs["scale"]) in (2, 10)


def test_a_counter_is_no_place_in_space_and_stays_an_integer():
    clients = 7
    states = [state(1, counter=True) for _ in range(clients)]
    for index, tensors in enumerate(states):
        tensors["fc.bias"] = tensors["fc.bias"] + 0.01 * index
        tensors["count"] = torch.tensor(1000 * (index == 3) + index)
    ours, theirs = exchange("krum", clients, 1, states, [10] * clients)
    # The middle one is nearest to the others; Flower sees its counter a thousand away.
    assert torch.equal(ours["fc.bias"], states[3]["fc.bias"])
    assert not torch.equal(theirs["fc.bias"], states[3]["fc.bias"])
    ours, theirs = exchange("median", clients, 0, states, [10] * clients)
    assert ours["count"].dtype is torch.int64
    assert theirs["count"].dtype is torch.float64
    assert int(ours["count"]) == int(np.median([int(tensors["count"]) for tensors in states]))
