"""Models of timm and torchvision, made small by their own options, with what they are executed on.

Neither library is a dependency. torchvision beside the CPU build of torch cannot load its compiled operators, whose
names must be declared before the import.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.architectures.proof import Verdict, examine

_SMALL_VIT = {"img_size": 64, "depth": 2}
_SMALL_SWIN = {"img_size": 64, "window_size": 2, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 24}
_SMALL_MIXER = {"img_size": 64, "num_blocks": 2}

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

MODELS = {
    "torchvision": ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "densenet121", "densenet169", "efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "mnasnet1_0", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "regnet_y_400mf", "regnet_x_400mf", "vgg11", "vgg11_bn", "alexnet", "convnext_tiny", "googlenet", "swin_t", "swin_v2_t", "vit_b_16", "maxvit_t"],
    "timm": ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224", "cait_xxs24_224", "crossvit_tiny_240", "mixer_s32_224", "gmlp_s16_224", "resmlp_12_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "xcit_nano_12_p16_224", "convnext_atto", "convnextv2_atto", "convmixer_768_32", "poolformer_s12", "resnet18", "resnet26d", "resnet10t", "seresnet18", "resnext26ts", "ecaresnet26t", "skresnet18", "res2net50_14w_8s", "resnest14d", "gcresnet33ts", "cspresnet50", "vovnet39a", "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mixnet_s", "lcnet_035", "tinynet_e", "fbnetc_100", "ghostnet_050", "hardcorenas_a", "semnasnet_075", "spnasnet_100", "mnasnet_small", "regnety_002", "regnetx_002", "regnetz_005", "densenet121", "dla34", "dpn48b", "hrnet_w18_small", "repvgg_a0", "repghostnet_050", "mobileone_s0", "vgg11", "inception_v3", "xception41", "nf_resnet26", "nfnet_l0", "eca_nfnet_l0", "selecsls42", "darknet17", "edgenext_xx_small", "fastvit_t8", "efficientformer_l1", "levit_128s", "mobilevit_xxs", "coatnet_nano_rw_224", "maxvit_pico_rw_256", "pvt_v2_b0", "twins_svt_small", "visformer_tiny", "pit_ti_224", "tnt_s_patch16_224", "convit_tiny", "coat_tiny", "focalnet_tiny_srf", "inception_next_atto", "rdnet_tiny", "starnet_s1", "repvit_m0_9", "hgnet_tiny", "tiny_vit_5m_224"],
}


def is_installed(kind: str) -> bool:
    """Return whether a library of models is installed."""
    return importlib.util.find_spec(kind) is not None and importlib.util.find_spec("torchvision") is not None


def build(kind: str, name: str) -> nn.Module:
    """Return a model with random parameters, in evaluation mode."""
    _declare_operators()
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
    if "img_size" in _OPTIONS.get(name, {}) or kind == "torchvision":
        return 64
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
    return int(model.pretrained_cfg["input_size"][-1]) if fixed else 64


_LIBRARY: list[torch.library.Library] = []


def _declare_operators() -> None:
    """Declare the operators that torchvision registers shapes for, where its compiled library does not fit torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        spec = importlib.util.find_spec("torchvision")
        assert spec is not None
        assert spec.origin is not None
        source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in dict.fromkeys(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', source)):
            _LIBRARY[0].define(f"{name}(Tensor a) -> Tensor")
