"""T5: encoder and decoder over one token table (Raffel et al. 2020, arXiv 1910.10683).

The first block of a stack has a table of relative position biases, one column for each head, which all blocks of the
stack use. All self-attentions of a stack therefore permute their heads together, with the columns, and each rotates
its heads by itself. The decoder's attention to the encoder has no bias and permutes its heads alone. Both stacks read
one token table, so they share one residual stream, which has signs because its norms are root mean square norms.
"""

from fedbasin.strategies.symmetry.groups.groups import Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State
from tests.strategies.symmetry.by_hand.draft import Config, Draft, Projections, Role, gated, heads, share, signed

# The role of `signed(n, scales=True)` that follows the order without the sign.
_SCALES = 1


def t5(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of T5, gated or not, with a language head; an encoder alone returns its residual stream."""
    draft = Draft(state)
    stream = draft.space("residual", signed(config.count("d_model", "hidden_size"), scales=True))
    tables = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    # The tables may be tied or not; as all of them have the stream on one axis, both are the same symmetry.
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
    """Declare the heads of a stack.

    The roles are query-key and value-output of one block after the other, then the columns of the position biases.
    """
    names = [_projections(f"{stack}.block.{block}.layer.0.SelfAttention") for block in range(blocks)]
    size = share(draft.shape(f"{names[0].query}.weight")[0], count, names[0].query)
    # One order for all blocks, but a rotation of its own for each role of each block.
    inners = (Orthogonal(size),) * (2 * blocks)
    head = draft.space(f"{stack}.heads", Wreath((*inners, Permutation(1)), count))
    for block, projections in enumerate(names):
        head.at(2 * block).writes(projections.query)
        head.at(2 * block).writes(projections.key)
        head.at(2 * block + 1).writes(projections.value)
        head.at(2 * block + 1).reads(projections.output)
        _beside(stream, projections, f"{stack}.block.{block}.layer.0.layer_norm")
    head.at(2 * blocks).reads(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias")


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
