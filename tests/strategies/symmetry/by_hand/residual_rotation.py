"""Transformers whose residual stream rotates: O(d-1) between LayerNorms, O(d) between root mean square norms.

Once the weights of the norms are folded into the layers that read them (`folding.py`), every writer of the residual
stream may rotate it and every reader rotate it back: `(x - mean) / sigma` commutes with the maps of O(d) that keep
the vector of ones, `x / rms(x)` with all of O(d). For models from independent initialisations these rotations decide
how well they match (Theus et al. 2025, arXiv 2506.22712).

The symmetries here change the parametrisation: a model that was matched by one has norms of weight 1, and so has the
global model made of such models. Its function, and the names and shapes of its tensors, stay the same.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from fedbasin.strategies.symmetry.folding import Fold, Reader
from fedbasin.strategies.symmetry.groups.centred import Centred
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError
from fedbasin.strategies.tensors.state import State
from tests.strategies.symmetry.by_hand.families import family
from tests.strategies.symmetry.by_hand.prenorm_transformer import Names, preln_transformer

_RESIDUAL = "residual"


def rotating_residual_transformer(state: State, heads: int, names: Names | None = None) -> Symmetry:
    """Return the symmetry of `preln_transformer` with O(d-1) on the residual stream, and the folds it needs.

    Args:
        state: tensors of the model.
        heads: number of attention heads of a block.
        names: names of the model's parts.

    Raises:
        SymmetryError: a tensor is missing or has another shape, or a norm cannot be folded.
    """
    names = names or Names()
    folds = tuple(_folds_of(names, state))
    return rotate_residual(preln_transformer(state, heads, names), folds, state)


def rotating_residual_family(model_type: str, config: object, state: State) -> Symmetry:
    """Return the symmetry of a model of the `transformers` library with a rotating residual stream.

    Args:
        model_type: `config.model_type` of the model: gpt2, gpt_neox, vit, llama, mistral, qwen2, qwen3 or mixtral.
        config: configuration of the model, or its `to_dict()`.
        state: the model's `state_dict()`, in which tied tensors share their memory.

    Raises:
        SymmetryError: the type is not one of these, a norm cannot be folded, or the model has no head.
    """
    if model_type not in _READERS:
        raise SymmetryError(
            f"no rotating residual stream for {model_type!r}; known are {', '.join(sorted(_READERS))}. A norm "
            "after the sum keeps its weight on the residual stream: use `family`, which permutes the stream"
        )
    folds = tuple(_matching_folds(_READERS[model_type], state))
    return rotate_residual(family(model_type, config, state), folds, state)


def rotate_residual(symmetry: Symmetry, folds: tuple[Fold, ...], state: State) -> Symmetry:
    """Replace the permutations, or signed permutations, of the residual stream by all rotations.

    Args:
        symmetry: a symmetry with a space `residual`, of S(d) between LayerNorms or of signed permutations between root
            mean square norms.
        folds: every norm that reads the residual stream.
        state: tensors of the model.

    Raises:
        SymmetryError: there is no such space, a norm on the stream is not folded, or a norm cannot be folded.
    """
    stream = next((space for space in symmetry.spaces if space.name == _RESIDUAL), None)
    if stream is None:
        raise SymmetryError(
            "the symmetry has no space 'residual' to rotate: a model without a head returns its residual stream; "
            "match the model with its head"
        )
    rotating = replace(stream, group=_rotations(stream), axes=_axes(stream, folds, state))
    spaces = tuple(rotating if space is stream else space for space in symmetry.spaces)
    result = replace(symmetry, spaces=spaces, folds=folds)
    # Folds read the state too: a reader that is tied to another tensor is refused here.
    result.check(state)
    return result


def _rotations(stream: Space) -> Group:
    # LayerNorm subtracts the mean, which is why its family has permutations without signs.
    width = stream.width()
    return Centred(width) if stream.group.is_permutation else Orthogonal(width)


def _axes(stream: Space, folds: Iterable[Fold], state: State) -> tuple[Axis, ...]:
    """Return the axes of the stream without the weights of folded norms; refuse any norm that is not folded."""
    folded = {fold.weight for fold in folds}
    axes = tuple(axis for axis in stream.axes if axis.tensor not in folded)
    tensors = {axis.tensor for axis in axes}
    norms = {axis.tensor.removesuffix(".bias") for axis in stream.axes}
    scales = [f"{norm}.weight" for norm in norms if f"{norm}.weight" in tensors]
    unfolded = sorted(
        [name for name in scales if len(state[name].shape) == 1] + [axis.tensor for axis in axes if axis.role]
    )
    if unfolded:
        raise SymmetryError(
            f"{unfolded[0]} scales entries of the residual stream and is not folded; name the layers that read "
            "the norm, or leave the stream to permutations"
        )
    return axes


def _folds_of(names: Names, state: State) -> Iterator[Fold]:
    block = 0
    while f"{names.attention_norm.format(block=block)}.weight" in state:
        attention = (names.query, names.key, names.value)
        yield _fold(names.attention_norm, attention, block)
        yield _fold(names.mlp_norm, (names.up,), block)
        block += 1
        if "{block}" not in names.attention_norm:
            break
    if names.head is None:
        raise SymmetryError(
            "a model without a head returns its residual stream, which must not rotate then; name the head in Names"
        )
    yield _fold(names.final_norm, (names.head,), 0)


def _fold(norm: str, readers: Iterable[str], block: int) -> Fold:
    weights = (f"{reader.format(block=block)}.weight" for reader in readers)
    return Fold(norm.format(block=block), tuple(Reader(weight, 1) for weight in weights))


_ROTARY_LINE = {
    r"(.*layers\.\d+)\.input_layernorm": tuple(rf"\1.self_attn.{part}_proj.weight[1]" for part in "qkv"),
    r"(.*layers\.\d+)\.post_attention_layernorm": (
        *(rf"\1.mlp.{part}_proj.weight[1]" for part in ("gate", "up")),
        *(r"\1.mlp.gate.weight[1]", r"\1.mlp.experts.gate_up_proj[2]"),
    ),
    r"(?:model\.)?norm": ("lm_head.weight[1]", "score.weight[1]"),
}

# For each norm that reads the residual stream the layers that read the norm, if the model has them.
# The axis is that of the stream: 0 of a `Conv1D`, 2 of stacked experts.
_READERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gpt2": {
        r"(.*h\.\d+)\.ln_1": (r"\1.attn.c_attn.weight[0]",),
        r"(.*h\.\d+)\.ln_2": (r"\1.mlp.c_fc.weight[0]",),
        r".*ln_f": ("lm_head.weight[1]", "score.weight[1]"),
    },
    "gpt_neox": {
        r"(.*layers\.\d+)\.input_layernorm": (r"\1.attention.query_key_value.weight[1]",),
        r"(.*layers\.\d+)\.post_attention_layernorm": (r"\1.mlp.dense_h_to_4h.weight[1]",),
        r".*final_layer_norm": tuple(f"{head}.weight[1]" for head in ("embed_out", "lm_head", "score")),
    },
    "vit": {
        r"(.*layers\.\d+)\.layernorm_before": tuple(rf"\1.attention.{part}_proj.weight[1]" for part in "qkv"),
        r"(.*layers\.\d+)\.layernorm_after": (r"\1.mlp.fc1.weight[1]",),
        r"(?:vit\.)?layernorm": ("classifier.weight[1]",),
    },
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3"), _ROTARY_LINE),
}


def _matching_folds(patterns: Mapping[str, tuple[str, ...]], state: State) -> Iterator[Fold]:
    for tensor in state:
        norm = tensor.removesuffix(".weight")
        for pattern, readers in patterns.items():
            match = re.fullmatch(pattern, norm)
            if match and norm != tensor:
                yield Fold(norm, tuple(_present(readers, match, state)))


def _present(readers: Iterable[str], match: re.Match[str], state: State) -> Iterator[Reader]:
    for text in readers:
        tensor, axis = match.expand(text)[:-1].split("[")
        if tensor in state:
            yield Reader(tensor, int(axis))
