"""The plan of a merge: every tensor of the result with its sources and parameters, made from headers alone."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedbasin.server.files.merge.layer_names import depth_of, fraction, is_embedding, layer_counts, layer_of
from fedbasin.server.files.merge.parameters import TensorPosition, rule_arguments
from fedbasin.server.files.merge.recipe import MergeRecipe, MergeSource, Parameters, Slice
from fedbasin.server.files.reading import ModelError, few
from fedbasin.strategies.fusion.rules.merging_rules import Rule
from fedbasin.strategies.tensors.state import State

Shapes = Mapping[Path, State]


@dataclass(frozen=True)
class TensorOrigin:
    """A tensor of a model: the model's path and the tensor's name in it."""

    model: Path
    name: str


class LayerOrigin(NamedTuple):
    """A layer of a model."""

    model: Path
    layer: int


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: its dtype in the files.
        rule: the rule that merges it; None copies the first source, as for integers.
        anchor: the anchor's tensor, if the rule has one.
        sources: the models' tensors.
        weights: weight of each source.
        arguments: keyword arguments of the rule.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rule: Rule | None
    anchor: TensorOrigin | None
    sources: tuple[TensorOrigin, ...]
    weights: tuple[float, ...]
    arguments: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the files."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def origins(self) -> tuple[TensorOrigin, ...]:
        """The tensors that are read, the anchor's first."""
        return self.sources if self.anchor is None else (self.anchor, *self.sources)


@dataclass(frozen=True)
class _Row:
    """A tensor of the result, the part of the recipe it comes from, and its name in each source."""

    place: TensorPosition
    part: Slice
    names: tuple[str, ...]
    anchor_name: str


def plan_merge(recipe: MergeRecipe, shapes: Shapes) -> list[PlannedTensor]:
    """Plan a merge.

    Args:
        recipe: the merge.
        shapes: names, shapes and dtypes of each model's tensors, as tensors without values.

    Raises:
        ModelError: names what makes the merge impossible, and the remedy.
    """
    for part in recipe.parts:
        _check_models(recipe, part)
    rows = _whole_rows(recipe, shapes) if recipe.models else _sliced_rows(recipe, shapes)
    return [_plan_tensor(recipe, row, shapes) for row in rows]


def layer_sources(plan: Sequence[PlannedTensor]) -> list[LayerOrigin]:
    """Return the layer that each layer of the result takes after: that of its first model, in the order of layers."""
    origins: dict[int, LayerOrigin] = {}
    for tensor in plan:
        parts, source = layer_of(tensor.name), layer_of(tensor.sources[0].name)
        if parts is not None and source is not None:
            origins.setdefault(parts.layer, LayerOrigin(tensor.sources[0].model, source.layer))
    return [origins[layer] for layer in sorted(origins)]


def _anchor_of(recipe: MergeRecipe, part: Slice) -> Path | None:
    return None if recipe.rule.anchor == "none" else part.base_model or recipe.base_model


def _models_of(recipe: MergeRecipe, part: Slice) -> list[MergeSource]:
    """Return the sources beside the anchor."""
    return [source for source in part.sources if source.model != _anchor_of(recipe, part)]


def _check_models(recipe: MergeRecipe, part: Slice) -> None:
    rule, base = recipe.rule, part.base_model or recipe.base_model
    if rule.anchor == "required" and base is None:
        raise ModelError(f"base_model: {rule.name} needs the model that the others were fine-tuned from; give it")
    if rule.anchor == "none" and base is not None and base not in {source.model for source in part.sources}:
        raise ModelError(
            f"base_model: {rule.name} has no anchor, and {base} is none of its models; add it to them or leave it out"
        )
    count = len(_models_of(recipe, part))
    if count < rule.least or (rule.most is not None and count > rule.most):
        beside = "" if rule.anchor == "none" else " beside the base model"
        counts = f"{rule.least}" if rule.least == rule.most else f"at least {rule.least}"
        if rule.most is not None and rule.least != rule.most:
            counts = f"{rule.least} to {rule.most}"
        raise ModelError(f"models: {rule.name} takes {counts}{beside}, but there are {count}")


def _whole_rows(recipe: MergeRecipe, shapes: Shapes) -> Iterator[_Row]:
    """Yield the tensors of a merge of whole models, which all have the same names."""
    (part,) = recipe.parts
    for source in part.sources:
        if source.layer_range is not None:
            raise ModelError("layer_range: stands in slices; write slices in place of models")
    reference, *rest = recipe.paths()
    for path in rest:
        for holder, lacking in ((reference, path), (path, reference)):
            if missing := [name for name in shapes[holder] if name not in shapes[lacking]]:
                raise ModelError(
                    f"{lacking} has no tensor {few(missing)}, but {holder} has; merge models of one architecture "
                    "that were saved in the same way"
                )
    counts = layer_counts(shapes[reference])
    for name in shapes[reference]:
        names = (name,) * len(_models_of(recipe, part))
        yield _Row(TensorPosition(name, depth_of(name, counts)), part, names, name)


def _sliced_rows(recipe: MergeRecipe, shapes: Shapes) -> Iterator[_Row]:
    """Yield the tensors of a stack of slices, with the layers numbered anew."""
    parts = recipe.parts
    layer = 0
    for path in recipe.paths():
        _require_one_stack(path, shapes[path])
    for part in parts:
        length = _check_ranges(part, shapes)
        for offset in range(length):
            yield from _layer_rows(recipe, part, shapes, offset, layer, fraction(offset, length))
            layer += 1
    for part, embeddings in ((parts[0], True), (parts[-1], False)):
        models = [source.model for source in _models_of(recipe, part)]
        for name in shapes[models[0]]:
            if layer_of(name) is None and is_embedding(name) == embeddings:
                yield _Row(TensorPosition(name, 0.0), part, (name,) * len(models), name)


def _layer_rows(
    recipe: MergeRecipe, part: Slice, shapes: Shapes, offset: int, layer: int, depth: float
) -> Iterator[_Row]:
    models = _models_of(recipe, part)
    starts = {source.model: (source.layer_range or (0, 0))[0] for source in part.sources}
    anchor = _anchor_of(recipe, part)
    anchor_layer = starts.get(anchor, starts[models[0].model]) + offset if anchor else layer
    start = starts[models[0].model] + offset
    for name in shapes[models[0].model]:
        words = layer_of(name)
        if words is None or words.layer != start:
            continue
        names = tuple(f"{words.stack}{(source.layer_range or (0, 0))[0] + offset}{words.rest}" for source in models)
        place = TensorPosition(f"{words.stack}{layer}{words.rest}", depth)
        yield _Row(place, part, names, f"{words.stack}{anchor_layer}{words.rest}")


def _require_one_stack(path: Path, shapes: State) -> None:
    counts = layer_counts(shapes)
    if len(counts) != 1:
        stacks = ", ".join(sorted(counts)) or "none"
        raise ModelError(f"{path}: slices need a model with one stack of layers; its stacks are {stacks}")


def _check_ranges(part: Slice, shapes: Shapes) -> int:
    """Return the number of layers of a slice."""
    lengths = set()
    for source in part.sources:
        (layers,) = layer_counts(shapes[source.model]).values()
        start, stop = source.layer_range or (0, layers)
        if not 0 <= start < stop <= layers:
            raise ModelError(f"layer_range: [{start}, {stop}] is not within the {layers} layers of {source.model}")
        lengths.add(stop - start)
    if len(lengths) > 1:
        raise ModelError(f"layer_range: the sources of a slice have {sorted(lengths)} layers; give equally many")
    return lengths.pop()


def _plan_tensor(recipe: MergeRecipe, row: _Row, shapes: Shapes) -> PlannedTensor:
    models = _models_of(recipe, row.part)
    anchor = _anchor_of(recipe, row.part)
    sources = tuple(TensorOrigin(source.model, name) for source, name in zip(models, row.names, strict=True))
    origin = None if anchor is None else TensorOrigin(anchor, row.anchor_name)
    reference = _check_tensors(row.place, (origin, *sources) if origin else sources, shapes)
    by_model = [(name, source.parameters) for source, name in zip(models, row.names, strict=True)]
    shared: tuple[Parameters, ...] = (row.part.parameters, recipe.parameters)
    weights, arguments = rule_arguments(recipe.rule, row.place, shared, by_model)
    if recipe.rule.random:
        arguments["seeds"] = [_seed(recipe.seed, number, row.place.name) for number in range(len(models))]
    is_merged = _is_merged(reference.dtype)
    name = recipe.out_dtype or recipe.dtype
    dtype = getattr(torch, name) if name and is_merged else reference.dtype
    rule = recipe.rule if is_merged else None
    return PlannedTensor(
        row.place.name, tuple(reference.shape), dtype, rule, origin, sources, tuple(weights), arguments
    )


def _check_tensors(place: TensorPosition, origins: Sequence[TensorOrigin], shapes: Shapes) -> torch.Tensor:
    """Return the first tensor, once all are known to exist and to fit."""
    tensors = []
    for origin in origins:
        if origin.name not in shapes[origin.model]:
            raise ModelError(f"{origin.model} has no tensor {origin.name!r}, from which {place.name!r} would be merged")
        tensors.append(shapes[origin.model][origin.name])
    reference, *rest = tensors
    for origin, tensor in zip(origins[1:], rest, strict=True):
        if tensor.shape != reference.shape:
            raise ModelError(
                f"{origin.model}: {origin.name!r} has shape {tuple(tensor.shape)}, but in {origins[0].model} "
                f"{tuple(reference.shape)}; merge models of one architecture"
            )
        if _is_merged(tensor.dtype) != _is_merged(reference.dtype):
            raise ModelError(
                f"{origin.model}: {origin.name!r} is {tensor.dtype}, but in {origins[0].model} {reference.dtype}; "
                "convert the models to one dtype first"
            )
    return reference


def _is_merged(dtype: torch.dtype) -> bool:
    """Return True for dtypes that are merged; others are copied, as eight bits count in units that lie elsewhere."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _seed(seed: int, model: int, name: str) -> int:
    """Return a seed that depends on the recipe's seed, the model's place and the tensor."""
    digest = hashlib.sha256(f"{seed} {model} {name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
