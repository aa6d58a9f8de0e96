"""Learned matching: train the transform that lowers the loss on the path between two models.

    minimise over T    E_t [ L((1 - t) anchor + t T . client) ]        t near a place on the path

Every space has a matrix M, and its element is the group's own maximiser of `<T, M>`, so the function is kept for every
M. The gradient with respect to M is that of the polar factor at singular values of 1 where entries mix, and passes
straight through the assignment where units are permuted (straight-through estimator: Ainsworth et al. 2023, arXiv
2209.04836; with polar factors: Theus et al. 2025, arXiv 2506.22712):

    dL/dM = (G - T G^T T) / 2    or    dL/dM = G        G = dL/dT

The search starts from weight matching, because from the identity it finds little. Nothing but T is trained.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.proto.report import SpaceReport
from fedbasin.strategies.alignment.weight_matching import Alignment, distances, match_weights
from fedbasin.strategies.diagnostics.evaluation import bind
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tasks.guess import guess_task
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State, interpolate

# Number of batches on which the start and the end of the search are compared.
_COMPARED = 8


@dataclass(frozen=True)
class Search:
    """The settings of a search for a transform.

    Attributes:
        steps: number of steps of Adam, one batch each; 0 leaves weight matching as it is.
        rate: learning rate at the beginning; it falls to 0 along a cosine.
        spread: largest distance of the drawn point on the path from its place.
        smoothing: label smoothing. A client has memorised its own examples: without smoothing their loss soon
            vanishes, and the transform fits them alone.
        seed: seed of the drawn points.
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
    task: Task | None = None,
) -> Alignment:
    """Align `client` to `anchor` by weights, then by the loss near one point of the path between them.

    Laws: the client's function is kept; on the batches of the comparison, the smoothed loss at the place is never above
    the one after weight matching. Spaces whose group stretches, and the order of blocks that rotate, stay as weight
    matching left them. Unlike with weight matching, the distance to the anchor may rise.

    Args:
        symmetry: the spaces; `symmetry.check(anchor)` must hold.
        model: the architecture; it is left as it was.
        anchor: the state to align to.
        client: the state to align; the returned state is folded.
        batches: the client's data; the search reads it from its beginning as often as it needs.
        place: the client's weight, 0 to 1, where the two models will be merged.
        search: settings of the search; None for the defaults.
        task: the task; None takes the one that the first batch shows.

    Raises:
        ValueError: there is no data, a state does not fit the model, or the loss is not finite.
        TypeError: the batches can be read only once.
        SymmetryError: a norm's weight is too close to zero to divide by.
    """
    if isinstance(batches, Iterator):
        raise TypeError("learning reads its batches many times; pass a list or a DataLoader")
    start, search = match_weights(symmetry, anchor, client), search or Search()
    task = task or guess_task(model, batches)
    problem = _Problem(symmetry, model, symmetry.fold(anchor), start.state, place, search.smoothing, task)
    learned = _learn_transform(problem, batches, search)
    if learned is None:
        return start
    transform = learned.after(start.transform)
    state = {**start.state, **learned.act(start.state)}
    spaces = tuple(_update_report(space, transform.elements[space.space]) for space in start.report.spaces)
    distance = math.hypot(*distances(symmetry, problem.anchor, state).values())
    report = replace(start.report, spaces=spaces, distance_after=distance)
    return Alignment(state, transform, report)


def _update_report(space: SpaceReport, element: Element) -> SpaceReport:
    return replace(
        space,
        certified=False,
        moved=element.displacement(),
        fixed_points=fixed_points(element),
        largest_angle=largest_angle(element),
    )


@dataclass(frozen=True, eq=False)
class _Problem:
    symmetry: Symmetry
    model: nn.Module
    anchor: State
    client: State
    place: float
    smoothing: float
    task: Task

    def loss(self, transform: Transform, batch: Batch, t: float) -> Tensor:
        merged = interpolate(self.anchor, transform.act(self.client), t)
        # Running statistics follow the transform, but no gradient flows through them: they are not trained.
        for name in merged.keys() & {name for name, _ in self.model.named_buffers()}:
            merged[name] = merged[name].detach()
        outputs = forward(self.model, batch, bind(self.model, merged))
        return self.task.losses(outputs, batch, self.smoothing).mean()


def _learn_transform(problem: _Problem, batches: Batches, search: Search) -> Transform | None:
    """Return the transform at the end of the search, or None if its loss is not below that of the start."""
    latents = {space.name: _initial_latent(space) for space in problem.symmetry.spaces if _learnable(space)}
    with evaluating(problem.model), torch.enable_grad():
        _descend(problem, latents, batches, search)
    start = Transform(problem.symmetry, {})
    end = Transform(problem.symmetry, {name: latent.nearest() for name, latent in latents.items()})
    with evaluating(problem.model), torch.no_grad():
        compared = list(islice(read_batches(batches, problem.model), _COMPARED))
        gains = [problem.loss(start, b, problem.place) - problem.loss(end, b, problem.place) for b in compared]
    return end if torch.stack(gains).sum() > 0 else None


def _descend(problem: _Problem, latents: "dict[str, _Latent]", batches: Batches, search: Search) -> None:
    parameters = [role for latent in latents.values() for role in latent.roles]
    if not (parameters and search.steps):
        return
    optimiser = torch.optim.Adam(parameters, search.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, search.steps)
    # A separate generator, so that the app's random numbers stay the same.
    generator = torch.Generator().manual_seed(search.seed)
    data = _repeat(batches, problem.model)
    for _ in range(search.steps):
        # Drawn anew at every step: at one fixed point the search would lower the loss there alone.
        t = problem.place + search.spread * (2 * float(torch.rand((), generator=generator)) - 1)
        moving = {name: latent.element() for name, latent in latents.items()}
        loss = problem.loss(Transform(problem.symmetry, moving), next(data), min(max(t, 0.0), 1.0))
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} at t = {t:.2f}; learn at a smaller rate")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for role, gradient in zip(parameters, gradients, strict=True):
            role.grad = gradient
        optimiser.step()
        schedule.step()


def _repeat(batches: Batches, model: nn.Module) -> Iterator[Batch]:
    while True:
        yield from read_batches(batches, model)


@dataclass(frozen=True, eq=False)
class _Latent:
    """The matrices M of a space, one for each role; they start at the identity.

    Attributes:
        space: the space whose element is learned.
        roles: the matrices that Adam trains.
        mixes: True if the group mixes entries. Blocks then keep their places, because an exchange of heads is a jump
            of which the gradient has no sign.
    """

    space: Space
    roles: tuple[Float[Tensor, "width width"], ...]
    mixes: bool

    def nearest(self) -> Element:
        """Return the group element that fits M best."""
        scores = tuple(
            self.space.group.score(role.detach().double(), torch.eye(len(role)).double(), number)
            for number, role in enumerate(self._matrices())
        )
        return self.space.group.maximiser(scores, 0.0)

    def element(self) -> Element:
        """Return the nearest element as one dense block for each role, through which gradients flow to M."""
        nearest, matrices = self.nearest(), self._matrices()
        dense = (nearest.act(torch.eye(len(m)), 0, role) for role, m in enumerate(matrices))
        estimate = _with_polar_gradient if self.mixes else _with_straight_gradient
        blocks = tuple(estimate(m, t)[None] for m, t in zip(matrices, dense, strict=True))
        return Element(torch.arange(1), blocks, tuple(len(m) for m in matrices))

    def _matrices(self) -> list[Tensor]:
        return [role * self._mask(number) for number, role in enumerate(self.roles)]

    def _mask(self, role: int) -> Tensor:
        count, size = self.space.group.count, self.space.group.sizes[role]
        places = torch.eye(count) if self.mixes else torch.ones(count, count)
        return torch.kron(places, torch.ones(size, size))


def _initial_latent(space: Space) -> _Latent:
    widths = (space.width(role) for role in range(len(space.group.sizes)))
    # A group does not say whether its elements mix entries; almost every random element does.
    example = space.group.random(torch.Generator().manual_seed(0))
    roles = tuple(torch.eye(width).requires_grad_() for width in widths)
    return _Latent(space, roles, mixes=not example.is_monomial)


def _learnable(space: Space) -> bool:
    # Both gradients assume an orthogonal map. Where a role's dual is another role, elements do not keep lengths.
    element = space.group.identity()
    return all(element.dual(role) == role for role in range(len(element.sizes)))


def _with_straight_gradient(latent: Tensor, matrix: Tensor) -> Tensor:
    return matrix + (latent - latent.detach())


def _with_polar_gradient(latent: Tensor, matrix: Tensor) -> Tensor:
    """Return `matrix` with the derivative of the polar factor at an orthogonal matrix."""
    change = latent - latent.detach()
    return matrix + (change - matrix @ change.mT @ matrix) / 2
