"""The losses that clients would report whom a round has not asked, from the sums that they sent in earlier rounds.

    L_all(W) = L_asked(W) + V(W; all sums) - V(W; sums of the asked clients)

V is the expected cross-entropy of a head W where the inputs of each class are normal, with the class means and the
scatter within classes of the sums. The clients that a round has asked are those whose models it has averaged, so by their
examples the mean looks better than it is: on 10 of 50 clients with labels from Dirichlet(0.3) its accuracy was .84 by
their held-out examples and .45 by the test's. The normal model alone would favour discriminants, and the difference of
two such losses does so less. Where all clients were asked it is zero.

Sources: virtual features from the clients' sums, Luo et al. 2021 (CCVR), arXiv 2106.05001; the difference estimator of
survey sampling, Cassel, Saerndal and Wretman 1976, Biometrika 63(3).
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.head_memory import HeadSums
from fedbasin.strategies.tensors.eigenvalues import eigendecompose

# Normal draws of a class, fewer where there are many classes; the same for all heads, so that differences are exact.
_DRAWS, _MOST_LOGITS = 64, 2**22


def for_all_clients(
    path: Path,
    start: Float[Tensor, "classes inputs"],
    end: Float[Tensor, "classes inputs"],
    asked: HeadSums,
    everybody: HeadSums,
) -> Path:
    """Return a path of the clients that were asked as all clients would have evaluated it.

    Args:
        path: the path.
        start: head at its start, with the bias last.
        end: head at its end.
        asked: sums of the clients that were asked.
        everybody: those sums with the remembered ones of the others.
    """
    losses, corrects = [], []
    for index, point in enumerate(path.points):
        head = torch.lerp(start.double(), end.double(), point)
        more = expected_score(head, everybody) - expected_score(head, asked)
        losses.append(max(0.0, path.loss[index] + path.examples * float(more[0])))
        if path.correct:
            corrects.append(min(max(0.0, path.correct[index] + path.examples * float(more[1])), path.examples))
    return replace(path, loss=tuple(losses), correct=tuple(corrects))


def expected_score(head: Float[Tensor, "classes inputs"], sums: HeadSums) -> Float[Tensor, "2"]:
    """Return the expected loss and accuracy of a head on normal inputs with the means and the scatter of some sums.

    Args:
        head: weights, with the bias last.
        sums: the sums; a class counts by its examples in them.
    """
    counts = sums.sums[:, -1].double().clamp(min=0)
    means = sums.sums.double() / counts.clamp(min=1e-12)[:, None]
    scatter = (sums.gram.double() - means.mT @ sums.sums.double()) / counts.sum()
    values, vectors = eigendecompose(head @ scatter @ head.mT)
    factor = vectors * values.clamp(min=0).sqrt()
    classes = len(counts)
    draws = max(1, min(_DRAWS, _MOST_LOGITS // classes**2))
    noise = torch.randn(draws, classes, generator=torch.Generator().manual_seed(0), dtype=head.dtype) @ factor.mT
    logits = (means @ head.mT)[:, None] + noise
    labels = torch.arange(classes)[:, None].expand(classes, draws)
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(classes, draws).mean(1)
    correct = (logits.argmax(2) == labels).double().mean(1)
    return torch.stack([(counts * loss).sum(), (counts * correct).sum()]) / counts.sum()
