"""One round of closed forms on a frozen random layer, whatever the clients' shares and their training are."""

import torch
from sklearn.datasets import load_digits

from fedbasin import RandomFeatures


def test_its_features_are_as_large_as_its_inputs():
    net = RandomFeatures(64, 10)
    inputs = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    features = torch.relu(net.features(inputs))
    assert 0.5 < float(features.square().mean()) < 2


def test_a_linear_head_on_it_tells_digits_apart():
    images, digits = load_digits(return_X_y=True)
    net, inputs = RandomFeatures(64, 10), torch.tensor(images / 16, dtype=torch.float32)
    with torch.no_grad():
        features = torch.cat([torch.relu(net.features(inputs)), torch.ones(len(inputs), 1)], 1).double()
    train, goals = features[:1200], torch.eye(10, dtype=torch.float64)[digits[:1200]]
    head = torch.linalg.solve(train.T @ train + 0.1 * torch.eye(1025), train.T @ goals)
    assert float(((features[1200:] @ head).argmax(1) == torch.tensor(digits[1200:])).double().mean()) > 0.9
