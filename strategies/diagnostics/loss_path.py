"""The loss of a model along the straight path between two states.

    L(t) = sum over examples of the loss of the model (1 - t) anchor + t end

Source: linear mode connectivity, Frankle et al. 2020, arXiv 1912.05671. BatchNorm's running statistics are
interpolated like every other tensor and not measured again at each point, so a network that has them shows a
higher barrier than it would after recalibration (Jordan et al. 2023, arXiv 2211.08403).
"""

import math
from collections.abc import Iterator

from torch import nn

from fedbasin.strategies.diagnostics.barrier import Barriers, Path, barriers
from fedbasin.strategies.diagnostics.evaluation import bind, evaluate
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batches
from fedbasin.strategies.tensors.state import State, interpolate


def path_losses(
    model: nn.Module, anchor: State, end: State, batches: Batches, points: int, task: Task | str | None = None
) -> Path:
    """Evaluate a model at equally spaced points of the straight line between two states.

    Tensors that are not floating, such as BatchNorm's counters, are those of `end`. The data is read once for each
    point.

    Args:
        model: gives the architecture; it is left as it was.
        anchor: the state at t = 0.
        end: the state at t = 1.
        batches: `(inputs, targets)`, in a list or a DataLoader that gives the same each time.
        points: number of points, at least 2.
        task: the task or its name; None takes the one that the first batch shows.

    Raises:
        ValueError: Fewer than two points, or data that is not the same each time it is read; see also `evaluate`.
        TypeError: The batches can be read only once.
    """
    if points < 2:
        raise ValueError(f"a path of {points} points; ask for at least the two ends")
    if isinstance(batches, Iterator):
        raise TypeError(
            "the batches of a path are read once for each point; pass a list or a DataLoader, not an iterator"
        )
    start_state, end_state = bind(model, anchor), bind(model, end)
    grid = tuple(i / (points - 1) for i in range(points))
    scores = [evaluate(model, interpolate(start_state, end_state, t), batches, task) for t in grid]
    loss, correct, examples = zip(*scores, strict=True)
    if len(set(examples)) > 1:
        raise ValueError(
            f"the data held {examples} examples at the points of one path; "
            "pass batches that are the same each time they are read"
        )
    return Path(grid, loss, () if math.isnan(correct[0]) else correct, examples[0])


def barrier(
    model: nn.Module, anchor: State, end: State, batches: Batches, points: int = 11, task: Task | str | None = None
) -> Barriers:
    """Measure how far the loss between two states rises above the straight line between their losses.

    Args:
        model: gives the architecture; it is left as it was.
        anchor: the state at t = 0.
        end: the state at t = 1.
        batches: `(inputs, targets)`, in a list or a DataLoader that gives the same each time.
        points: number of points of the path, at least 2.
        task: the task or its name, as `regression`; None takes the one that the first batch shows.

    Returns:
        The barriers of the path: `linear` is the largest rise of the mean loss above the chord.

    Raises:
        ValueError: fewer than two points, or data that is not the same each time it is read.
        TypeError: the batches can be read only once.
    """
    return barriers(path_losses(model, anchor, end, batches, points, task))
