"""The diagonal Fisher information of a client's model on its own inputs.

    F = sum over examples of  E_{y ~ p(y | x)} (d log p(y | x) / d theta)^2

Source: Matena and Raffel 2022, arXiv 2111.09832. It is a sum over examples, so the Fisher information of two data sets
is the sum of theirs. It belongs to the present weights: collect it after aligning.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedbasin.strategies.capture.layer_calls import layer_by_layer
from fedbasin.strategies.statistics.layer_squares import LayerSquares
from fedbasin.strategies.tasks.guess import task_of_batch
from fedbasin.strategies.tasks.likelihoods import widen
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, Batches, Inputs, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State

# Numbers held at once in addition to the model and its activations: 2^24 float32 are 64 MiB.
GRADIENT_ELEMENTS = 2**24
# Each gradient also holds activations; small models have more of these than weights.
MOST_GRADIENTS = 256
# Examples and numbers of small batches that a recurrent model runs as one: each of its steps costs more than its numbers.
JOINED_EXAMPLES, JOINED_ELEMENTS = 256, 2**15


def diagonal_fisher(
    model: nn.Module, batches: Batches, generator: torch.Generator | None = None, task: Task | None = None
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of a model's trainable parameters, summed over examples.

    The gradient of each example is squared alone; squaring a batch's mean gradient instead would mix signs and shrink
    the result with the batch. Targets are the model's own, by the likelihood of the task. Where few gradients give all
    of the expectation, each counts. Where many would be needed, a target is drawn at every place, which costs a single
    gradient and is right on average.

    Args:
        model: the model, which runs in evaluation mode, so that examples do not meet in BatchNorm, and is left as it
            was.
        batches: the client's data, read once. A recurrent model runs small batches of the same form as one.
        generator: generator that draws targets, on the CPU.
        task: the task, which also says up to how many gradients the expectation is exact; None takes the one that the
            first batch shows.

    Returns:
        the diagonal by parameter name, in the parameter's shape and dtype, or float32 where that is longer.

    Raises:
        ValueError: there is no data, the targets do not fit the outputs, or the likelihood is not known.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # Squared gradients of confident examples are small, and many of them are added.
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in trained.items()}
    layers: LayerSquares | None = None
    # Fused attention kernels have no rule for vmap, which would run them example by example.
    with evaluating(model), layer_by_layer(), sdpa_kernel(SDPBackend.MATH):
        for batch in _joined(read_batches(batches, model)) if _is_recurrent(model) else read_batches(batches, model):
            if layers is None:
                _require_single_examples(model, batch)
                layers = LayerSquares.of(model, batch, GRADIENT_ELEMENTS)
            task = task or _guess(model, batch)
            scores, squares = layers.squares(task, batch, generator)
            rest = {n: p.detach() for n, p in trained.items() if n not in layers.names}
            for name, square in chain(squares.items(), _other_squares(model, task, rest, batch, scores)):
                sums[name] += square
    return {n: s.to(widen(trained[n]).dtype) for n, s in sums.items()}


def normalise(fisher: Tensor, examples: float) -> Tensor:
    """Return Fisher information scaled to the mean `examples`.

    A confident client's Fisher information is orders of magnitude below a hesitant client's, which says nothing about
    whose weights are right. So the number of examples weighs clients, and Fisher information weighs entries within a
    client.
    """
    mean = fisher.double().mean()
    if not mean > 0:
        return torch.full_like(fisher, examples)
    return fisher * (examples / mean).to(fisher.dtype)


def _is_recurrent(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def _joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches with those that follow them, as long as they are alike and small."""
    parts: list[Batch] = []
    for batch in batches:
        if parts and not _are_small_and_alike([*parts, batch]):
            yield _concatenated(parts)
            parts = []
        parts.append(batch)
    if parts:
        yield _concatenated(parts)


def _are_small_and_alike(parts: list[Batch]) -> bool:
    """Return whether batches may be run as one."""
    forms = {tuple((name, t.shape[1:], t.dtype) for name, t in part.tensors.items()) for part in parts}
    elements = sum(t.numel() for part in parts for t in part.tensors.values())
    examples = sum(len(part.targets) for part in parts)
    return len(forms) == 1 and elements <= JOINED_ELEMENTS and examples <= JOINED_EXAMPLES


def _concatenated(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    tensors = iter([torch.cat(same) for same in zip(*(part.tensors.values() for part in parts), strict=True)])
    return parts[0].map(lambda _: next(tensors))


def _guess(model: nn.Module, batch: Batch) -> Task:
    with torch.no_grad():
        return task_of_batch(forward(model, batch), batch)


def _require_single_examples(model: nn.Module, batch: Batch) -> None:
    """Refuse a model whose outputs compare the examples of a batch, as those of two towers or of a graph's nodes do."""
    try:
        with torch.no_grad():
            few = [forward(model, batch.map(itemgetter(slice(count)))) for count in (1, 2)]
        compares = few[1].numel() != few[0].numel() * len(batch.targets[:2])
    except RuntimeError:
        # If the whole batch does not run either, the model has another fault, which this run tells.
        compares = bool(forward(model, batch).numel())
    if compares:
        raise ValueError(
            f"the outputs of {type(model).__name__} for an example depend on the others in its batch, so no example has "
            "a likelihood of its own, and there is no Fisher information; choose another statistic"
        )


def _other_squares(
    model: nn.Module, task: Task, parameters: State, batch: Batch, scores: Float[Tensor, "batch scores numbers"]
) -> Iterator[tuple[str, Tensor]]:
    """Yield squared gradients of parameters that belong to no layer, such as embeddings and norms."""
    if not parameters:
        return
    gradients = GRADIENT_ELEMENTS // sum(p.numel() for p in parameters.values())
    with torch.no_grad():
        for few, some in _parts(batch, scores, gradients):
            yield from _sum_squares(model, task, parameters, few, some).items()


def _parts(
    batch: Batch, scores: Float[Tensor, "batch scores numbers"], gradients: int
) -> Iterator[tuple[Batch, Float[Tensor, "few some numbers"]]]:
    """Split a batch and its label scores into parts of few gradients."""
    most = max(1, min(gradients, MOST_GRADIENTS))
    wide = min(most, scores.shape[1])
    for start in range(0, len(scores), most // wide):
        rows = slice(start, start + most // wide)
        few = batch.map(itemgetter(rows))
        for some in scores[rows].split(wide, 1):
            yield few, some


def _sum_squares(
    model: nn.Module, task: Task, parameters: State, batch: Batch, scores: Float[Tensor, "few some numbers"]
) -> dict[str, Tensor]:
    """Return the squared gradients of every example and score, summed over both."""
    # PyTorch has no rule to run recurrent layers for many examples at once, and would run them far more slowly.
    if not _is_recurrent(model):
        squares = partial(_squares, model, task, parameters)
        try:
            return {n: square.sum(0) for n, square in vmap(squares)(batch.inputs, batch.targets, scores).items()}
        except RuntimeError:
            # As do a model that decides by its inputs, such as one of `transformers` by the attention mask, and operators
            # of which PyTorch's rule for many examples is wrong, such as PReLU with a slope for each unit.
            pass
    return _sum_squares_in_turn(model, task, parameters, batch, scores)


def _sum_squares_in_turn(
    model: nn.Module, task: Task, parameters: State, batch: Batch, scores: Float[Tensor, "few some numbers"]
) -> dict[str, Tensor]:
    """Return the same as `_sum_squares`, example by example."""
    sums = {name: torch.zeros_like(widen(tensor)) for name, tensor in parameters.items()}
    for row, some in enumerate(scores):
        # The scores are zero where the mask is false, so the mask itself is not needed.
        example = replace(batch, mask=None).map(itemgetter(slice(row, row + 1)))
        # Not by functorch, which refuses an `autograd.Function` of the old kind, such as BLOOM's GELU.
        with torch.enable_grad():
            learnt = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
            outputs = task.arrange(forward(model, example, learnt))
        for score in some:
            gradients = torch.autograd.grad(
                outputs, list(learnt.values()), score.to(outputs), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(learnt, gradients, strict=True):
                if gradient is not None:
                    sums[name] += widen(gradient).square()
    return sums


def _squares(
    model: nn.Module,
    task: Task,
    parameters: State,
    inputs: Inputs,
    target: Tensor,
    scores: Float[Tensor, "some numbers"],
) -> dict[str, Tensor]:
    """Return the squared gradients of one example, summed over its scores."""
    example = Batch(inputs, target).map(lambda tensor: tensor.unsqueeze(0))

    # The forward pass does not depend on the score, so it runs once for all of them.
    gradients = vmap(grad(partial(_weighted_outputs, model, task, example)), in_dims=(None, 0))(parameters, scores)
    # Squares of half-precision numbers would underflow.
    return {name: widen(gradient).square().sum(0) for name, gradient in gradients.items()}


def _weighted_outputs(model: nn.Module, task: Task, example: Batch, parameters: State, score: Tensor) -> Tensor:
    return task.arrange(forward(model, example, parameters)) @ score
