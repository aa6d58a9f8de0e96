"""Squared gradients of layers, summed over examples, without the gradients of single examples.

    F = sum over examples n of (sum over rows r of g_nr x_nr^T)^2        g gradient at the output, x input, squares by entry
      = (g^2)^T x^2                                                      where every example has one row

One backward pass serves a whole batch, because examples do not meet. Goodfellow 2015, "Efficient per-example gradient
computations", arXiv 1510.01799.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls
from fedbasin.strategies.capture.recurrent_steps import RecurrentSteps, recurrent_layers
from fedbasin.strategies.fusion.layers import Layer, gram_layers
from fedbasin.strategies.fusion.update import TRANSPOSED, tensor_names
from fedbasin.strategies.tasks.likelihoods import widen
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, forward


class Order(Enum):
    """The order in which the rows that a layer reads belong to examples."""

    example_first = "all rows of an example, then those of the next"
    example_last = "the first row of every example, then the second of every one"


@dataclass(frozen=True, eq=False)
class LayerSquares:
    """The layers of a model whose squared gradients are found without gradients of single examples.

    Attributes:
        model: the model.
        orders: order of the rows of each layer.
        elements: most numbers that are held at once for gradients of several rows.
    """

    model: nn.Module
    orders: Mapping[Layer, Order]
    elements: int

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, elements: int) -> "LayerSquares":
        """Find the layers of whose rows it is known whose they are.

        The rows of an example that runs alone show where its rows are among those of two.

        Args:
            model: the model, in evaluation mode.
            batch: a batch of its data.
            elements: most numbers that are held at once.
        """
        layers = [
            layer
            for layer in (*gram_layers(model), *recurrent_layers(model))
            if layer.groups == 1 and all(model.get_parameter(n).requires_grad for n in tensor_names(layer.block))
        ]
        last = min(2, len(batch.targets)) - 1
        two, alone = (_calls(model, layers, batch.map(itemgetter(torch.tensor(rows)))) for rows in ([0, last], [last]))
        orders = {layer: _order(two[layer], alone[layer]) for layer in layers if layer in two and layer in alone}
        return cls(model, {layer: order for layer, order in orders.items() if order is not None}, elements)

    @property
    def names(self) -> set[str]:
        """The names of the tensors of these layers."""
        return {name for layer in self.orders for name in tensor_names(layer.block)}

    def squares(
        self, task: Task, batch: Batch, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "batch scores numbers"], dict[str, Tensor]]:
        """Return the scores of a batch, and the squared gradients of the layers, summed over examples and scores.

        Args:
            task: the task.
            batch: the batch.
            generator: generator that draws targets.
        """
        calls: list[LayerCall] = []
        steps = set(recurrent_layers(self.model))

        def observe(call: LayerCall) -> Tensor | None:
            calls.append(call)
            # The model continues with a copy: later operations may write over the output, but for a recurrent step.
            return None if call.layer in steps else call.output.clone()

        with torch.enable_grad(), LayerCalls(self.model, list(self.orders), observe), RecurrentSteps():
            outputs = forward(self.model, batch)
        scores = task.label_scores(outputs, batch, generator)
        sums: dict[str, Tensor] = {}
        if not calls:
            return scores, sums
        numbers = task.arrange(outputs)
        for score in scores.unbind(1):
            gradients = torch.autograd.grad(
                numbers, [call.output for call in calls], score.flatten(), retain_graph=True, allow_unused=True
            )
            used: defaultdict[Layer, list[tuple[LayerCall, Tensor]]] = defaultdict(list)
            for call, gradient in zip(calls, gradients, strict=True):
                if gradient is not None:
                    used[call.layer].append((call, gradient))
            for layer, pairs in used.items():
                for name, square in self._of_layer(layer, pairs, len(scores)).items():
                    sums[name] = sums[name] + square if name in sums else square
        return scores, sums

    @torch.no_grad()
    def _of_layer(self, layer: Layer, calls: Sequence[tuple[LayerCall, Tensor]], examples: int) -> dict[str, Tensor]:
        """Return the squared gradients of a layer's tensors; an example's gradient is the sum over all calls."""
        order, gradients = self.orders[layer], [gradient for _, gradient in calls]
        shape = layer.outputs, layer.inputs - len(layer.block) + 1
        weight = torch.zeros(shape, device=gradients[0].device, dtype=widen(gradients[0]).dtype)
        bias = torch.zeros_like(weight[:, 0])
        has_one_row = sum(gradient.numel() for gradient in gradients) == examples * layer.outputs
        most = examples if has_one_row else max(1, self.elements // weight.numel())
        for start in range(0, examples, most):
            part = slice(start, start + most)
            x = torch.cat([_rows(call, order, examples, part) for call, _ in calls], 1)
            g = torch.cat([_outputs(call, gradient, order, examples, part) for call, gradient in calls], 1)
            weight += g.square()[:, 0].T @ x.square()[:, 0] if has_one_row else (g.mT @ x).square().sum(0)
            bias += g.sum(1).square().sum(0)
        parameter = self.model.get_parameter(tensor_names(layer.block)[0])
        whole = weight.T if layer.block[0].endswith(TRANSPOSED) else weight
        return dict(zip(tensor_names(layer.block), (whole.reshape(parameter.shape), bias), strict=False))


def _calls(model: nn.Module, layers: list[Layer], batch: Batch) -> dict[Layer, list[LayerCall]]:
    """Return the calls of every layer."""
    calls: defaultdict[Layer, list[LayerCall]] = defaultdict(list)

    def observe(call: LayerCall) -> None:
        calls[call.layer].append(call.copy())

    with torch.no_grad(), LayerCalls(model, layers, observe), RecurrentSteps():
        forward(model, batch)
    return calls


def _order(two: Sequence[LayerCall], alone: Sequence[LayerCall]) -> Order | None:
    """Return the order in which a layer reads the rows of two examples; None where it is none that is known."""
    return next((order for order in Order if len(two) == len(alone) and all(map(_fits(order), two, alone))), None)


def _fits(order: Order) -> Callable[[LayerCall, LayerCall], bool]:
    def fits(two: LayerCall, alone: LayerCall) -> bool:
        if two.inputs.numel() != 2 * alone.inputs.numel() or (two.kernel and order is not Order.example_first):
            return False
        pair_rows, single_rows = _rows(two, order, 2, slice(1, 2)), _rows(alone, order, 1, slice(0, 1))
        return pair_rows.shape == single_rows.shape and torch.allclose(pair_rows, single_rows, rtol=1e-3, atol=1e-5)

    return fits


def _rows(call: LayerCall, order: Order, examples: int, part: slice) -> Float[Tensor, "part rows in"]:
    if call.kernel is not None:
        some = replace(call, inputs=call.inputs[part], output=call.output[part])
        return widen(some.patches().flatten(2).mT)
    return widen(_by_example(call.inputs.detach(), order, examples)[part])


def _outputs(
    call: LayerCall, values: Tensor, order: Order, examples: int, part: slice
) -> Float[Tensor, "part rows out"]:
    if call.kernel is not None:
        return widen(values[part].flatten(2).mT)
    return widen(_by_example(values, order, examples)[part])


def _by_example(values: Tensor, order: Order, examples: int) -> Float[Tensor, "examples rows features"]:
    if order is Order.example_first:
        return values.reshape(examples, -1, values.shape[-1])
    return values.reshape(-1, examples, values.shape[-1]).transpose(0, 1)
