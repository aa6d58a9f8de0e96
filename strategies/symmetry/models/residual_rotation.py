"""Transformers whose residual stream turns: O(d-1) between LayerNorms, O(d) between root mean square norms.

With the norms' gains folded into what reads them (`folding.py`), every writer of the stream may turn it and every
reader turn it back: 1/sigma (x - mean) commutes with the maps of O(d) that keep the ones vector, x/rms(x) with all of
them. For models from different starts this decides how well they match (Theus et al. 2025, arXiv 2506.22712).

The symmetries here rewrite the parametrisation: a model that was matched by one has gains 1, and so has the global model
that is made of such models. Its function is the same, and its tensors keep their names and shapes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from fedbasin.strategies.symmetry.folding import Fold, Reader
from fedbasin.strategies.symmetry.groups.centred import Centred
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation
from fedbasin.strategies.symmetry.models.families import family
from fedbasin.strategies.symmetry.models.prenorm_transformer import Names, preln_transformer
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError
from fedbasin.strategies.tensors.state import State

_RESIDUAL = "residual"


def turning_transformer(state: State, heads: int, names: Names | None = None) -> Symmetry:
    """The spaces of `preln_transformer` with O(d-1) on the residual stream, and the folds it needs.

    Args:
        state: tensors of the model.
        heads: attention heads of a block.
        names: what the model calls its parts.

    Raises:
        SymmetryError: a tensor is missing or of another shape, or a norm cannot be folded.
    """
    found = names or Names()
    folds = tuple(_folds_of(found, state))
    return turning(preln_transformer(state, heads, found), folds, state)


def turning_family(model_type: str, config: object, state: State) -> Symmetry:
    """The symmetry of a model of the `transformers` library, its residual stream turning.

    Args:
        model_type: `config.model_type` of the model: gpt2, gpt_neox, vit, llama, mistral, qwen2, qwen3 or mixtral.
        config: the model's config, or its `to_dict()`.
        state: the model's `state_dict()`, whose tied tensors share their memory.

    Raises:
        SymmetryError: the type is not among these, a norm cannot be folded, or the model hands its stream out.
    """
    if model_type not in _READERS:
        raise SymmetryError(
            f"no turning stream for {model_type!r}; known are {', '.join(sorted(_READERS))}. "
            "A norm after the sum hands its own gain on: use `family`, which permutes the stream"
        )
    folds = tuple(_matched(_READERS[model_type], state))
    return turning(family(model_type, config, state), folds, state)


def turning(symmetry: Symmetry, folds: tuple[Fold, ...], state: State) -> Symmetry:
    """Replace the residual stream's permutations, or signed permutations, by all rotations.

    Args:
        symmetry: with a space `residual`, of S(d) between LayerNorms or of signs between root mean square norms.
        folds: every norm that reads the stream.
        state: tensors of the model.

    Raises:
        SymmetryError: there is no such space, a gain on the stream is not folded, or a norm cannot be folded.
    """
    stream = next((space for space in symmetry.spaces if space.name == _RESIDUAL), None)
    if stream is None:
        raise SymmetryError(
            "the symmetry has no space 'residual' to turn: a model without a head hands its stream out; "
            "match the model that has its head"
        )
    turned = replace(stream, group=_rotations(stream), axes=_turned(stream, folds, state))
    spaces = tuple(turned if space is stream else space for space in symmetry.spaces)
    result = replace(symmetry, spaces=spaces, folds=folds)
    result.check(state)
    return result


def _rotations(stream: Space) -> Group:
    # A LayerNorm takes the mean of the stream, and its family says so by keeping signs out.
    width = stream.width()
    return Centred(width) if isinstance(stream.group, Permutation) else Orthogonal(width)


def _turned(stream: Space, folds: Iterable[Fold], state: State) -> tuple[Axis, ...]:
    gains = {fold.gain for fold in folds}
    axes = tuple(m for m in stream.axes if m.tensor not in gains)
    moved = {axis.tensor for axis in axes}
    for norm in {axis.tensor.removesuffix(".bias") for axis in stream.axes}:
        gain = f"{norm}.weight"
        if gain in moved and len(state[gain].shape) == 1:
            raise SymmetryError(
                f"{gain} scales entries of the stream and is not folded; name what reads the norm, or leave "
                "the stream to permutations"
            )
    lone = sorted(m.tensor for m in axes if m.role)
    if lone:
        raise SymmetryError(f"{lone[0]} scales entries of the stream and is not folded")
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
            "a model without a head hands its stream out, which must then stay; name the head in Names"
        )
    yield _fold(names.final_norm, (names.head,), 0)


def _fold(norm: str, readers: Iterable[str], block: int) -> Fold:
    weights = (f"{reader.format(block=block)}.weight" for reader in readers)
    return Fold(norm.format(block=block), tuple(Reader(weight, 1) for weight in weights))


_ROTARY_LINE = {
    r"(.*layers\.\d+)\.input_layernorm": tuple(
        rf"\1.self_attn.{part}_proj.weight[1]" for part in "qkv"
    ),
    r"(.*layers\.\d+)\.post_attention_layernorm": (
        *(rf"\1.mlp.{part}_proj.weight[1]" for part in ("gate", "up")),
        *(r"\1.mlp.gate.weight[1]", r"\1.mlp.experts.gate_up_proj[2]"),
    ),
    r"(?:model\.)?norm": ("lm_head.weight[1]", "score.weight[1]"),
}

# For each norm that reads the stream what reads the norm, where the model has it.
_READERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gpt2": {
        r"(.*h\.\d+)\.ln_1": (r"\1.attn.c_attn.weight[0]",),
        r"(.*h\.\d+)\.ln_2": (r"\1.mlp.c_fc.weight[0]",),
        r".*ln_f": ("lm_head.weight[1]", "score.weight[1]"),
    },
    "gpt_neox": {
        r"(.*layers\.\d+)\.input_layernorm": (r"\1.attention.query_key_value.weight[1]",),
        r"(.*layers\.\d+)\.post_attention_layernorm": (r"\1.mlp.dense_h_to_4h.weight[1]",),
        r".*final_layer_norm": tuple(
            f"{head}.weight[1]" for head in ("embed_out", "lm_head", "score")
        ),
    },
    "vit": {
        r"(.*layers\.\d+)\.layernorm_before": tuple(
            rf"\1.attention.{part}_proj.weight[1]" for part in "qkv"
        ),
        r"(.*layers\.\d+)\.layernorm_after": (r"\1.mlp.fc1.weight[1]",),
        r"(?:vit\.)?layernorm": ("classifier.weight[1]",),
    },
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3"), _ROTARY_LINE),
}


def _matched(patterns: Mapping[str, tuple[str, ...]], state: State) -> Iterator[Fold]:
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
