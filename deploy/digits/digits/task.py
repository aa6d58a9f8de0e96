"""The task: scikit-learn's handwritten digits, a two-layer perceptron, and how a client trains it."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
PIXELS = 64

Examples = tuple[Tensor, Tensor]


def make_model(width: int, seed: int) -> nn.Sequential:
    """A perceptron 64-width-width-10 with its own initial weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def load_split() -> tuple[Examples, Examples]:
    """Training and test examples: 1257 and 540 images of 8x8 pixels, scaled to [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images / 16).astype(np.float32)
    parts = train_test_split(pixels, labels, test_size=0.3, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.tensor, parts)
    return (train_images, train_labels), (test_images, test_labels)


def load_partition(partition: int, partitions: int, alpha: float, seed: int) -> Examples:
    """One client's slice; with `alpha` above 0 its labels follow a Dirichlet distribution."""
    (images, labels), _ = load_split()
    draw = np.random.default_rng(seed)
    mine: list[int] = []
    for label in range(CLASSES):
        indices = draw.permutation(np.flatnonzero(labels.numpy() == label))
        shares = draw.dirichlet([alpha] * partitions) if alpha else np.full(partitions, 1 / partitions)
        cuts = (np.cumsum(shares) * len(indices)).astype(int)[:-1]
        mine.extend(np.split(indices, cuts)[partition])
    chosen = torch.tensor(mine)
    return images[chosen], labels[chosen]


def train(model: nn.Module, examples: Examples, epochs: int, batch_size: int, seed: int) -> float:
    """Train in place; returns the last epoch's mean loss."""
    images, labels = examples
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    model.train()
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images), generator=draw).split(batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(batch)
    return total / len(images)


def evaluate(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Mean loss and accuracy."""
    images, labels = examples
    model.eval()
    with torch.no_grad():
        logits = model(images)
    loss = F.cross_entropy(logits, labels).item()
    return loss, float((logits.argmax(1) == labels).float().mean())
