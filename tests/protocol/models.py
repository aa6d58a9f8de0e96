"""The models: a perceptron, convolutional and recurrent networks, small transformers, Flower's quickstart, adapted ones."""

from collections.abc import Callable
from math import prod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from fedbasin import BucketedFeatures, DeepAnalytic, RandomFeatures
from tests.protocol.spec import SpecError
from tests.protocol.task import Task

Make = Callable[[Task], nn.Module]


def mlp(width: int = 256) -> Make:
    """Two hidden layers of `width` units."""

    def make(task: Task) -> nn.Module:
        if task.tokens:
            raise SpecError("mlp reads numbers, and this task has tokens; choose transformer")
        inputs = prod(task.shape)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, task.classes),
        )

    return make


def cnn() -> Make:
    """Three convolutions (16, 32, 32), two poolings, a hidden layer of 128; from 8x8 pixels on."""
    return lambda task: nn.Sequential(*_convolutions(task, norm=False))


def cnn_norm() -> Make:
    """The same with BatchNorm after every convolution."""
    return lambda task: nn.Sequential(*_convolutions(task, norm=True))


def small_cnn() -> Make:
    """Two convolutions (16, 32), one pooling, a hidden layer of 64: for digits."""

    def make(task: Task) -> nn.Module:
        channels, side = _image(task)
        return nn.Sequential(
            *_convolution(channels, 16, norm=False),
            *_convolution(16, 32, norm=False),
            nn.MaxPool2d(2),
            *_read_out(32 * (side // 2) ** 2, 64, task.classes),
        )

    return make


def segmenter() -> Make:
    """Three convolutions and one of a pixel, which gives each pixel its classes."""

    def make(task: Task) -> nn.Module:
        channels, _ = _image(task)
        layers = [*_convolution(channels, 16, norm=False), *_convolution(16, 32, norm=False)]
        return nn.Sequential(*layers, *_convolution(32, 32, norm=False), nn.Conv2d(32, task.classes, 1))

    return make


def resnet(width: int = 16) -> Make:
    """A convolution and two residual blocks with BatchNorm, the second with twice the channels; a mean over pixels."""

    def make(task: Task) -> nn.Module:
        channels, _ = _image(task)
        return nn.Sequential(
            *_convolution(channels, width, norm=True),
            Residual(width, width),
            Residual(width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, task.classes),
        )

    return make


def quickstart() -> Make:
    """The network of Flower's PyTorch quickstart: two convolutions, three linear layers, for colour images of 32x32."""

    def make(task: Task) -> nn.Module:
        if task.shape != (3, 32, 32):
            raise SpecError(f"quickstart reads colour images of 32x32, and an input has shape {list(task.shape)}")
        # The quickstart's own Net takes views, which the layout that `experiment` gives convolutions does not have.
        return nn.Sequential(
            *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            *(nn.Linear(400, 120), nn.ReLU()),
            *(nn.Linear(120, 84), nn.ReLU()),
            nn.Linear(84, task.classes),
        )

    return make


def lstm(width: int = 48) -> Make:
    """One layer of an LSTM on series or tokens; a linear layer reads its last state."""
    return lambda task: Lstm(task, width)


def gpt2(width: int = 32, blocks: int = 2) -> Make:
    """A tiny GPT-2 of `transformers` with random weights, whose last layer is the table of its embeddings."""

    def make(task: Task) -> nn.Module:
        from tests.protocol.gpt2 import Gpt2  # brings transformers, which takes seconds

        return Gpt2(task, width, blocks)

    return make


def random_features(width: int = 1024) -> Make:
    """One frozen random layer of ReLUs; only its last layer can be learned."""

    return lambda task: RandomFeatures(_numbers("random_features", task), task.classes, width)


def bucketed_features(width: int = 1024, bits: int = 2) -> Make:
    """Frozen random buckets, one-hot; only the last layer can be learned."""
    return lambda task: BucketedFeatures(_numbers("bucketed_features", task), task.classes, width, bits)


def deep_analytic(width: int = 512, depth: int = 3) -> Make:
    """Residual blocks of random features, which the recipe `deep-analytic` fits."""
    return lambda task: DeepAnalytic(_numbers("deep_analytic", task), task.classes, width, depth)


def transformer(width: int = 32, heads: int = 4, blocks: int = 2) -> Make:
    """Pre-norm blocks on tokens, on the rows of an image, or on a vector cut into eight."""
    return lambda task: Transformer(task, width, heads, blocks)


def lora(rank: int = 16, width: int = 256) -> Make:
    """The perceptron, pretrained on half of the classes; only adapters of its three layers are trained and travel."""
    base = mlp(width)

    def make(task: Task) -> nn.Module:
        from tests.protocol.adapted import adapted  # brings peft, which takes seconds

        return adapted(base, task, rank)

    return make


def lora_bert(rank: int = 8) -> Make:
    """The same of a tiny BERT of `transformers`, on tokens."""

    def make(task: Task) -> nn.Module:
        from tests.protocol.adapted import Bert, adapted

        return adapted(Bert, task, rank)

    return make


def _convolutions(task: Task, *, norm: bool) -> list[nn.Module]:
    channels, side = _image(task)
    return [
        *_convolution(channels, 16, norm=norm),
        nn.MaxPool2d(2),
        *_convolution(16, 32, norm=norm),
        *_convolution(32, 32, norm=norm),
        nn.MaxPool2d(2),
        *_read_out(32 * (side // 4) ** 2, 128, task.classes),
    ]


def _convolution(before: int, after: int, *, norm: bool) -> list[nn.Module]:
    middle = [nn.BatchNorm2d(after)] if norm else []
    return [nn.Conv2d(before, after, 3, padding=1), *middle, nn.ReLU()]


def _read_out(inputs: int, hidden: int, classes: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes)]


def _numbers(name: str, task: Task) -> int:
    """Return the number of numbers in an example."""
    if task.tokens or task.kind in ("pixels", "language-modelling"):
        raise SpecError(f"{name} reads numbers and gives one row for an example; choose another model")
    return prod(task.shape)


def _image(task: Task) -> tuple[int, int]:
    if task.tokens or len(task.shape) != 3:
        raise SpecError(f"a convolution needs images, and an input has shape {list(task.shape)}")
    return task.shape[0], task.shape[1]


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a way around them, which halves the pixels where channels double."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = after // before
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.around = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Float[Tensor, "batch before row column"]) -> Float[Tensor, "batch after low narrow"]:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.around(x))


class Lstm(nn.Module):
    """Logits from the last state."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        if not task.tokens and len(task.shape) != 2:
            raise SpecError(f"lstm reads tokens or series, and an input has shape {list(task.shape)}")
        self.read = nn.Embedding(task.tokens, width) if task.tokens else nn.Identity()
        self.lstm = nn.LSTM(width if task.tokens else task.shape[1], width, batch_first=True)
        self.head = nn.Linear(width, task.classes)

    def forward(self, x: Shaped[Tensor, "batch time ..."]) -> Float[Tensor, "batch classes"]:
        return self.head(self.lstm(self.read(x))[0][:, -1])


class Attention(nn.Module):
    """Every place reads from every place."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch place width"]) -> Float[Tensor, "batch place width"]:
        parts = (layer(x) for layer in (self.query, self.key, self.value))
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.output(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Every place for itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Float[Tensor, "batch place width"]) -> Float[Tensor, "batch place width"]:
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    """Attention, then an MLP, each read through a norm and added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Float[Tensor, "batch place width"]) -> Float[Tensor, "batch place width"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Logits from the mean over all places; parts are named as `strategies.symmetry.transformer` names them."""

    def __init__(self, task: Task, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.places = task.shape[-1] if task.tokens else 8
        self.embedding: nn.Module
        if task.tokens:
            self.embedding = nn.Embedding(task.tokens, width)
        else:
            self.embedding = nn.Linear(prod(task.shape) // 8, width)
        self.positions = nn.Parameter(0.1 * torch.randn(self.places, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.final_norm, self.head = nn.LayerNorm(width), nn.Linear(width, task.classes)
        self.tokens = task.tokens

    def forward(self, x: Shaped[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        places = x if self.tokens else x.flatten(1).unflatten(1, (self.places, -1))
        stream = self.blocks(self.embedding(places) + self.positions)
        return self.head(self.final_norm(stream.mean(1)))


MODELS: dict[str, Callable[..., Make]] = {
    "mlp": mlp,
    "cnn": cnn,
    "cnn_norm": cnn_norm,
    "small_cnn": small_cnn,
    "random_features": random_features,
    "bucketed_features": bucketed_features,
    "deep_analytic": deep_analytic,
    "segmenter": segmenter,
    "resnet": resnet,
    "quickstart": quickstart,
    "lstm": lstm,
    "gpt2": gpt2,
    "transformer": transformer,
    "lora": lora,
    "lora_bert": lora_bert,
}
