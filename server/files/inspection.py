"""Counts of the tensors that a stored model's symmetry touches, space by space, and of those it leaves alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Column, Table
from torch import Tensor

from fedbasin.server.files.stored_symmetry import SymmetricModel, in_stored_names
from fedbasin.server.report.charts.text import size
from fedbasin.strategies.symmetry.coverage import coverage, touched_entries
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry

# Names in a line, so that it stays readable where hundreds of tensors are untouched; JSON has them all.
_MOST_NAMES = 8


@dataclass(frozen=True)
class SpaceRow:
    """A space and its part of a model.

    Attributes:
        space: name of the space.
        group: its group in the notation.
        width: units of its first role.
        tensors: names of the tensors that it touches.
        share: share of the model's parameters, 0 to 1; a matrix between two spaces counts for both.
    """

    space: str
    group: str
    width: int
    tensors: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Inspection:
    """A stored model and its symmetry in numbers.

    Attributes:
        model: path of the file or folder.
        architecture: class of the module that was executed, or None if the symmetry was given by hand.
        files: number of files with tensors.
        tensors: number of tensors.
        parameters: number of their entries.
        bytes: size of the tensors.
        dtypes: number of tensors of each dtype.
        tied: names that the files leave out, each with the name under which its tensor is stored.
        ties_embeddings: True if the config says that the head is the table of the input.
        coverage: share of the entries that the whole symmetry moves, 0 to 1.
        kinds: the same share for each kind of group.
        untouched: tensors that no space of the whole symmetry touches.
        unread: stored tensors that the module does not load, and that stay as they are.
        stops: one sentence for each part that does not move.
        spaces: the chosen spaces.
    """

    model: str
    architecture: str | None
    files: int
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    tied: dict[str, str]
    ties_embeddings: bool
    coverage: float
    kinds: dict[str, float]
    untouched: tuple[str, ...]
    unread: tuple[str, ...]
    stops: tuple[str, ...]
    spaces: tuple[SpaceRow, ...]


def inspect_model(model: SymmetricModel, part: Symmetry) -> Inspection:
    """Count the tensors and parameters of a model and of its spaces.

    Args:
        model: the stored model with its whole symmetry, which decides which tensors are untouched.
        part: the spaces to list.
    """
    stored = model.stored
    shapes = stored.shapes()
    total = sum(tensor.numel() for tensor in shapes.values())
    tensors = shapes
    whole, part_in_files = (in_stored_names(symmetry, model.layout) for symmetry in (model.symmetry, part))
    if whole is None or part_in_files is None:
        # Tensors that are stored in pieces are counted as the module has them, and tied ones once.
        once = {pieces[0].stored: name for name, pieces in reversed([*model.layout.pieces.items()])}
        tensors = {name: model.state[name].to("meta") for name in once.values()}
        whole, part_in_files = model.symmetry, part
    measured = coverage(whole, tensors)
    return Inspection(
        model=str(stored.path),
        architecture=model.executable.kind if model.executable else None,
        files=len(stored.shards),
        tensors=len(shapes),
        parameters=total,
        bytes=sum(tensor.nbytes for tensor in shapes.values()),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in shapes.values())),
        tied=stored.ties,
        ties_embeddings=bool(stored.config.get("tie_word_embeddings", False)),
        coverage=measured.fraction,
        kinds=dict(measured.by_kind),
        untouched=measured.uncovered,
        unread=model.executable.layout.unread if model.executable and not model.by_hand else (),
        stops=model.stops,
        spaces=tuple(_count_space(space, tensors, total) for space in part_in_files.spaces),
    )


def _count_space(space: Space, shapes: Mapping[str, Tensor], total: int) -> SpaceRow:
    touched = touched_entries(space.axes, shapes)
    share = sum(touched.values()) / max(total, 1)
    return SpaceRow(space.name, str(space.group), space.width(), tuple(touched), share)


def render_inspection(inspection: Inspection) -> Group:
    """Return a table of the spaces, with lines on the whole model below it."""
    words = (Column(name, overflow="fold") for name in ("space", "group"))
    numbers = (Column(name, justify="right") for name in ("width", "tensors", "share"))
    table = Table(*words, *numbers, box=None, pad_edge=False)
    for row in inspection.spaces:
        counts = (str(row.width), str(len(row.tensors)), f"{row.share:.1%}")
        table.add_row(row.space, row.group, *counts)
    return Group(table, "", *_summary_lines(inspection))


def _summary_lines(inspection: Inspection) -> list[str]:
    dtypes = ", ".join(f"{count} {name}" for name, count in inspection.dtypes.items())
    ties = [f"{name} is {stored}" for name, stored in inspection.tied.items()]
    head = "the head is the table of the input, as the config says: it moves as one"
    files = "1 file" if inspection.files == 1 else f"{inspection.files} files"
    return [
        f"{inspection.parameters:,} parameters in {inspection.tensors} tensors ({dtypes}), "
        f"{size(inspection.bytes)} in {files}",
        *([f"stored once: {_join(ties)}"] if ties else []),
        *([head] if inspection.ties_embeddings else []),
        *(f"{kind} moves {share:.1%}" for kind, share in inspection.kinds.items()),
        *([f"not read by {inspection.architecture}: {_join(inspection.unread)}"] if inspection.unread else []),
        f"touched by no space: {_join(inspection.untouched) or 'nothing'}",
        *inspection.stops[:_MOST_NAMES],
    ]


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
