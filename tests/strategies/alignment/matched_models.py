"""Tiny models of every family and every kind of layer, each with data on which it can be trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def _noise(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, draw: torch.randn(count, *shape, generator=draw, dtype=torch.float64)


def _numbers(most: int, *shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, draw: torch.randint(most, (count, *shape), generator=draw)


def _named(**inputs: Callable[[int, torch.Generator], Tensor]) -> Callable[[int, torch.Generator], Inputs]:
    return lambda count, draw: {name: each(count, draw) for name, each in inputs.items()}


def _plain(make: Callable[[], nn.Module], *shape: int) -> Example:
    return Example(make, _noise(*shape), _numbers(CLASSES))


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

EXAMPLES_BY_NAME: Mapping[str, Example] = {**PLAIN, **FAMILIES}
NAMES: Sequence[str] = tuple(EXAMPLES_BY_NAME)
