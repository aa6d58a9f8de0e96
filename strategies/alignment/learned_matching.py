"""Learned matching: train the transform that lowers the loss on the path between two models.

    minimise over T    E_t [ L((1 - t) anchor + t T . client) ]        t near a place on the path

Every space has a matrix M, and its element is the group's own maximiser of `<T, M>`, so the function is kept for every
M. The gradient with respect to M is that of the polar factor at singular values of 1 where entries mix, and passes
straight through the assignment where units are permuted (straight-through estimator: Ainsworth et al. 2023, arXiv
2209.04836; with polar factors: Theus et al. 2025, arXiv 2506.22712):

    dL/dM = (G - T G^T T) / 2    or    dL/dM = G        G = dL/dT

The search starts from the better of weight and activation matching, because from the identity it finds little. A client
that weight matching leaves as it is has trained from the anchor, and there is no search: it would only find an order
that the client's own few examples prefer by chance. Nothing but T is trained. BatchNorm normalises each batch by its
own statistics: those of the merged model are measured later.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.proto.report import SpaceReport
from fedbasin.strategies.alignment.activation_matching import match_activations
from fedbasin.strategies.alignment.weight_matching import Alignment, distances, match_weights
from fedbasin.strategies.capture.batchnorm_statistics import normalising_by_batch, read_normalised
from fedbasin.strategies.capture.feature_correlations import correlations
from fedbasin.strategies.diagnostics.evaluation import bind
from fedbasin.strategies.diagnostics.geometry import fixed_points, largest_angle
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tasks.guess import guess_task
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, Batches, forward
from fedbasin.strategies.tensors.state import State, interpolate

# Number of batches on which the start and the end of the search are compared.
_COMPARED = 8

# Label smoothing of examples that a client has memorised.
_SMOOTHING = 0.1


@dataclass(frozen=True)
class Search:
    """The settings of a search for a transform.

    Attributes:
        steps: number of steps of Adam, one batch each; 0 leaves weight matching as it is.
        rate: learning rate of groups that mix entries, at the beginning; it falls to 0 along a cosine.
        order_rate: learning rate of groups that permute, whose elements change only after many steps.
        spread: largest distance of the drawn point on the path from its place.
        smoothing: label smoothing. Of examples that a client has memorised the loss soon vanishes without it, and the
            transform fits them alone; where data are many, as text, it hides what learning gains. None takes 0.1
            where the client's own loss is below that of a model that is no surer than such labels, and 0 elsewhere.
        seed: seed of the drawn points.
    """

    steps: int = 400
    rate: float = 0.02
    order_rate: float = 0.1
    spread: float = 0.1
    smoothing: float | None = None
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
    """Align `client` to `anchor` by weights or activations, then by the loss near one point of the path between them.

    Laws: the client's function is kept; on the batches of the comparison, the smoothed loss at the place is never above
    the one after weight matching, each batch normalised by its own statistics where there is BatchNorm. Spaces whose
    group stretches, and the order of blocks that rotate, stay as the start left them. Unlike with weight matching, the
    distance to the anchor may rise.

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
    by_weights = match_weights(symmetry, anchor, client)
    if not any(space.moved for space in by_weights.report.spaces):
        return by_weights
    search, task = search or Search(), task or guess_task(model, batches)
    folded = symmetry.fold(anchor)
    if search.smoothing is None:
        search = replace(search, smoothing=_smoothing(symmetry, model, client, batches, task))
    start = _better_start(symmetry, model, folded, client, by_weights, batches, place, search, task)
    problem = _Problem(symmetry, model, folded, start.state, place, search.smoothing or 0.0, task)
    learned = _learn_transform(problem, batches, search)
    if learned is None:
        return start
    transform = learned.after(start.transform)
    state = {**start.state, **learned.act(start.state)}
    spaces = tuple(_update_report(space, transform.elements[space.space]) for space in start.report.spaces)
    distance = math.hypot(*distances(symmetry, problem.anchor, state).values())
    report = replace(start.report, spaces=spaces, distance_after=distance)
    return Alignment(state, transform, report)


def _smoothing(symmetry: Symmetry, model: nn.Module, client: State, batches: Batches, task: Task) -> float:
    """Return the label smoothing for a client's own examples: none unless it is surer of them than smoothed labels are."""
    state = symmetry.fold(client)
    own = _Problem(symmetry, model, state, state, 1.0, 0.0, task)
    compared = len(list(islice(read_normalised(batches, model), _COMPARED)))
    (loss,) = _losses([own], [Transform(symmetry, {})], batches)
    return _SMOOTHING if loss / max(compared, 1) < -math.log1p(-_SMOOTHING) else 0.0


def _better_start(
    symmetry: Symmetry,
    model: nn.Module,
    anchor: State,
    client: State,
    by_weights: Alignment,
    batches: Batches,
    place: float,
    search: Search,
    task: Task,
) -> Alignment:
    """Return the alignment by weights, or the one by activations where its loss at the place is lower."""
    features = correlations(symmetry, model, anchor, symmetry.fold(client), batches)
    starts = by_weights, match_activations(symmetry, anchor, client, features)
    problems = [_Problem(symmetry, model, anchor, s.state, place, search.smoothing or 0.0, task) for s in starts]
    losses = _losses(problems, [Transform(symmetry, {})] * 2, batches)
    return starts[int(losses[1] < losses[0])]


def _losses(problems: "Sequence[_Problem]", transforms: Sequence[Transform], batches: Batches) -> list[float]:
    """Return the sum of each problem's losses at its place over the batches of the comparison."""
    model = problems[0].model
    with normalising_by_batch(model), torch.no_grad():
        compared = list(islice(read_normalised(batches, model), _COMPARED))
        return [
            float(sum(problem.loss(transform, batch, problem.place) for batch in compared))
            for problem, transform in zip(problems, transforms, strict=True)
        ]


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
    with normalising_by_batch(problem.model), torch.enable_grad():
        _descend(problem, latents, batches, search)
    start = Transform(problem.symmetry, {})
    end = Transform(problem.symmetry, {name: latent.nearest() for name, latent in latents.items()})
    before, after = _losses([problem] * 2, [start, end], batches)
    return end if after < before else None


def _descend(problem: _Problem, latents: "dict[str, _Latent]", batches: Batches, search: Search) -> None:
    parameters = [role for latent in latents.values() for role in latent.roles]
    if not (parameters and search.steps):
        return
    rates = {True: search.rate, False: search.order_rate}
    optimiser = torch.optim.Adam([{"params": list(q.roles), "lr": rates[q.mixes]} for q in latents.values()])
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
        yield from read_normalised(batches, model)


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
