"""A run's matcher and layers reach its clients, and what they decided comes back."""

import pytest
import torch
from torch import nn

from fedbasin.proto.report import Decision
from fedbasin.proto.request import Request
from fedbasin.strategies.alignment import matchers
from fedbasin.strategies.alignment.learned_matching import Search
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.discover.discovery import discover
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


@pytest.mark.parametrize(
    ("settings", "matchers"),
    [
        ({"start": "own"}, ["auto", "weights"]),
        ({"start": "own", "recipe": "features"}, ["auto", "weights"]),
        # The mean alone takes clients without data.
        ({"start": "own", "recipe": "fedavg"}, ["weights", "weights"]),
        ({"start": "own", "recipe": "fedavg", "align": "server"}, ["weights", "weights"]),
        ({"start": "own", "merge": "chain"}, ["weights", "weights"]),
        ({"start": "shared"}, ["weights", "weights"]),
        ({"start": "own", "matcher": "weights"}, ["weights", "weights"]),
        ({"start": "own", "matcher": "graph"}, ["graph", "graph"]),
    ],
)
def test_the_matcher_is_left_to_the_client_after_own_starts_where_layers_are_fitted(folder, settings, matchers):
    federation, requests = tiny.federation(recipe=settings.get("recipe", "auto")), []
    answer = federation.answer
    # Read on its way: the mod puts the app's content in its place.
    federation.answer = lambda message: (requests.append(Request.from_message(message.content)), answer(message))[1]
    start(federation, folder, 2, **{key: value for key, value in settings.items() if key != "recipe"})
    fusing = {request.round: request.matcher for request in requests if request.stage == "fuse"}
    assert [fusing[number] for number in (1, 2)] == matchers


def test_spaces_that_features_do_not_show_are_matched_by_weights():
    def net(seed):
        torch.manual_seed(seed)
        return Recurrent()

    inputs = torch.randn(12, 5, 4)
    model, symmetry = net(0), discover(net(0), inputs).symmetry
    anchor, client = net(1).state_dict(), net(2).state_dict()
    data = matchers.MatchingData(model, [(inputs, torch.zeros(12, dtype=torch.long))])
    ours = matchers.prepare_auto(symmetry, anchor, client, None, data)()
    theirs = match_weights(symmetry, anchor, client)
    assert all(torch.equal(ours.state[name], theirs.state[name]) for name in theirs.state)
    seen = matchers.prepare_match(matchers.Matcher.activations, symmetry, anchor, client, None, data)()
    assert not all(torch.equal(seen.state[name], theirs.state[name]) for name in theirs.state)


class Recurrent(nn.Module):
    """A recurrent layer, whose units no linear layer writes, and a hidden one behind it."""

    def __init__(self):
        super().__init__()
        self.steps = nn.LSTM(4, 6, batch_first=True)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.hidden(self.steps(inputs)[0][:, -1]).relu())


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
