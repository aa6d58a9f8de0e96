"""Server and client name the same blocks, because both read them from the modules."""

import torch
from torch import nn

from fedbasin.strategies.fusion.layers import gram_layers, known_blocks
from fedbasin.strategies.fusion.weighting import Statistic
from fedbasin.strategies.statistics.fisher import diagonal_fisher
from fedbasin.strategies.statistics.gram import grams


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.fc = nn.Linear(4, 4)
        self.again = self.fc
        self.plain = nn.Linear(4, 3, bias=False)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x):
        x = self.norm(self.grouped(self.conv(x))).mean((2, 3))
        return self.plain(self.again(self.fc(x)))


def data():
    return [(torch.randn(5, 1, 6, 6), torch.randint(3, (5,)))]


def test_no_statistic_has_no_blocks():
    assert known_blocks(Net(), Statistic.none) == []


def test_grams_are_owed_for_whole_layers_also_for_those_that_no_example_reaches():
    blocks = known_blocks(Net(), Statistic.gram)
    assert blocks == [
        ("conv.weight", "conv.bias"),
        ("grouped.weight", "grouped.bias"),
        ("fc.weight", "fc.bias"),
        ("plain.weight",),
        ("unused.weight", "unused.bias"),
    ]
    sent = grams(Net(), data())
    assert list(sent) == blocks
    assert not sent["unused.weight", "unused.bias"].any()


def test_a_fisher_diagonal_is_owed_for_every_trainable_parameter():
    blocks = known_blocks(Net(), Statistic.fisher)
    assert blocks == [(name,) for name in diagonal_fisher(Net(), data())]
    assert ("frozen",) not in blocks
    assert ("unused.weight",) in blocks


def test_a_weight_that_another_kind_of_module_uses_has_no_gram():
    tied = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(7, 2))
    tied[1].weight = tied[0].weight
    assert [layer.block for layer in gram_layers(tied)] == [("2.weight", "2.bias")]
