"""Updates that wait for the others of their stage, in memory or in files."""

from dataclasses import replace

import pytest
import torch

from fedbasin.server.exchange.cohort import Cohort
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.spool import SpoolFiles
from fedbasin.strategies.fusion.update import Update

FILES = SpoolFiles()


def update(seed):
    draw = torch.Generator().manual_seed(seed)
    parameters = {
        "weight": torch.randn(3, 4, generator=draw),
        "half": torch.randn(5, generator=draw).bfloat16(),
        "counter": torch.tensor(seed),
        "mask": torch.full((2,), -torch.inf),
    }
    return Update(parameters, float(seed), {("weight",): Gram(torch.eye(4, dtype=torch.float64) * seed)})


@pytest.mark.parametrize("most_bytes", [0, 200, 2**20])
def test_updates_come_back_as_they_were_in_the_order_of_the_nodes(most_bytes):
    cohort = Cohort(FILES, most_bytes)
    for node in (7, 3, 5):
        cohort.keep(node, update(node))
    assert list(cohort) == [3, 5, 7]
    for node in cohort:
        expected, actual = update(node), cohort[node]
        assert actual.examples == expected.examples
        for name, tensor in expected.parameters.items():
            assert torch.equal(actual.parameters[name], tensor)
            assert actual.parameters[name].dtype == tensor.dtype
        assert torch.equal(actual.precisions["weight",].matrix, expected.precisions["weight",].matrix)


def test_a_statistic_that_layers_share_is_written_once_and_shared_afterwards():
    gram = Gram(torch.eye(4))
    cohort = Cohort(FILES, 0)
    cohort.keep(1, replace(update(1), precisions={("weight",): gram, ("half",): gram}))
    one, two = cohort[1].precisions.values()
    assert one is two
