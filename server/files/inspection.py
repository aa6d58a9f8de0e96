"""What a stored model's symmetry touches, site by site, and what it leaves alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from fedbasin.server.files.reading import StoredModel
from fedbasin.server.report.charts.text import size
from fedbasin.strategies.symmetry.symmetry import Site, Symmetry

_SHOWN = 8


@dataclass(frozen=True)
class SiteRow:
    """One site.

    Attributes:
        site: its name.
        group: in the notation.
        width: units of its first leg.
        tensors: names of what it touches.
        share: of the model's parameters, 0 to 1; a matrix between two sites counts for both.
    """

    site: str
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
        untouched: tensors that no site of the whole symmetry touches.
        sites: the sites that were asked for.
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
    sites: tuple[SiteRow, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as a mapping for JSON."""
        return asdict(self)


def inspected(model: StoredModel, whole: Symmetry, meant: Symmetry) -> Inspection:
    """Count; values are not read.

    Args:
        model: the stored model.
        whole: its symmetry, which says what is not touched.
        meant: the sites to list.
    """
    shapes = model.shapes()
    total = sum(tensor.numel() for tensor in shapes.values())
    touched = {member.tensor for site in whole.sites for member in site.members}
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
        sites=tuple(_row(site, shapes, total) for site in meant.sites),
    )


def _row(site: Site, shapes: Mapping[str, Tensor], total: int) -> SiteRow:
    entries: Counter[str] = Counter()
    for member in site.members:
        entries[member.tensor] += member.view(shapes[member.tensor]).numel()
    # A tensor with the site on both axes is touched once.
    own = sum(min(count, shapes[name].numel()) for name, count in entries.items())
    return SiteRow(site.name, str(site.group), site.width(), tuple(entries), own / max(total, 1))


def shown(found: Inspection) -> Group:
    """The same for the eye."""
    made = Table(box=None, pad_edge=False)
    made.add_column("site", overflow="fold")
    made.add_column("group", overflow="fold")
    for name in ("width", "tensors", "share"):
        made.add_column(name, justify="right")
    for row in found.sites:
        made.add_row(row.site, row.group, str(row.width), str(len(row.tensors)), f"{row.share:.1%}")
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
        f"touched by no site: {_listed(list(found.untouched)) or 'nothing'}",
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
