"""Encoders with the norm before the branch: ViT, and both towers of CLIP.

    x <- x + attention(LN(x)),    x <- x + W_2 act(W_1 LN(x))

Permutations act on the residual stream, because LayerNorm subtracts the mean and has a weight for each entry
(Dosovitskiy et al. 2021, arXiv 2010.11929; Radford et al. 2021, arXiv 2103.00020). Each tower of CLIP has a residual
stream of its own; the space in which they meet is an output of the model and stays.
"""

from fedbasin.strategies.symmetry.groups.groups import Permutation
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State
from tests.strategies.symmetry.by_hand.draft import Config, Draft, Projections, Role, heads


def vit(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of ViT with an image classifier."""
    draft = Draft(state)
    prefix = "vit." if draft.has("vit.embeddings.cls_token") else ""
    embeddings = f"{prefix}embeddings"
    stream = draft.space("residual", Permutation(config.count("hidden_size")))
    # Class token and positions have shape [1, length, features].
    stream.moves(f"{embeddings}.cls_token", 2)
    stream.moves(f"{embeddings}.position_embeddings", 2)
    stream.writes(f"{embeddings}.patch_embeddings.projection")
    for block in range(config.count("num_hidden_layers")):
        layer = f"{prefix}layers.{block}"
        names = Projections(*(f"{layer}.attention.{part}_proj" for part in "qkvo"))
        heads(draft, f"heads.{block}", names, config.count("num_attention_heads"))
        _around(stream, names, f"{layer}.layernorm_before", f"{layer}.layernorm_after")
        _hidden(draft, stream, f"mlp.{block}", f"{layer}.mlp")
    stream.scales(f"{prefix}layernorm")
    draft.keep("classifier.bias")
    if draft.has("classifier"):
        stream.reads("classifier")
    if draft.has(f"{prefix}pooler.dense"):
        stream.reads(f"{prefix}pooler.dense")
        draft.keep(f"{prefix}pooler.dense.bias")
    # A model without a head returns the residual stream itself.
    return draft.finish(*("residual",) * (not prefix or not residual))


def clip(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of CLIP or of one tower; a tower without its projection returns its residual stream."""
    draft = Draft(state)
    draft.keep("logit_scale", "classifier.bias")
    bare = []
    if draft.has("text_model.embeddings.token_embedding"):
        stream = _text(Config(config.get("text_config", default=config.source)), draft)
        bare += _project(draft, stream, "text_projection")
    if draft.has("vision_model.embeddings.patch_embedding"):
        stream = _vision(Config(config.get("vision_config", default=config.source)), draft)
        bare += _project(draft, stream, "visual_projection", "classifier")
    return draft.finish(*(bare if residual else ("text.residual", "vision.residual")))


def _project(draft: Draft, stream: Role, *readers: str) -> list[str]:
    present = [reader for reader in readers if draft.has(reader)]
    stream.reads(*present)
    return [] if present else [stream.space]


def _text(config: Config, draft: Draft) -> Role:
    stream = draft.space("text.residual", Permutation(config.count("hidden_size")))
    embeddings = "text_model.embeddings"
    stream.reads(f"{embeddings}.token_embedding", f"{embeddings}.position_embedding")
    _tower(config, draft, stream, "text")
    stream.scales("text_model.final_layer_norm")
    return stream


def _vision(config: Config, draft: Draft) -> Role:
    stream = draft.space("vision.residual", Permutation(config.count("hidden_size")))
    embeddings = "vision_model.embeddings"
    stream.moves(f"{embeddings}.class_embedding")
    stream.writes(f"{embeddings}.patch_embedding")
    stream.reads(f"{embeddings}.position_embedding")
    stream.scales("vision_model.pre_layrnorm")
    _tower(config, draft, stream, "vision")
    stream.scales("vision_model.post_layernorm")
    return stream


def _tower(config: Config, draft: Draft, stream: Role, name: str) -> None:
    for block in range(config.count("num_hidden_layers")):
        layer = f"{name}_model.encoder.layers.{block}"
        names = Projections(*(f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")))
        heads(draft, f"{name}.heads.{block}", names, config.count("num_attention_heads"))
        _around(stream, names, f"{layer}.layer_norm1", f"{layer}.layer_norm2")
        _hidden(draft, stream, f"{name}.mlp.{block}", f"{layer}.mlp")


def _around(stream: Role, names: Projections, *norms: str) -> None:
    stream.scales(*norms)
    stream.reads(names.query, names.key, names.value)
    stream.writes(names.output)


def _hidden(draft: Draft, stream: Role, name: str, mlp: str) -> None:
    up, down = f"{mlp}.fc1", f"{mlp}.fc2"
    units = draft.space(name, Permutation(draft.shape(f"{up}.weight")[0]))
    units.writes(up)
    units.reads(down)
    stream.reads(up)
    stream.writes(down)
