"""The picture of a round's barriers: loss and accuracy on the path from the anchor to the clients."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fedbasin.proto.report import PathSums

_AS_TRAINED, _ALIGNED = "#c2410c", "#1d4ed8"


def draw_paths(target: Path, path: PathSums | None) -> None:
    """Draw both curves before and after alignment into a PNG file.

    Raises:
        ValueError: the round evaluated no path.
    """
    if path is None or not path.points:
        raise ValueError("the round has no path; set fedbasin.barrier-points to at least 2")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    curves = (
        (loss, path.loss_before, path.loss_after, "mean loss of the clients' own data (nats)"),
        (accuracy, path.correct_before, path.correct_after, "accuracy on the clients' own data"),
    )
    for axes, as_trained, aligned, label in curves:
        axes.plot(path.points, _means(as_trained, path), "o-", color=_AS_TRAINED, label="as trained")
        axes.plot(path.points, _means(aligned, path), "s-", color=_ALIGNED, label="aligned")
        axes.set_xlabel("anchor (0) to client (1)")
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
    loss.legend(frameon=False)
    figure.suptitle("The straight line from the anchor to each client, summed over clients")
    figure.savefig(target, dpi=120)


def _means(sums: Sequence[float], path: PathSums) -> list[float]:
    return [value / path.examples for value in sums]
