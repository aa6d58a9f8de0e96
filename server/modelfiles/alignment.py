"""One stored model moved into another's basin, and a saved transform applied again."""

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from fedbasin.server.modelfiles.reading import ModelError, StoredModel, few
from fedbasin.server.report.text import number
from fedbasin.strategies.alignment.certificate import identity_radii
from fedbasin.strategies.alignment.matching import Alignment, AlignmentReport, match_weights
from fedbasin.strategies.chunks import is_finite, one_core
from fedbasin.strategies.symmetry.sites import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.transform import Transform

# What a config says of its own making, and not of the architecture.
_INCIDENTAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def align(
    anchor: StoredModel, model: StoredModel, symmetry: Symmetry, *, certify: bool
) -> Alignment:
    """Move `model` into the basin of `anchor`.

    Args:
        anchor: the model that stays.
        model: the model that is moved.
        symmetry: of both.
        certify: look first for sites where the identity is provably the best; costs memory.

    Raises:
        ModelError: an entry is infinite or not a number.
    """
    for one in (anchor, model):
        _refuse_not_finite(one)
    radii = identity_radii(symmetry, anchor) if certify else None
    return match_weights(symmetry, anchor, model, radii)


def refuse_other(anchor: StoredModel, model: StoredModel) -> None:
    """Refuse two models that do not have the same tensors.

    Raises:
        ModelError: naming those that differ in name or shape.
    """
    _refuse_missing(anchor, model)
    _refuse_missing(model, anchor)
    ours, theirs = anchor.shapes(), model.shapes()
    differ = [
        f"{name} {tuple(theirs[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if theirs[name].shape != tensor.shape
    ]
    if differ:
        raise ModelError(
            f"{model.path} has other shapes than {anchor.path}: {few(differ)}; they are two architectures"
        )


def refuse_other_config(
    anchor: StoredModel, model: StoredModel, ours: Symmetry, theirs: Symmetry
) -> None:
    """Refuse two models whose configs give two symmetries.

    Raises:
        ModelError: naming what the configs say differently.
    """
    if ours == theirs:
        return
    keys = (anchor.config.keys() | model.config.keys()) - _INCIDENTAL
    differ = sorted(key for key in keys if anchor.config.get(key) != model.config.get(key))
    raise ModelError(
        f"{model.path} and {anchor.path} are of two architectures: their configs differ in "
        f"{few(differ) if differ else 'what their files hold'}"
    )


def applied(transform: Transform, model: StoredModel) -> dict[str, torch.Tensor]:
    """A stored model with a transform applied.

    Raises:
        ModelError: the transform was made for another model.
    """
    try:
        transform.symmetry.check(model.shapes())
    except SymmetryError as error:
        raise ModelError(f"{model.path}: {error}") from error
    return transform.act(model)


def as_json(report: AlignmentReport) -> dict[str, Any]:
    """The report as a mapping for JSON."""
    return asdict(report)


def shown(report: AlignmentReport) -> Group:
    """The report for the eye."""
    made = Table(box=None, pad_edge=False)
    made.add_column("site", overflow="fold")
    for name in ("moved", "gain"):
        made.add_column(name, justify="right")
    made.add_column("certified")
    for site in report.sites:
        made.add_row(
            site.site, number(site.moved), number(site.gain), "yes" if site.certified else ""
        )
    before, after = report.distance_before, report.distance_after
    sweeps = "1 sweep" if report.sweeps == 1 else f"{report.sweeps} sweeps"
    return Group(made, "", f"distance to the anchor {before:.6g} → {after:.6g} in {sweeps}")


def _refuse_missing(one: StoredModel, other: StoredModel) -> None:
    if missing := [name for name in one if name not in other.files]:
        raise ModelError(
            f"{other.path} has no tensor {few(missing)}, and {one.path} has; only models of one architecture, "
            "saved alike, can be aligned"
        )


def _refuse_not_finite(model: StoredModel) -> None:
    with one_core():
        for name in model:
            if not is_finite(model[name]):
                raise ModelError(
                    f"{model.path}: {name!r} has entries that are infinite or not a number; it cannot be aligned"
                )
