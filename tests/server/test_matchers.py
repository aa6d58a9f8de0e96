"""A run's matcher and layers reach its clients, and what they decided comes back."""

import pytest

from fedbasin.proto.report import Decision
from fedbasin.strategies.symmetry.symmetry import parse
from tests import tiny
from tests.server.test_runs import folder as folder  # a fixture
from tests.server.test_runs import start


def alignments(result):
    (stage,) = [stage for stage in result.reports[-1].stages if stage.stage == "fuse"]
    return [client.alignment for client in stage.clients]


@pytest.mark.parametrize("matcher", ["weights", "graph", "activations"])
def test_clients_of_their_own_starts_are_aligned_by_the_matcher_of_the_run(folder, matcher):
    found = alignments(start(tiny.federation(), folder, matcher=matcher, start="own"))
    assert all(each.distance_after <= each.distance_before for each in found)
    assert Decision.aligned in {each.decision for each in found}


def test_the_server_aligns_by_softened_orders_too(folder):
    result = start(tiny.federation(), folder, matcher="sinkhorn", align="server", start="own")
    assert Decision.aligned in {each.decision for each in alignments(result)}


def test_only_the_chosen_layers_are_aligned(folder):
    (space,) = tiny.symmetry().spaces
    axes = " ".join(map(str, space.axes))
    symmetry = parse(f"{space.name} {space.group} {axes}\nlast.9 S(3) 3.bias[0]")
    result = start(tiny.federation(), folder, symmetry=symmetry, layers="!last.*")
    for each in alignments(result):
        assert [report.space for report in each.spaces] == [space.name]
