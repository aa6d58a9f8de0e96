"""The products of a model's weights with their inputs, seen while it runs.

    y = W x + b        as a linear map, a convolution, or a projection inside attention

Every such product of a forward pass is shown as it happens, with the rows x that it multiplied. What a
module is called and how it is nested plays no part: the function that multiplies is what is watched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedbasin.client.capture.attention_calls import attend, is_plain
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.update import stored

# Numbers held at once beside the model and its activations: 2^22 float64 are 32 MiB.
ROW_ELEMENTS = 2**22

Pair: TypeAlias = tuple[int, int]
Margins: TypeAlias = tuple[int, int, int, int]

# Where torch's functions have their arguments.
_ORDER = {
    F.linear: ("input", "weight", "bias"),
    torch.addmm: ("bias", "input", "weight"),
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}


@dataclass(frozen=True)
class Kernel:
    """How a convolution reads an image.

    Attributes:
        size: height and width.
        stride, dilation: the same.
        margins: zeros left, right, above and below.
    """

    size: Pair
    stride: Pair
    dilation: Pair
    margins: Margins


@dataclass(frozen=True, eq=False)
class Product:
    """One product: a layer's weight and what it was multiplied with.

    Attributes:
        layer: which.
        inputs: `[..., in]`, or images.
        output: `[..., out]`, or images.
        kernel: of a convolution.
    """

    layer: Layer
    inputs: Tensor
    output: Tensor
    kernel: Kernel | None = None

    def copy(self) -> "Product":
        """The same, safe from later steps that write over what was read or computed."""
        return replace(self, inputs=self.inputs.clone(), output=self.output.clone())

    def rows(self, mask: Tensor | None = None) -> Iterator[Float[Tensor, "groups part in"]]:
        """What the weight multiplied, in double, a one at the end of each row where there is a bias.

        A row is one vector of a linear layer, one position of one example of a convolution. In parts, so
        that memory stays bounded.

        Args:
            mask: `[batch, tokens]`, false where a row is padding and left out.

        Raises:
            ValueError: padding cannot be told from the input's shape.
        """
        bias = len(self.layer.block) - 1
        for part in self._parts(self.inputs, mask):
            rows = (
                part.double() if self.kernel is None else self._patches(part.double(), self.kernel)
            )
            yield F.pad(rows, (0, bias), value=1.0) if bias else rows

    def columns(
        self, values: Tensor, mask: Tensor | None = None
    ) -> Iterator[Float[Tensor, "groups part out"]]:
        """Values in the place of the output, in double, in the same parts and order as the rows."""
        for part in self._parts(values, mask):
            if self.kernel is None:
                yield part.double()
            else:
                grouped = part.double().unflatten(1, (self.layer.groups, -1))
                yield grouped.permute(1, 0, 3, 4, 2).flatten(1, 3)

    def _parts(self, values: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        if self.kernel is None:
            most = max(1, ROW_ELEMENTS // self.layer.inputs)
            for part in torch.split(unpadded(values, mask, self.layer.block[0]), most):
                yield part.unsqueeze(0)
            return
        positions = self.output.shape[-2:].numel()
        most = max(1, ROW_ELEMENTS // (self.layer.inputs * self.layer.groups * positions))
        yield from torch.split(values if values.ndim == 4 else values.unsqueeze(0), most)

    def _patches(self, images: Tensor, kernel: Kernel) -> Float[Tensor, "groups part in"]:
        """What the kernel sees at each position, in the order of `weight.flatten(1)`."""
        padded = F.pad(images, kernel.margins)
        patches = F.unfold(padded, kernel.size, kernel.dilation, 0, kernel.stride)
        grouped = patches.unflatten(1, (self.layer.groups, -1))
        return grouped.permute(1, 0, 3, 2).flatten(1, 2)


class Products(TorchFunctionMode):
    """While active, shows every product with one of the layers' weights to `see`.

    Args:
        model: whose weights are watched, as they are now.
        layers: those to watch.
        see: called with each product, as soon as it is computed; what it returns takes the place of the output.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], see: Callable[[Product], Tensor | None]
    ) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        self._layers = {id(parameters[stored(layer.block)[0]]): layer for layer in layers}
        self._see = see

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            named = signature(func).bind(*args, **named).arguments
            if is_plain(**named):
                # Written out, its projections are functions of their own.
                with self:
                    return attend(**named)
            args = ()
        output = func(*args, **named)
        if func in _ORDER:
            return self._multiplied(output, dict(zip(_ORDER[func], args, strict=False)) | named)
        return output

    def _multiplied(self, output: Tensor, given: Mapping[str, Any]) -> Tensor:
        # Functions that a layer calls by other names, as `mat2`, are none of those that are watched.
        layer = self._layers.get(id(given.get("weight")))
        if layer is None:
            return output
        kernel = _kernel(given) if given["weight"].dim() == 4 else None
        instead = self._see(Product(layer, given["input"], output, kernel))
        return output if instead is None else instead


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """PyTorch's own encoder without its fused evaluation path, as it is trained.

    That path turns padded batches into nested tensors, whose shapes cannot be read and which vmap cannot
    batch. The switch is the process's own, so it is put back.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def unpadded(values: Tensor, mask: Tensor | None, name: str) -> Float[Tensor, "rows features"]:
    """The rows `[..., features]` that are not padding; a pooled `[batch, features]` has none.

    Raises:
        ValueError: padding cannot be told from the shape; `name` says whose it is.
    """
    rows = values.reshape(-1, values.shape[-1])
    if mask is None or values.shape[:-1] == mask.shape[:1]:
        return rows
    if values.shape[:2] == mask.shape and values.ndim > 2:
        return values[mask].reshape(-1, values.shape[-1])
    if values.shape[:-1] == (mask.numel(),):
        return rows[mask.flatten()]
    raise ValueError(
        f"the mask is {list(mask.shape)} but {name!r} reads {list(values.shape)}, in which padding cannot "
        "be told; put [batch, tokens] first in the layer's input, or yield batches without padding and mask"
    )


def _kernel(given: Mapping[str, Any]) -> Kernel:
    height, width = given["weight"].shape[-2:]
    dilation = _pair(given.get("dilation", 1))
    margins = _margins(given.get("padding", 0), (height, width), dilation)
    return Kernel((height, width), _pair(given.get("stride", 1)), dilation, margins)


def _pair(value: Sequence[int] | int) -> Pair:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]


def _margins(padding: Sequence[int] | int | str, size: Pair, dilation: Pair) -> Margins:
    """Where "same" is odd, PyTorch puts the greater half last."""
    if isinstance(padding, str):
        reach = [
            d * (k - 1) if padding == "same" else 0 for k, d in zip(size, dilation, strict=True)
        ]
        rows, columns = ((total // 2, total - total // 2) for total in reach)
    else:
        rows, columns = ((margin, margin) for margin in _pair(padding))
    return (*columns, *rows)
