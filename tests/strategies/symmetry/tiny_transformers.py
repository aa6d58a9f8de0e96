"""Tiny random models of the `transformers` library, built from configs; nothing is downloaded."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as hf

from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Symmetry
from tests.double_precision import Doubled
from tests.strategies.symmetry.by_hand.families import family

TOKENS = torch.tensor([[3, 9, 21, 7, 15, 2], [5, 8, 30, 11, 4, 2]])
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Tiny:
    """How to make a model, what it is called with, and what its function is."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    output: Callable[[Any], Any] = lambda found: found.logits

    def model(self, seed: int = 0) -> nn.Module:
        """The model, called with plain tensors and giving plain tensors."""
        torch.manual_seed(seed)
        model = self.make().eval()
        with torch.no_grad():
            # Fresh weights are so small that attention hardly attends, and biases and norms are all alike.
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.4 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
        inner = model.forward

        def forward(*tensors: Tensor) -> Any:
            with Doubled():
                return self.output(inner(**dict(zip(self.inputs, tensors, strict=True))))

        model.forward = forward  # type: ignore[method-assign] - the names of its tensors stay
        return model


WIDTH = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT = dict(**WIDTH, vocab_size=31, max_position_embeddings=16)
ROTARY = {
    "hidden_size": 16,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 16,
}
DISTIL = {"dim": 12, "hidden_dim": 10, "n_layers": 2, "n_heads": 3, "vocab_size": 31, "max_position_embeddings": 16}
T5 = {"d_model": 12, "d_kv": 4, "d_ff": 10, "num_layers": 2, "num_heads": 3, "vocab_size": 31}
VISION = dict(**WIDTH, image_size=8, patch_size=4)
DEBERTA = dict(
    **TEXT,
    relative_attention=True,
    position_buckets=4,
    max_relative_positions=8,
    position_biased_input=False,
    pos_att_type=["c2p", "p2c"],
    norm_rel_ebd="layer_norm",
)


def text(model: type, config: type, **options: Any) -> Tiny:
    pad = {} if model.__name__.startswith("T5") else {"pad_token_id": 0}
    return Tiny(lambda: model(config(**pad, **options)), {"input_ids": TOKENS})


def untied(**options: Any) -> dict[str, Any]:
    return {**options, "tie_word_embeddings": False}


def clip() -> nn.Module:
    vision = dict(VISION, hidden_size=8, num_attention_heads=2)
    config = hf.CLIPConfig(text_config=dict(TEXT, eos_token_id=2), vision_config=vision, projection_dim=7)
    return hf.CLIPModel(config)


def t5(**options: Any) -> Tiny:
    return Tiny(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**{**T5, **options})),
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]},
    )


MODELS: dict[str, Tiny] = {
    "gpt2": text(hf.GPT2LMHeadModel, hf.GPT2Config, n_embd=12, n_layer=2, n_head=3, vocab_size=31, n_positions=16),
    "gpt2_untied_classes": text(
        hf.GPT2ForSequenceClassification,
        hf.GPT2Config,
        n_embd=12,
        n_layer=2,
        n_head=3,
        n_inner=7,
        vocab_size=31,
        n_positions=16,
    ),
    "bert": text(hf.BertForMaskedLM, hf.BertConfig, **TEXT),
    "bert_untied": text(hf.BertForMaskedLM, hf.BertConfig, **untied(**TEXT)),
    "bert_classes": text(hf.BertForSequenceClassification, hf.BertConfig, **TEXT),
    "bert_tokens": text(hf.BertForTokenClassification, hf.BertConfig, **TEXT),
    "roberta": text(hf.RobertaForMaskedLM, hf.RobertaConfig, **TEXT),
    "roberta_classes": text(hf.RobertaForSequenceClassification, hf.RobertaConfig, **TEXT),
    "distilbert": text(hf.DistilBertForMaskedLM, hf.DistilBertConfig, **DISTIL),
    "distilbert_classes": text(hf.DistilBertForSequenceClassification, hf.DistilBertConfig, **DISTIL),
    "distilbert_tokens": text(hf.DistilBertForTokenClassification, hf.DistilBertConfig, **DISTIL),
    "bert_spans": Tiny(
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**TEXT)),
        {"input_ids": TOKENS},
        lambda found: (found.start_logits, found.end_logits),
    ),
    "vit": Tiny(lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=5)), {"pixel_values": PIXELS}),
    "clip": Tiny(
        clip,
        {"input_ids": TOKENS, "pixel_values": PIXELS},
        lambda found: (found.logits_per_image, found.text_embeds, found.image_embeds),
    ),
    "llama": text(hf.LlamaForCausalLM, hf.LlamaConfig, **ROTARY),
    "llama_biases": text(hf.LlamaForCausalLM, hf.LlamaConfig, **ROTARY, attention_bias=True, mlp_bias=True),
    "llama_alone": text(hf.LlamaForCausalLM, hf.LlamaConfig, **{**ROTARY, "num_key_value_heads": 4}),
    "llama_alone_biases": text(
        hf.LlamaForCausalLM, hf.LlamaConfig, **{**ROTARY, "num_key_value_heads": 4}, attention_bias=True
    ),
    "llama_one_key": text(hf.LlamaForCausalLM, hf.LlamaConfig, **{**ROTARY, "num_key_value_heads": 1}),
    "llama_classes": text(hf.LlamaForSequenceClassification, hf.LlamaConfig, **ROTARY),
    "mistral": text(hf.MistralForCausalLM, hf.MistralConfig, **ROTARY, sliding_window=3),
    "qwen2": text(hf.Qwen2ForCausalLM, hf.Qwen2Config, **ROTARY),
    "qwen2_tied": text(hf.Qwen2ForCausalLM, hf.Qwen2Config, **ROTARY, tie_word_embeddings=True),
    "qwen3": text(hf.Qwen3ForCausalLM, hf.Qwen3Config, **ROTARY, head_dim=6),
    "qwen3_biases": text(hf.Qwen3ForCausalLM, hf.Qwen3Config, **ROTARY, head_dim=6, attention_bias=True),
    "gpt_neox": text(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **{**TEXT, "hidden_size": 24}, rotary_pct=0.5),
    "gpt_neox_sequential": text(
        hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **TEXT, rotary_pct=1.0, use_parallel_residual=False
    ),
    "t5": t5(),
    "t5_gated": t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5_uneven": t5(num_decoder_layers=1),
    "mixtral": text(
        hf.MixtralForCausalLM, hf.MixtralConfig, **ROTARY, num_local_experts=3, experts_implementation="eager"
    ),
    "deberta_v2": text(hf.DebertaV2ForMaskedLM, hf.DebertaV2Config, **DEBERTA, share_att_key=False),
    "deberta_v2_shared": text(hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config, **DEBERTA, share_att_key=True),
    "deberta_v2_one_way": text(
        hf.DebertaV2ForMaskedLM, hf.DebertaV2Config, **{**DEBERTA, "pos_att_type": ["c2p"], "norm_rel_ebd": "none"}
    ),
    "deberta_v2_plain": text(hf.DebertaV2ForTokenClassification, hf.DebertaV2Config, **TEXT),
}


def symmetry_of(model: nn.Module, *, residual: bool = True) -> Symmetry:
    """Return the symmetry that was written by hand, an oracle of what is discovered."""
    config: Any = model.config
    return family(config.model_type, config, model.state_dict(), residual=residual)


@cache
def discovered(name: str) -> Symmetry:
    """Return the symmetry of one of the models that execution finds."""
    tiny = MODELS[name]
    return discover(tiny.model(), *tiny.inputs.values()).symmetry
