"""Plain torch modules of every kind of layer, with what they are executed on.

Each module is small and stands for its kind; a module whose units must stay in their places is among them too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.architectures.proof import Verdict, examine


class Net(nn.Module):
    """A module from named layers and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class PairNet(Net):
    """A net that reads two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(self, x, y)


@dataclass(frozen=True)
class Case:
    """A module, its inputs, and the least share of its parameters that must move."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], list[Tensor]]
    least: float = 0.95


def rows() -> list[Tensor]:
    return [torch.randn(4, 8)]


def images() -> list[Tensor]:
    return [torch.randn(2, 3, 16, 16)]


def tokens() -> list[Tensor]:
    return [torch.randint(30, (2, 7))]


def sequences() -> list[Tensor]:
    return [torch.randn(2, 6, 8)]


def signals() -> list[Tensor]:
    return [torch.randn(2, 3, 32)]


def pairs() -> list[Tensor]:
    return [torch.randn(4, 8), torch.randn(4, 8)]


def graphs() -> list[Tensor]:
    return [torch.randn(6, 8), (torch.rand(6, 6) > 0.5).double().float() + torch.eye(6)]


def linear(inner: Callable[[Tensor], Tensor], width: int = 16, read: int | None = None) -> Callable[[], nn.Module]:
    """Two linear layers with a function between them."""
    return lambda: Net(lambda m, x: m.b(inner(m.a(x))), a=nn.Linear(8, width), b=nn.Linear(read or width, 3))


def normed(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A convolution, a normalisation of its channels and a head."""
    return lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3), norm(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
    )


def hooked(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """Three linear layers, of which two have a parametrised weight."""
    return lambda: nn.Sequential(
        wrap(nn.Linear(8, 16)), nn.ReLU(), wrap(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 3)
    )


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    """An embedding, a recurrent network and a head that reads its last state."""
    width = 12 * (2 if options.get("bidirectional") else 1)

    def run(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.relu(m.f(m.r(m.e(x))[0][:, -1])))

    return lambda: Net(
        run,
        e=nn.Embedding(30, 16),
        r=kind(16, 12, batch_first=True, **options),
        f=nn.Linear(options.get("proj_size", 0) or width, 8),
        o=nn.Linear(8, 3),
    )


def cells(kind: type[nn.RNNCellBase], states: int) -> Callable[[], nn.Module]:
    """A recurrent cell that is applied step by step."""

    def run(m: Any, x: Tensor) -> Tensor:
        state = tuple(x.new_zeros(len(x), 12) for _ in range(states))
        for step in x.unbind(1):
            result = m.c(step, state if states > 1 else state[0])
            state = result if states > 1 else (result,)
        return m.o(state[0])

    return lambda: Net(run, c=kind(8, 12), o=nn.Linear(12, 3))


def heads(x: Tensor, count: int = 4) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(m: Any, x: Tensor) -> Tensor:
    """Attention with separate projections."""
    return F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x))).transpose(1, 2).flatten(2)


def attending(run: Callable[..., Tensor], **layers: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A stream of 16 units with attention on it."""
    return lambda: Net(
        run,
        i=nn.Linear(8, 16),
        p=nn.Linear(16, 16),
        o=nn.Linear(16, 3),
        **{name: layer() for name, layer in layers.items()},
    )


def _separate(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    return m.o((h + m.p(attention(m, h))).mean(1))


def _fused(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    q, k, v = m.qkv(h).chunk(3, -1)
    a = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True).transpose(1, 2).flatten(2)
    return m.o((h + m.p(a)).mean(1))


def _interleaved(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    q, k, v = m.qkv(h).view(*h.shape[:2], 4, 12).transpose(1, 2).chunk(3, -1)
    return m.o((h + m.p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))).mean(1))


def _by_hand(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    scores = torch.softmax(heads(m.q(h)) @ heads(m.k(h)).mT / 2, -1)
    return m.o((h + m.p((scores @ heads(m.v(h))).transpose(1, 2).flatten(2))).mean(1))


def _einsum(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    q, k, v = (layer(h).view(*h.shape[:2], 4, 4) for layer in (m.q, m.k, m.v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return m.o((h + m.p(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))).mean(1))


def _queries(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    q, k, v = heads(m.q(h)), heads(m.k(h), 2), heads(m.v(h), 2)
    a = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    return m.o((h + m.p(a)).mean(1))


def _relative(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    bias = m.table[m.index]
    a = F.scaled_dot_product_attention(heads(m.q(h)), heads(m.k(h)), heads(m.v(h)), bias.movedim(-1, 0)[None])
    return m.o((h + m.p(a.transpose(1, 2).flatten(2))).mean(1))


def _unet(m: Any, x: Tensor) -> Tensor:
    a = F.relu(m.a(x))
    b = F.relu(m.c(F.relu(m.b(F.max_pool2d(a, 2)))))
    return m.o(F.relu(m.d(torch.cat([m.up(b), a], 1))))


def _dense(m: Any, x: Tensor) -> Tensor:
    a = F.relu(m.a(x))
    b = torch.cat([a, F.relu(m.b(a))], 1)
    return m.o(torch.cat([b, F.relu(m.c(b))], 1).mean((2, 3)))


def _mixer(m: Any, x: Tensor) -> Tensor:
    x = m.p(x).flatten(2).transpose(1, 2)
    x = x + m.t2(F.gelu(m.t1(m.n1(x).transpose(1, 2)))).transpose(1, 2)
    return m.h((x + m.c2(F.gelu(m.c1(m.n2(x))))).mean(1))


def _excitation(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    gate = torch.sigmoid(m.f2(F.relu(m.f1(h.mean((2, 3))))))
    return m.o((h * gate[:, :, None, None]).mean((2, 3)))


def _shuffle(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.o(m.b(h.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)).mean((2, 3)))


def _split(m: Any, x: Tensor) -> Tensor:
    left, right = F.relu(m.a(x)).split([4, 12], 1)
    return m.o(left.repeat(1, 3) * right)


def _experts(m: Any, x: Tensor) -> Tensor:
    gates = m.g(x).softmax(-1)
    hidden = F.relu(torch.einsum("bi,eji->bej", x, m.up))
    return m.o(torch.einsum("bej,ekj,be->bk", hidden, m.down, gates))


def _scan(m: Any, x: Tensor) -> Tensor:
    u, z = m.i(x).chunk(2, -1)
    state = u.new_zeros(len(x), u.shape[-1])
    decay, states = torch.sigmoid(m.decay), []
    for step in u.unbind(1):
        state = decay * state + step
        states.append(state)
    return m.o((torch.stack(states, 1) * F.silu(z)).mean(1))


def _spline(m: Any, x: Tensor) -> Tensor:
    for weight in (m.w1, m.w2):
        x = torch.einsum("bik,oik->bo", torch.exp(-((x[..., None] - m.grid) ** 2)), weight)
    return x


def _graph_attention(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
    h = m.w(x)
    scores = F.leaky_relu((h @ m.left)[:, None] + (h @ m.right)[None, :], 0.2)
    return m.o(F.elu(torch.softmax(scores.masked_fill(adjacency == 0, -1e9), -1) @ h))


def _tied(m: Any, x: Tensor) -> Tensor:
    h = m.e(x)
    return F.linear(h + m.b(F.relu(m.a(h))), m.e.weight)


def _shared(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    for _ in range(3):
        h = h + m.b(F.relu(m.a(h)))
    return m.o(h)


def _siamese(join: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.h(join(m.b(F.relu(m.a(x))), m.b(F.relu(m.a(y)))))

    return run


def siamese(join: Callable[[Tensor, Tensor], Tensor], width: int = 12) -> Callable[[], nn.Module]:
    """One encoder of two inputs, whose features are joined for a head."""
    return lambda: PairNet(_siamese(join), a=nn.Linear(8, 16), b=nn.Linear(16, 12), h=nn.Linear(width, 2))


def _highway(m: Any, x: Tensor) -> Tensor:
    h = m.i(x)
    gate = torch.sigmoid(m.t(h))
    return m.o(gate * F.relu(m.a(h)) + (1 - gate) * h)


def _film(m: Any, x: Tensor, y: Tensor) -> Tensor:
    scale, shift = m.c(y).chunk(2, -1)
    return m.o(F.relu(m.a(x) * (1 + scale) + shift))


def _autoencoder(m: Any, x: Tensor) -> Tensor:
    mean, spread = m.m(F.relu(m.a(x))), m.s(F.relu(m.a(x)))
    return m.o(F.relu(m.d(mean + torch.exp(0.5 * spread))))


def _positions(m: Any, x: Tensor) -> Tensor:
    return m.o((m.e(x) + m.p[: x.shape[1]]).mean(1))


def _class_token(m: Any, x: Tensor) -> Tensor:
    h = torch.cat([m.cls.expand(len(x), 1, -1), m.i(x)], 1) + m.pos
    return m.o(m.n(h + m.b(F.gelu(m.a(m.n1(h)))))[:, 0])


def vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


QKV = {"q": lambda: nn.Linear(16, 16), "k": lambda: nn.Linear(16, 16), "v": lambda: nn.Linear(16, 16)}

MODULES: dict[str, Case] = {
    # Units between two layers, and what stands between them.
    **{
        f"activation {f.__name__}": Case(linear(f), rows)
        for f in (F.relu, F.gelu, F.silu, F.elu, F.mish, F.softplus, torch.tanh, torch.sigmoid, torch.sin, torch.abs)
    },
    "linear twice": Case(linear(lambda h: h), rows),
    "prelu shared": Case(lambda: nn.Sequential(nn.Linear(8, 16), nn.PReLU(), nn.Linear(16, 3)), rows),
    "prelu per unit": Case(lambda: nn.Sequential(nn.Linear(8, 16), nn.PReLU(16), nn.Linear(16, 3)), rows),
    "softmax": Case(linear(lambda h: h.softmax(-1)), rows),
    "l2 normalised": Case(linear(lambda h: F.normalize(h, dim=-1)), rows),
    "clamp and power": Case(linear(lambda h: h.clamp(-1, 1) ** 2), rows),
    "dropout": Case(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)), rows),
    "glu": Case(linear(F.glu, 32, 16), rows),
    "gated by chunks": Case(linear(lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], 32, 16), rows),
    "maxout": Case(linear(lambda h: h.unflatten(-1, (16, 2)).amax(-1), 32, 16), rows),
    "gated by two layers": Case(
        lambda: Net(
            lambda m, x: m.d(F.silu(m.g(x)) * m.u(x)), g=nn.Linear(8, 16), u=nn.Linear(8, 16), d=nn.Linear(16, 3)
        ),
        rows,
    ),
    "bilinear": Case(
        lambda: Net(lambda m, x: m.o(F.relu(m.a(x, x))), a=nn.Bilinear(8, 8, 16), o=nn.Linear(16, 3)), rows
    ),
    # Norms.
    "batch norm": Case(normed(lambda: nn.BatchNorm2d(16)), images),
    "group norm": Case(normed(lambda: nn.GroupNorm(4, 16)), images),
    "group norm of one group": Case(normed(lambda: nn.GroupNorm(1, 16)), images),
    "instance norm": Case(normed(lambda: nn.InstanceNorm2d(16, affine=True)), images),
    "local response norm": Case(normed(lambda: nn.LocalResponseNorm(3)), images, 0),
    "layer norm": Case(lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)), rows),
    "rms norm": Case(lambda: nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 3)), rows),
    # Parametrised weights.
    "weight norm": Case(hooked(parametrizations.weight_norm), rows),
    "spectral norm": Case(hooked(parametrizations.spectral_norm), rows),
    "orthogonal weight": Case(hooked(parametrizations.orthogonal), rows, 0),
    # Convolutions.
    "convolution in one dimension": Case(
        lambda: Net(lambda m, x: m.o(F.relu(m.a(x)).mean(2)), a=nn.Conv1d(3, 16, 3), o=nn.Linear(16, 3)), signals
    ),
    "flattened convolution": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 3)), images
    ),
    "flattened steps": Case(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(2400, 3)),
        lambda: [torch.randn(2, 300, 8)],
    ),
    "depthwise convolutions that widen": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1),
            *(layer for n in (4, 8, 16) for layer in (nn.Conv2d(n, 2 * n, 3, groups=n), nn.ReLU())),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        images,
    ),
    "depthwise convolution": Case(
        lambda: Net(
            lambda m, x: m.o(m.d(F.relu(m.a(x))).mean((2, 3))),
            a=nn.Conv2d(3, 16, 3),
            d=nn.Conv2d(16, 16, 3, groups=16),
            o=nn.Linear(16, 3),
        ),
        images,
    ),
    "grouped convolution": Case(
        lambda: Net(
            lambda m, x: m.o(F.relu(m.d(F.relu(m.a(x)))).mean((2, 3))),
            a=nn.Conv2d(3, 16, 3),
            d=nn.Conv2d(16, 16, 3, groups=4),
            o=nn.Linear(16, 3),
        ),
        images,
    ),
    "channel shuffle": Case(
        lambda: Net(_shuffle, a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 16, 3, groups=4), o=nn.Linear(16, 3)), images
    ),
    "transposed convolution": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)
        ),
        images,
    ),
    "pixel shuffle": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 2, 1)), images
    ),
    "upsampling": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(8, 2, 1)), images
    ),
    "unet": Case(
        lambda: Net(
            _unet,
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 16, 3, padding=1),
            c=nn.Conv2d(16, 16, 3, padding=1),
            up=nn.ConvTranspose2d(16, 8, 2, 2),
            d=nn.Conv2d(16, 8, 3, padding=1),
            o=nn.Conv2d(8, 2, 1),
        ),
        images,
    ),
    "dense connections": Case(
        lambda: Net(
            _dense,
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 8, 3, padding=1),
            c=nn.Conv2d(16, 8, 3, padding=1),
            o=nn.Linear(24, 3),
        ),
        images,
    ),
    "squeeze and excitation": Case(
        lambda: Net(_excitation, a=nn.Conv2d(3, 16, 3), f1=nn.Linear(16, 4), f2=nn.Linear(4, 16), o=nn.Linear(16, 3)),
        images,
    ),
    "mixer": Case(
        lambda: Net(
            _mixer,
            p=nn.Conv2d(3, 24, 4, 4),
            n1=nn.LayerNorm(24),
            t1=nn.Linear(16, 32),
            t2=nn.Linear(32, 16),
            n2=nn.LayerNorm(24),
            c1=nn.Linear(24, 48),
            c2=nn.Linear(48, 24),
            h=nn.Linear(24, 5),
        ),
        images,
    ),
    # Recurrent networks.
    "lstm": Case(recurrent(nn.LSTM), tokens),
    "lstm in both directions": Case(recurrent(nn.LSTM, num_layers=2, bidirectional=True), tokens),
    "lstm with projection": Case(recurrent(nn.LSTM, proj_size=6), tokens),
    "gru": Case(recurrent(nn.GRU), tokens),
    "gru in both directions": Case(recurrent(nn.GRU, num_layers=2, bidirectional=True), tokens),
    "rnn": Case(recurrent(nn.RNN), tokens),
    "lstm cell": Case(cells(nn.LSTMCell, 2), sequences),
    "gru cell": Case(cells(nn.GRUCell, 1), sequences),
    "state space": Case(lambda: Net(_scan, i=nn.Linear(8, 24), decay=vector(12), o=nn.Linear(12, 3)), sequences),
    # Attention.
    "attention": Case(attending(_separate, **QKV), sequences),
    "attention fused": Case(attending(_fused, qkv=lambda: nn.Linear(16, 48)), sequences),
    "attention interleaved": Case(attending(_interleaved, qkv=lambda: nn.Linear(16, 48)), sequences),
    "attention by hand": Case(attending(_by_hand, **QKV), sequences),
    "attention by einsum": Case(attending(_einsum, **QKV), sequences),
    "attention with shared keys": Case(
        attending(_queries, q=QKV["q"], k=lambda: nn.Linear(16, 8), v=lambda: nn.Linear(16, 8)), sequences
    ),
    "attention with relative positions": Case(
        attending(
            _relative,
            **QKV,
            table=lambda: vector(11, 4),
            index=lambda: torch.arange(6)[:, None] - torch.arange(6)[None] + 5,
        ),
        sequences,
    ),
    "multihead attention of torch": Case(
        lambda: Net(
            lambda m, x: m.o(m.t(m.i(x), m.i(x), m.i(x))[0].mean(1)),
            i=nn.Linear(8, 16),
            t=nn.MultiheadAttention(16, 4, batch_first=True),
            o=nn.Linear(16, 3),
        ),
        sequences,
    ),
    "encoder of torch": Case(
        lambda: Net(
            lambda m, x: m.o(m.t(m.i(x)).mean(1)),
            i=nn.Linear(8, 16),
            t=nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2),
            o=nn.Linear(16, 3),
        ),
        sequences,
    ),
    "decoder of torch": Case(
        lambda: Net(
            lambda m, x: m.o(m.t(m.i(x), m.i(x)).mean(1)),
            i=nn.Linear(8, 16),
            t=nn.TransformerDecoderLayer(16, 4, 24, batch_first=True),
            o=nn.Linear(16, 3),
        ),
        sequences,
    ),
    "class token": Case(
        lambda: Net(
            _class_token,
            i=nn.Linear(8, 16),
            cls=vector(1, 1, 16),
            pos=vector(1, 7, 16),
            n1=nn.LayerNorm(16),
            n=nn.LayerNorm(16),
            a=nn.Linear(16, 24),
            b=nn.Linear(24, 16),
            o=nn.Linear(16, 3),
        ),
        sequences,
    ),
    # Shared and tied weights, several inputs, graphs.
    "tied embedding": Case(
        lambda: Net(_tied, e=nn.Embedding(30, 16), a=nn.Linear(16, 24), b=nn.Linear(24, 16)), tokens
    ),
    "shared layers": Case(
        lambda: Net(_shared, i=nn.Linear(8, 16), a=nn.Linear(16, 24), b=nn.Linear(24, 16), o=nn.Linear(16, 3)), rows
    ),
    "embedding bag": Case(lambda: Net(lambda m, x: m.o(m.e(x)), e=nn.EmbeddingBag(30, 16), o=nn.Linear(16, 3)), tokens),
    "positions": Case(lambda: Net(_positions, e=nn.Embedding(30, 16), p=vector(9, 16), o=nn.Linear(16, 3)), tokens),
    "siamese difference": Case(siamese(lambda a, b: (a - b).abs()), pairs),
    "siamese concatenation": Case(siamese(lambda a, b: torch.cat([a, b], 1), 24), pairs),
    "siamese product": Case(siamese(lambda a, b: a * b), pairs),
    "cosine similarity": Case(
        lambda: PairNet(
            lambda m, x, y: F.cosine_similarity(m.b(F.relu(m.a(x))), m.b(F.relu(m.a(y)))),
            a=nn.Linear(8, 16),
            b=nn.Linear(16, 12),
        ),
        pairs,
    ),
    "two towers": Case(
        lambda: PairNet(
            lambda m, x, y: m.b(F.relu(m.a(x))) @ m.d(F.relu(m.c(y))).mT,
            a=nn.Linear(8, 16),
            b=nn.Linear(16, 12),
            c=nn.Linear(8, 20),
            d=nn.Linear(20, 12),
        ),
        pairs,
    ),
    "film": Case(lambda: PairNet(_film, a=nn.Linear(8, 16), c=nn.Linear(8, 32), o=nn.Linear(16, 3)), pairs),
    "highway": Case(
        lambda: Net(_highway, i=nn.Linear(8, 16), t=nn.Linear(16, 16), a=nn.Linear(16, 16), o=nn.Linear(16, 3)), rows
    ),
    "graph convolution": Case(
        lambda: PairNet(
            lambda m, x, adjacency: m.o(F.relu(adjacency @ m.b(F.relu(adjacency @ m.a(x))))),
            a=nn.Linear(8, 16),
            b=nn.Linear(16, 16),
            o=nn.Linear(16, 3),
        ),
        graphs,
    ),
    "graph attention": Case(
        lambda: PairNet(
            _graph_attention, w=nn.Linear(8, 16, bias=False), left=vector(16), right=vector(16), o=nn.Linear(16, 3)
        ),
        graphs,
    ),
    "variational": Case(
        lambda: Net(
            _autoencoder,
            a=nn.Linear(8, 16),
            m=nn.Linear(16, 4),
            s=nn.Linear(16, 4),
            d=nn.Linear(4, 16),
            o=nn.Linear(16, 8),
        ),
        rows,
    ),
    "experts": Case(
        lambda: Net(_experts, g=nn.Linear(8, 4), up=vector(4, 12, 8), down=vector(4, 10, 12), o=nn.Linear(10, 3)), rows
    ),
    "splines": Case(
        lambda: Net(_spline, w1=vector(12, 8, 5), w2=vector(3, 12, 5), grid=torch.linspace(-2, 2, 5)), rows
    ),
    "matrix by hand": Case(
        lambda: Net(lambda m, x: F.relu(x @ m.w1 + m.b1) @ m.w2, w1=vector(8, 16), b1=vector(16), w2=vector(16, 3)),
        rows,
    ),
    "uneven split": Case(lambda: Net(_split, a=nn.Linear(8, 16), o=nn.Linear(12, 3)), rows, 0),
    "stacked": Case(
        lambda: Net(
            lambda m, x: m.o(torch.stack([F.relu(m.a(x)), torch.tanh(m.a(x))], 1).sum(1)),
            a=nn.Linear(8, 16),
            o=nn.Linear(16, 3),
        ),
        rows,
    ),
    # Units whose order is part of the function: nothing of these may move.
    "cumulative sum": Case(linear(lambda h: h.cumsum(-1)), rows, 0),
    "rolled": Case(linear(lambda h: h + h.roll(1, -1)), rows, 0),
    "sorted": Case(linear(lambda h: h.sort(-1).values * torch.arange(16)), rows, 0),
    "added product": Case(linear(lambda h: torch.addcmul(h, h.norm(dim=-1, keepdim=True), h.relu())), rows),
    "added quotient": Case(linear(lambda h: torch.addcdiv(h, h.relu(), 1 + h.square())), rows),
    "weighted by place": Case(linear(lambda h: F.relu(h) * torch.arange(16.0)), rows, 0),
    "index buffer": Case(
        lambda: Net(
            lambda m, x: m.o(m.a(x) + m.a(x)[:, m.index]),
            a=nn.Linear(8, 16),
            index=torch.arange(16).flip(0),
            o=nn.Linear(16, 3),
        ),
        rows,
        0,
    ),
    "fourier transform": Case(linear(lambda h: torch.fft.fft(h).real), rows, 0),
    "decision by data": Case(
        lambda: Net(
            lambda m, x: m.o(F.relu(m.a(x)) if x.sum() > 0 else m.a(x)), a=nn.Linear(8, 16), o=nn.Linear(16, 3)
        ),
        rows,
        0,
    ),
    "buffer per unit": Case(
        lambda: Net(
            lambda m, x: m.o(F.relu(m.a(x)) * m.scale), a=nn.Linear(8, 16), scale=torch.randn(16), o=nn.Linear(16, 3)
        ),
        rows,
    ),
    "limit per unit": Case(
        lambda: Net(
            lambda m, x: m.o(torch.maximum(m.a(x), m.low)), a=nn.Linear(8, 16), low=vector(16), o=nn.Linear(16, 3)
        ),
        rows,
    ),
}


def examine_module(name: str) -> Verdict:
    """Discover the symmetry of a module, and execute the module under random elements of it."""
    torch.manual_seed(0)
    module = MODULES[name].make().eval()
    example, other = MODULES[name].inputs(), MODULES[name].inputs()
    return examine(name, module, example, [other], lambda output: output)
