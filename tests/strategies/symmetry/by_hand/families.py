"""The families of published architectures, and the symmetry of a model by its type."""

from typing import Protocol

from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.tensors.state import State
from tests.strategies.symmetry.by_hand.decoders import gpt2, gpt_neox, llama, mixtral, qwen3
from tests.strategies.symmetry.by_hand.draft import Config
from tests.strategies.symmetry.by_hand.encoders import bert, deberta_v2, distilbert, roberta
from tests.strategies.symmetry.by_hand.t5 import t5
from tests.strategies.symmetry.by_hand.vision import clip, vit


class Family(Protocol):
    """A function that derives the symmetry of one architecture."""

    def __call__(self, config: Config, state: State, *, residual: bool) -> Symmetry: ...


# The keys are values of `config.model_type`.
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
    """Return the symmetry of a model of the `transformers` library, which need not be installed.

    Args:
        model_type: `config.model_type` of the model.
        config: configuration of the model, or its `to_dict()`.
        state: the model's `state_dict()`; only names and shapes are read.
        residual: False leaves the residual stream as it is. A model without a head returns its residual stream, which
            is always left as it is.

    Raises:
        SymmetryError: the type is unknown, or a tensor is missing, has another shape or is not of this architecture.
    """
    if model_type not in FAMILIES:
        raise SymmetryError(
            f"no family {model_type!r}; the known families are {', '.join(FAMILIES)}. "
            "Trace the model or write its symmetry as text"
        )
    return FAMILIES[model_type](Config(config), state, residual=residual)
