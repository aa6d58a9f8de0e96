"""Models of the `transformers` library: the architecture that a config names, and its own rules for loading tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedbasin.server.files.library.tensor_layout import TensorLayout, find_layout
from fedbasin.server.files.reading import CONFIG, ModelError, few
from fedbasin.strategies.tensors.state import State

# What DistributedDataParallel and torch.compile put before the names of the module that they wrap.
_WRAPPERS = ("module.", "_orig_mod.")


def library() -> Any:
    """Return the `transformers` library, which speaks only of errors."""
    # Imported here, because it is an optional dependency and takes seconds.
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def architecture_of(folder: Path, config: Mapping[str, Any], *, bare: bool = False) -> tuple[Any, Any]:
    """Return the class that the config of a folder names, and the library's own config for it.

    Code that a folder contains is not run.

    Args:
        folder: the folder of the config, or the config's own path.
        config: content of the config.
        bare: choose the model without a head, as `AutoModel` does.

    Raises:
        ModelError: the library has no such architecture, or the config does not fit it.
    """
    hf = library()
    path = folder / CONFIG if folder.is_dir() else folder
    names = config.get("architectures") or [None]
    name = names[0] if isinstance(names, list) else names
    kind: Any = getattr(hf, name, None) if isinstance(name, str) else None
    is_model = isinstance(kind, type) and issubclass(kind, hf.PreTrainedModel) and hasattr(kind, "config_class")
    if name is not None and not is_model:
        raise ModelError(
            f"{path}: architectures says {name!r}, which transformers {hf.__version__} does not have; give --module"
        )
    try:
        library_config = hf.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if is_model and isinstance(library_config, kind.config_class or ()) and not bare:
            return kind, library_config
        if is_model and not bare:
            return kind, kind.config_class.from_pretrained(path, local_files_only=True)
        return _bare(hf, kind, type(library_config)), library_config
    except Exception as error:  # validators of configs raise classes of their own
        raise ModelError(f"{path}: cannot be read as the config of {name or 'a model'}: {error}") from error


def _bare(hf: Any, named: Any, config: Any) -> Any:
    """Return the model without a head: the one that is named if it has none, such as the encoder of an encoder-decoder."""
    encoder = hf.MODEL_FOR_TEXT_ENCODING_MAPPING.get(config, None)
    return encoder if encoder is not None and encoder is named else hf.MODEL_MAPPING[config]


def _load(
    architecture: Any, config: Any, state: State, *, where: object, other_sizes: bool
) -> tuple[nn.Module, set[str]]:
    """Return a module in float64 with a state loaded by the library's rules, and the names that the state lacked."""
    try:
        module, info = architecture.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float64,
            output_loading_info=True,
            # The product of all experts at once has no float64.
            experts_implementation="eager",
            ignore_mismatched_sizes=other_sizes,
        )
    except Exception as error:  # a model of a strange config raises anything, as for heads that are none
        # The library names the tensors in a table on stderr alone.
        if "ignore_mismatched_sizes" in str(error) and (apart := _of_other_shapes(architecture, config, state)):
            raise ModelError(
                f"{where}: {architecture.__name__} has other shapes by its config: {few(apart)}; use the config that was "
                "saved with these weights"
            ) from error
        raise ModelError(f"{where}: {architecture.__name__} does not load: {error}") from error
    names = [*info["missing_keys"], *info["mismatched_keys"]]
    return module.eval(), {name if isinstance(name, str) else name[0] for name in names}


def _of_other_shapes(architecture: Any, config: Any, state: State) -> list[str]:
    """Return the tensors of a file that have another shape in the module of a config, as far as names tell."""
    with torch.device("meta"):
        expected = architecture(config).state_dict()
    prefix = f"{architecture.base_model_prefix}."
    names = {name: {name, prefix + name, name.removeprefix(prefix)} & state.keys() for name in expected}
    return [
        f"{stored} {tuple(state[stored].shape)} for {tuple(expected[name].shape)}"
        for name, found in names.items()
        for stored in sorted(found)
        if state[stored].shape != expected[name].shape
    ]


def layout_in(
    architecture: Any, config: Any, state: State, *, where: object, other_sizes: bool = False
) -> tuple[nn.Module, TensorLayout]:
    """Return a module of an architecture, and where its tensors are stored in a file.

    The values of the module are numbers that mean nothing.

    Args:
        architecture: class of the model.
        config: the library's config.
        state: the tensors of the file; only names, shapes and dtypes are read.
        where: the file, for errors.
        other_sizes: leave out tensors that have another size, instead of refusing them.

    Raises:
        ModelError: the library cannot load the tensors, or loads none of them.
    """
    modules: list[nn.Module] = []

    def load_numbers(numbers: State) -> tuple[State, set[str]]:
        module, lacking = _load(architecture, config, numbers, where=where, other_sizes=other_sizes)
        modules.append(module)
        return module.state_dict(), lacking

    layout = find_layout(state, load_numbers)
    if not layout.pieces:
        wrapped = all(name.startswith(_WRAPPERS) for name in state)
        raise ModelError(
            f"{where}: none of its tensors is loaded by {architecture.__name__} ({few(layout.unread)}); "
            + ("save the module inside its wrapper" if wrapped else "use the config that was saved with these weights")
        )
    if integers := [name for name, _ in modules[0].named_parameters() if name in layout.integers]:
        raise ModelError(
            f"{where}: {few(integers)} of {architecture.__name__} would be loaded from integers, which a quantised model "
            "has; convert it to bfloat16 or float32"
        )
    return modules[0], layout
