"""How statistics are encoded on the wire: which form of a Gram matrix and of a cross-moment a layer sends."""

from dataclasses import dataclass, field
from enum import Enum


class GramKind(Enum):
    """The part of a Gram matrix that is sent."""

    triangle = "the upper triangle: exact"
    half = "correlations in 16 bits, and exact variances"
    byte = "correlations in 8 bits, and exact variances"
    sketch = "a few directions, and the rest of the variances"
    blocks = "covariances of neighbouring inputs"
    diagonal = "variances"


class MomentKind(Enum):
    """The number format of a cross-moment."""

    float32 = "every entry in 32 bits"
    float16 = "every entry in 16 bits, and a scale for each row"
    byte = "every entry in 8 bits, and a scale for each row and each column"


@dataclass(frozen=True)
class GramForm:
    """The form in which a Gram matrix is sent.

    Attributes:
        kind: the part of it that is sent.
        size: rows of a sketch, or inputs in a block; 0 for the other kinds.
    """

    kind: GramKind = GramKind.triangle
    size: int = 0

    def __str__(self) -> str:
        return f"{self.kind.name}({self.size})" if self.size else self.kind.name


@dataclass(frozen=True)
class Encoding:
    """The form in which the statistics of one layer are sent.

    Attributes:
        gram: form of the Gram matrix.
        moment: number format of the cross-moment, where the layer is fitted.
        inputs: rows of the Gram matrix, including the one for the bias; 0 where the server does not know it, and a
            triangle's length tells.
        groups: number of Gram matrices, one for each group of a convolution.
    """

    gram: GramForm = field(default_factory=GramForm)
    moment: MomentKind = MomentKind.float32
    inputs: int = 0
    groups: int = 1
