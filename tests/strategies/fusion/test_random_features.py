"""One round of closed forms on a frozen random layer, whatever the clients' shares and their training are."""

import pytest
import torch
from sklearn.datasets import load_digits

from fedbasin import RandomFeatures


def test_the_random_layer_follows_from_its_seed_and_is_not_trained():
    first, same, other = RandomFeatures(4, 3, 8), RandomFeatures(4, 3, 8), RandomFeatures(4, 3, 8, seed=1)
    assert torch.equal(first.features.weight, same.features.weight)
    assert not torch.equal(first.features.weight, other.features.weight)
    assert [name for name, p in first.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert torch.equal(first(torch.randn(2, 2, 2)), torch.zeros(2, 3))


def test_its_features_are_as_large_as_its_inputs():
    net = RandomFeatures(64, 10)
    inputs = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    features = torch.relu(net.features(inputs))
    assert 0.5 < float(features.square().mean()) < 2


@pytest.mark.parametrize(("sizes", "name"), [((0, 3), "inputs"), ((4, 0), "outputs"), ((4, 3, 0), "width")])
def test_a_size_below_one_is_refused(sizes, name):
    with pytest.raises(ValueError, match=f"{name} = 0: random features need 1 or more"):
        RandomFeatures(*sizes)


def test_a_linear_head_on_it_tells_digits_apart():
    images, digits = load_digits(return_X_y=True)
    net, inputs = RandomFeatures(64, 10), torch.tensor(images / 16, dtype=torch.float32)
    with torch.no_grad():
        features = torch.cat([torch.relu(net.features(inputs)), torch.ones(len(inputs), 1)], 1).double()
    train, goals = features[:1200], torch.eye(10, dtype=torch.float64)[digits[:1200]]
    head = torch.linalg.solve(train.T @ train + 0.1 * torch.eye(1025), train.T @ goals)
    assert float(((features[1200:] @ head).argmax(1) == torch.tensor(digits[1200:])).double().mean()) > 0.9
