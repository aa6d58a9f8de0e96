"""Gradients of the log-likelihood of labels drawn from a model's own predictions, for Fisher information.

    d log p(y | x) / d logits = e_y - p(x)        for y drawn from p(x), or every y times sqrt(p_y)

Labels are the model's own and never the data's: the data's labels would give the empirical Fisher information, which
is not Fisher information (Kunstner, Balles and Hennig 2019, arXiv 1905.12558).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedbasin.strategies.tensors.batches import Batch

# Up to this number of labels over all places of an example, each costs a gradient; above it, labels are drawn.
EXACT_LABELS = 32


def label_scores(
    logits: Float[Tensor, "batch *places classes"],
    batch: Batch,
    generator: torch.Generator | None = None,
    exact_labels: int = EXACT_LABELS,
) -> Float[Tensor, "batch labels numbers"]:
    """Return gradients whose squares sum to the second moment of `d log p(y | x) / d logits`, for each example.

    The numbers of a row are those of one example's logits, places times classes. With few labels there is one row for
    every place and label, times the root of its probability. With many there is one row, in which a label is drawn at
    every place: draws at two places are independent, so their products vanish on average.

    Args:
        logits: logits of the batch, `[batch, classes]`, or `[batch, tokens, classes]` for a model of tokens.
        batch: the batch, whose targets give the places; a place with a negative target, or outside the mask, does not
            count.
        generator: generator that draws labels, on the model's device.
        exact_labels: places times classes up to which every label is evaluated.

    Raises:
        ValueError: the logits are not classes for the targets.
    """
    counted = _counted_places(logits, batch)
    # A softmax in half precision rounds small probabilities to zero.
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    p = p.reshape(*counted.shape, -1)
    is_exact = p.shape[1] * p.shape[2] <= exact_labels
    return _score_all(p, counted) if is_exact else _score_drawn(p, counted, generator)


def _counted_places(logits: Tensor, batch: Batch) -> Bool[Tensor, "batch places"]:
    targets = batch.targets
    is_classifier = logits.dim() == 2 and len(logits) == len(targets)
    if not (is_classifier or (logits.dim() > 2 and logits.shape[:-1] == targets.shape)):
        raise ValueError(
            f"logits {list(logits.shape)} for targets {list(targets.shape)}; Fisher information is that of a "
            "classifier: return logits [batch, classes], or [batch, tokens, classes] with targets [batch, tokens]"
        )
    if logits.shape[-1] < 2:
        raise ValueError(
            f"logits {list(logits.shape)}: with a single class there is no choice, so its Fisher information is zero; "
            "return two logits, or choose a recipe without Fisher information"
        )
    if is_classifier:
        return torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
    counted = targets >= 0
    if batch.mask is not None and batch.mask.shape == targets.shape:
        counted &= batch.mask
    return counted.flatten(1)


def _score_all(
    p: Float[Tensor, "batch places classes"], counted: Bool[Tensor, "batch places"]
) -> Float[Tensor, "batch labels numbers"]:
    """Return one row for every label of every place, zero at the other places."""
    places, classes = p.shape[1:]
    errors = torch.eye(classes).to(p) - p.unsqueeze(-2)
    errors = errors * (p.sqrt() * counted.unsqueeze(-1)).unsqueeze(-1)
    alone = torch.einsum("bplc,pq->bplqc", errors, torch.eye(places).to(p))
    return alone.reshape(len(p), places * classes, places * classes)


def _score_drawn(
    p: Float[Tensor, "batch places classes"], counted: Bool[Tensor, "batch places"], generator: torch.Generator | None
) -> Float[Tensor, "batch labels numbers"]:
    """Return one row with a label drawn at every place."""
    labels = torch.multinomial(p.flatten(0, 1), 1, generator=generator)
    errors = (-p).scatter_add_(-1, labels.view(*p.shape[:2], 1), torch.ones_like(p[..., :1]))
    return (errors * counted.unsqueeze(-1)).flatten(1).unsqueeze(1)
