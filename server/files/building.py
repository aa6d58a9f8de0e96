"""Construction of the module of a stored model, with an input to run it on."""

import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedbasin.server.files.double_precision import Doubled
from fedbasin.server.files.reading import CONFIG, ModelError, StoredModel, few

# Length of the example text: short, because a check runs the model many times.
_TOKENS = 8


@dataclass(frozen=True, eq=False)
class RunnableModel:
    """A module in evaluation mode and an example of the inputs of its forward."""

    module: nn.Module
    inputs: tuple[Tensor, ...]


def build_from_folder(model: StoredModel) -> RunnableModel:
    """Build the model of a folder in float32 with the `transformers` library.

    Raises:
        ModelError: the library has no such architecture, or the weights do not fit it.
    """
    # Imported here, because only this function needs the optional dependency.
    import transformers

    library: Any = transformers
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    name = (model.config.get("architectures") or [None])[0]
    architecture = getattr(library, str(name), None)
    if architecture is None:
        raise ModelError(
            f"{model.path / CONFIG}: architectures says {name!r}, which transformers {library.__version__} does "
            "not have; give --module"
        )
    try:
        module, keys = architecture.from_pretrained(
            model.path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{model.path}: {name} does not load: {error}") from error
    # The library only warns of these and fills the gaps with random numbers.
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, keys[fault])):
            raise ModelError(
                f"{model.path}: {fault.replace('_', ' ')} for {name}: {few(names)}; use the config that was saved "
                "with these weights"
            )
    inputs = _example_inputs(module)
    module.forward = partial(_run_forward, module.forward, tuple(inputs))
    return RunnableModel(module.eval(), tuple(inputs.values()))


def build_from_factory(model: StoredModel, factory: str) -> RunnableModel:
    """Build the model that `package.module:function` returns, and load the stored weights into it.

    The function takes no arguments and returns the module and an example of its inputs, `module, input, ...`.

    Raises:
        ModelError: there is no such function, it returns something else, or the weights do not fit.
    """
    module_name, _, function = factory.partition(":")
    # Modules beside the caller can be imported, as with `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    try:
        make_model = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"--module {factory}: {error}; write package.module:function, importable from {Path.cwd()}"
        ) from error
    result = make_model()
    module, *inputs = result if isinstance(result, tuple) else (result,)
    if not isinstance(module, nn.Module) or not all(isinstance(x, Tensor) for x in inputs):
        raise ModelError(f"--module {factory}: returns no `module, input, ...`; return a torch module and tensors")
    state = {**model, **{name: model[stored] for name, stored in model.ties.items()}}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{model.path}: does not fit what {factory} returns: {error}") from error
    return RunnableModel(module.eval(), tuple(inputs))


def _example_inputs(module: nn.Module) -> dict[str, Tensor]:
    """Return random tokens and pixels, if the model takes them, by the names of its arguments."""
    config: Any = module.config
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    text = config.get_text_config()
    if hasattr(text, "vocab_size") and module.main_input_name == "input_ids":
        tokens = torch.randint(text.vocab_size, (1, _TOKENS), generator=generator)
        inputs["input_ids"] = tokens
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens.flip(1)
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "image_size"):
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    return inputs


def _run_forward(forward: Any, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Run a forward of the library and return the outputs that an element must not change.

    These are logits and embeddings. Hidden states count only where the model returns nothing else: in a model with a
    head, an element transforms them.
    """
    with Doubled():
        outputs = forward(**dict(zip(names, tensors, strict=True)))
    values = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    results = tuple(
        value for name, value in values.items() if name.endswith(("logits", "_embeds")) or name.startswith("logits_")
    )
    states = (values.get(name) for name in ("last_hidden_state", "pooler_output"))
    return results or tuple(state for state in states if state is not None)
