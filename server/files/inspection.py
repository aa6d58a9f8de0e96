"""What a stored model's symmetry touches, space by space, and what it leaves alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from fedbasin.server.files.reading import StoredModel
from fedbasin.server.report.charts.text import size
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry

_SHOWN = 8


@dataclass(frozen=True)
class SpaceRow:
    """One space.

    Attributes:
        space: its name.
        group: in the notation.
        width: units of its first role.
        tensors: names of what it touches.
        share: of the model's parameters, 0 to 1; a matrix between two spaces counts for both.
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
        files: number of files with tensors.
        tensors: number of tensors.
        parameters: number of their entries.
        bytes: their size.
        dtypes: number of tensors of each dtype.
        tied: names that are left out, with the name under which the tensor is stored.
        ties_embeddings: whether the config says that the head is the input's table.
        untouched: tensors that no space of the whole symmetry touches.
        spaces: the spaces that were asked for.
    """

    model: str
    files: int
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    tied: dict[str, str]
    ties_embeddings: bool
    untouched: tuple[str, ...]
    spaces: tuple[SpaceRow, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as a mapping for JSON."""
        return asdict(self)


def inspected(model: StoredModel, whole: Symmetry, meant: Symmetry) -> Inspection:
    """Count; values are not read.

    Args:
        model: the stored model.
        whole: its symmetry, which says what is not touched.
        meant: the spaces to list.
    """
    shapes = model.shapes()
    total = sum(tensor.numel() for tensor in shapes.values())
    touched = {axis.tensor for space in whole.spaces for axis in space.axes}
    return Inspection(
        model=str(model.path),
        files=len(model.shards),
        tensors=len(shapes),
        parameters=total,
        bytes=sum(tensor.nbytes for tensor in shapes.values()),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in shapes.values())),
        tied=model.ties,
        ties_embeddings=bool(model.config.get("tie_word_embeddings", False)),
        untouched=tuple(name for name in shapes if name not in touched),
        spaces=tuple(_row(space, shapes, total) for space in meant.spaces),
    )


def _row(space: Space, shapes: Mapping[str, Tensor], total: int) -> SpaceRow:
    entries: Counter[str] = Counter()
    for axis in space.axes:
        entries[axis.tensor] += axis.view(shapes[axis.tensor]).numel()
    # A tensor with the space on both axes is touched once.
    own = sum(min(count, shapes[name].numel()) for name, count in entries.items())
    return SpaceRow(
        space.name, str(space.group), space.width(), tuple(entries), own / max(total, 1)
    )


def shown(found: Inspection) -> Group:
    """The same for the eye."""
    made = Table(box=None, pad_edge=False)
    made.add_column("space", overflow="fold")
    made.add_column("group", overflow="fold")
    for name in ("width", "tensors", "share"):
        made.add_column(name, justify="right")
    for row in found.spaces:
        made.add_row(
            row.space, row.group, str(row.width), str(len(row.tensors)), f"{row.share:.1%}"
        )
    return Group(made, "", *_lines(found))


def _lines(found: Inspection) -> list[str]:
    dtypes = ", ".join(f"{count} {name}" for name, count in found.dtypes.items())
    tied = [f"{name} is {kept}" for name, kept in found.tied.items()]
    head = "the head is the table of the input, as the config says: it moves as one"
    files = "1 file" if found.files == 1 else f"{found.files} files"
    return [
        f"{found.parameters:,} parameters in {found.tensors} tensors ({dtypes}), {size(found.bytes)} in {files}",
        *([f"stored once: {_listed(tied)}"] if tied else []),
        *([head] if found.ties_embeddings else []),
        f"touched by no space: {_listed(list(found.untouched)) or 'nothing'}",
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
