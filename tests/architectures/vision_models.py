"""Models of timm and torchvision, made small by their own options, with what they are executed on.

Neither library is a dependency.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.architectures.proof import Verdict, examine

_SMALL_VIT = {"img_size": 64, "depth": 2}
_SMALL_SWIN = {"img_size": 64, "window_size": 2, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 24}
_SMALL_MIXER = {"img_size": 64}

# Options that make a model small, or that it needs.
_OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224"), _SMALL_VIT),
    **dict.fromkeys(("beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_dinov2"), _SMALL_VIT),
    **dict.fromkeys(("vit_base_patch16_siglip_224", "vit_base_patch16_clip_224", "cait_xxs24_224"), _SMALL_VIT),
    "xcit_nano_12_p16_224": _SMALL_VIT,
    **dict.fromkeys(("mixer_s32_224", "gmlp_s16_224", "resmlp_12_224"), _SMALL_MIXER),
    **dict.fromkeys(("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"), _SMALL_SWIN),
    "googlenet": {"init_weights": False, "aux_logits": False},
    "vit_b_16": {"image_size": 64},
    "maxvit_t": {"input_size": (64, 64)},
}

# Its last layers would have nothing left of an image of 64.
_SIDE_OF_INCEPTION = 96

MODELS = {kind: (Path(__file__).parent / f"{kind}_models.txt").read_text().split() for kind in ("torchvision", "timm")}


def is_installed(kind: str) -> bool:
    """Return whether a library of models is installed."""
    return importlib.util.find_spec(kind) is not None and importlib.util.find_spec("torchvision") is not None


def build(kind: str, name: str) -> nn.Module:
    """Return a model with random parameters, in evaluation mode."""
    torch.manual_seed(0)
    if kind == "torchvision":
        import torchvision.models

        return getattr(torchvision.models, name)(weights=None, num_classes=5, **_OPTIONS.get(name, {})).eval()
    import timm

    return timm.create_model(name, pretrained=False, num_classes=5, **_OPTIONS.get(name, {})).eval()


def examine_vision_model(kind: str, name: str) -> Verdict:
    """Discover the symmetry of a model, and execute the model under random elements of it."""
    model = build(kind, name)
    side = _side(kind, name, model)
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return examine(f"{kind} {name}", model, [image], [[image.flip(0, 3) * 1.5]], lambda output: output)


def _side(kind: str, name: str, model: nn.Module) -> int:
    if name == "inception_v3":
        return _SIDE_OF_INCEPTION
    if "img_size" in _OPTIONS.get(name, {}) or kind == "torchvision":
        return 64
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
    return int(model.pretrained_cfg["input_size"][-1]) if fixed else 64
