"""The calls of a model's linear layers and convolutions, observed while it runs.

    y = W x + b        as a linear map, a convolution, or a projection inside attention

A torch function mode intercepts the functions that multiply, so every layer of a forward pass is observed at the time
of its call, however its module is named or nested, and also where no module calls it.
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

from fedbasin.strategies.capture.attention_calls import attend, is_plain
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.update import tensor_names

# Numbers held at once in addition to the model and its activations: 2^22 float64 are 32 MiB.
ROW_ELEMENTS = 2**22

Pair: TypeAlias = tuple[int, int]
Margins: TypeAlias = tuple[int, int, int, int]

# Positions of the arguments of torch's functions.
_ARGUMENTS = {
    F.linear: ("input", "weight", "bias"),
    torch.addmm: ("bias", "input", "weight"),
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}


@dataclass(frozen=True)
class Kernel:
    """The geometry with which a convolution reads an image.

    Attributes:
        size: height and width.
        stride: vertical and horizontal stride.
        dilation: vertical and horizontal dilation.
        margins: widths of the zero padding left, right, above and below.
    """

    size: Pair
    stride: Pair
    dilation: Pair
    margins: Margins


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer in a forward pass.

    Attributes:
        layer: the layer.
        inputs: `[..., in]`, or images.
        output: `[..., out]`, or images.
        kernel: geometry of a convolution; None for a linear layer.
    """

    layer: Layer
    inputs: Tensor
    output: Tensor
    kernel: Kernel | None = None

    def copy(self) -> "LayerCall":
        """Return a copy that no later operation in place can change."""
        return replace(self, inputs=self.inputs.clone(), output=self.output.clone())

    def rows(self, mask: Tensor | None = None) -> Iterator[Float[Tensor, "groups part in"]]:
        """Yield the rows that the weight multiplies, in double, in parts of bounded size.

        A row is one vector of a linear layer, or one position of one example of a convolution. Where the layer has a
        bias, each row ends in a one.

        Args:
            mask: `[batch, tokens]`, false at padding, whose rows are left out.

        Raises:
            ValueError: the shape of the inputs does not say which rows are padding.
        """
        bias = len(self.layer.block) - 1
        for part in self._parts(self.inputs, mask):
            rows = part.double() if self.kernel is None else self._patches(part.double(), self.kernel)
            yield F.pad(rows, (0, bias), value=1.0) if bias else rows

    def columns(self, values: Tensor, mask: Tensor | None = None) -> Iterator[Float[Tensor, "groups part out"]]:
        """Yield values of the output's shape as rows, in double, in the parts and the order of `rows`."""
        for part in self._parts(values, mask):
            if self.kernel is None:
                yield part.double()
            else:
                grouped = part.double().unflatten(1, (self.layer.groups, -1))
                yield grouped.permute(1, 0, 3, 4, 2).flatten(1, 3)

    def patches(self) -> Float[Tensor, "batch in height width"]:
        """Return what a convolution's weight multiplies at each position, in the shape of its output."""
        if self.kernel is None or self.layer.groups > 1:
            raise ValueError(f"{self.layer.block[0]} is no convolution of one group, so it has no patches")
        padded = F.pad(self.inputs, self.kernel.margins)
        patches = F.unfold(padded, self.kernel.size, self.kernel.dilation, 0, self.kernel.stride)
        return patches.unflatten(-1, self.output.shape[-2:])

    def _parts(self, values: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        if self.kernel is None:
            most = max(1, ROW_ELEMENTS // self.layer.inputs)
            for part in torch.split(drop_padding(values, mask, self.layer.block[0]), most):
                yield part.unsqueeze(0)
            return
        # Unfolding images multiplies their size by the area of the kernel, so the parts are counted in patches.
        positions = self.output.shape[-2:].numel()
        most = max(1, ROW_ELEMENTS // (self.layer.inputs * self.layer.groups * positions))
        yield from torch.split(values if values.ndim == 4 else values.unsqueeze(0), most)

    def _patches(self, images: Tensor, kernel: Kernel) -> Float[Tensor, "groups part in"]:
        """Return the patch under the kernel at each position, in the order of `weight.flatten(1)`."""
        padded = F.pad(images, kernel.margins)
        patches = F.unfold(padded, kernel.size, kernel.dilation, 0, kernel.stride)
        grouped = patches.unflatten(1, (self.layer.groups, -1))
        return grouped.permute(1, 0, 3, 2).flatten(1, 2)


class LayerCalls(TorchFunctionMode):
    """A mode that shows every call of some layers to a callback while it is active.

    Args:
        model: the model, whose present parameters identify the layers.
        layers: the layers to observe.
        observe: callback that receives each call as soon as it is computed; a tensor that it returns replaces the
            output.
        state: tensors with which the model runs in place of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        observe: Callable[[LayerCall], Tensor | None],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        # By identity: a function is called with the parameter itself, whatever the module is.
        parameters = {**dict(model.named_parameters()), **(state or {})}
        self._layers = {id(parameters[tensor_names(layer.block)[0]]): layer for layer in layers}
        self._observe = observe

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
                # The mode is off inside `func`, so its projections would not be seen; `attend` runs in the mode.
                with self:
                    return attend(**named)
            args = ()
        output = func(*args, **named)
        if func in _ARGUMENTS:
            return self._observe_call(output, dict(zip(_ARGUMENTS[func], args, strict=False)) | named)
        return output

    def _observe_call(self, output: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        # A call with other keywords, as `mat2` of `torch.addmm`, is not one of a layer and has no "weight".
        layer = self._layers.get(id(arguments.get("weight")))
        if layer is None:
            return output
        kernel = _kernel(arguments) if arguments["weight"].dim() == 4 else None
        replacement = self._observe(LayerCall(layer, arguments["input"], output, kernel))
        return output if replacement is None else replacement


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Disable the fused evaluation path of PyTorch's transformer encoder while the context is open.

    The fused path turns padded batches into nested tensors, whose shapes cannot be read and which vmap cannot batch.
    """
    # The switch belongs to the whole process, so it is restored.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def drop_padding(values: Tensor, mask: Tensor | None, name: str) -> Float[Tensor, "rows features"]:
    """Return the rows of `[..., features]` that are not padding; a pooled `[batch, features]` has none.

    Args:
        values: the values.
        mask: `[batch, tokens]`, false at padding; None where there is no padding.
        name: name of the layer, for messages.

    Raises:
        ValueError: the shape of the values does not say which rows are padding.
    """
    rows = values.reshape(-1, values.shape[-1])
    if mask is None or values.shape[:-1] == mask.shape[:1]:
        return rows
    if values.shape[:2] == mask.shape and values.ndim > 2:
        return values[mask].reshape(-1, values.shape[-1])
    if values.shape[:-1] == (mask.numel(),):
        return rows[mask.flatten()]
    raise ValueError(
        f"the mask is {list(mask.shape)} but {name!r} reads {list(values.shape)}, so padding cannot be told from data; "
        "put [batch, tokens] first in the layer's input, or yield batches without padding and mask"
    )


def _kernel(arguments: Mapping[str, Any]) -> Kernel:
    height, width = arguments["weight"].shape[-2:]
    dilation = _pair(arguments.get("dilation", 1))
    margins = _margins(arguments.get("padding", 0), (height, width), dilation)
    return Kernel((height, width), _pair(arguments.get("stride", 1)), dilation, margins)


def _pair(value: Sequence[int] | int) -> Pair:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]


def _margins(padding: Sequence[int] | int | str, size: Pair, dilation: Pair) -> Margins:
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(size, dilation, strict=True)]
        # Where the sum is odd, PyTorch puts the greater half last.
        rows, columns = ((total // 2, total - total // 2) for total in totals)
    else:
        rows, columns = ((margin, margin) for margin in _pair(padding))
    return (*columns, *rows)
