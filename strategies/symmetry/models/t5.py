"""T5: encoder and decoder over one token table (Raffel et al. 2020, arXiv 1910.10683).

A table of relative position biases, one column a head, lies in a stack's first block and is used by all of its blocks.
So all self-attentions of a stack exchange their heads together, with the columns, and turn each by itself; the
decoder's attention to the encoder has no bias and exchanges its heads alone. Both stacks read one table, so they share
one residual stream; root mean square norms leave it its signs.
"""

from fedbasin.strategies.symmetry.groups.groups import (
    Orthogonal,
    Permutation,
    Wreath,
    gated,
    signed,
)
from fedbasin.strategies.symmetry.models.draft import (
    Config,
    Draft,
    Projections,
    Role,
    heads,
    share,
)
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State

_SCALES = 1


def t5(config: Config, state: State, *, residual: bool) -> Symmetry:
    """T5, gated or not, with a language head; an encoder alone hands its stream out."""
    draft = Draft(state)
    stream = draft.space("residual", signed(config.count("d_model", "hidden_size"), scales=True))
    tables = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    stream.reads(*(table for table in tables if draft.has(table)))
    encoder = config.count("num_layers", "num_hidden_layers")
    _stack(config, draft, stream, "encoder", encoder)
    if draft.has("decoder.final_layer_norm"):
        _stack(config, draft, stream, "decoder", config.get("num_decoder_layers", default=encoder))
    bare = not residual or not draft.has("lm_head")
    return draft.finish(*("residual",) * bare)


def _stack(config: Config, draft: Draft, stream: Role, stack: str, blocks: int) -> None:
    count = config.count("num_heads", "num_attention_heads")
    _tied_heads(draft, stream, stack, blocks, count)
    for block in range(blocks):
        layers = f"{stack}.block.{block}.layer"
        last = 1
        if stack == "decoder":
            last = 2
            names = _projections(f"{layers}.1.EncDecAttention")
            heads(draft, f"cross.{block}", names, count)
            _beside(stream, names, f"{layers}.1.layer_norm")
        _units(draft, stream, f"{stack}.mlp.{block}", f"{layers}.{last}.DenseReluDense")
        stream.at(_SCALES).scales(f"{layers}.{last}.layer_norm")
    stream.at(_SCALES).scales(f"{stack}.final_layer_norm")


def _tied_heads(draft: Draft, stream: Role, stack: str, blocks: int, count: int) -> None:
    """Roles: query-key and value-output of block after block, then the columns of the biases."""
    names = [
        _projections(f"{stack}.block.{block}.layer.0.SelfAttention") for block in range(blocks)
    ]
    size = share(draft.shape(f"{names[0].query}.weight")[0], count, names[0].query)
    inners = (Orthogonal(size),) * (2 * blocks)
    head = draft.space(f"{stack}.heads", Wreath((*inners, Permutation(1)), count))
    for block, own in enumerate(names):
        head.at(2 * block).writes(own.query)
        head.at(2 * block).writes(own.key)
        head.at(2 * block + 1).writes(own.value)
        head.at(2 * block + 1).reads(own.output)
        _beside(stream, own, f"{stack}.block.{block}.layer.0.layer_norm")
    first = f"{stack}.block.0.layer.0.SelfAttention"
    head.at(2 * blocks).reads(f"{first}.relative_attention_bias")


def _projections(attention: str) -> Projections:
    return Projections(*(f"{attention}.{part}" for part in "qkvo"))


def _beside(stream: Role, names: Projections, norm: str) -> None:
    stream.at(_SCALES).scales(norm)
    stream.reads(names.query, names.key, names.value)
    stream.writes(names.output)


def _units(draft: Draft, stream: Role, name: str, mlp: str) -> None:
    down = f"{mlp}.wo"
    width = draft.shape(f"{down}.weight")[1]
    if draft.has(f"{mlp}.wi_0"):
        units = draft.space(name, gated(width))
        units.writes(f"{mlp}.wi_0")
        units.at(1).writes(f"{mlp}.wi_1")
        units.at(1).reads(down)
        stream.reads(f"{mlp}.wi_0", f"{mlp}.wi_1")
    else:
        units = draft.space(name, Permutation(width))
        units.writes(f"{mlp}.wi")
        units.reads(down)
        stream.reads(f"{mlp}.wi")
    stream.writes(down)
