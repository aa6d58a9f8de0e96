"""Gram matrices and moments in fewer bytes: what travels in place of the square, and back.

    G = [C 0; 0 0] + m m^T / m_last        m  the last column, that of the ones (only where there is a bias)
                                           C  the scatter around the mean

Forms that lose something lose it of C: the mean of the inputs is always exact, and a positive semi-definite
piece of C gives a positive semi-definite G. `half` and `byte` send the correlations `D^-1/2 C D^-1/2`, which lie
between -1 and 1, in fixed point of 16 or 8 bits, and D exactly: rounding G itself to a float of as many bits, an
error relative to each entry, makes nearly singular matrices indefinite. A sketch is described in `sketch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedbasin.proto.encoding import GramForm, GramKind, MomentKind

# The largest entry of a row of a moment in float16; the most that it could be is 65504.
_LARGEST = 2.0**15

Pieces: TypeAlias = dict[str, Tensor]


# Correlations in fixed point, the largest number standing for one.
_FIXED = {GramKind.half: torch.int16, GramKind.byte: torch.int8}


@dataclass(frozen=True)
class Piece:
    """One tensor of what is sent: its element type, and its shape for each group."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize


class IndefiniteError(ValueError):
    """What was sent is of no positive semi-definite matrix."""


def layout(form: GramForm, inputs: int, bias: bool) -> dict[str, Piece]:
    """The tensors that a form sends, in their order, `values` first.

    Args:
        form: of the Gram matrix.
        inputs: its size.
        bias: whether its last row is that of the ones.
    """
    own = inputs - bias
    values, root = Piece(torch.float32, (_kept(form, own),)), Piece(torch.float32, (own,))
    mean = {"mean": Piece(torch.float32, (inputs,))} if bias else {}
    match form.kind:
        case GramKind.triangle:
            return {"values": Piece(torch.float32, (inputs * (inputs + 1) // 2,))}
        case GramKind.half | GramKind.byte:
            pairs = Piece(_FIXED[form.kind], (own * (own - 1) // 2,))
            return {"values": pairs, "root": root} | mean
        case GramKind.sketch:
            rows = Piece(torch.float32, (form.size, own))
            return {"values": rows, "spread": root} | mean
        case _:
            return {"values": values} | mean


def moment_layout(kind: MomentKind, outputs: int, inputs: int) -> dict[str, Piece]:
    """The tensors that a moment sends, in their order, `values` first."""
    shape, scale = (outputs, inputs), Piece(torch.float32, (outputs,))
    match kind:
        case MomentKind.float32:
            return {"values": Piece(torch.float32, shape)}
        case MomentKind.float16:
            return {"values": Piece(torch.float16, shape), "scale": scale}
        case MomentKind.byte:
            columns = Piece(torch.float32, (inputs,))
            return {"values": Piece(torch.int8, shape), "scale": scale, "columns": columns}


def encode(gram: Float[Tensor, "*groups n n"], form: GramForm, bias: bool) -> Pieces:
    """What a form keeps of a Gram matrix.

    Raises:
        ValueError: the form is a sketch, which is made of rows and not of their Gram matrix.
    """
    if form.kind is GramKind.sketch:
        raise ValueError(
            "a sketch is made of rows; use fedbasin.strategies.fusion.compression.sketch"
        )
    if form.kind is GramKind.triangle:
        return {"values": _upper(gram).float()}
    scatter = _scatter(gram) if bias else gram
    mean = {"mean": gram[..., -1].float()} if bias else {}
    if form.kind in _FIXED:
        return _correlations(scatter, _FIXED[form.kind]) | mean
    where = _within(scatter.shape[-1], form)
    return {"values": scatter[..., where[0], where[1]].float()} | mean


def decode(
    pieces: Mapping[str, Tensor], form: GramForm, bias: bool
) -> Float[Tensor, "*groups n n"]:
    """The matrix that the pieces stand for, in double.

    Raises:
        IndefiniteError: they are of no positive semi-definite matrix, as far as its form shows that.
    """
    values = pieces["values"]
    match form.kind:
        case GramKind.triangle:
            return _symmetric(values.double())
        case GramKind.half | GramKind.byte:
            scatter = _from_correlations(values, pieces["root"].double())
        case GramKind.sketch:
            rows = values.double()
            scatter = rows.mT @ rows + torch.diag_embed(pieces["spread"].double())
        case _:
            size = pieces["mean"].shape[-1] - 1 if bias else _size_of_blocks(values, form)
            scatter = _from_blocks(values.double(), size, form)
    return _with_mean(scatter, pieces["mean"].double()) if bias else scatter


def dominating(gram: Float[Tensor, "*groups n n"], form: GramForm, bias: bool) -> Tensor:
    """The Gram matrix with a diagonal raised so far that what the form keeps of it is no less than the matrix.

    A fit to residuals divides by what is known of the inputs. What is left out must not make steps too long:
    `2 |c_ij u_i u_j| <= |c_ij| (u_i^2 d_j / d_i + u_j^2 d_i / d_j)` with `d_i^2 = c_ii`, so covariances that are left
    out are made up for by variances. Rounded correlations are made up for by the largest eigenvalue of noise of
    that size, `2 sigma sqrt(n)` (Wigner 1958): most likely, and not for certain.
    """
    scatter = _scatter(gram) if bias else gram
    if form.kind in _FIXED:
        rise = _noise(form, scatter.shape[-1]) * scatter.diagonal(dim1=-2, dim2=-1)
    elif form.kind in {GramKind.blocks, GramKind.diagonal}:
        rise = _outside(scatter, form)
    else:
        return gram
    return gram + torch.diag_embed(torch.nn.functional.pad(rise, (0, 1)) if bias else rise)


def encode_moment(moment: Float[Tensor, "out inputs"], kind: MomentKind) -> Pieces:
    """What is sent of a moment."""
    match kind:
        case MomentKind.float32:
            return {"values": moment.float()}
        case MomentKind.float16:
            scale = _largest(moment, 1) / _LARGEST
            return {"values": (moment / _divisor(scale)[:, None]).half(), "scale": scale}
        case MomentKind.byte:
            columns = _largest(moment, 0)
            level = moment / _divisor(columns)
            scale = _largest(level, 1) / torch.iinfo(torch.int8).max
            values = (level / _divisor(scale)[:, None]).round().to(torch.int8)
            return {"values": values, "scale": scale, "columns": columns}


def decode_moment(pieces: Mapping[str, Tensor]) -> Float[Tensor, "out inputs"]:
    """The moment that was sent, in double."""
    values = pieces["values"].double()
    if "scale" in pieces:
        values = values * pieces["scale"].double()[:, None]
    return values * pieces["columns"].double() if "columns" in pieces else values


def _largest(moment: Tensor, axis: int) -> Tensor:
    return moment.abs().amax(axis).float()


def _divisor(scale: Tensor) -> Tensor:
    return scale.where(scale > 0, 1.0).double()


def side(entries: int) -> int:
    """The size of the matrix whose triangle has so many entries, rounded down."""
    return (isqrt(8 * entries + 1) - 1) // 2


def _scatter(gram: Tensor) -> Tensor:
    """C of the module's equation: what is left once the ones have explained all they can."""
    mean, count = gram[..., :-1, -1], gram[..., -1:, -1:]
    return gram[..., :-1, :-1] - mean.unsqueeze(-1) * mean.unsqueeze(-2) / count.where(
        count > 0, 1.0
    )


def _with_mean(scatter: Tensor, mean: Tensor) -> Tensor:
    count = mean[..., -1:]
    if bool(((count <= 0) & (mean != 0)).any()):
        raise IndefiniteError("the ones of a Gram matrix have no positive number of rows")
    joint = mean.unsqueeze(-1) * mean.unsqueeze(-2) / count.where(count > 0, 1.0).unsqueeze(-1)
    joint[..., :-1, :-1] += scatter
    return joint


def _correlations(scatter: Tensor, dtype: torch.dtype) -> Pieces:
    root = scatter.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    divisor = root.where(root > 0, 1.0)
    correlations = scatter / (divisor.unsqueeze(-1) * divisor.unsqueeze(-2))
    rounded = (correlations.clamp(-1, 1) * torch.iinfo(dtype).max).round().to(dtype)
    size = scatter.shape[-1]
    rows, columns = torch.triu_indices(size, size, offset=1)
    return {"values": rounded[..., rows, columns], "root": root.float()}


def _from_correlations(values: Int[Tensor, "*groups pairs"], root: Tensor) -> Tensor:
    size = root.shape[-1]
    rows, columns = torch.triu_indices(size, size, offset=1)
    correlations = torch.diag_embed(torch.ones_like(root))
    one = torch.iinfo(values.dtype).max
    correlations[..., rows, columns] = correlations[..., columns, rows] = values.double() / one
    return _positive(correlations, 0.5 / one) * (root.unsqueeze(-1) * root.unsqueeze(-2))


def _positive(correlations: Tensor, unit: float) -> Tensor:
    """Correlations drawn together by what their rounding may have taken them below zero, and no further.

    No entry is off by more than `unit`, so no eigenvalue by more than that for every other input.
    """
    most = unit * correlations.shape[-1]
    lift = correlations.new_zeros(correlations.shape[:-2])
    while bool((bad := torch.linalg.cholesky_ex(_lifted(correlations, lift)).info > 0).any()):
        if bool((bad & (lift >= most)).any()):
            raise IndefiniteError("the correlations of a Gram matrix are none of any inputs")
        lift = lift.where(~bad, (2 * lift).clamp(unit, most))
    return _lifted(correlations, lift) / (1 + lift[..., None, None])


def _lifted(correlations: Tensor, lift: Tensor) -> Tensor:
    return correlations + torch.diag_embed(lift.unsqueeze(-1).expand(correlations.shape[:-1]))


def _noise(form: GramForm, size: int) -> float:
    """The largest eigenvalue of what rounding changes in correlations; one is off by up to half a unit."""
    return float(2 * (size / 3) ** 0.5 * 0.5 / torch.iinfo(_FIXED[form.kind]).max)


def _outside(scatter: Tensor, form: GramForm) -> Tensor:
    """What the covariances outside the blocks can add up to, for each input."""
    root = scatter.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    block = torch.arange(scatter.shape[-1]) // _edge(form, scatter.shape[-1])
    outside = scatter.abs() * (block[:, None] != block)
    return root * (outside / root.where(root > 0, 1.0).unsqueeze(-2)).sum(-1)


def _edge(form: GramForm, size: int) -> int:
    return {GramKind.triangle: size, GramKind.diagonal: 1}.get(form.kind, form.size)


def _kept(form: GramForm, size: int) -> int:
    """How many entries of the upper triangle stand in the blocks."""
    edge = min(_edge(form, size), size) or 1
    whole, rest = divmod(size, edge)
    return (whole * edge * (edge + 1) + rest * (rest + 1)) // 2


def _size_of_blocks(values: Tensor, form: GramForm) -> int:
    """The size of the matrix that has so many entries in its blocks."""
    edge = _edge(form, 1)
    whole, rest = divmod(values.shape[-1], edge * (edge + 1) // 2)
    return whole * edge + side(rest)


def _within(size: int, form: GramForm) -> Tensor:
    """Rows and columns of the entries of the upper triangle that stand in the blocks."""
    rows, columns = torch.triu_indices(size, size)
    edge = _edge(form, size) or 1
    return torch.stack([rows, columns])[:, rows // edge == columns // edge]


def _from_blocks(values: Tensor, size: int, form: GramForm) -> Tensor:
    rows, columns = _within(size, form)
    full = values.new_zeros(*values.shape[:-1], size, size)
    full[..., rows, columns] = full[..., columns, rows] = values
    return full


def _upper(gram: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*gram.shape[-2:])
    return gram[..., rows, columns]


def _symmetric(values: Tensor) -> Tensor:
    return _from_blocks(values, side(values.shape[-1]), GramForm())
