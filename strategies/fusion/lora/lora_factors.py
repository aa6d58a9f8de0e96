"""Low-rank adapters in a state: pairs of factors, found by name, and factors of other ranks.

    W + s B A        A [rank, in], B [out, rank]

Hu et al. 2022, arXiv 2106.09685. Names are those of the `peft` library, in its models (`...lora_A.NAME.weight`) and in
its files (`...lora_A.weight`); the library need not be installed. The scale s travels where a state has it
(`adapter_scales`); in a run whose first state has none, all clients need the same s, and so an alpha in proportion to the
rank.
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

# The name of an adapter (`.NAME`) is part of a model's tensors and not of a saved file's.
_DOWN = re.compile(r".+\.lora_(embedding_A(\.[^.]+)?|A(\.[^.]+)?\.weight)")


class AdapterError(ValueError):
    """A state without adapters, or with adapters whose factors cannot be multiplied."""


@dataclass(frozen=True)
class Adapter:
    """The names of an adapter's two factors.

    Attributes:
        down: name of A, `[rank, in]`.
        up: name of B, `[out, rank]`.
    """

    down: str
    up: str

    @property
    def is_linear(self) -> bool:
        """True for an adapter of a linear layer, False for one of an embedding, which reads indices."""
        return self.down.endswith(".weight")

    def product(self, state: State) -> LowRank:
        """Return `B A` in double."""
        return LowRank(state[self.up].double(), state[self.down].double())


def find_adapters(state: State) -> list[Adapter]:
    """Return the adapters of a state, in its order.

    Raises:
        AdapterError: there are none, a factor lacks its partner, or their shapes do not multiply.
    """
    adapters = adapter_pairs(state)
    if not adapters:
        others = [name for name in state if "lora" in name.lower()]
        has = f"; it has {', '.join(others[:3])}, which are named otherwise than by peft" if others else ""
        raise AdapterError(
            f"the state has no tensor named lora_A.weight or lora_embedding_A{has}; pass the state of a model with LoRA "
            "adapters of peft, or choose the recipe fedavg"
        )
    for adapter in adapters:
        _check(adapter, state)
    return adapters


def widen(state: State, anchor: State) -> dict[str, Tensor]:
    """Return the state with factors padded to the anchor's rank: new rows of A and columns of B are zero.

    Tensors whose shapes differ in another axis are left unchanged; the server refuses them by name.
    """
    pairs = [a for a in adapter_pairs(state) if {a.down, a.up} <= anchor.keys() & state.keys()]
    down = {a.down: _pad(state[a.down], anchor[a.down], 0) for a in pairs}
    up = {a.up: _pad(state[a.up], anchor[a.up], 1) for a in pairs}
    return {**state, **down, **up}


def narrow(state: State, rank: int) -> dict[str, Tensor]:
    """Return the state with every adapter cut to `rank`, as the closest product of that rank.

    A client calls it to train adapters of a lower rank than the global model's.
    """
    result = dict(state)
    for adapter in find_adapters(state):
        down, up = state[adapter.down], state[adapter.up]
        if len(down) > rank:
            factors = adapter.product(state).balance(rank)
            # A zero product has no singular directions; before the first training any rows of A are as good.
            is_zero = not bool(up.any())
            result[adapter.up] = up[:, :rank].clone() if is_zero else factors.left.to(up.dtype)
            result[adapter.down] = down[:rank].clone() if is_zero else factors.right.to(down.dtype)
    return result


def blocks_of(adapters: Iterable[Adapter], factor: str, state: State) -> list[Block]:
    """Return the blocks of linear layers' adapters that a Gram matrix describes.

    Args:
        adapters: adapters of the model.
        factor: `down` for Gram matrices of A's inputs, which are the layer's inputs; `up` for those of B's inputs.
        state: the state with the adapters, whose factors may have biases (`lora_bias`).
    """
    names = (getattr(adapter, factor) for adapter in adapters if adapter.is_linear)
    pairs = ((name, f"{name.removesuffix('weight')}bias") for name in names)
    return [(name, bias) if bias in state else (name,) for name, bias in pairs]


def adapted_layers(state: State) -> list[Layer]:
    """Return the sizes of the adapters' Gram matrices, for a budget; raises as `find_adapters`."""
    return [
        Layer((adapter.down,), state[adapter.down].shape[1], len(state[adapter.down]))
        for adapter in find_adapters(state)
        if adapter.is_linear
    ]


def sketch_encodings(state: State) -> dict[Block, Encoding]:
    """Return encodings that send the Gram matrices of the adapters' inputs as sketches with twice as many rows as A.

    A sketch of `2 r` rows describes the best `r` directions up to a part of `1 / r` of the rest (Ghashami et al. 2016,
    arXiv 1501.01711). Adapters whose Gram matrix is smaller than the sketch are left out. Raises as `find_adapters`.
    """
    return {
        layer.block: Encoding(GramForm(GramKind.sketch, 2 * layer.outputs), inputs=layer.inputs)
        for layer in adapted_layers(state)
        if 2 * (2 * layer.outputs + 1) < layer.inputs + 1
    }


def as_module(state: State) -> nn.Module:
    """Return a module with the tensors of a state as buffers; `serve` takes it for adapters without a base model."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        # Buffers and not parameters, because integer tensors cannot be parameters.
        module.register_buffer(last, torch.as_tensor(tensor).detach().clone())
    return root


def adapter_pairs(state: State) -> list[Adapter]:
    """Return the names of the factors in a state, without looking at them."""
    return [
        Adapter(down, re.sub(r"\.lora_(embedding_)?A", r".lora_\1B", down)) for down in state if _DOWN.fullmatch(down)
    ]


def _check(adapter: Adapter, state: State) -> None:
    if adapter.up not in state:
        raise AdapterError(f"{adapter.down!r} has no partner {adapter.up!r}; send both factors of every adapter")
    down, up = state[adapter.down].shape, state[adapter.up].shape
    if len(down) != 2 or len(up) != 2:
        raise AdapterError(
            f"{adapter.down!r} is {list(down)}, a convolution's factor; only adapters of linear layers and "
            "embeddings have a matrix product: leave convolutions out of target_modules, or choose the recipe fedavg"
        )
    if down[0] != up[1]:
        raise AdapterError(f"{adapter.down!r} is {list(down)} and {adapter.up!r} is {list(up)}; their ranks must agree")


def _pad(tensor: Tensor, like: Tensor, axis: int) -> Tensor:
    """Return the tensor with zeros appended along an axis, up to the size of `like`."""
    missing = like.shape[axis] - tensor.shape[axis] if tensor.dim() == like.dim() else 0
    if missing <= 0:
        return tensor
    return pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing))
