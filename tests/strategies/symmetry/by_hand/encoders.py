"""Bidirectional encoders with the norm after the sum: BERT, RoBERTa, DistilBERT, DeBERTa-v2.

    x <- LN(x + attention(x)),    x <- LN(x + W_2 act(W_1 x))

The output of a norm is the skip connection of the next block, so only permutations act on the residual stream, and one
permutation holds for the whole network (Devlin et al. 2019, arXiv 1810.04805; Liu et al. 2019, arXiv 1907.11692;
Sanh et al. 2019, arXiv 1910.01108; He et al. 2021, arXiv 2111.09543).
"""

from fedbasin.strategies.symmetry.groups.groups import Permutation
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State
from tests.strategies.symmetry.by_hand.draft import Config, Draft, Projections, Role, heads, signed


def bert(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of BERT with a pooler and classifier, a masked language head, or span or token classes."""
    return _bert(config, Draft(state), "bert.", residual=residual)


def roberta(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of RoBERTa, which is BERT's encoder with other heads."""
    return _bert(config, Draft(state), "roberta.", residual=residual)


def _bert(config: Config, draft: Draft, name: str, *, residual: bool) -> Symmetry:
    # A bare encoder has no prefix, and returns its residual stream.
    prefix = name if draft.has(f"{name}embeddings.word_embeddings") else ""
    stream = _embeddings(config, draft, f"{prefix}embeddings")
    for block in range(config.count("num_hidden_layers")):
        layer = f"{prefix}encoder.layer.{block}"
        names = _within(f"{layer}.attention", "self.{part}")
        heads(draft, f"heads.{block}", names, config.count("num_attention_heads"))
        stream.reads(names.query, names.key, names.value)
        _feed_forward(draft, stream, layer, block)
    _pooler(draft, stream, f"{prefix}pooler.dense", "classifier", "cls.seq_relationship")
    _dense_classifier(draft, stream, "classifier.dense", "classifier.out_proj")
    _masked_head(config, draft, stream, "cls.predictions.transform", "cls.predictions")
    _masked_head(config, draft, stream, "lm_head", "lm_head")
    return _finish(draft, stream, bare=not prefix or not residual)


def _within(attention: str, pattern: str) -> Projections:
    query, key, value = (pattern.format(part=part) for part in ("query", "key", "value"))
    return Projections(*(f"{attention}.{name}" for name in (query, key, value, "output.dense")))


def _embeddings(config: Config, draft: Draft, embeddings: str) -> Role:
    """Declare the residual stream, with its tables and their norm."""
    width = config.count("hidden_size", "dim")
    stream = draft.space("residual", Permutation(width))
    stream.reads(f"{embeddings}.word_embeddings")
    for table in ("position_embeddings", "token_type_embeddings"):
        if draft.has(f"{embeddings}.{table}"):
            stream.reads(f"{embeddings}.{table}")
    stream.scales(f"{embeddings}.LayerNorm")
    return stream


def _feed_forward(draft: Draft, stream: Role, layer: str, block: int) -> None:
    """Declare the layers that follow the heads in a block of BERT or DeBERTa."""
    stream.writes(f"{layer}.attention.output.dense")
    stream.scales(f"{layer}.attention.output.LayerNorm")
    _hidden(draft, stream, f"mlp.{block}", f"{layer}.intermediate.dense", f"{layer}.output.dense")
    stream.scales(f"{layer}.output.LayerNorm")


def _hidden(draft: Draft, stream: Role, name: str, up: str, down: str) -> None:
    units = draft.space(name, Permutation(draft.shape(f"{up}.weight")[0]))
    units.writes(up)
    units.reads(down)
    stream.reads(up)
    stream.writes(down)


def _pooler(draft: Draft, stream: Role, pooler: str, *readers: str) -> None:
    """Declare a pooler, whose units have signs because tanh is odd, or the classifiers of a model without one."""
    present = [reader for reader in readers if draft.has(reader)]
    draft.keep(*(f"{reader}.bias" for reader in readers))
    if not draft.has(pooler):
        stream.reads(*present)
        return
    stream.reads(pooler)
    if not present:
        # The model returns the pooled features.
        draft.keep(f"{pooler}.bias")
        return
    units = draft.space("pooler", signed(draft.shape(f"{pooler}.weight")[0]))
    units.writes(pooler)
    units.reads(*present)


def _dense_classifier(draft: Draft, stream: Role, dense: str, out: str) -> None:
    """Declare the classifier of RoBERTa: dense layer, tanh, output layer."""
    if draft.has(dense):
        draft.keep(f"{out}.bias")
        units = draft.space("classifier", signed(draft.shape(f"{dense}.weight")[0]))
        units.writes(dense)
        units.reads(out)
        stream.reads(dense)


def _masked_head(config: Config, draft: Draft, stream: Role, transform: str, head: str) -> None:
    """Declare the dense layer, norm and decoder of a masked language model."""
    dense, decoder = f"{transform}.dense", f"{head}.decoder"
    if not draft.has(dense):
        return
    draft.keep(f"{head}.bias", f"{decoder}.bias")
    norm = "LayerNorm" if draft.has(f"{transform}.LayerNorm") else "layer_norm"
    masked_head(config, draft, stream, dense, f"{transform}.{norm}", decoder)


def masked_head(config: Config, draft: Draft, stream: Role, dense: str, norm: str, decoder: str) -> None:
    """Declare a masked language head, whose decoder may be tied to the token table.

    A tied decoder reads the units of the residual stream, so the dense layer has the stream on both axes. It is
    transformed on both and counts in matching on neither, because matching would be quadratic.
    """
    tied = config.get("tie_word_embeddings", default=True)
    units = stream if tied else draft.space("head", Permutation(draft.shape(f"{dense}.weight")[0]))
    stream.reads(dense, scored=not tied)
    units.moves(f"{dense}.weight", 0, scored=not tied)
    units.moves(f"{dense}.bias")
    units.scales(norm)
    if draft.has(decoder):
        units.reads(decoder)


def _finish(draft: Draft, stream: Role, *, bare: bool) -> Symmetry:
    if draft.has("qa_outputs"):
        stream.reads("qa_outputs")
        draft.keep("qa_outputs.bias")
    # A model without a head returns the residual stream itself.
    return draft.finish(*("residual",) * bare)


def distilbert(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of DistilBERT with a masked language head, or a sequence, span or token classifier."""
    draft = Draft(state)
    prefix = "distilbert." if draft.has("distilbert.embeddings.word_embeddings") else ""
    stream = _embeddings(config, draft, f"{prefix}embeddings")
    for block in range(config.count("n_layers", "num_hidden_layers")):
        layer = f"{prefix}transformer.layer.{block}"
        names = Projections(*(f"{layer}.attention.{part}_lin" for part in ("q", "k", "v", "out")))
        heads(draft, f"heads.{block}", names, config.count("n_heads", "num_attention_heads"))
        stream.reads(names.query, names.key, names.value)
        stream.writes(names.output)
        stream.scales(f"{layer}.sa_layer_norm")
        _hidden(draft, stream, f"mlp.{block}", f"{layer}.ffn.lin1", f"{layer}.ffn.lin2")
        stream.scales(f"{layer}.output_layer_norm")
    if draft.has("vocab_transform"):
        draft.keep("vocab_projector.bias")
        layers = ("vocab_transform", "vocab_layer_norm", "vocab_projector")
        masked_head(config, draft, stream, *layers)
    _permuted_classifier(draft, stream, "classifier", "pre_classifier")
    return _finish(draft, stream, bare=not prefix or not residual)


def _permuted_classifier(draft: Draft, stream: Role, name: str, dense: str, out: str = "classifier") -> None:
    """Declare a classifier whose dense layer has any activation, or of tokens, which has no dense layer."""
    draft.keep(f"{out}.bias")
    if draft.has(dense):
        units = draft.space(name, Permutation(draft.shape(f"{dense}.weight")[0]))
        units.writes(dense)
        units.reads(out)
        stream.reads(dense)
    elif draft.has(out):
        stream.reads(out)


def deberta_v2(config: Config, state: State, *, residual: bool) -> Symmetry:
    """Return the symmetry of DeBERTa-v2 and v3.

    With `share_att_key` the projections of query and key also read the table of relative positions, which then
    belongs to the residual stream. Without it the table is a space of its own with its own projections:
    `pos_key_proj` meets queries and `pos_query_proj` meets keys, so all four projections are one role. A key bias
    meets positions too and therefore counts in matching.
    """
    draft = Draft(state)
    prefix = "deberta." if draft.has("deberta.embeddings.word_embeddings") else ""
    stream = _embeddings(config, draft, f"{prefix}embeddings")
    positions = _positions(config, draft, stream, f"{prefix}encoder")
    for block in range(config.count("num_hidden_layers")):
        layer = f"{prefix}encoder.layer.{block}"
        within = f"{layer}.attention.self"
        names = _within(f"{layer}.attention", "self.{part}_proj")
        count = config.count("num_attention_heads")
        meets_keys = "p2c" in (config.get("pos_att_type") or ())
        head = heads(draft, f"heads.{block}", names, count, key_bias_scored=meets_keys)
        stream.reads(names.query, names.key, names.value)
        for reader in (f"{within}.pos_key_proj", f"{within}.pos_query_proj"):
            if draft.has(reader):
                # This bias adds the same number for all keys of a query, like a key bias without positions.
                head.writes(reader, bias_scored=not reader.endswith("pos_key_proj"))
                positions.reads(reader)
        _feed_forward(draft, stream, layer, block)
    _permuted_classifier(draft, stream, "pooler", "pooler.dense")
    _masked_head(config, draft, stream, "cls.predictions.transform", "cls.predictions")
    return _finish(draft, stream, bare=not prefix or not residual)


def _positions(config: Config, draft: Draft, stream: Role, encoder: str) -> Role:
    """Return the space that the table of relative positions belongs to."""
    table = f"{encoder}.rel_embeddings"
    if not draft.has(table):
        return stream
    shared = config.get("share_att_key", default=False)
    width = draft.shape(f"{table}.weight")[1]
    space = stream if shared else draft.space("positions", Permutation(width))
    space.reads(table)
    if draft.has(f"{encoder}.LayerNorm"):
        space.scales(f"{encoder}.LayerNorm")
    return space
