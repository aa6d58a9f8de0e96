"""What is frozen stays as it is, whatever an app does with the network."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin import BucketedFeatures, DeepAnalytic, RandomFeatures

NETWORKS = {network.__name__: network for network in (RandomFeatures, BucketedFeatures, DeepAnalytic)}


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))


@pytest.fixture(params=NETWORKS)
def make(request):
    return NETWORKS[request.param]


def images(count=16):
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def test_an_app_that_trains_the_network_changes_its_last_layer_alone(make):
    net = make(64, 3, 8, body=backbone())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(net(images()), torch.arange(16) % 3).backward()
        optimizer.step()
    after = net.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["head.weight", "head.bias"]


def test_a_body_stays_in_evaluation_mode(make):
    net = make(64, 3, 8, body=backbone())
    for mode in (net.train(), net.train(mode=False), net.train(mode=True)):
        assert not any(module.training for module in mode.body.modules())
    assert net.training
    assert torch.equal(net(images()), net.eval()(images()))


def test_a_body_feeds_the_network(make):
    body = backbone()
    bare, whole = make(64, 3, 8), make(64, 3, 8, body=body)
    for net in (bare, whole):
        net.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(whole(images()), bare(body.eval()(images())))


def test_networks_of_one_seed_are_the_same(make):
    first, same, other = make(4, 3, 8), make(4, 3, 8), make(4, 3, 8, seed=1)
    states = [net.state_dict() for net in (first, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert torch.equal(first(torch.randn(2, 2, 2)), torch.zeros(2, 3))


@pytest.mark.parametrize(("sizes", "name"), [((0, 3), "inputs"), ((4, 0), "outputs"), ((4, 3, 0), "width")])
def test_a_size_below_one_is_refused(make, sizes, name):
    with pytest.raises(ValueError, match=f"{name} = 0: .* need 1 or more"):
        make(*sizes)
