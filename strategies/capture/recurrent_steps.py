"""Recurrent layers of PyTorch step by step, so that each product with a weight is a call that can be observed.

    a_t = W x_t + b        r_t = V h_{t-1} + c        h_t = cell(a_t, r_t, h_{t-1})

PyTorch computes all steps in one function, in which no product is seen.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.layers import Layer

# The states of a step: h, or h and c of an LSTM.
States: TypeAlias = tuple[Tensor, ...]
Cell: TypeAlias = Callable[[Tensor, Tensor, States], States]


def recurrent_layers(model: nn.Module) -> list[Layer]:
    """Return the products of a model's recurrent layers with their inputs and with their states."""
    layers: dict[Block, Layer] = {}
    for name, module in model.named_modules():
        # A projection of the states belongs to no step that is unrolled.
        if isinstance(module, nn.RNNBase) and not module.proj_size:
            prefix = f"{name}." if name else ""
            for names in module._all_weights:
                for weight, bias in zip(names[:2], names[2:] or (None, None), strict=True):
                    block = tuple(prefix + n for n in (weight, bias) if n)
                    outputs, inputs = getattr(module, weight).shape
                    layers[block] = Layer(block, inputs + len(block) - 1, outputs)
    return list(layers.values())


class RecurrentSteps(TorchFunctionMode):
    """A mode that computes recurrent layers step by step. Packed sequences are computed as always."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        cell = _CELLS.get(getattr(func, "__name__", ""))
        # A packed sequence has its batch sizes in place of the states' weights.
        if cell is None or kwargs or not isinstance(args[2], list | tuple):
            return func(*args, **dict(kwargs or {}))
        inputs, states, weights, has_biases, layers, dropout, training, bidirectional, batch_first = args
        count = (4 if has_biases else 2) * layers * (2 if bidirectional else 1)
        if len(weights) != count or (dropout and training):
            return func(*args)
        steps = inputs.transpose(0, 1) if batch_first else inputs
        outputs, last = _unroll(cell, steps, states, weights, 4 if has_biases else 2, 2 if bidirectional else 1)
        return (outputs.transpose(0, 1) if batch_first else outputs, *last)


def _unroll(
    cell: Cell, steps: Tensor, states: Tensor | Sequence[Tensor], weights: Sequence[Tensor], size: int, directions: int
) -> tuple[Tensor, States]:
    """Return the outputs of all steps of the last layer, and the last states of every layer."""
    starts = (states,) if isinstance(states, Tensor) else tuple(states)
    ends: list[States] = []
    for layer in range(len(weights) // (size * directions)):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            w, v, *biases = weights[place * size : (place + 1) * size]
            b, c = biases or (None, None)
            state: States = tuple(start[place] for start in starts)
            products = linear(steps, w, b).unbind(0)
            rows = []
            for product in reversed(products) if direction else products:
                reaction = linear(state[0], v, c)
                # Nothing within a cell is observed, and showing it would take longer than computing it.
                with torch._C.DisableTorchFunction():
                    state = cell(product, reaction, state)
                rows.append(state[0])
            outputs.append(torch.stack(rows[::-1] if direction else rows))
            ends.append(state)
        steps = torch.cat(outputs, -1)
    return steps, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))


def _lstm(a: Tensor, r: Tensor, states: States) -> States:
    gates = a + r
    entry, forget, _, exit_ = gates.sigmoid().chunk(4, -1)
    memory = torch.addcmul(forget * states[1], entry, gates.chunk(4, -1)[2].tanh())
    return exit_ * memory.tanh(), memory


def _gru(a: Tensor, r: Tensor, states: States) -> States:
    (reset, keep, value), (reset_state, keep_state, value_state) = a.chunk(3, -1), r.chunk(3, -1)
    new = (value + (reset + reset_state).sigmoid() * value_state).tanh()
    return (torch.lerp(new, states[0], (keep + keep_state).sigmoid()),)


_CELLS: Mapping[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda a, r, _states: ((a + r).tanh(),),
    "rnn_relu": lambda a, r, _states: ((a + r).relu(),),
}
