"""Small models of every family that tracing must follow."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp() -> nn.Module:
    return nn.Sequential(*(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.PReLU(7), nn.Linear(7, 3)))


class ConvNet(nn.Module):
    """BatchNorm, pooling, and a flatten that gives every channel a run of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 6, 2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6 * 2 * 2, 9)
        self.fc2 = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.dropout(torch.tanh(self.bn2(self.conv2(x))), 0.5, self.training)
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += self.skip(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, 1, 1)
        self.block1 = Residual(4, 4, 1)
        self.block2 = Residual(4, 6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(self.stem(x))).mean(dim=(2, 3)))


class Bottleneck(nn.Module):
    """A block of ResNeXt, or with as many groups as channels of MobileNet: narrow, by groups, wide."""

    def __init__(self, channels: int, width: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or out != channels:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn1(self.narrow(x)))
        y = self.bn3(self.wide(F.hardswish(self.bn2(self.grouped(y)))))
        return F.relu(y + self.skip(x))


class Bottlenecks(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4))
        self.block1 = Bottleneck(4, 6, 4, 1, groups)
        self.block2 = Bottleneck(4, 6, 8, 2, groups)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def group_norm_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.SiLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Conv2d(6, 4, 1), nn.GroupNorm(1, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)),
    )


class DepthwiseNet(nn.Module):
    """Depthwise, squeeze and excitation, two outputs a channel, LayerNorm over (C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.squeeze = nn.Linear(4, 3)
        self.excite = nn.Linear(3, 4)
        self.wider = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm((8, 4, 4))
        self.inner = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(x))
        gate = self.excite(self.squeeze(x.mean((2, 3))).tanh()).sigmoid()
        x = self.norm(self.wider(x * gate[:, :, None, None]))
        return self.head(F.silu(self.inner(x.amax((2, 3)))))


def layer_norm_mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6), nn.RMSNorm(6)),
        *(nn.Softmax(dim=-1), nn.Linear(6, 3)),
    )


class Twice(nn.Module):
    """One module called twice: what it reads and what it writes is one space."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.again(torch.relu(self.again(self.first(x))))))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 7)
        self.back = nn.Linear(7, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.back(F.gelu(self.hidden(self.norm(x)))))


class LinearResidual(nn.Module):
    """A single Linear around a skip: its weight carries the space on both axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + 0.5 * F.relu(self.inner(x)))


class Branches(nn.Module):
    """Two branches multiplied, then a concatenation and a parameter used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 6)
        self.right = nn.Linear(5, 6)
        self.product = nn.Linear(6, 4)
        self.other = nn.Linear(4, 4)
        self.mixed = nn.Linear(8, 7)
        self.scale = nn.Parameter(torch.randn(7))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(F.silu(self.left(x)) * self.right(x))
        z = torch.cat([y, self.other(y)], dim=1)
        return self.head(self.mixed(z) * self.scale)


class HandNormalised(nn.Module):
    """A layer normalisation written by hand, one-dimensional convolutions, and a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3)
        self.inner = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-3).sqrt()
        return self.head(torch.relu(self.inner(x))[:, 0])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), self.key(x), self.value(x))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, bias=bias)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Rows of an 8x8 digit are tokens; two pre-norm blocks, mean over the tokens."""

    def __init__(self, width: int = 32, heads: int = 4, *, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.positions = nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.Sequential(*(Block(width, heads, bias=bias) for _ in range(2)))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final_norm(self.blocks(self.embedding(x) + self.positions)).mean(1))


IMAGE = torch.zeros(2, 2, 6, 6)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, torch.zeros(3, 6)),
    "convnet": (ConvNet, IMAGE),
    "resnet": (ResNet, IMAGE),
    "resnext": (lambda: Bottlenecks(groups=3), IMAGE),
    "mobilenet": (lambda: Bottlenecks(groups=6), IMAGE),
    "group_norm": (group_norm_net, IMAGE),
    "depthwise": (DepthwiseNet, torch.zeros(2, 2, 4, 4)),
    "layer_norm": (layer_norm_mlp, torch.zeros(3, 5)),
    "twice": (Twice, torch.zeros(3, 5)),
    "tied": (Tied, torch.arange(10).reshape(2, 5)),
    "linear_residual": (LinearResidual, torch.zeros(3, 5)),
    "branches": (Branches, torch.zeros(3, 5)),
    "hand_normalised": (HandNormalised, torch.zeros(2, 3, 7)),
    "transformer": (Transformer, torch.zeros(2, 8, 8)),
}
