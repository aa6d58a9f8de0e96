"""The outputs of a model's layers as rows of features, observed while it runs."""

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
def observing(layers: Mapping[str, nn.Module], mask: Tensor | None, observe: Observe) -> Iterator[None]:
    """Show every output of some layers to a callback while the context is open.

    A row is an example, a token that is not padding, or a position of a convolution's output.

    Args:
        layers: the layers, by name.
        mask: `[batch, tokens]`, false at padding; None where there is no padding.
        observe: callback that receives the name of a layer and the rows of its output.
    """
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = partial(_show, name, mask, observe)
            hooks.callback(layer.register_forward_hook(hook).remove)
        yield


def _show(
    name: str,
    mask: Tensor | None,
    observe: Observe,
    layer: nn.Module,
    inputs: tuple[Tensor, ...],  # noqa: ARG001 - the signature of a hook
    output: Tensor,
) -> None:
    if isinstance(layer, nn.Linear | nn.Embedding):
        observe(name, drop_padding(output, mask, name))
    else:
        axis = output.ndim - len(layer.kernel_size) - 1  # type: ignore[arg-type] # every convolution has one
        observe(name, output.movedim(axis, -1).flatten(0, -2))
