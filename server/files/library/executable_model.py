"""Stored models that can be executed: a module with the stored weights, and an input to run it on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.server.files.library.library_inputs import example_inputs
from fedbasin.server.files.library.library_model import architecture_of, layout_in
from fedbasin.server.files.library.tensor_layout import ModuleState, TensorLayout, find_layout, with_copies
from fedbasin.server.files.library.user_function import import_function
from fedbasin.server.files.reading import ModelError, StoredModel, refuse_not_finite
from fedbasin.strategies.symmetry.example_inputs import Example
from fedbasin.strategies.symmetry.float64_execution import true_double
from fedbasin.strategies.symmetry.outputs import answers
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class ExecutableModel:
    """A module in evaluation mode, in float32.

    Attributes:
        module: the module, with the stored values; what is not stored has random ones.
        example: an example of the inputs of its forward.
        layout: where its tensors are stored.
        architecture: the class of the library that loads it, or None if a function of the user made it.
        config: the library's config of it, or None.
    """

    module: nn.Module
    example: Example
    layout: TensorLayout
    architecture: type | None = None
    config: object = None

    @property
    def kind(self) -> str:
        """Name of the module's class."""
        return type(self.module).__name__


def from_folder(model: StoredModel, config: Mapping[str, object], where: Path) -> ExecutableModel:
    """Build the model that a config names with the `transformers` library, by the library's own rules for loading.

    Args:
        model: the stored tensors.
        config: content of the config.
        where: folder or path of the config.

    Raises:
        ModelError: the library has no such architecture, the weights do not fit it, or a parameter is not finite.
    """
    # Another module of the folder reads the stream that a head would leave free to move.
    architecture, library_config = architecture_of(where, config, bare=bool(model.readers))
    module, layout = layout_in(architecture, library_config, model.shapes(), where=model.path)
    layout = with_copies(layout, model)
    _count_no_padding(module)
    try:
        example = example_inputs(module)
    except Exception as error:  # a config may lack anything
        kind = architecture.__name__
        raise ModelError(f"{where}: gives no example of the inputs of {kind}: {error}; give --module") from error
    return ExecutableModel(_filled(module, model, layout), example, layout, architecture, library_config)


def _count_no_padding(module: nn.Module) -> None:
    """Let a classifier of texts without a padding token run on several texts, in which every token counts."""
    config: Any = module.config
    text = config.get_text_config()
    if type(module).__name__.endswith("ForSequenceClassification") and text.pad_token_id is None:
        text.pad_token_id = -1


def from_factory(model: StoredModel, factory: str) -> ExecutableModel:
    """Build the model that `package.module:function` returns, and load the stored weights into it.

    The function takes no arguments and returns the module and an example of its inputs, `module, input, ...`.

    Raises:
        ModelError: there is no such function, it returns something else, the weights do not fit, or a parameter is not
            finite.
    """
    make_model = import_function(factory, "--module")
    try:
        result = make_model()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ModelError(f"--module {factory}: raised {type(error).__name__}: {error}") from error
    module, *inputs = result if isinstance(result, tuple) else (result,)
    if not isinstance(module, nn.Module) or not all(isinstance(x, Tensor) for x in inputs):
        raise ModelError(f"--module {factory}: returns no `module, input, ...`; return a torch module and tensors")

    def load_numbers(numbers: State) -> tuple[State, set[str]]:
        module.double().load_state_dict({**numbers, **{name: numbers[name_] for name, name_ in model.ties.items()}})
        return module.state_dict(), set()

    try:
        layout = find_layout(model.shapes(), load_numbers)
    except RuntimeError as error:
        raise ModelError(f"{model.path}: does not fit what {factory} returns: {error}") from error
    return ExecutableModel(_filled(module, model, layout), tuple(inputs), layout)


def change_of_function(model: ExecutableModel, before: State, after: State) -> float:
    """Return the largest relative change of an output in float64, between two states of the stored names.

    Args:
        model: the model.
        before: the stored tensors.
        after: the tensors that are to be written.

    Raises:
        ModelError: the model does not run on its example.
    """
    expected, actual = (_execute(model, ModuleState(model.layout, state)) for state in (before, after))
    changes = [
        float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in zip(actual, expected, strict=True)
    ]
    # NaN is larger than any number here: a comparison would lose it.
    return max(changes, key=lambda change: (change != change, change))


def _execute(model: ExecutableModel, state: State) -> list[Tensor]:
    module = model.module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **module.state_dict(), **state}
    arguments, named = _arguments(model.example)
    with torch.no_grad(), torch.random.fork_rng(), true_double():
        torch.manual_seed(0)
        doubled = {name: _double(tensor).clone() for name, tensor in tensors.items()}
        try:
            output = functional_call(module, doubled, arguments, named, tie_weights=False)
        except Exception as error:  # the model's own code may raise anything
            raise ModelError(f"{model.kind} does not run on an example: {error}; give --no-prove to go on") from error
    return answers(output)


def _arguments(example: Example) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if isinstance(example, Mapping):
        return (), {name: _double(tensor) for name, tensor in example.items()}
    return tuple(_double(tensor) for tensor in ((example,) if isinstance(example, Tensor) else example)), {}


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _filled(module: nn.Module, model: StoredModel, layout: TensorLayout) -> nn.Module:
    """Return the module with the stored values in place of the numbers by which the layout was found.

    Raises:
        ModelError: a parameter has entries that are not finite.
    """
    state = ModuleState(layout, model)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name in state:
                tensor.copy_(state[name])
    refuse_not_finite({name: p for name, p in module.named_parameters() if name in state}, model.path)
    return module.float().eval()
