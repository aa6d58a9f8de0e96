"""Causal decoders: GPT-2, GPT-NeoX, and the rotary line of Llama, Mistral, Qwen2, Qwen3 and Mixtral.

GPT-2 (Radford et al. 2019) has fused `Conv1D [in, out]` projections and no rotary positions. GPT-NeoX (Black et al.
2022, arXiv 2204.06745) has rotary positions on a part of each head, interleaves query, key and value head by head,
and may add both branches of a block at once, which adds no space. Llama (Touvron et al. 2023, arXiv 2302.13971) and
its relatives have root mean square norms, so the residual stream has signs; gated units; rotary positions on whole
heads; and keys that several queries share. Qwen3 normalises queries and keys in each head, which leaves a sign for
each rotary pair. Mixtral (Jiang et al. 2024, arXiv 2401.04088) has experts that change places together with their row
of the router.
"""

from fedbasin.strategies.symmetry.groups.block_groups import DirectSum, Inner, PairSigns, Rotary
from fedbasin.strategies.symmetry.groups.groups import Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.tensors.state import State
from tests.strategies.symmetry.by_hand.draft import (
    Config,
    Draft,
    Projections,
    Role,
    gated,
    grouped_heads,
    share,
    signed,
)

# The role of `signed(n, scales=True)` that follows the order without the sign.
_SCALES = 1


def gpt2(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of GPT-2 with a language head or a sequence classifier."""
    draft = Draft(state)
    prefix = "transformer." if draft.has("transformer.wte") else ""
    width, count = config.count("n_embd", "hidden_size"), config.count("n_head")
    stream = draft.space("residual", Permutation(width))
    stream.reads(f"{prefix}wte", f"{prefix}wpe")
    for block in range(config.count("n_layer", "num_hidden_layers")):
        _gpt2_block(draft, stream, f"{prefix}h.{block}", block, count)
    stream.scales(f"{prefix}ln_f")
    return _finish(draft, stream, bare=not prefix or not residual)


def _gpt2_block(draft: Draft, stream: Role, layer: str, block: int, count: int) -> None:
    # `Conv1D` stores [in, out], so axis 1 writes and axis 0 reads.
    fused, output = f"{layer}.attn.c_attn", f"{layer}.attn.c_proj"
    width = draft.shape(f"{output}.weight")[0]
    rotation = Orthogonal(share(width, count, fused))
    head = draft.space(f"heads.{block}", Wreath((rotation, rotation), count))
    for number, role in enumerate((0, 0, 1)):
        part = (number * width, (number + 1) * width)
        # The key bias, in the second third, adds the same number to all scores of a query.
        head.at(role).writes(fused, 1, part, bias_scored=number != 1)
    head.at(1).reads(output, axis=0)
    draft.shifts_keys(fused, (width, 2 * width))
    draft.shifts_values(fused, output, (2 * width, 3 * width), axis=0)
    up, down = f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj"
    units = draft.space(f"mlp.{block}", Permutation(draft.shape(f"{up}.weight")[1]))
    units.writes(up, 1)
    units.reads(down, axis=0)
    stream.scales(f"{layer}.ln_1", f"{layer}.ln_2")
    stream.reads(fused, up, axis=0)
    stream.writes(output, 1)
    stream.writes(down, 1)


def gpt_neox(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of GPT-NeoX and Pythia, with parallel or sequential blocks."""
    draft = Draft(state)
    prefix = "gpt_neox." if draft.has("gpt_neox.embed_in") else ""
    stream = draft.space("residual", Permutation(config.count("hidden_size")))
    stream.reads(f"{prefix}embed_in")
    for block in range(config.count("num_hidden_layers")):
        layer = f"{prefix}layers.{block}"
        _interleaved_heads(config, draft, f"heads.{block}", f"{layer}.attention")
        # Parallel and sequential blocks add to one stream, so both have the same spaces.
        stream.scales(f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
        stream.reads(f"{layer}.attention.query_key_value")
        stream.writes(f"{layer}.attention.dense")
        up, down = f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h"
        units = draft.space(f"mlp.{block}", Permutation(draft.shape(f"{up}.weight")[0]))
        units.writes(up)
        units.reads(down)
        stream.reads(up)
        stream.writes(down)
    stream.scales(f"{prefix}final_layer_norm")
    return _finish(draft, stream, bare=not prefix or not residual)


def _interleaved_heads(config: Config, draft: Draft, name: str, attention: str) -> None:
    """Declare heads whose query, key and value are interleaved in one tensor, `(heads, 3, size)`."""
    fused, count = f"{attention}.query_key_value", config.count("num_attention_heads")
    size = share(draft.shape(f"{attention}.dense.weight")[1], count, fused)
    head = draft.space(name, Wreath((_partly_rotary(config, size), Orthogonal(size)), count))
    for number, role in enumerate((0, 0, 1)):
        head.at(role).writes(fused, 0, (number * size, (number + 1) * size), period=3 * size)
    head.at(1).reads(f"{attention}.dense")
    part = (2 * size, 3 * size)
    draft.shifts_values(fused, f"{attention}.dense", part, period=3 * size)


def _partly_rotary(config: Config, size: int) -> Inner:
    width = int(size * _rotary_fraction(config))
    if width % 2 or not width:
        raise SymmetryError(
            f"rotary positions act on pairs, but the config gives them {width} of the {size} entries of a head"
        )
    rotary = Rotary(width, width // 2)
    return rotary if width == size else DirectSum((rotary, Orthogonal(size - width)))


def _rotary_fraction(config: Config) -> float:
    """Return the fraction of a head that is rotated by position."""
    rope = Config(config.get("rope_parameters", default={}))
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor", "rotary_pct", default=1.0))


def llama(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of Llama, Mistral and Qwen2: rotary positions on whole heads, shared keys, gated units."""
    return _rotary_line(config, Draft(state), residual=residual)


def qwen3(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of Qwen3: the norms of queries and keys have weights that all heads share, which stay."""
    draft = Draft(state)
    draft.keep("*.self_attn.q_norm.weight", "*.self_attn.k_norm.weight")
    return _rotary_line(config, draft, residual=residual, normed=True)


def mixtral(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of Mixtral: stacked experts, `[experts, 2 units, width]` and `[experts, width, units]`."""
    return _rotary_line(config, Draft(state), residual=residual, experts=True)


def _rotary_line(
    config: Config, draft: Draft, *, residual: bool, normed: bool = False, experts: bool = False
) -> Symmetry:
    if _rotary_fraction(config) != 1:
        raise SymmetryError(
            "this family has rotary positions on whole heads, but the config gives them a part; write the "
            "symmetry as text"
        )
    prefix = "model." if draft.has("model.embed_tokens") else ""
    stream = draft.space("residual", signed(config.count("hidden_size"), scales=True))
    stream.reads(f"{prefix}embed_tokens")
    for block in range(config.count("num_hidden_layers")):
        layer = f"{prefix}layers.{block}"
        norms = (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
        stream.at(_SCALES).scales(*norms)
        _rotary_heads(config, draft, stream, f"{layer}.self_attn", block, normed=normed)
        (_experts if experts else _gated_units)(draft, stream, f"{layer}.mlp", block)
    stream.at(_SCALES).scales(f"{prefix}norm")
    return _finish(draft, stream, bare=not prefix or not residual)


def _rotary_heads(config: Config, draft: Draft, stream: Role, attention: str, block: int, *, normed: bool) -> None:
    # Keys have no shift here: rotary positions and norms make scores depend on a key bias.
    names = Projections(*(f"{attention}.{part}_proj" for part in "qkvo"))
    queries = config.count("num_attention_heads")
    keys = config.get("num_key_value_heads", default=queries)
    size = share(draft.shape(f"{names.query}.weight")[0], queries, names.query)
    rotation = (PairSigns if normed else Rotary)(size, size // 2)
    grouped_heads(draft, f"heads.{block}", names, rotation, queries, keys)
    stream.reads(names.query, names.key, names.value)
    stream.writes(names.output)


def _gated_units(draft: Draft, stream: Role, mlp: str, block: int) -> None:
    gate, up, down = (f"{mlp}.{part}_proj" for part in ("gate", "up", "down"))
    units = draft.space(f"mlp.{block}", gated(draft.shape(f"{gate}.weight")[0]))
    units.writes(gate)
    units.at(1).writes(up)
    units.at(1).reads(down)
    stream.reads(gate, up)
    stream.writes(down)


def _experts(draft: Draft, stream: Role, mlp: str, block: int) -> None:
    router, up, down = (f"{mlp}.gate.weight", f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj")
    count, _, width = draft.shape(down)
    group = Wreath((gated(width), Permutation(1)), count)
    # The gate is the first half of `gate_up_proj`, up the second; a row of the router moves with its expert.
    experts = draft.space(f"experts.{block}", group)
    experts.moves(up, 1, (0, width), outer=0)
    experts.at(1).moves(up, 1, (width, 2 * width), outer=0)
    experts.at(1).moves(down, 2, outer=0)
    experts.at(2).moves(router)
    stream.moves(router, 1)
    stream.moves(up, 2)
    stream.moves(down, 1)


def _finish(draft: Draft, stream: Role, *, bare: bool) -> Symmetry:
    for head in ("lm_head", "embed_out", "score"):
        if draft.has(head):
            stream.reads(head)
    draft.keep("score.bias", "lm_head.bias")
    # A model without a head returns the residual stream itself.
    return draft.finish(*("residual",) * bare)
