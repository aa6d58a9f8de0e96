"""A stored model as a module that runs, with an input to run it on."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedbasin.server.files.double_precision import Doubled
from fedbasin.server.files.reading import CONFIG, ModelError, StoredModel, few

_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Built:
    """A module in evaluation mode and one example of what its forward takes."""

    module: nn.Module
    inputs: tuple[Tensor, ...]


def from_folder(model: StoredModel) -> Built:
    """The model of a folder, built by the `transformers` library in float32.

    Raises:
        ModelError: the library is not installed or has no such architecture, or the weights do not fit.
    """
    hf = _library(model.path)
    kind = _architecture(hf, model)
    try:
        module, loaded = kind.from_pretrained(
            model.path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{model.path}: {kind.__name__} does not load: {error}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loaded[fault])):
            raise ModelError(
                f"{model.path}: {fault.replace('_', ' ')} for {kind.__name__}: {few(names)}; are config and "
                "weights of one model?"
            )
    inputs = _inputs(module)
    module.forward = partial(_function, module.forward, tuple(inputs))
    return Built(module.eval(), tuple(inputs.values()))


def from_factory(model: StoredModel, factory: str) -> Built:
    """The model that `package.module:function` makes, with the stored weights.

    The function takes nothing and returns the module and an example of its inputs, `module, input, ...`.

    Raises:
        ModelError: there is no such function, it returns something else, or the weights do not fit.
    """
    module, *inputs = _made(factory)
    if not isinstance(module, nn.Module) or not all(isinstance(x, Tensor) for x in inputs):
        raise ModelError(f"{factory} returns no `module, input, ...` of a torch module and tensors")
    state = {**model, **{name: model[kept] for name, kept in model.ties.items()}}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{model.path}: does not fit what {factory} returns: {error}") from error
    return Built(module.eval(), tuple(inputs))


def _made(factory: str) -> tuple[Any, ...]:
    name, _, function = factory.partition(":")
    # What lies where the command is called, as `python -m` would find it.
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"--module {factory}: {error}; write package.module:function, importable from {Path.cwd()}"
        ) from error
    made = found()
    return made if isinstance(made, tuple) else (made,)


def _library(path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{path}: the transformers library, which builds this model, is not installed; "
            "`pip install transformers`, or give --module"
        ) from error
    library: Any = transformers
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def _architecture(hf: Any, model: StoredModel) -> Any:
    names = model.config.get("architectures") or [None]
    kind = getattr(hf, str(names[0]), None)
    if kind is None:
        raise ModelError(
            f"{model.path / CONFIG}: architectures says {names[0]!r}, which transformers {hf.__version__} does "
            "not have; give --module"
        )
    return kind


def _inputs(module: nn.Module) -> dict[str, Tensor]:
    """Random tokens and pixels, as far as the model takes any."""
    config: Any = module.config
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config()
    tokens = (
        torch.randint(text.vocab_size, (1, _TOKENS), generator=generator)
        if hasattr(text, "vocab_size")
        else None
    )
    found: dict[str, Tensor] = {}
    if tokens is not None and module.main_input_name == "input_ids":
        found["input_ids"] = tokens
        if config.is_encoder_decoder:
            found["decoder_input_ids"] = tokens.flip(1)
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "image_size"):
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        found["pixel_values"] = torch.randn(shape, generator=generator)
    return found


def _function(forward: Any, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the model is for: its logits or embeddings, not the states that it also hands out."""
    with Doubled():
        outputs = forward(**dict(zip(names, tensors, strict=True)))
    return _answers(outputs)


def _answers(outputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    found = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    asked = [
        value
        for name, value in found.items()
        if name.endswith(("logits", "_embeds")) or name.startswith("logits_")
    ]
    states = [found[name] for name in ("last_hidden_state", "pooler_output") if name in found]
    return tuple(asked or states)
