"""Example inputs of a model of the `transformers` library, from its config and the arguments of its forward method."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# Length of the example text: short, because a proof runs the model many times.
_TOKENS = 8
_MOST_TOKENS = 512
# Two, because an axis of length one looks as if it were not there.
_BATCH = 2


def example_inputs(module: nn.Module) -> dict[str, Tensor]:
    """Return random tokens, images or sound for a model, by the names of its arguments.

    Args:
        module: a model of the library.
    """
    arguments = inspect.signature(module.forward).parameters
    config: Any = module.config
    required = {name for name, a in arguments.items() if a.default is a.empty and a.kind is not a.VAR_KEYWORD}
    encoder: Any = getattr(module, "encoder", None)
    # A model that joins an encoder and a decoder reads what its encoder reads.
    joined = {str(encoder.main_input_name)} if hasattr(encoder, "main_input_name") else set()
    main = {str(module.main_input_name), *joined, *required}
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    if "input_ids" in arguments and (main & {"input_ids", "inputs"} or _is_text(config)):
        inputs |= _tokens(module, config, set(arguments), generator)
    if "pixel_values" in arguments and ("pixel_values" in main or _has_two_towers(config)):
        inputs["pixel_values"] = _image(config, generator)
    if "input_features" in arguments and "input_features" in main:
        inputs["input_features"] = _spectrum(config, generator)
    if "input_values" in arguments and "input_values" in main:
        inputs["input_values"] = _sound(config, generator)
    if config.is_encoder_decoder and "decoder_input_ids" in arguments:
        inputs["decoder_input_ids"] = _text(module, _part(config, "decoder"), generator)
    if "pixel_values" in arguments and "pixel_values" not in inputs and _reads_images_as_tokens(config):
        inputs |= _with_images(module, inputs["input_ids"], generator)
    return inputs | _optional(module, set(arguments), inputs.get("input_ids"), generator)


def _with_images(module: nn.Module, tokens: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a text behind an image, which has as many tokens as the model makes of it; nothing if it wants more."""
    config: Any = module.config
    image = _image(config, generator)
    # Some models take several images for each text.
    for images in (image, image[:, None]):
        if entries := _entries_of_features(module, images):
            place = int(getattr(config, "image_token_id", None) or config.image_token_index)
            length = entries // (_BATCH * config.get_text_config().hidden_size)
            text = tokens.where(tokens != place, tokens.min())
            return {"input_ids": torch.cat([torch.full((_BATCH, length), place), text], dim=1), "pixel_values": images}
    return {}


def _entries_of_features(module: nn.Module, images: Tensor) -> int:
    """Return the number of entries that a model makes of images, or 0 if it does not take such images."""
    model: Any = module
    try:
        with torch.no_grad():
            features = model.get_image_features(pixel_values=images.to(model.dtype))
    except Exception:  # noqa: BLE001 - some models take patches and their grids in place of images
        return 0
    features = getattr(features, "pooler_output", features)
    return sum(part.numel() for part in ([features] if isinstance(features, Tensor) else features))


def _optional(
    module: nn.Module, arguments: set[str], tokens: Tensor | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the inputs without which a model does not run all of its layers, whose parameters would then stay."""
    config: Any = module.config
    names = [name for name, _ in module.named_parameters()]

    def has(*words: str) -> bool:
        return any(word in name for name in names for word in words)

    optional: dict[str, Tensor] = {}
    # A decoder with attention to an encoder that is no part of it.
    states = next((name for name in ("encoder_hidden_states", "encoder_outputs") if name in arguments), None)
    if states is not None and not config.is_encoder_decoder and has("cross", "encoder_attn"):
        optional[states] = _states(config, generator)
    if tokens is not None and "token_type_ids" in arguments and has("seg_embed"):
        optional["token_type_ids"] = tokens % 2
    if tokens is not None and "global_attention_mask" in arguments and has("_global"):
        optional["global_attention_mask"] = torch.zeros_like(tokens).index_fill(-1, torch.tensor(0), 1)
    return optional


def _part(config: Any, *names: str) -> Any:
    """Return the config of the part that has one of these names, or the whole config."""
    return next((part for name in names if hasattr(part := getattr(config, name, None), "model_type")), config)


def _states(config: Any, generator: torch.Generator) -> Tensor:
    widths = (getattr(config, name, None) for name in ("cross_attention_hidden_size", "encoder_hidden_size"))
    return torch.randn(_BATCH, _TOKENS, next(filter(None, widths), config.hidden_size), generator=generator)


def _is_text(config: Any) -> bool:
    return getattr(config, "vocab_size", None) is not None or _has_two_towers(config)


def _has_two_towers(config: Any) -> bool:
    """Return whether the model compares texts with images."""
    has_both = hasattr(config, "vision_config") and hasattr(config, "text_config")
    return has_both and not _reads_images_as_tokens(config)


def _reads_images_as_tokens(config: Any) -> bool:
    return any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))


def _length(module: nn.Module) -> int:
    """Return the number of tokens: more where only those experts run that the text chooses, so that it reaches all."""
    config: Any = module.config
    runs_all = getattr(module, "_can_set_experts_implementation", lambda: True)
    return _TOKENS if runs_all() else min(_TOKENS * (getattr(config, "num_experts", None) or 1), _MOST_TOKENS)


def _text(module: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    text = config.get_text_config()
    special = (getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id"))
    # Special tokens would mask a position, or end the text.
    lowest = max((token + 1 for token in special if isinstance(token, int) and token < text.vocab_size // 2), default=0)
    return torch.randint(lowest, text.vocab_size, (_BATCH, _length(module)), generator=generator)


def _tokens(module: nn.Module, config: Any, arguments: set[str], generator: torch.Generator) -> dict[str, Tensor]:
    tokens = _text(module, _part(config, "encoder"), generator)
    if config.is_encoder_decoder and getattr(config, "eos_token_id", None) is not None:
        # Classifiers of sequences read the state at the end of the text.
        tokens[:, -1] = config.eos_token_id
    if type(module).__name__.endswith("ForMultipleChoice"):
        tokens = torch.stack([tokens, tokens.flip(1)], dim=1)
    inputs = {"input_ids": tokens}
    if "bbox" in arguments:
        corners = torch.randint(0, 100, (*tokens.shape, 2), generator=generator)
        inputs["bbox"] = torch.cat([corners, corners + 20], dim=-1)
    return inputs


def _image(config: Any, generator: torch.Generator) -> Tensor:
    vision = _part(config, "vision_config", "encoder")
    size = getattr(vision, "image_size", None) or getattr(vision, "input_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape: tuple[int, ...] = (getattr(vision, "num_channels", 3), height, width)
    frames = getattr(vision, "num_frames", None)
    if frames is not None:
        shape = (frames, *shape)
    return torch.randn(_BATCH, *shape, generator=generator)


def _spectrum(config: Any, generator: torch.Generator) -> Tensor:
    config = _part(config, "encoder")
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        shape: tuple[int, ...] = (config.num_mel_bins, 2 * config.max_source_positions)
    else:
        shape = (32, int(getattr(config, "feature_projection_input_dim", 0) or getattr(config, "num_mel_bins", 80)))
    return torch.randn(_BATCH, *shape, generator=generator)


def _sound(config: Any, generator: torch.Generator) -> Tensor:
    config = _part(config, "encoder")
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        shape: tuple[int, ...] = (config.max_length, config.num_mel_bins)
    else:
        shape = (800,)
    return torch.randn(_BATCH, *shape, generator=generator)
