"""The inputs and outputs of a model's layers as rows of features, observed while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.strategies.capture.layer_calls import drop_padding

Observe: TypeAlias = Callable[[str, Float[Tensor, "rows features"]], None]


def named_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Return the modules of some classes and their subclasses, each by the name of its weight."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


@contextmanager
def observing(
    layers: Mapping[str, nn.Module], mask: Tensor | None, observe: Observe, observe_input: Observe | None = None
) -> Iterator[None]:
    """Show every output of some layers to a callback while the context is open.

    With `observe_input` it sees what the layers read, too; an embedding reads no features.

    A row is an example, a token that is not padding, or a position of a convolution's output.

    Args:
        layers: the layers, by name.
        mask: `[batch, tokens]`, false at padding; None where there is no padding.
        observe: callback that receives the name of a layer and the rows of its output.
        observe_input: callback for the rows of its input.
    """
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = partial(_show, name, mask, observe, observe_input)
            hooks.callback(layer.register_forward_hook(hook).remove)
        yield


def _show(
    name: str,
    mask: Tensor | None,
    observe: Observe,
    observe_input: Observe | None,
    layer: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    observe(name, _rows(name, mask, layer, output))
    # A module may be called with its input as a keyword, which no hook sees.
    if observe_input is not None and inputs and not isinstance(layer, nn.Embedding):
        observe_input(name, _rows(name, mask, layer, inputs[0]))


def _rows(name: str, mask: Tensor | None, layer: nn.Module, values: Tensor) -> Float[Tensor, "rows features"]:
    if isinstance(layer, nn.Linear | nn.Embedding):
        return drop_padding(values, mask, name)
    axis = values.ndim - len(layer.kernel_size) - 1  # type: ignore[arg-type] # every convolution has one
    return values.movedim(axis, -1).flatten(0, -2)
