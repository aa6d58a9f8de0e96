"""A model of many levels, each fitted in a stage of its own."""

import torch
from torch import nn

WIDTH = 32


def make_model(levels: int, seed: int = 0) -> nn.Module:
    """Linear maps with rectifiers between them."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(levels - 1) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))
