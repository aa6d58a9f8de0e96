"""Compressed forms of Gram matrices and cross-moments, with encoders and decoders.

    G = [C 0; 0 0] + m m^T / m_last        m  last column of G, that of the ones (only with a bias)
                                           C  scatter of the inputs around their mean

Lossy forms approximate C only. The mean of the inputs is always exact, and a positive semi-definite approximation of C
gives a positive semi-definite G. `half` and `byte` send D exactly and the correlations `D^-1/2 C D^-1/2`, which lie
between -1 and 1, in fixed point with 16 or 8 bits. Rounding G itself to floats of that size was rejected: an error
relative to each entry makes nearly singular matrices indefinite. Sketches are computed in `sketch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedbasin.proto.encoding import GramForm, GramKind, MomentKind

# Value to which the largest entry of a cross-moment's row is scaled in float16, whose maximum is 65504.
_LARGEST = 2.0**15

# Variance, relative to the mean square, below which an input is constant.
_CONSTANT = 1e-10

Pieces: TypeAlias = dict[str, Tensor]

# Integer types of correlations in fixed point; their largest number stands for 1.
_FIXED = {GramKind.half: torch.int16, GramKind.byte: torch.int8}


@dataclass(frozen=True)
class Piece:
    """The element type, and the shape for each group, of one tensor that is sent."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes of one group's values."""
        return prod(self.shape) * self.dtype.itemsize


class IndefiniteError(ValueError):
    """Pieces from a client that do not stand for a positive semi-definite matrix."""


def layout(form: GramForm, inputs: int, bias: bool) -> dict[str, Piece]:
    """Return the tensors that a form sends, in their order, `values` first.

    Args:
        form: form of the Gram matrix.
        inputs: number of rows of the Gram matrix.
        bias: True if its last row is that of the ones.
    """
    size = inputs - bias
    root = Piece(torch.float32, (size,))
    mean = {"mean": Piece(torch.float32, (inputs,))} if bias else {}
    match form.kind:
        case GramKind.triangle:
            return {"values": Piece(torch.float32, (inputs * (inputs + 1) // 2,))}
        case GramKind.half | GramKind.byte:
            pairs = Piece(_FIXED[form.kind], (size * (size - 1) // 2,))
            return {"values": pairs, "root": root} | mean
        case GramKind.sketch:
            rows = Piece(torch.float32, (form.size, size))
            return {"values": rows, "spread": root} | mean
        case _:
            return {"values": Piece(torch.float32, (_entries(form, size),))} | mean


def cross_moment_layout(kind: MomentKind, outputs: int, inputs: int) -> dict[str, Piece]:
    """Return the tensors that a cross-moment sends, in their order, `values` first."""
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
    """Return the tensors that stand for a Gram matrix in a form.

    Args:
        gram: Gram matrix, symmetric.
        form: form to encode it in.
        bias: True if its last row is that of the ones.

    Raises:
        ValueError: the form is a sketch, which is computed from rows and not from their Gram matrix.
    """
    if form.kind is GramKind.sketch:
        raise ValueError("a sketch is computed from rows; use fedbasin.strategies.fusion.compression.sketch")
    if form.kind is GramKind.triangle:
        return {"values": _upper(gram).float()}
    scatter = _scatter(gram) if bias else gram
    mean = {"mean": gram[..., -1].float()} if bias else {}
    if form.kind in _FIXED:
        return _correlations(scatter, _FIXED[form.kind]) | mean
    rows, columns = _within(scatter.shape[-1], form)
    return {"values": scatter[..., rows, columns].float()} | mean


def decode(pieces: Mapping[str, Tensor], form: GramForm, bias: bool) -> Float[Tensor, "*groups n n"]:
    """Return the Gram matrix that the pieces stand for, in double.

    Raises:
        IndefiniteError: it would not be positive semi-definite; only errors that the form itself reveals are detected.
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


def raise_diagonal(gram: Float[Tensor, "*groups n n"], form: GramForm, bias: bool) -> Tensor:
    """Return the Gram matrix with its diagonal raised, so that its encoded form is an upper bound of the matrix.

    A fit to residuals divides by the Gram matrix, and an approximation that is too small would make its steps too long.
    Covariances that a form leaves out are covered by variances: `2 |c_ij u_i u_j| <= |c_ij| (u_i^2 d_j / d_i + u_j^2
    d_i / d_j)` with `d_i^2 = c_ii`. Rounded correlations are covered by the largest eigenvalue of random noise of that
    size, `2 sigma sqrt(n)` (Wigner 1958), so the bound then holds with high probability only.
    """
    scatter = _scatter(gram) if bias else gram
    if form.kind in _FIXED:
        rise = _noise(form, scatter.shape[-1]) * scatter.diagonal(dim1=-2, dim2=-1)
    elif form.kind in {GramKind.blocks, GramKind.diagonal}:
        rise = _outside(scatter, form)
    else:
        return gram
    return gram + torch.diag_embed(torch.nn.functional.pad(rise, (0, 1)) if bias else rise)


def encode_cross_moment(cross_moment: Float[Tensor, "out inputs"], kind: MomentKind) -> Pieces:
    """Return the tensors that stand for a cross-moment."""
    match kind:
        case MomentKind.float32:
            return {"values": cross_moment.float()}
        case MomentKind.float16:
            scale = _largest(cross_moment, 1) / _LARGEST
            return {"values": (cross_moment / _divisor(scale)[:, None]).half(), "scale": scale}
        case MomentKind.byte:
            # Inputs can differ in scale by orders of magnitude; with scales for rows alone small ones would round to 0.
            columns = _largest(cross_moment, 0)
            level = cross_moment / _divisor(columns)
            scale = _largest(level, 1) / torch.iinfo(torch.int8).max
            values = (level / _divisor(scale)[:, None]).round().to(torch.int8)
            return {"values": values, "scale": scale, "columns": columns}


def decode_cross_moment(pieces: Mapping[str, Tensor]) -> Float[Tensor, "out inputs"]:
    """Return the cross-moment that the pieces stand for, in double."""
    values = pieces["values"].double()
    if "scale" in pieces:
        values = values * pieces["scale"].double()[:, None]
    return values * pieces["columns"].double() if "columns" in pieces else values


def _largest(cross_moment: Tensor, axis: int) -> Tensor:
    return cross_moment.abs().amax(axis).float()


def _divisor(scale: Tensor) -> Tensor:
    # A row of zeros has scale zero, and must stay zero.
    return scale.where(scale > 0, 1.0).double()


def side(entries: int) -> int:
    """Return the size of the largest matrix whose triangle has at most this number of entries."""
    return (isqrt(8 * entries + 1) - 1) // 2


def _scatter(gram: Tensor) -> Tensor:
    """Return the scatter C of the module's equation."""
    mean, count, squares = gram[..., :-1, -1], gram[..., -1:, -1:], gram[..., :-1, :-1]
    scatter = squares - mean.unsqueeze(-1) * mean.unsqueeze(-2) / count.where(count > 0, 1.0)
    # Of an input that is the same in every row only rounding errors are left, whose correlations mean nothing.
    constant = scatter.diagonal(dim1=-2, dim2=-1) <= _CONSTANT * squares.diagonal(dim1=-2, dim2=-1)
    return scatter.masked_fill(constant.unsqueeze(-1) | constant.unsqueeze(-2), 0.0)


def _with_mean(scatter: Tensor, mean: Tensor) -> Tensor:
    count = mean[..., -1:]
    if bool(((count <= 0) & (mean != 0)).any()):
        raise IndefiniteError("a Gram matrix has inputs with a mean, but no positive number of rows")
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
    unit = torch.iinfo(values.dtype).max
    correlations[..., rows, columns] = correlations[..., columns, rows] = values.double() / unit
    return _make_positive(correlations, 0.5 / unit) * (root.unsqueeze(-1) * root.unsqueeze(-2))


def _make_positive(correlations: Tensor, error: float) -> Tensor:
    """Return correlations with all eigenvalues lifted above zero, by no more than rounding can explain.

    Args:
        correlations: rounded correlations, whose diagonal is 1.
        error: largest rounding error of an entry.

    Raises:
        IndefiniteError: rounding does not explain an eigenvalue below zero.
    """
    # Gershgorin: no eigenvalue is off by more than the sum of a row's errors.
    most = error * correlations.shape[-1]
    # The lift is doubled until a Cholesky factorisation exists, which is cheaper than the eigenvalues.
    lift = correlations.new_zeros(correlations.shape[:-2])
    while bool((bad := torch.linalg.cholesky_ex(_add_identity(correlations, lift)).info > 0).any()):
        if bool((bad & (lift >= most)).any()):
            raise IndefiniteError("the correlations of a Gram matrix are not positive semi-definite")
        lift = lift.where(~bad, (2 * lift).clamp(error, most))
    return _add_identity(correlations, lift) / (1 + lift[..., None, None])


def _add_identity(correlations: Tensor, lift: Tensor) -> Tensor:
    return correlations + torch.diag_embed(lift.unsqueeze(-1).expand(correlations.shape[:-1]))


def _noise(form: GramForm, size: int) -> float:
    """Return the largest eigenvalue to expect of the rounding errors, which are uniform within half a unit."""
    return float(2 * (size / 3) ** 0.5 * 0.5 / torch.iinfo(_FIXED[form.kind]).max)


def _outside(scatter: Tensor, form: GramForm) -> Tensor:
    """Return for each input a bound on the sum of the covariances outside the blocks."""
    root = scatter.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    block = torch.arange(scatter.shape[-1]) // _edge(form, scatter.shape[-1])
    outside = scatter.abs() * (block[:, None] != block)
    return root * (outside / root.where(root > 0, 1.0).unsqueeze(-2)).sum(-1)


def _edge(form: GramForm, size: int) -> int:
    return {GramKind.triangle: size, GramKind.diagonal: 1}.get(form.kind, form.size)


def _entries(form: GramForm, size: int) -> int:
    """Return the number of entries of the upper triangle inside the blocks."""
    edge = min(_edge(form, size), size) or 1
    whole, rest = divmod(size, edge)
    return (whole * edge * (edge + 1) + rest * (rest + 1)) // 2


def _size_of_blocks(values: Tensor, form: GramForm) -> int:
    """Return the size of the matrix from the number of entries in its blocks."""
    edge = _edge(form, 1)
    whole, rest = divmod(values.shape[-1], edge * (edge + 1) // 2)
    return whole * edge + side(rest)


def _within(size: int, form: GramForm) -> Tensor:
    """Return rows and columns of the upper triangle's entries inside the blocks, `[2, entries]`."""
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
