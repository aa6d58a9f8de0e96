"""Low-rank adapters in a state: which tensors are the two factors of one product, and factors of other ranks.

    W + s B A        A [rank, in], B [out, rank]

Hu et al. 2022, arXiv 2106.09685. Names are those of the `peft` library, as its models have them
(`...lora_A.NAME.weight`) and as it saves them (`...lora_A.weight`); it need not be installed. The scale s = alpha / rank
is no tensor: clients whose ranks differ need the same s, an alpha in proportion to the rank.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fedbasin.proto.encoding import Encoding, GramForm, GramKind
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.lora.lowrank import LowRank
from fedbasin.strategies.tensors.state import State

_DOWN = re.compile(r".+\.lora_(embedding_A(\.[^.]+)?|A(\.[^.]+)?\.weight)")


class AdapterError(ValueError):
    """A state without adapters, or with some whose product is no matrix product."""


@dataclass(frozen=True)
class Adapter:
    """The names of one product's factors.

    Attributes:
        down: A, `[rank, in]`.
        up: B, `[out, rank]`.
    """

    down: str
    up: str

    @property
    def reads_rows(self) -> bool:
        """Whether A is multiplied with a linear layer's inputs, not with the indices of an embedding."""
        return self.down.endswith(".weight")

    def product(self, state: State) -> LowRank:
        """`B A`, in double."""
        return LowRank(state[self.up].double(), state[self.down].double())


def find_adapters(state: State) -> list[Adapter]:
    """The pairs of factors of a state, in its order.

    Raises:
        AdapterError: there are none, a factor lacks its partner, or they do not multiply.
    """
    found = _pairs(state)
    if not found:
        raise AdapterError(
            "the state has no tensor named lora_A; give an adapted model's, or choose the recipe fedavg"
        )
    for adapter in found:
        _check(adapter, state)
    return found


def widened(state: State, anchor: State) -> dict[str, Tensor]:
    """The state with factors as wide as the anchor's: new rows of A and columns of B are zero.

    What has another shape in any other way stays as it is, for the server to refuse by name.
    """
    pairs = [a for a in _pairs(state) if {a.down, a.up} <= anchor.keys() & state.keys()]
    down = {a.down: _grown(state[a.down], anchor[a.down], 0) for a in pairs}
    up = {a.up: _grown(state[a.up], anchor[a.up], 1) for a in pairs}
    return {**state, **down, **up}


def narrowed(state: State, rank: int) -> dict[str, Tensor]:
    """The state with every adapter at most as wide as `rank`: the closest product of that rank.

    For a client that trains fewer directions than the global model has.
    """
    result = dict(state)
    for adapter in find_adapters(state):
        down, up = state[adapter.down], state[adapter.up]
        if len(down) > rank:
            factors = adapter.product(state).balanced(rank)
            # A product of zeros has no directions; where nothing is learned yet, the first ones will do.
            fresh = not bool(up.any())
            result[adapter.up] = up[:, :rank].clone() if fresh else factors.left.to(up.dtype)
            result[adapter.down] = down[:rank].clone() if fresh else factors.right.to(down.dtype)
    return result


def blocks_of(adapters: Iterable[Adapter], factor: str) -> list[Block]:
    """The blocks that a Gram matrix speaks of, of linear layers.

    Args:
        adapters: of the model.
        factor: `down` for the inputs of A, which are the layer's own; `up` for those of B.
    """
    return [(getattr(adapter, factor),) for adapter in adapters if adapter.reads_rows]


def adapted_layers(state: State) -> list[Layer]:
    """What Gram matrices of the adapters' inputs cost, for a budget; raises as `find_adapters`."""
    return [
        Layer((adapter.down,), state[adapter.down].shape[1], len(state[adapter.down]))
        for adapter in find_adapters(state)
        if adapter.reads_rows
    ]


def sketched(state: State) -> dict[Block, Encoding]:
    """Gram matrices of the adapters' inputs as sketches of as many rows as A has, where that is less than the triangle.

    So what is sent beside an adapter takes one row more than its A. Raises as `find_adapters`.
    """
    return {
        layer.block: Encoding(GramForm(GramKind.sketch, layer.outputs), inputs=layer.inputs)
        for layer in adapted_layers(state)
        if 2 * (layer.outputs + 1) < layer.inputs + 1
    }


def holding(state: State) -> nn.Module:
    """A module that only holds tensors, under the names of a state: what `serve` needs of adapters that travel alone."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_buffer(last, torch.as_tensor(tensor).detach().clone())
    return root


def _pairs(state: State) -> list[Adapter]:
    return [Adapter(name, _partner(name)) for name in state if _DOWN.fullmatch(name)]


def _partner(name: str) -> str:
    return name.replace(".lora_A", ".lora_B").replace("lora_embedding_A", "lora_embedding_B")


def _check(adapter: Adapter, state: State) -> None:
    if adapter.up not in state:
        raise AdapterError(
            f"{adapter.down!r} has no partner {adapter.up!r}; send both factors of every adapter"
        )
    down, up = state[adapter.down].shape, state[adapter.up].shape
    if len(down) != 2 or len(up) != 2:
        raise AdapterError(
            f"{adapter.down!r} is {list(down)}, a convolution's factor; only adapters of linear layers and "
            "embeddings have a matrix product: leave convolutions out of target_modules, or choose the recipe fedavg"
        )
    if down[0] != up[1]:
        raise AdapterError(
            f"{adapter.down!r} is {list(down)} and {adapter.up!r} is {list(up)}; their ranks must agree"
        )


def _grown(tensor: Tensor, like: Tensor, axis: int) -> Tensor:
    """With zeros along an axis up to the size of `like`."""
    missing = like.shape[axis] - tensor.shape[axis] if tensor.dim() == like.dim() else 0
    if missing <= 0:
        return tensor
    return pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing))
