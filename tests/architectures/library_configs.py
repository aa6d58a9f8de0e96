"""Tiny configs of the model types of the `transformers` library, and every architecture that the library has for them.

One set of sizes fits most configs, whose arguments have the same names. Where a type needs other values, they stand
beside its name.
"""

import importlib
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from tests.strategies.symmetry.tiny_transformers import hf

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "pooler_hidden_size", "encoder_hidden_size", "decoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "max_source_positions": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_mel_bins": 8,
    "num_labels": 3,
    "sliding_window": 4,
    "projection_dim": 16,
    "use_cache": False,
}

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_TOWERS = {
    "text_config": {**_TEXT, "eos_token_id": 2, "bos_token_id": 0, "projection_size": 32},
    "vision_config": _VISION,
}

_SPEECH = {
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "tdnn_dim": [8, 8, 8, 8, 16],
    "xvector_output_dim": 8,
}

# What a type needs beyond the sizes that fit most.
_SPECIAL: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "beit": {"use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blip": {
        **_TOWERS,
        "image_text_hidden_size": 16,
        "text_config": {**_TEXT, "encoder_hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
    },
    "clip": _TOWERS,
    "clipseg": _TOWERS,
    "metaclip_2": _TOWERS,
    "siglip": _TOWERS,
    "chinese_clip": _TOWERS,
    "altclip": _TOWERS,
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "distilbert": {"dim": 32, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt2": {"n_inner": None},
    "gptj": {"rotary_dim": 4, "n_inner": None},
    "codegen": {"rotary_dim": 4, "n_inner": None},
    "kimi_linear": {**_LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "longformer": {"attention_window": 4},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 4, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 4},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    "mpt": {"n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "segformer": {
        "depths": [1, 1],
        "hidden_sizes": [8, 16],
        "num_attention_heads": [1, 2],
        "sr_ratios": [2, 1],
        "decoder_hidden_size": 16,
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "swin": {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "swinv2": {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "unispeech-sat"), _SPEECH),
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8},
    "qwen3_next": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gpt_bigcode": {"n_inner": None},
    "xlnet": {"d_inner": 48},
    "yolos": {"image_size": [32, 32]},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 16]},
    "audio-spectrogram-transformer": {"max_length": 32, "num_mel_bins": 16},
}

# Architectures that need more than an example of their inputs: separator tokens, masks of patches, further backbones.
_NOT_RUN = {
    *("BeitForSemanticSegmentation", "LongformerForQuestionAnswering", "LongformerForMultipleChoice"),
    *("SplinterForPreTraining", "DPRReader", "BlipForQuestionAnswering", "PLBartPreTrainedModel"),
}

# The types that are examined, with every architecture that the library has for them.
MODEL_TYPES = (Path(__file__).parent / "model_types.txt").read_text().split()


def tiny_config(model_type: str) -> Any:
    """Return the config of a model type with small sizes."""
    kind = hf.CONFIG_MAPPING[model_type]
    arguments = inspect.signature(kind.__init__).parameters
    sizes = {name: size for name, size in _SIZES.items() if name in arguments}
    return kind(**{**sizes, **_SPECIAL.get(model_type, {})})


def architectures_of(model_type: str) -> list[str]:
    """Return every model of the library for a config, with and without a head."""
    kind = hf.CONFIG_MAPPING[model_type]
    module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    return [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, hf.PreTrainedModel)
        and value.__module__ == module.__name__
        and getattr(value, "config_class", None) is kind
        and hasattr(hf, name)
        and value.forward is not nn.Module.forward
        and name not in _NOT_RUN
    ]
