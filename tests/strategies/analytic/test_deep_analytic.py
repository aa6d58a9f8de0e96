"""Blocks are fitted one after the other, and the network computes what its formula says at every step."""

import pytest
import torch

from fedbasin import DeepAnalytic
from fedbasin.strategies.analytic.deep_analytic import count_blocks, unfitted, with_block

WIDTH, DEPTH = 5, 3


def network():
    net = DeepAnalytic(4, 2, WIDTH, DEPTH)
    torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(0))
    return net


def matrices():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(WIDTH, WIDTH, generator=draw) for _ in range(DEPTH - 1)]


def test_it_computes_its_formula_after_every_block():
    net, inputs = network(), torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    stream = torch.relu(net.first(inputs))
    for number, matrix in enumerate([*matrices(), None]):
        features = torch.relu(net.blocks[number].random(stream))
        torch.testing.assert_close(net(inputs), net.head(torch.cat([stream, features], 1)))
        if matrix is not None:
            net.load_state_dict(with_block(net.state_dict(), matrix))
            stream = stream + features @ matrix.T


def test_a_fitted_network_becomes_the_one_that_was_drawn():
    drawn = DeepAnalytic(4, 2, WIDTH, DEPTH).state_dict()
    fitted = network().state_dict()
    for matrix in matrices():
        fitted = with_block(fitted, matrix)
    assert int(fitted["fitted_blocks"]) == DEPTH - 1
    again = unfitted(fitted)
    assert again.keys() == drawn.keys()
    assert all(torch.equal(again[name], drawn[name]) for name in drawn)


@pytest.mark.parametrize("depth", [1, 4])
def test_blocks_are_counted_by_their_names(depth):
    assert count_blocks(DeepAnalytic(4, 2, WIDTH, depth).state_dict()) == depth
    assert count_blocks({"0.weight": torch.zeros(2, 2)}) == 0


def test_a_depth_below_one_is_refused():
    with pytest.raises(ValueError, match="depth = 0: deep analytic networks need 1 or more"):
        DeepAnalytic(4, 2, depth=0)
