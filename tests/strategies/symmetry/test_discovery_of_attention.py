"""Transformers of plain torch, traced: positions and class tokens, fused and separate projections, every option."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Symmetry, parse
from fedbasin.strategies.symmetry.transform import random
from tests.strategies.symmetry.test_groups import drawn

WIDTH, HEADS, UNITS = 8, 2, 12


class Images(nn.Module):
    """A small ViT: patches, a class token, positions, an encoder, a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(5, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, UNITS, batch_first=True, **options)
        norm = nn.LayerNorm(WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.encoder(x + self.positions)[:, 0])


class Sequences(nn.Module):
    """Encoder and decoder, each with its table of tokens; places first unless `batch_first`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.sources = nn.Embedding(11, WIDTH)
        self.targets = nn.Embedding(11, WIDTH)
        with warnings.catch_warnings():
            # torch's own choice of nested tensors does not suit all of its own options.
            warnings.filterwarnings("ignore", "enable_nested_tensor is True")
            self.both = nn.Transformer(WIDTH, HEADS, 1, 2, UNITS, **options)
        self.head = nn.Linear(WIDTH, 11)
        self.register_buffer("mask", torch.ones(5, 5).triu(1).bool())

    def forward(self, tokens: Tensor) -> Tensor:
        source, target = self.sources(tokens), self.targets(tokens)
        return self.head(self.both(source, target, tgt_mask=self.mask))


class Layers(nn.Module):
    """Layers by themselves, called with names, and a decoder without an encoder."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, WIDTH)
        self.memories = nn.Linear(WIDTH, WIDTH)
        self.encode = nn.TransformerEncoderLayer(WIDTH, HEADS, UNITS, **options)
        self.decode = nn.TransformerDecoderLayer(WIDTH, HEADS, UNITS, **options)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, UNITS, **options)
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encode(self.tokens(tokens))
        memory = self.memories(x)
        x = self.decode(x, memory=memory)
        return self.head(self.decoder(x, memory))


class Attention(nn.Module):
    """A lone `nn.MultiheadAttention` between two Linears."""

    def __init__(self, dims: tuple[int, int] | None = None, **options: Any) -> None:
        super().__init__()
        kdim, vdim = dims or (WIDTH, WIDTH)
        self.asking = nn.Linear(9, WIDTH)
        self.keys = nn.Linear(9, kdim)
        self.values = nn.Linear(9, vdim)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=kdim, vdim=vdim, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.attention(self.asking(x), self.keys(x), self.values(x), need_weights=False)
        return self.head(found.tanh())


IMAGES, TOKENS = torch.zeros(2, 1, 4, 4), torch.arange(25).reshape(5, 5) % 11
EITHER = (True, False)
LAYERS = [
    {"norm_first": first, "bias": bias, "activation": activation}
    for first, bias, activation in itertools.product(EITHER, EITHER, ("relu", "gelu"))
]
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    **{f"images {o}": (lambda o=o: Images(**o), IMAGES) for o in LAYERS},
    **{
        f"sequences {name}": (lambda o=o: Sequences(**o), TOKENS)
        for name, o in {
            "norm first": {"batch_first": True, "norm_first": True},
            "no bias": {"batch_first": False, "bias": False},
            "silu": {"batch_first": False, "activation": nn.functional.silu},
        }.items()
    },
    **{
        f"layers {o}": (lambda o=o: Layers(**o), TOKENS)
        for o in ({"batch_first": True, "activation": nn.Tanh()}, {"norm_first": True})
    },
    **{
        f"attention {o}": (lambda o=o: Attention(**o), torch.zeros(5, 2, 9))
        for o in (
            *({}, {"batch_first": True}, {"bias": False}, {"dims": (6, 5)}),
            *({"add_bias_kv": True}, {"add_zero_attn": True}, {"dims": (6, 5), "bias": False}),
            {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
        )
    },
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[nn.Module, Symmetry, Tensor]:
    make, example = CASES[case]
    torch.manual_seed(0)
    model = make()
    return model, discover(model, example).symmetry, example


@every_case
def test_the_function_is_left_as_it_was(case: str) -> None:
    model, symmetry, example = made(case)
    assert parse(str(symmetry)) == symmetry
    report = check(model, symmetry, example)
    assert report.passed, report


@every_case
def test_heads_units_and_streams_are_found(case: str) -> None:
    model, symmetry, _ = made(case)
    heads = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert sum(str(space.group).endswith(f"wr S({HEADS})") for space in symmetry.spaces) == len(heads)
    moved = {axis.tensor for space in symmetry.spaces for axis in space.axes}
    staying = set(model.state_dict()) - moved
    assert staying <= {"head.bias", "mask"}


@every_case
def test_planted_elements_are_undone(case: str) -> None:
    model, symmetry, _ = made(case)
    generator = drawn(1)
    anchor = {
        name: tensor.double() + 0.3 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in model.state_dict().items()
    }
    if case.startswith("attention"):
        # Spaces of a few features in a row are climbed to together, and may end at a local maximum.
        symmetry = Symmetry(tuple(space for space in symmetry.spaces if str(space.group).endswith(f"wr S({HEADS})")))
    planted = random(symmetry, generator)
    found = match_weights(symmetry, anchor, planted.act(anchor))
    assert found.report.distance_after < 1e-4 * found.report.distance_before


class Shown(Attention):
    """Hands out the weights of attention head by head."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, weights = self.attention(self.asking(x), self.keys(x), self.values(x), average_attn_weights=False)
        return self.head(found.tanh()), weights


def test_heads_that_are_shown_stay() -> None:
    model, example = Shown(), torch.zeros(5, 2, 9)
    symmetry = discover(model, example).symmetry
    assert not [space for space in symmetry.spaces if str(space.group).endswith(f"wr S({HEADS})")]
    assert not symmetry.shifts
    assert check(model, symmetry, example).passed


class Reading(Attention):
    """Reads its attention's weights beside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.attention.in_proj_weight.exp().sum() / 100 * x.mean()


def test_a_projection_that_is_read_beside_stays() -> None:
    model, example = Reading(), torch.zeros(5, 2, 9)
    symmetry = discover(model, example).symmetry
    assert check(model, symmetry, example).passed
    assert not [space for space in symmetry.spaces if "O(4)" in str(space.group)]


class Masked(Images):
    """A mask that the features themselves make."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        seen = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(seen, src_key_padding_mask=seen[:, :, 0] > 1).mean(1))


def test_a_mask_of_features_keeps_their_places() -> None:
    model = Masked()
    symmetry = discover(model, IMAGES).symmetry
    assert check(model, symmetry, IMAGES).passed
    assert not [space for space in symmetry.spaces if space.name in ("patches", "token")]


class Own(nn.MultiheadAttention):
    """Another attention under the name of torch's."""

    def forward(self, *given: Any, **options: Any) -> Any:
        found, weights = super().forward(*given, **options)
        return found.roll(1, -1), weights


def test_a_layer_that_was_changed_is_followed_as_it_is() -> None:
    torch.manual_seed(0)
    for change in ("attention", "hook"):
        model = Images()
        layer: Any = model.encoder.layers[0]
        if change == "attention":
            layer.self_attn = Own(WIDTH, HEADS, batch_first=True)
        else:
            layer.linear1.register_forward_hook(lambda *_: None)
        assert check(model, discover(model, IMAGES).symmetry, IMAGES).passed


def test_projections_that_are_shared_with_another_layer_stay() -> None:
    model = Sequences()
    model.both.decoder.layers[0].self_attn.in_proj_weight = model.both.decoder.layers[1].self_attn.in_proj_weight
    assert check(model, discover(model, TOKENS).symmetry, TOKENS).passed


WRONG = {
    "channels across heads": ("O(4)*O(4) wr S(2)", "O(8)*O(8) wr S(1)"),
    "a rotation of units": ("S(12)", "O(12)"),
    "a rotation of the stream": ("S(8)", "O(8)"),
    "queries against values": ("in_proj_weight[0,16:24]@1", "in_proj_weight[0,16:24]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_only_looks_like_a_symmetry_is_noticed(wrong: str) -> None:
    model, symmetry, example = made(next(iter(CASES)))
    assert WRONG[wrong][0] in str(symmetry)
    other = parse(str(symmetry).replace(*WRONG[wrong]))
    assert not check(model, other, example).passed


class Sloped(nn.Module):
    """Attention whose heads have a slope of their own over distances, so that they cannot change places (ALiBi)."""

    def __init__(self, *, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.first, self.fused = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.interleaved:
            q, k, v = self.fused(x).unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.fused(x).chunk(3, -1))
        places = torch.arange(x.shape[1], dtype=x.dtype)
        slopes = torch.tensor([0.5, 0.25], dtype=x.dtype)[:, None, None]
        scores = q @ k.mT + slopes * (places - places[:, None])
        return self.head((x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_that_keep_their_order_rotate_each_by_itself(interleaved: bool) -> None:
    model = Sloped(interleaved=interleaved)
    symmetry = discover(model, torch.randn(2, 4, 5)).symmetry
    groups = [str(space.group) for space in symmetry.spaces if space.name.startswith("fused")]
    assert groups == [f"O({WIDTH // HEADS})^{HEADS}"] * 2
    assert check(model, symmetry, torch.randn(2, 4, 5)).passed


class Listed(nn.Module):
    """Heads and what they share in one projection, taken apart by lists of places, as Falcon does."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(5, WIDTH + 4), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.fused(x).unflatten(-1, (HEADS + 1, -1))
        return self.out((parts[..., :-1, :].tanh() * parts[..., [-1], :].sigmoid()).flatten(-2))


def test_a_list_of_consecutive_places_is_followed_as_a_slice() -> None:
    model = Listed()
    discovery = discover(model, torch.randn(4, 5))
    assert discovery.coverage.fraction > 0.9
    assert check(model, discovery.symmetry, torch.randn(4, 5)).passed


def test_places_among_the_inputs_are_no_slice() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(2, 3)

        def forward(self, x: Tensor, places: Tensor) -> Tensor:
            return self.last(self.first(x)[:, places])

    symmetry = discover(Chosen(), torch.randn(4, 5), torch.tensor([2, 3])).symmetry
    assert not any(axis.tensor == "first.weight" for space in symmetry.spaces for axis in space.axes)


class HeadsFirst(nn.Module):
    """One projection that is divided into heads first, and into queries, keys and values then; keys may be shared."""

    def __init__(self, groups: int, heads: int) -> None:
        super().__init__()
        self.groups, self.heads = groups, heads
        self.table = nn.Embedding(11, WIDTH)
        self.qkv = nn.Linear(WIDTH, groups * (heads + 2) * 4)
        self.out = nn.Linear(groups * heads * 4, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        fused = self.qkv(x).view(*tokens.shape, self.groups, self.heads + 2, 4)
        query, key, value = fused[..., :-2, :], fused[..., [-2], :], fused[..., -1:, :]
        key, value = (part.expand_as(query).flatten(2, 3).transpose(1, 2) for part in (key, value))
        mixed = nn.functional.scaled_dot_product_attention(query.flatten(2, 3).transpose(1, 2), key, value)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("groups", "heads", "group"),
    [(1, 3, "(O(4)*O(4))xS(3) wr S(1)"), (2, 3, "(O(4)*O(4))xS(3) wr S(2)"), (2, 1, "O(4)*O(4) wr S(2)")],
)
def test_a_projection_that_is_divided_into_heads_first_has_the_groups_of_its_parts(
    groups: int, heads: int, group: str
) -> None:
    torch.manual_seed(0)
    model = HeadsFirst(groups, heads)
    tokens = torch.arange(10).reshape(2, 5)
    discovery = discover(model, tokens)
    assert group in {str(space.group) for space in discovery.symmetry.spaces}
    assert discovery.coverage.fraction == 1.0
    assert check(model, discovery.symmetry, tokens).passed
