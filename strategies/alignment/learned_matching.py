"""Learned matching: the transform that makes the middle of the path between two models good, learned on data.

    minimise over T    E_t [ L((1 - t) anchor + t T . client) ]        t near a place on the path

Every space has a matrix M, and its element is the group's own maximiser of `<T, M>`: the function is kept whatever M is.
The gradient with respect to M is that of the polar factor at singular values of 1 where entries mix, and passes
straight through the assignment where units change places (straight-through estimator: Ainsworth et al. 2023, arXiv
2209.04836; with polar factors Theus et al. 2025, arXiv 2506.22712),

    dL/dM = (G - T G^T T) / 2    or    dL/dM = G        G = dL/dT

The search starts from weight matching; from the identity it finds little. Nothing but T is trained.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedbasin.strategies.alignment.alignment_report import AlignmentReport, SpaceReport
from fedbasin.strategies.alignment.weight_matching import Alignment, distances, match_weights
from fedbasin.strategies.diagnostics.evaluation import bind, counted
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read
from fedbasin.strategies.tensors.state import State, interpolate

# Batches on which the start and the end are compared.
_HELD = 8


@dataclass(frozen=True)
class Search:
    """How the transform is learned.

    Attributes:
        steps: of Adam, one batch each; 0 leaves weight matching as it is.
        rate: learning rate at the beginning; it falls to 0 along a cosine.
        spread: the point on the path is drawn this far around its place, at most.
        smoothing: of the labels. A client knows its own examples by heart, so that without it the loss is soon
            nothing, and what was learned holds for them alone.
        seed: of those points.
    """

    steps: int = 400
    rate: float = 0.02
    spread: float = 0.1
    smoothing: float = 0.1
    seed: int = 0


def match_learned(
    symmetry: Symmetry,
    model: nn.Module,
    anchor: State,
    client: State,
    batches: Batches,
    place: float = 0.5,
    search: Search | None = None,
) -> Alignment:
    """Align `client` to `anchor` by weights, then by the loss near one point of the path between them.

    Laws: the client's function is kept; the smoothed loss at the place is never above that after weight matching, on
    the batches that both are compared on. Spaces that stretch, and the order of blocks that mix inside, stay as weight
    matching left them. Unlike there, the distance to the anchor may rise.

    Args:
        symmetry: the spaces; `symmetry.check(anchor)` must hold.
        model: lends its architecture; it is left as it was.
        anchor: the state to align to.
        client: the state to align; what is returned is folded.
        batches: the client's data, read again from its beginning as often as the steps need.
        place: the client's share where the two will be merged, 0 to 1.
        search: how; None for the defaults.

    Raises:
        ValueError: there is no data, a state does not fit the model, or the loss is not finite.
        TypeError: the batches can be read only once.
        FoldError: a norm's gain vanishes where it would have to be divided by.
    """
    if isinstance(batches, Iterator):
        raise TypeError("learning reads its batches many times; pass a list or a DataLoader")
    start, how = match_weights(symmetry, anchor, client), search or Search()
    task = _Task(symmetry, model, symmetry.fold(anchor), start.state, place, how.smoothing)
    learned = _learn(task, batches, how)
    if learned is None:
        return start
    transform = learned.after(start.transform)
    state = {**start.state, **learned.act(start.state)}
    return Alignment(state, transform, _report(task, start.report, transform, state))


@dataclass(frozen=True, eq=False)
class _Task:
    symmetry: Symmetry
    model: nn.Module
    anchor: State
    client: State
    place: float
    smoothing: float

    def loss(self, transform: Transform, batch: Batch, t: float) -> Tensor:
        merged = interpolate(self.anchor, transform.act(self.client), t)
        # What a norm keeps of the data is moved, but nothing is learned from it.
        for name in merged.keys() & {name for name, _ in self.model.named_buffers()}:
            merged[name] = merged[name].detach()
        logits, targets = counted(forward(self.model, batch, bind(self.model, merged)), batch)
        return cross_entropy(logits, targets, label_smoothing=self.smoothing)


def _learn(task: _Task, batches: Batches, search: Search) -> Transform | None:
    """The best transform of the two ends of the search; None if that is the start."""
    latents = {space.name: _start(space) for space in task.symmetry.spaces if _learnable(space)}
    with evaluating(task.model), torch.enable_grad():
        _descend(task, latents, batches, search)
    found = Transform(task.symmetry, {name: latent.nearest() for name, latent in latents.items()})
    start = Transform(task.symmetry, {})
    with evaluating(task.model), torch.no_grad():
        held = list(islice(read(batches, task.model), _HELD))
        gains = [task.loss(start, b, task.place) - task.loss(found, b, task.place) for b in held]
    return found if torch.stack(gains).sum() > 0 else None


def _descend(task: _Task, latents: "dict[str, _Latent]", batches: Batches, search: Search) -> None:
    parameters = [role for latent in latents.values() for role in latent.roles]
    if not (parameters and search.steps):
        return
    optimiser = torch.optim.Adam(parameters, search.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, search.steps)
    generator = torch.Generator().manual_seed(search.seed)
    data = _forever(batches, task.model)
    for _ in range(search.steps):
        t = task.place + search.spread * (2 * float(torch.rand((), generator=generator)) - 1)
        moving = {name: latent.element() for name, latent in latents.items()}
        loss = task.loss(Transform(task.symmetry, moving), next(data), min(max(t, 0.0), 1.0))
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} at t = {t:.2f}; learn at a smaller rate")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for role, gradient in zip(parameters, gradients, strict=True):
            role.grad = gradient
        optimiser.step()
        schedule.step()


def _forever(batches: Batches, model: nn.Module) -> Iterator[Batch]:
    while True:
        yield from read(batches, model)


@dataclass(frozen=True, eq=False)
class _Latent:
    """A space's matrices M, role by role, which start at the identity.

    Attributes:
        space: whose element is sought.
        roles: what Adam moves.
        mixes: whether the group turns entries into each other. Then blocks keep their places: an exchange of
            heads is a jump that gradients do not see coming.
    """

    space: Space
    roles: tuple[Float[Tensor, "width width"], ...]
    mixes: bool

    def nearest(self) -> Element:
        """The element that fits M best."""
        scores = tuple(
            self.space.group.score(role.detach().double(), torch.eye(len(role)).double(), number)
            for number, role in enumerate(self._matrices())
        )
        return self.space.group.maximiser(scores, 0.0)

    def element(self) -> Element:
        """The same as one dense block on each role, through which gradients flow back to M."""
        nearest, matrices = self.nearest(), self._matrices()
        dense = (nearest.act(torch.eye(len(m)), 0, role) for role, m in enumerate(matrices))
        estimate = _tangent if self.mixes else _straight
        blocks = tuple(estimate(m, t)[None] for m, t in zip(matrices, dense, strict=True))
        return Element(torch.arange(1), blocks, tuple(len(m) for m in matrices))

    def _matrices(self) -> list[Tensor]:
        return [role * self._mask(number) for number, role in enumerate(self.roles)]

    def _mask(self, role: int) -> Tensor:
        count, size = self.space.group.count, self.space.group.sizes[role]
        places = torch.eye(count) if self.mixes else torch.ones(count, count)
        return torch.kron(places, torch.ones(size, size))


def _start(space: Space) -> _Latent:
    widths = (space.width(role) for role in range(len(space.group.sizes)))
    drawn = space.group.random(torch.Generator().manual_seed(0))
    roles = tuple(torch.eye(width).requires_grad_() for width in widths)
    return _Latent(space, roles, mixes=not drawn.is_monomial)


def _learnable(space: Space) -> bool:
    element = space.group.identity()
    return all(element.dual(role) == role for role in range(len(element.sizes)))


def _straight(latent: Tensor, matrix: Tensor) -> Tensor:
    return matrix + (latent - latent.detach())


def _tangent(latent: Tensor, matrix: Tensor) -> Tensor:
    """The value of `matrix` with the derivative of the polar factor at an orthogonal matrix."""
    change = latent - latent.detach()
    return matrix + (change - matrix @ change.mT @ matrix) / 2


def _report(
    task: _Task, start: AlignmentReport, transform: Transform, state: State
) -> AlignmentReport:
    spaces = tuple(_moved(space, transform.elements[space.space]) for space in start.spaces)
    after = math.hypot(*distances(task.symmetry, task.anchor, state).values())
    return replace(start, spaces=spaces, distance_after=after)


def _moved(space: SpaceReport, element: Element) -> SpaceReport:
    return replace(
        space,
        certified=False,
        moved=element.moved(),
        fixed_points=fixed_points(element),
        largest_angle=largest_angle(element),
    )
