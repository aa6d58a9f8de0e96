"""Labels that a model itself would give, as gradients of what they cost: where Fisher information comes from.

    d log p(y | x) / d logits = e_y - p(x)        for y drawn from p(x), or every y times sqrt(p_y)

Labels are the model's own and never the data's: with those it would be the empirical Fisher information, which is
none (Kunstner, Balles and Hennig 2019, arXiv 1905.12558).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedbasin.client.data import Batch

# An example of at most so many labels, over all its places, costs a gradient for each; others are drawn.
EXACT_LABELS = 32


def label_scores(
    logits: Float[Tensor, "batch *places classes"],
    batch: Batch,
    generator: torch.Generator | None = None,
    exact_labels: int = EXACT_LABELS,
) -> Float[Tensor, "batch labels numbers"]:
    """What squares and sums to the second moment of `d log p(y | x) / d logits`, for each example.

    The numbers of a row are those of one example's logits, places and classes. With few labels, one row for every
    place and label, times the root of its probability. With many, one row in which a label is drawn at every place:
    draws at two places are independent, so what they have in common vanishes on average.

    Args:
        logits: of the batch, `[batch, classes]`, or `[batch, tokens, classes]` for a model of tokens.
        batch: whose targets say how many places there are; a negative one, or one that the mask leaves out, does
            not count.
        generator: draws labels, on the model's device.
        exact_labels: places times classes up to which every label is looked at.

    Raises:
        ValueError: the logits are no classes of the targets.
    """
    counted = _counted(logits, batch)
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    p = p.reshape(*counted.shape, -1)
    every = p.shape[1] * p.shape[2] <= exact_labels
    return _every(p, counted) if every else _drawn(p, counted, generator)


def _counted(logits: Tensor, batch: Batch) -> Bool[Tensor, "batch places"]:
    targets = batch.targets
    one_each = logits.dim() == 2 and len(logits) == len(targets)
    if not (one_each or (logits.dim() > 2 and logits.shape[:-1] == targets.shape)):
        raise ValueError(
            f"logits {list(logits.shape)} for targets {list(targets.shape)}; Fisher information is that of a "
            "classifier: return logits [batch, classes], or [batch, tokens, classes] with targets [batch, tokens]"
        )
    if logits.shape[-1] < 2:
        raise ValueError(
            f"logits {list(logits.shape)}: one class is none to choose from, and its Fisher information is zero; "
            "return two logits, or choose a recipe without Fisher information"
        )
    if one_each:
        return torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
    counted = targets >= 0
    if batch.mask is not None and batch.mask.shape == targets.shape:
        counted &= batch.mask
    return counted.flatten(1)


def _every(
    p: Float[Tensor, "batch places classes"], counted: Bool[Tensor, "batch places"]
) -> Float[Tensor, "batch labels numbers"]:
    """Every label of every place, the other places at rest."""
    places, classes = p.shape[1:]
    errors = torch.eye(classes).to(p) - p.unsqueeze(-2)
    errors = errors * (p.sqrt() * counted.unsqueeze(-1)).unsqueeze(-1)
    alone = torch.einsum("bplc,pq->bplqc", errors, torch.eye(places).to(p))
    return alone.reshape(len(p), places * classes, places * classes)


def _drawn(
    p: Float[Tensor, "batch places classes"],
    counted: Bool[Tensor, "batch places"],
    generator: torch.Generator | None,
) -> Float[Tensor, "batch labels numbers"]:
    """One label drawn at every place."""
    labels = torch.multinomial(p.flatten(0, 1), 1, generator=generator)
    errors = (-p).scatter_add_(-1, labels.view(*p.shape[:2], 1), torch.ones_like(p[..., :1]))
    return (errors * counted.unsqueeze(-1)).flatten(1).unsqueeze(1)
