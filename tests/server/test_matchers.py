"""A run's matcher and layers reach its clients, and what they decided comes back."""

import pytest

from fedbasin.proto.report import Decision
from fedbasin.strategies.alignment import matchers
from fedbasin.strategies.alignment.learned_matching import Search
from fedbasin.strategies.alignment.weight_matching import match_weights
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


def test_clients_learn_with_the_search_of_the_run(folder, monkeypatch):
    searches = []
    monkeypatch.setattr(matchers, "match_learned", lambda *given: (searches.append(given[6]), match_weights(*given[:1], *given[2:4]))[1])  # fmt: skip
    for number, settings in enumerate(({}, {"learned_steps": 7, "learned_smoothing": 0.0})):
        start(tiny.federation(), folder / str(number), matcher="learned", start="own", **settings)
    usual, chosen = Search(), Search(7, smoothing=0.0)
    half = len(searches) // 2
    assert searches == half * [usual] + half * [chosen]
    assert half


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
