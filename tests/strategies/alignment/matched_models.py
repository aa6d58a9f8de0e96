"""Tiny models of every family and every kind of layer, each with data on which it can be trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.architectures.library_models import random_model
from tests.architectures.plain_modules import MODULES, graphs, pairs, rows, sequences, signals, tokens
from tests.architectures.plain_modules import images as pictures
from tests.strategies.symmetry.tiny_transformers import MODELS as LIBRARY

CLASSES = 4
WIDTH = 8
TOKENS = 31
EXAMPLES = 12
BATCHES = 2

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A model and its data.

    Attributes:
        make: gives the model with random parameters, in double precision.
        inputs: gives as many random inputs as asked for.
        targets: gives random targets for as many inputs.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Inputs]
    targets: Callable[[int, torch.Generator], Tensor]

    def model(self, seed: int = 0) -> nn.Module:
        """The model, in evaluation mode."""
        torch.manual_seed(seed)
        return self.make().double().eval()

    def batches(self, seed: int) -> list[tuple[Inputs, Tensor]]:
        """Batches that are the same for the same seed."""
        draw = torch.Generator().manual_seed(seed)
        return [(self.inputs(EXAMPLES, draw), self.targets(EXAMPLES, draw)) for _ in range(BATCHES)]


class Attention(nn.Module):
    """torch's own attention, whose projections are one tensor, read at the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


class Encoder(nn.Module):
    """torch's own encoder of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 10, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.first(x)).mean(1))


class Recurrent(nn.Module):
    """A recurrent network that is read at its last step."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body, self.head = kind(5, WIDTH, 2, batch_first=True), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Convolutions(nn.Module):
    """Convolutions with BatchNorm and one of as many groups as channels or of two, then a flatten."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(2, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=groups), nn.BatchNorm2d(WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, 6, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(6 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Gated(nn.Module):
    """Gated linear units of two kinds: two layers, and the halves of one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 6)
        self.both, self.head = nn.Linear(6, 2 * WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(F.glu(self.both(x), -1))


class Experts(nn.Module):
    """Experts that are stacked in one tensor, with a soft gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 3)
        self.up, self.down = (nn.Parameter(torch.randn(3, *shape)) for shape in ((5, WIDTH), (WIDTH, CLASSES)))

    def forward(self, x: Tensor) -> Tensor:
        each = torch.einsum("bi,eih->beh", x, self.up).relu()
        return torch.einsum("beh,ehc,be->bc", each, self.down, self.gate(x).softmax(-1))


class Tied(nn.Module):
    """A token table that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 10)
        self.back = nn.Linear(10, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return F.linear(x + self.back(self.body(x).tanh()), self.table.weight)


class Normed(nn.Module):
    """Group and layer norms between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.SiLU(), nn.Conv2d(6, 4, 1), nn.GroupNorm(1, 4), nn.GELU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(16)),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Contrast(nn.Module):
    """Two towers of the library, whose answer is how well each text fits each image."""

    def __init__(self, towers: nn.Module) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.towers(input_ids, pixel_values).logits_per_image


def _noise(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, draw: torch.randn(count, *shape, generator=draw, dtype=torch.float64)


def _numbers(most: int, *shape: int, least: int = 0) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, draw: torch.randint(least, most, (count, *shape), generator=draw)


def _edges(count: int, draw: torch.Generator) -> Tensor:
    """Return a random graph in which every node is its own neighbour, as numbers."""
    return (torch.rand(count, count, generator=draw) < 0.5).double().fill_diagonal_(1)


def _named(**inputs: Callable[[int, torch.Generator], Tensor]) -> Callable[[int, torch.Generator], Inputs]:
    return lambda count, draw: {name: each(count, draw) for name, each in inputs.items()}


def _plain(make: Callable[[], nn.Module], *shape: int) -> Example:
    return Example(make, _noise(*shape), _numbers(CLASSES))


def _module(name: str) -> Example:
    """Return a module whose outputs are classes."""
    classes = 2 if MODULES[name].inputs is pairs else 3
    return Example(MODULES[name].make, _SHAPES[MODULES[name].inputs], _numbers(classes))


def _library(model_type: str, architecture: str, inputs: Any, targets: Any) -> Example:
    return Example(partial(random_model, model_type, architecture), inputs, targets)


def _language(model_type: str, architecture: str) -> Example:
    """Return a model of the library that predicts tokens."""
    # The lowest tokens are special ones, which would mask a position.
    return _library(model_type, architecture, _named(input_ids=_numbers(60, 6, least=3)), _numbers(60, 6))


def _vision(model_type: str, architecture: str) -> Example:
    return _library(model_type, architecture, _named(pixel_values=_noise(3, 32, 32)), _numbers(2))


def _text(name: str, length: int = 6, **more: Callable[[int, torch.Generator], Tensor]) -> Example:
    targets = next(iter(more.values())) if more else _numbers(TOKENS, length)
    return Example(LIBRARY[name].make, _named(input_ids=_numbers(TOKENS, length), **more), targets)


PLAIN: Mapping[str, Example] = {
    "mlp": _plain(lambda: nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)), 5),
    "attention": _plain(Attention, 3, 5),
    "encoder": _plain(Encoder, 3, 5),
    "lstm": _plain(lambda: Recurrent(nn.LSTM), 4, 5),
    "gru": _plain(lambda: Recurrent(nn.GRU), 4, 5),
    "depthwise": _plain(lambda: Convolutions(WIDTH), 2, 6, 6),
    "grouped": _plain(lambda: Convolutions(2), 2, 6, 6),
    "norms": _plain(Normed, 2, 5, 5),
    "gated": _plain(Gated, 5),
    "experts": _plain(Experts, 5),
    "tied": Example(Tied, _numbers(TOKENS, 5), _numbers(TOKENS, 5)),
}

FAMILIES: Mapping[str, Example] = {
    "gpt2": _text("gpt2"),
    "llama": _text("llama"),
    "qwen3": _text("qwen3"),
    "gpt_neox": _text("gpt_neox"),
    "bert": _text("bert"),
    "deberta_v2": _text("deberta_v2"),
    "t5": _text("t5", decoder_input_ids=_numbers(TOKENS, 4)),
    "mixtral": _text("mixtral"),
    "vit": Example(LIBRARY["vit"].make, _named(pixel_values=_noise(3, 8, 8)), _numbers(5)),
}

_SHAPES: Mapping[Any, Callable[[int, torch.Generator], Inputs]] = {
    rows: _noise(8),
    pictures: _noise(3, 16, 16),
    tokens: _numbers(30, 7),
    sequences: _noise(6, 8),
    signals: _noise(3, 32),
    pairs: _named(x=_noise(8), y=_noise(8)),
    graphs: _named(x=_noise(8), y=_edges),
}

# Kinds of layer among the plain modules that end in classes.
_KINDS = (
    *("maxout", "bilinear", "prelu per unit", "rms norm", "instance norm", "weight norm", "spectral norm"),
    *("convolution in one dimension", "channel shuffle", "dense connections", "squeeze and excitation"),
    *("lstm in both directions", "lstm with projection", "gru in both directions", "rnn", "lstm cell", "gru cell"),
    *("state space", "attention fused", "attention interleaved", "attention by einsum", "attention with shared keys"),
    *("attention with relative positions", "decoder of torch", "class token", "shared layers", "positions"),
    *("siamese concatenation", "film", "highway", "splines", "matrix by hand"),
    *("graph convolution", "graph attention"),
)

KINDS: Mapping[str, Example] = {name.replace(" ", "_"): _module(name) for name in _KINDS}

FURTHER: Mapping[str, Example] = {
    **{name: _text(name) for name in ("roberta", "distilbert", "mistral", "qwen2")},
    "two_towers": Example(MODULES["two towers"].make, _SHAPES[pairs], _numbers(EXAMPLES)),
    "clip": Example(
        lambda: Contrast(LIBRARY["clip"].make()),
        _named(input_ids=_numbers(TOKENS, 6), pixel_values=_noise(3, 8, 8)),
        _numbers(EXAMPLES),
    ),
    "mamba": _language("mamba", "MambaForCausalLM"),
    "falcon": _language("falcon", "FalconForCausalLM"),
    "deepseek_v3": _language("deepseek_v3", "DeepseekV3ForCausalLM"),
    "qwen2_moe": _language("qwen2_moe", "Qwen2MoeForCausalLM"),
    "phi3": _language("phi3", "Phi3ForCausalLM"),
    "gemma3": _language("gemma3_text", "Gemma3ForCausalLM"),
    "olmo2": _language("olmo2", "Olmo2ForCausalLM"),
    "bloom": _language("bloom", "BloomForCausalLM"),
    "opt": _language("opt", "OPTForCausalLM"),
    "granite": _language("granite", "GraniteForCausalLM"),
    "modernbert": _language("modernbert", "ModernBertForMaskedLM"),
    "albert": _language("albert", "AlbertForMaskedLM"),
    "electra": _language("electra", "ElectraForMaskedLM"),
    "xlm-roberta": _language("xlm-roberta", "XLMRobertaForMaskedLM"),
    "bart": _library(
        *("bart", "BartForConditionalGeneration"),
        _named(input_ids=_numbers(60, 6, least=3), decoder_input_ids=_numbers(60, 4, least=3)),
        _numbers(60, 4),
    ),
    "whisper": _library(
        *("whisper", "WhisperForConditionalGeneration"),
        _named(input_features=_noise(8, 32), decoder_input_ids=_numbers(60, 4, least=3)),
        _numbers(60, 4),
    ),
    "swin": _vision("swin", "SwinForImageClassification"),
    "convnext": _vision("convnext", "ConvNextForImageClassification"),
    "resnet": _vision("resnet", "ResNetForImageClassification"),
    "dinov2": _vision("dinov2", "Dinov2ForImageClassification"),
}

EXAMPLES_BY_NAME: Mapping[str, Example] = {**PLAIN, **KINDS, **FAMILIES, **FURTHER}
# Models whose outputs compare the examples of a batch, which therefore have no likelihood of their own.
COMPARING = ("two_towers", "clip", "graph_convolution", "graph_attention")
NAMES: Sequence[str] = tuple(EXAMPLES_BY_NAME)
