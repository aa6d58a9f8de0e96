"""What an anchor shares with a model: the anchor is read as the model's architecture, by the library's rules.

A base model and its fine-tuned copy, models with different heads or vocabularies, and files of different versions of
a library are compared on the tensors that both have. Of a table of tokens or positions that is the rows of both.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedbasin.server.files.library.executable_model import ExecutableModel, from_folder
from fedbasin.server.files.library.library_model import layout_in
from fedbasin.server.files.library.tensor_layout import ModuleState
from fedbasin.server.files.reading import ModelError, StoredModel, few, read_json
from fedbasin.server.files.stored_symmetry import SymmetricModel, derived
from fedbasin.strategies.symmetry.symmetry import Axis, Symmetry, SymmetryError
from fedbasin.strategies.tensors.state import State

# Keys of a config that change the lengths of tables whose rows correspond all the same.
_LENGTHS = ("vocab_size", "max_position_embeddings", "n_positions")

# Keys of a config that say nothing of which transforms keep the function.
_HARMLESS = {
    *_LENGTHS,
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "num_labels", "id2label"),
    *("label2id", "problem_type", "use_cache", "n_ctx", "finetuning_task", "task_specific_params"),
    *("tie_word_embeddings", "initializer_range", "classifier_dropout", "gradient_checkpointing", "bos_token_id"),
    *("eos_token_id", "pad_token_id", "decoder_start_token_id", "output_past", "summary_first_dropout"),
    # A stored encoder says that it is no encoder-decoder.
    "is_encoder_decoder",
}


@dataclass(frozen=True, eq=False)
class SharedTensors:
    """The states of an anchor and a model on what they share.

    Attributes:
        symmetry: the symmetry of the model; spaces of which nothing is shared are left out.
        anchor: the anchor's tensors, in the names of the symmetry.
        model: the model's tensors.
        apart: names of the model's tensors that the anchor lacks, or has in another shape.
    """

    symmetry: Symmetry
    anchor: State
    model: State
    apart: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Rows:
    """Entries along one dimension of the anchor's and the model's tensor that correspond to each other."""

    dim: int
    anchor: Tensor
    model: Tensor


def shared_tensors(anchor: StoredModel, model: SymmetricModel, symmetry: Symmetry) -> SharedTensors:
    """Return what an anchor shares with a model.

    Args:
        anchor: the anchor.
        model: the model with its whole symmetry.
        symmetry: the part of the symmetry that is aligned.

    Raises:
        ModelError: the two are of different architectures, or share nothing that can be aligned.
    """
    executable = model.executable
    if model.by_hand or executable is None or executable.architecture is None:
        require_equal_shapes(anchor, model.stored)
        return SharedTensors(symmetry, ModuleState(model.layout, anchor), model.state)
    _require_equal_structure(anchor, model, executable)
    config: Any = deepcopy(executable.config)
    for key in _LENGTHS:
        if isinstance(anchor.config.get(key), int) and hasattr(config, key):
            setattr(config, key, anchor.config[key])
    _, layout = layout_in(executable.architecture, config, anchor.shapes(), where=anchor.path, other_sizes=True)
    states = ModuleState(layout, anchor), model.state
    tokens = _tokens(anchor, model.stored)
    rows: dict[str, Rows | None] = {}
    for name in states[1]:
        # A tied tensor counts once.
        if name in states[0] and name not in model.layout.twins:
            moved = {axis.dim for space in model.symmetry.spaces for axis in space.axes if axis.tensor == name}
            _add_rows(rows, name, states[0][name].shape, states[1][name].shape, moved, tokens)
    part = _on_shared(symmetry, rows.keys())
    if not part.spaces:
        raise ModelError(
            f"{model.stored.path} and {anchor.path} share no tensors that can be aligned; align models of one "
            "architecture and size"
        )
    apart = tuple(name for name in states[1] if name not in rows and name not in model.layout.twins)
    return SharedTensors(part, _RowsState(states[0], rows, "anchor"), _RowsState(states[1], rows, "model"), apart)


def _add_rows(
    rows: dict[str, Rows | None],
    name: str,
    anchor: torch.Size,
    model: torch.Size,
    moved: set[int],
    tokens: tuple[Tensor, Tensor] | None,
) -> None:
    """Note which rows of a tensor correspond; nothing is noted if the two tensors do not."""
    differ = [dim for dim, lengths in enumerate(zip(anchor, model, strict=False)) if lengths[0] != lengths[1]]
    if len(anchor) != len(model) or len(differ) > 1 or moved & set(differ):
        return
    tables = {dim for dim in range(len(model)) if dim not in moved and _is_table(anchor[dim], model[dim], tokens)}
    if tokens is not None and tables and set(differ) <= tables:
        rows[name] = Rows(min(tables), *tokens)
    elif differ:
        leading = torch.arange(min(anchor[differ[0]], model[differ[0]]))
        rows[name] = Rows(differ[0], leading, leading)
    else:
        rows[name] = None


def _is_table(anchor: int, model: int, tokens: tuple[Tensor, Tensor] | None) -> bool:
    """Return whether a dimension of these lengths numbers the tokens of the two vocabularies."""
    if tokens is None:
        return False
    # Tables are padded to round lengths.
    lengths = [int(rows.max()) + 1 for rows in tokens]
    return all(least <= length < 2 * least + 128 for least, length in zip(lengths, (anchor, model), strict=True))


class _RowsState(Mapping[str, Tensor]):
    """A state of the shared tensors, of which only the rows that correspond are seen."""

    def __init__(self, state: State, rows: Mapping[str, Rows | None], side: str) -> None:
        self._state = state
        self._rows = rows
        self._side = side

    def __getitem__(self, name: str) -> Tensor:
        rows = self._rows[name]
        tensor = self._state[name]
        return tensor if rows is None else tensor.index_select(rows.dim, getattr(rows, self._side))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _tokens(anchor: StoredModel, model: StoredModel) -> tuple[Tensor, Tensor] | None:
    """Return the rows of the tokens that both vocabularies have, or None if the rows correspond as they are."""
    model_tokens, anchor_tokens = (_vocabulary(stored) for stored in (model, anchor))
    common = [token for token in model_tokens if token in anchor_tokens]
    if not common or all(model_tokens[token] == anchor_tokens[token] for token in common):
        return None
    return torch.tensor([anchor_tokens[token] for token in common]), torch.tensor(
        [model_tokens[token] for token in common]
    )


def _vocabulary(stored: StoredModel) -> dict[str, int]:
    """Return the tokens of a folder's tokenizer.json with their rows; empty if there is none of a known form."""
    path = stored.path / "tokenizer.json"
    if not stored.is_folder or not path.is_file():
        return {}
    content = read_json(path)
    vocabulary = (content.get("model") or {}).get("vocab")
    if isinstance(vocabulary, list):
        vocabulary = {entry[0]: row for row, entry in enumerate(vocabulary) if isinstance(entry, list)}
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    return {**(vocabulary if isinstance(vocabulary, dict) else {}), **added}


def _on_shared(symmetry: Symmetry, shared: Mapping[str, object] | Any) -> Symmetry:
    """Return the spaces that can be matched on shared tensors; what is not shared moves with them, without a score."""

    def on_shared(axis: Axis) -> Axis:
        return axis if axis.tensor in shared else replace(axis, scored=False)

    spaces = tuple(replace(space, axes=tuple(map(on_shared, space.axes))) for space in symmetry.spaces)
    return replace(
        symmetry, spaces=tuple(s for s in spaces if {axis.role for axis in s.scored} == set(range(len(s.group.sizes))))
    )


def _require_equal_structure(anchor: StoredModel, model: SymmetricModel, executable: ExecutableModel) -> None:
    """Refuse an anchor whose config gives another symmetry on the shared tensors.

    Raises:
        ModelError: names the keys in which the configs differ.
    """
    keys = (anchor.config.keys() | model.stored.config.keys()) - _HARMLESS
    differ = sorted(key for key in keys if anchor.config.get(key) != model.stored.config.get(key))
    if not anchor.config or not differ:
        return
    # As the model's architecture, because a base and a fine-tuned model differ in their heads.
    config = {**anchor.config, "architectures": [executable.kind]}
    refusal = ModelError(
        f"{model.stored.path} and {anchor.path} are of two architectures: their configs differ in {few(differ)}; align "
        "only models of one architecture"
    )
    try:
        structure = derived(anchor, from_folder(anchor, config, anchor.path), model.source)
    except (ModelError, SymmetryError) as error:
        raise refusal from error
    groups = _groups(model.symmetry)
    if any(groups.get(name, group) != group for name, group in _groups(structure.symmetry).items()):
        raise refusal


def _groups(symmetry: Symmetry) -> dict[Axis, str]:
    return {axis: str(space.group) for space in symmetry.spaces for axis in space.axes}


def require_equal_shapes(anchor: StoredModel, model: StoredModel) -> None:
    """Refuse two models that do not have the same tensors.

    Raises:
        ModelError: names the tensors that differ in name or shape.
    """
    for holder, lacking in ((anchor, model), (model, anchor)):
        if missing := [name for name in holder if name not in lacking.files]:
            raise ModelError(
                f"{lacking.path} has no tensor {few(missing)}, but {holder.path} has; align only models of one "
                "architecture that were saved in the same way"
            )
    shapes = model.shapes()
    differ = [
        f"{name} {tuple(shapes[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in anchor.shapes().items()
        if shapes[name].shape != tensor.shape
    ]
    if differ:
        raise ModelError(
            f"{model.path} has other shapes than {anchor.path}: {few(differ)}; align only models of one architecture"
        )
