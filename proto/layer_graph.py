"""The layers of a model in the order in which it uses them, as a client reports them to the server."""

from dataclasses import dataclass
from typing import TypeAlias

# The names of the tensors of one layer: a weight, or a weight and its bias.
Block: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNorm layer with running statistics, a weight and a bias.

    Attributes:
        name: name of the module.
        eps: the constant that the layer adds to variances.
    """

    name: str
    eps: float

    @property
    def statistics(self) -> tuple[str, str]:
        """The names of the running mean and the running variance."""
        return f"{self.name}.running_mean", f"{self.name}.running_var"

    @property
    def parameters(self) -> tuple[str, str]:
        """The names of the weight and the bias."""
        return f"{self.name}.weight", f"{self.name}.bias"


@dataclass(frozen=True)
class LayerGraph:
    """The linear and convolutional layers of a model, from input to output.

    Attributes:
        levels: layers that read the same tensor stand together, as queries, keys and values do.
        head: the last layer, which can be fitted to the targets of the task; None where there is none.
        norms: the BatchNorm layers of the model.
        head_target: name of the target that the head is fitted to; empty for labels.
    """

    levels: tuple[tuple[Block, ...], ...]
    head: Block | None = None
    norms: tuple[BatchNorm, ...] = ()
    head_target: str = ""
