"""No architecture is broken, and what does not move is told: a sample by default, all by `make architectures`."""

import pytest

from tests.architectures.library_configs import MODEL_TYPES, architectures_of
from tests.architectures.library_models import examine_architecture
from tests.architectures.plain_modules import MODULES, examine_module
from tests.architectures.proof import Verdict
from tests.architectures.vision_models import MODELS, examine_vision_model, is_installed

# One of each kind: fused and grouped attention, experts, state spaces, latent attention, windows, cross attention,
# convolutions, tied and shared layers.
SAMPLE = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForPreTraining",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "phi3": "Phi3ForCausalLM",
    "falcon": "FalconForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "bloom": "BloomForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mamba": "MambaForCausalLM",
    "swin": "SwinForImageClassification",
    "convnext": "ConvNextForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
    "albert": "AlbertForMaskedLM",
    "clip": "CLIPModel",
    "yolos": "YolosForObjectDetection",
}
PLAIN_SAMPLE = {
    *(
        "activation relu",
        "gated by chunks",
        "batch norm",
        "weight norm",
        "channel shuffle",
        "unet",
        "dense connections",
    ),
    *("lstm", "gru cell", "attention interleaved", "attention with shared keys", "attention with relative positions"),
    *("siamese concatenation", "graph attention", "experts", "rolled", "weighted by place", "index buffer"),
    "decision by data",
}


def require(verdict: Verdict, least: float = 0) -> None:
    assert not verdict.is_broken, verdict.row()
    assert verdict.coverage >= least, verdict.row()
    # What does not move has a reason, and so has a refusal.
    assert verdict.coverage >= 0.95 or verdict.reason, verdict.row()


@pytest.mark.parametrize(("kind", "name"), SAMPLE.items())
@pytest.mark.filterwarnings("ignore")
def test_a_transformer_keeps_its_function(kind: str, name: str) -> None:
    require(examine_architecture(kind, name))


# By type, because a list of all heads imports every model of the library.
@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.filterwarnings("ignore")
def test_every_head_of_a_transformer_keeps_its_function(kind: str) -> None:
    verdicts = [examine_architecture(kind, name) for name in architectures_of(kind)]
    assert verdicts
    for verdict in verdicts:
        require(verdict)


def test_there_are_enough_types_of_transformers() -> None:
    assert len(set(MODEL_TYPES)) >= 120
    assert set(MODEL_TYPES) >= SAMPLE.keys()


@pytest.mark.parametrize(
    "name", [name if name in PLAIN_SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]
)
@pytest.mark.filterwarnings("ignore")
def test_a_plain_module_keeps_its_function(name: str) -> None:
    require(examine_module(name), MODULES[name].least)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in MODELS for name in MODELS[kind]])
@pytest.mark.filterwarnings("ignore")
def test_a_vision_model_keeps_its_function(kind: str, name: str) -> None:
    if not is_installed(kind):
        pytest.skip(f"{kind} is not installed: pip install --no-deps timm torchvision")
    require(examine_vision_model(kind, name))
