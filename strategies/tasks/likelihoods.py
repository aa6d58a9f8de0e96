"""The likelihoods of targets given a model's outputs: categorical, Bernoulli, Gaussian, or a user's own.

    classes      p(y | z) = softmax(z)_y             Fisher information of z    diag(p) - p p^T
    labels       p(y | z) = prod_l sigmoid(z)_l      diag(p (1 - p))
    values       p(y | z) = N(y; z, 1)               identity

A place is what has a target of its own: an example, a token or a pixel. A place has a vector of outputs, its features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot, pad

IGNORED = -100  # the target that PyTorch's cross entropy leaves out
MARGIN = 5.0  # a head fitted by least squares has this output for a label, and its negative without

# Names of the targets to which a head is fitted: `fedbasin.strategies.recipes.Target`.
HeadTarget: TypeAlias = Literal["labels", "values"]


class TaskError(ValueError):
    """Outputs and targets that do not fit a task, or that leave it open."""


class Places(NamedTuple):
    """A batch by places: `[batch, places, *features]` of outputs, their targets, and which places count."""

    outputs: Tensor
    targets: Tensor
    counted: Bool[Tensor, "batch places"]


class Likelihood(Protocol):
    """The distribution of the targets of a place, given its outputs.

    Attributes:
        unit: unit of the loss.
        head: target to which a last layer can be fitted in closed form; None where there is none.
    """

    @property
    def unit(self) -> str: ...

    @property
    def head(self) -> HeadTarget | None: ...

    def arrange(self, outputs: Tensor) -> Tensor:
        """Return the outputs with the features of a place last."""
        ...

    def places(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Places:
        """Return a batch by places; raises a TaskError if the targets do not fit the outputs."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Float[Tensor, " rows"]:
        """Return the loss of every counted place; smoothing moves labels towards the uniform distribution."""
        ...

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return how much of every counted place is right, 0 to 1; None where right and wrong have no meaning."""
        ...

    def probabilities(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the probabilities of classes for counted places, and the classes; None where there are none."""
        ...

    def drawn_scores(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return `d log p(y | z) / d z` for a target drawn at every place."""
        ...

    def exact_scores(self, outputs: Tensor) -> Float[Tensor, "batch places scores features"]:
        """Return vectors of every place whose outer products sum to the Fisher information of its outputs."""
        ...

    def count_scores(self, outputs: Tensor) -> float:
        """Return the number of exact scores of one place; infinite where there are none."""
        ...

    def goals(self, outputs: Tensor, targets: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
        """Return the values to which a head is fitted, features last, and the places that count.

        Args:
            outputs: the outputs.
            targets: the targets.
            mask: the mask of the batch.
            axis: axis of the outputs on which the head writes its features.
        """
        ...


@dataclass(frozen=True)
class Categorical:
    """One class for each place, whose logits lie on one axis of the outputs.

    Attributes:
        axis: axis of the classes where there are several places.
    """

    axis: Literal[-1, 1] = -1
    unit: ClassVar[str] = "nats"
    head: ClassVar[HeadTarget] = "labels"

    def arrange(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.axis, -1)

    def places(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Places:
        logits = self.arrange(outputs) if outputs.ndim > 1 else outputs
        if logits.ndim < 2 or logits.shape[:-1] != targets.shape or targets.is_floating_point():
            raise TaskError(
                f"logits {list(outputs.shape)} for targets {targets.dtype} {list(targets.shape)}; give class indices of "
                f"the logits' shape without axis {self.axis}, or pass another task to basin(task=...)"
            )
        counted = targets != IGNORED
        classes = logits.shape[-1]
        # With one target for a whole sequence the mask speaks of the inputs.
        if mask is not None and targets.ndim > 1:
            counted = counted & mask
        if bool((counted & ((targets < 0) | (targets >= classes))).any()):
            raise TaskError(
                f"targets from {int(targets.min())} to {int(targets.max())} for {classes} logits; give class indices "
                f"from 0 to {classes - 1}, and {IGNORED} or the batch's mask where there is no class"
            )
        shape = len(targets), -1
        return Places(logits.reshape(*shape, classes), targets.reshape(shape), counted.reshape(shape))

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Float[Tensor, " rows"]:
        return cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(-1) == targets

    def probabilities(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.softmax(-1), targets

    def drawn_scores(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        p = self._probabilities(outputs)
        # On the CPU, here and below: a client on a GPU draws the targets that it would draw without one.
        labels = torch.multinomial(p.flatten(0, 1).cpu(), 1, generator=generator).to(p.device)
        return (-p).scatter_add_(-1, labels.view(*p.shape[:2], 1), torch.ones_like(p[..., :1]))

    def exact_scores(self, outputs: Tensor) -> Float[Tensor, "batch places scores features"]:
        """Return one vector for each class but the last: is it this class, or one of those after it?

        g_j = sqrt(p_j s_j / (p_j + s_j)) (e_j - p_{>j} / s_j)        s_j = sum of p over the classes after j
        """
        p = self._probabilities(outputs)
        classes = p.shape[-1]
        # Summed from the end, because 1 - cumsum(p) cancels where the model is confident.
        rest = pad(p.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))
        tiny = torch.finfo(p.dtype).tiny
        later = torch.ones(classes, classes).triu(1).to(p) * p.unsqueeze(-2) / rest.clamp(min=tiny).unsqueeze(-1)
        lengths = (p * rest / (p + rest).clamp(min=tiny)).sqrt()
        return (lengths.unsqueeze(-1) * (torch.eye(classes).to(p) - later))[..., :-1, :]

    def count_scores(self, outputs: Tensor) -> float:
        return outputs.shape[-1] - 1

    def goals(self, outputs: Tensor, targets: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
        if axis != self.axis % outputs.ndim:
            raise TaskError(f"the head writes on axis {axis} of logits whose classes are on axis {self.axis}")
        places = self.places(outputs, targets, mask)
        # A place without a class has a target that is none, as -100.
        return one_hot(places.targets.where(places.counted, 0), places.outputs.shape[-1]), places.counted

    def _probabilities(self, outputs: Tensor) -> Tensor:
        if outputs.shape[-1] < 2:
            raise TaskError(
                f"logits {list(outputs.shape)}: with a single class there is no choice, so its Fisher information is "
                "zero; return two logits, or choose the task multi-label, or a recipe without Fisher information"
            )
        # A softmax in half precision rounds small probabilities to zero.
        return widen(outputs.detach()).softmax(-1)


class _WithoutClasses:
    """The common part of likelihoods that know no right and wrong."""

    def hits(self, outputs: Tensor, targets: Tensor) -> None:  # noqa: ARG002 - nothing is right
        return None

    def probabilities(self, outputs: Tensor, targets: Tensor) -> None:  # noqa: ARG002 - nothing is a class
        return None


class _Elementwise:
    """The common part of likelihoods in which every output has a target of its own."""

    def arrange(self, outputs: Tensor) -> Tensor:
        return outputs

    def places(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Places:
        sizes = [[size for size in tensor.shape[1:] if size > 1] for tensor in (outputs, targets)]
        if not outputs.ndim or outputs.shape[:1] != targets.shape[:1] or sizes[0] != sizes[1]:
            raise TaskError(
                f"outputs {list(outputs.shape)} for targets {list(targets.shape)}; give one target for each output, or "
                "pass another task to basin(task=...)"
            )
        values = targets.reshape(outputs.shape).to(widen(outputs).dtype)
        # A mask of tokens leaves whole vectors out.
        if mask is not None and outputs.ndim > 1 and mask.shape == outputs.shape[:2] == targets.shape[:2]:
            return Places(outputs.reshape(*mask.shape, -1), values.reshape(*mask.shape, -1), mask)
        counted = torch.ones(len(outputs), 1, dtype=torch.bool, device=outputs.device)
        shape = len(outputs), 1, -1
        return Places(outputs.reshape(shape), values.reshape(shape), counted)

    def count_scores(self, outputs: Tensor) -> float:
        return outputs.shape[-1]

    def goals(self, outputs: Tensor, targets: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
        places = self.places(outputs, targets, mask)
        values = self._goal(places.targets.reshape(outputs.shape)).movedim(axis, -1)
        counted = torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
        if places.counted.shape[1] > 1:
            counted = counted & places.counted.reshape(*places.counted.shape, *(1 for _ in counted.shape[2:]))
        return values, counted

    def _goal(self, targets: Tensor) -> Tensor:
        return targets


@dataclass(frozen=True)
class Bernoulli(_Elementwise):
    """Any number of labels for each place, each with a logit and a target of 0 or 1."""

    unit: ClassVar[str] = "nats per label"
    head: ClassVar[HeadTarget] = "values"

    def places(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Places:
        places = super().places(outputs, targets, mask)
        if bool(((places.targets < 0) | (places.targets > 1)).any()):
            raise TaskError(
                f"targets from {float(targets.min()):g} to {float(targets.max()):g}; labels are 0 or 1, so give these, "
                "or pass another task to basin(task=...)"
            )
        return places

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Float[Tensor, " rows"]:
        smoothed = torch.lerp(targets, torch.full_like(targets, 0.5), smoothing)
        return binary_cross_entropy_with_logits(outputs, smoothed, reduction="none").mean(-1)

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs > 0) == (targets > 0.5)).double().mean(-1)

    def probabilities(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([-outputs, outputs], -1).sigmoid().flatten(0, -2), (targets > 0.5).long().flatten()

    def drawn_scores(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        p = widen(outputs.detach()).sigmoid()
        return torch.bernoulli(p.cpu(), generator=generator).to(p.device) - p

    def exact_scores(self, outputs: Tensor) -> Float[Tensor, "batch places scores features"]:
        p = widen(outputs.detach()).sigmoid()
        return (p * (1 - p)).sqrt().diag_embed()

    def _goal(self, targets: Tensor) -> Tensor:
        return MARGIN * (2 * targets - 1)


@dataclass(frozen=True)
class Gaussian(_WithoutClasses, _Elementwise):
    """A number for each output, with an error of one variance: the loss is the mean squared error.

    The variance would scale all Fisher information alike, which weighting removes.
    """

    unit: ClassVar[str] = "squared units of the targets"
    head: ClassVar[HeadTarget] = "values"

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Float[Tensor, " rows"]:  # noqa: ARG002 - numbers have no labels to smooth
        return (outputs - targets).square().mean(-1)

    def drawn_scores(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = widen(outputs.detach())
        return torch.randn(wide.shape, generator=generator, dtype=wide.dtype).to(wide.device)

    def exact_scores(self, outputs: Tensor) -> Float[Tensor, "batch places scores features"]:
        return torch.ones_like(widen(outputs.detach())).diag_embed()


@dataclass(frozen=True)
class UserLikelihood(_WithoutClasses):
    """A user's negative log-likelihood, with a way to draw targets from it.

    Attributes:
        loss: function of outputs and targets of some examples that returns the negative log-likelihood of each,
            `[batch]`.
        draw: function of outputs that draws targets from the likelihood, for Fisher information; None where it is not
            known, and recipes that need Fisher information are refused.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[Tensor], Tensor] | None = None
    unit: ClassVar[str] = "units of the user's loss"
    head: ClassVar[HeadTarget | None] = None

    def arrange(self, outputs: Tensor) -> Tensor:
        return outputs

    def places(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Places:  # noqa: ARG002 - the loss decides what counts
        if len(outputs) != len(targets):
            raise TaskError(f"{len(outputs)} outputs for {len(targets)} targets; give one of each to an example")
        counted = torch.ones(len(outputs), 1, dtype=torch.bool, device=outputs.device)
        return Places(outputs.unsqueeze(1), targets.unsqueeze(1), counted)

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Float[Tensor, " rows"]:  # noqa: ARG002 - the loss is the user's
        losses = self.loss(outputs, targets)
        if losses.shape != outputs.shape[:1]:
            raise TaskError(
                f"the task's loss returned {list(losses.shape)} for {len(outputs)} examples; return the loss of each, "
                "as with reduction='none', summed over what belongs to one example"
            )
        return losses

    def drawn_scores(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.draw is None:
            raise TaskError(
                "the task's likelihood is not known, which Fisher information needs; pass draw=, a function that draws "
                "targets for outputs, or choose a recipe other than fisher and kfac"
            )
        devices = [outputs.device] if outputs.device.type == "cuda" else []
        # The user's function knows torch's own generator alone.
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            examples = outputs.detach().flatten(0, 1).requires_grad_()
            losses = self.losses(examples, self.draw(examples.detach()))
            (gradient,) = torch.autograd.grad(losses.sum(), examples)
        return -gradient.view_as(outputs)

    def exact_scores(self, outputs: Tensor) -> Float[Tensor, "batch places scores features"]:
        raise NotImplementedError

    def count_scores(self, outputs: Tensor) -> float:  # noqa: ARG002 - none are known
        return torch.inf

    def goals(self, outputs: Tensor, targets: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or longer: half precision rounds more than a barrier's resolution."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
