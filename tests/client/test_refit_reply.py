"""What a client builds a fit on: its own model as it was sent, and the fused model, which comes in pieces."""

import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn

from fedbasin.client.client_state import keep_fused, keep_sent, keep_start
from fedbasin.client.refit.refit_reply import refit_reply
from fedbasin.client.request_reader import MissingDataError, read_request
from fedbasin.proto.header import HEADER, STATISTICS
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import PathSpec, Refit, Request
from fedbasin.strategies.diagnostics.evaluation import evaluate

BATCHES = [(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3)]
SHARED, HEAD = ("0.weight",), ("3.weight", "3.bias")


def net(seed=0):
    """A network that uses one layer twice, under two names."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def state(seed=0):
    return {name: tensor.clone() for name, tensor in net(seed).state_dict().items()}


def client(own, start):
    """The context of a client that has sent its model in round 1."""
    context = Context(1, 100, {}, RecordDict(), {})
    request = Request("fuse", round=1, anchor=start)
    reply = Reply(1, "fuse", parameters=own, examples=20)
    keep_sent(context, request, reply.to_content(request, packed=True))
    keep_start(context, request, request.to_content(packed=True))
    return context


def request(piece, sequence, *blocks, points=0, server_round=1):
    refit = Refit(blocks, "features", sequence, PathSpec() if points else None)
    return Request("refit", round=server_round, anchor=piece, refit=refit, path_points=points)


def replied(context, asked, data=lambda: BATCHES):
    content = asked.to_content(packed=True)
    asked = read_request(content)
    keep_fused(context, asked, content)
    return refit_reply(asked, asked.refit, context, net(), data, data)


def test_a_piece_moves_a_layer_under_all_of_its_names():
    fused, new = state(1), {"0.weight": state(2)["0.weight"]}
    context = client(state(3), fused)
    replied(context, request(fused, 0, SHARED))
    path = replied(context, request(new, 1, points=2)).path
    model = net()
    ends = [evaluate(model, s, BATCHES) for s in (fused, {**fused, **new, "2.weight": new["0.weight"]})]
    assert list(path.loss_after) == pytest.approx([loss for loss, _, _ in ends])


@pytest.mark.parametrize("again", [0, 1], ids=["the first", "a later"])
def test_a_piece_that_comes_again_gives_the_same_answer(again):
    pieces = [state(1), {"0.weight": state(2)["0.weight"]}]
    context = client(state(3), state(1))
    asked = [request(piece, i, HEAD) for i, piece in enumerate(pieces)][: again + 1]
    first = [replied(context, each) for each in asked][-1].to_content(asked[-1])
    second = replied(context, asked[-1]).to_content(asked[-1])
    assert first[HEADER] == second[HEADER]
    assert first[STATISTICS] == second[STATISTICS]


def test_a_piece_that_comes_again_without_tensors_is_the_one_that_came_before():
    context = client(state(3), state(1))
    pieces = [(state(1), 0), ({"0.weight": state(2)["0.weight"]}, 1)]
    *_, first = [replied(context, request(*piece, points=2)) for piece in pieces]
    again = replied(context, request({}, 1, points=2))
    assert again.path == first.path
    assert not again.lost


LOST = {
    "a piece in between": [request(state(1), 0, HEAD), request({}, 2, HEAD)],
    "the first piece": [request({}, 1, HEAD)],
    "this round": [request(state(1), 0, HEAD, server_round=2)],
}


@pytest.mark.parametrize("asked", LOST.values(), ids=LOST)
def test_a_client_says_that_it_lacks(asked):
    context = client(state(3), state(1))
    *_, last = [replied(context, each) for each in asked]
    assert last.lost
    assert not last.statistics


def test_a_refit_without_data_is_an_error_that_says_so():
    with pytest.raises(MissingDataError, match="a refit needs the client's data"):
        replied(client(state(3), state(1)), request(state(1), 0, HEAD), None)
