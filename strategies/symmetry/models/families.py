"""From a model's type to its symmetry."""

from typing import Protocol

from fedbasin.strategies.symmetry.models.decoders import gpt2, gpt_neox, llama, mixtral, qwen3
from fedbasin.strategies.symmetry.models.draft import Config
from fedbasin.strategies.symmetry.models.encoders import bert, deberta_v2, distilbert, roberta
from fedbasin.strategies.symmetry.models.t5 import t5
from fedbasin.strategies.symmetry.models.vision import clip, vit
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.tensors.state import State


class Family(Protocol):
    """Reads one architecture."""

    def __call__(self, config: Config, state: State, *, residual: bool) -> Symmetry: ...


FAMILIES: dict[str, Family] = {
    "bert": bert,
    "clip": clip,
    "deberta-v2": deberta_v2,
    "distilbert": distilbert,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": llama,
    "mixtral": mixtral,
    "qwen2": llama,
    "qwen3": qwen3,
    "roberta": roberta,
    "t5": t5,
    "vit": vit,
}


def family(model_type: str, config: object, state: State, *, residual: bool = True) -> Symmetry:
    """The symmetry of a model of the `transformers` library, which need not be installed.

    Args:
        model_type: `config.model_type` of the model.
        config: the model's config, or its `to_dict()`.
        state: the model's `state_dict()`; only names and shapes are read.
        residual: False leaves the residual stream as it is. A model without a head hands its stream out,
            so there it always stays.

    Raises:
        SymmetryError: the type is unknown, or a tensor is missing, of another shape or not of this architecture.
    """
    if model_type not in FAMILIES:
        raise SymmetryError(
            f"no family {model_type!r}; known are {', '.join(FAMILIES)}. "
            "Trace the model or write its symmetry as text"
        )
    return FAMILIES[model_type](Config(config), state, residual=residual)
