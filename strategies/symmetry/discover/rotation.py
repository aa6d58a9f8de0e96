"""Residual streams that rotate: O(d) between root mean square norms, O(d-1) between LayerNorms.

Once the weights of the norms are folded into the layers that read them (`folding.py`), every writer of the stream may
rotate it and every reader rotate it back: `x / rms(x)` commutes with all of O(d), `(x - mean) / sigma` with the maps
that keep the vector of ones. For models from independent initialisations these rotations decide how well they match
(Theus et al. 2025, arXiv 2506.22712).

The layers that read a norm are found by execution. If the layers W_r read `w * n(x) + b`, then scaling w and b at an
entry is the same as scaling what the layers read there. So every function f of the outputs has at each entry i

    w_i df/dw_i + b_i df/db_i  =  sum_r sum_o W_r[o,i] df/dW_r[o,i]

which no other set of layers solves at all entries of several f. The rotated symmetry is then proven as every other is.
It changes the parametrisation: norms of an aligned model have weight 1. Function, names and shapes stay.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.discover.proof import Prover, proving
from fedbasin.strategies.symmetry.example_inputs import Example
from fedbasin.strategies.symmetry.folding import Fold, Reader
from fedbasin.strategies.symmetry.groups.centred import Centred
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry, SymmetryError

# The relative error of an equation that holds: far above rounding, far below any equation that does not.
_TOLERANCE = 1e-6


def rotate_residual(model: nn.Module, symmetry: Symmetry, *example: Example | None) -> Symmetry:
    """Return a symmetry in which every residual stream rotates whose norms can be folded, with the folds.

    Args:
        model: the model, which is not changed.
        symmetry: its symmetry, as `discover` returns it.
        example: arguments of its forward method, as for `discover`.

    Raises:
        SymmetryError: no stream can rotate; the message names what keeps each in place.
    """
    reasons = []
    with proving(model, *example) as prover:
        for stream, folds in _folds(prover, symmetry):
            rotated = next(filter(prover.keeps_enlarged, _rotations(symmetry, stream, folds)), None)
            if rotated is None:
                reasons.append(_reason(prover, stream, folds))
            symmetry = rotated or symmetry
    if not symmetry.folds:
        raise SymmetryError(
            f"no residual stream of {type(model).__name__} can rotate: "
            f"{'; '.join(reasons) or 'no norm has a weight that could be folded'}. A norm after the sum passes its weight "
            "on, a head that is tied to the token table cannot absorb one (untie it: tie_word_embeddings = False), and a "
            "model without a head returns its stream; leave the stream to permutations"
        )
    return symmetry


def _rotations(symmetry: Symmetry, stream: Space, folds: tuple[Fold, ...]) -> Iterator[Symmetry]:
    """Yield the symmetries in which a stream rotates, the largest group first."""
    folded = {fold.weight for fold in folds}
    axes = tuple(replace(axis, role=0) for axis in stream.axes if axis.tensor not in folded)
    groups: list[Group] = [Orthogonal(stream.width()), Centred(stream.width())] if folds else []
    for group in groups:
        spaces = tuple(Space(s.name, group, axes) if s is stream else s for s in symmetry.spaces)
        yield replace(symmetry, spaces=spaces, folds=(*symmetry.folds, *folds))


def _reason(prover: Prover, stream: Space, folds: tuple[Fold, ...]) -> str:
    folded = {fold.weight for fold in folds}
    left = [gain.tensor for gain in _gains(_readers(prover, stream), prover) if gain.tensor not in folded]
    if left:
        return f"{left[0]!r} scales single entries of the stream {stream.name!r} and folds into no layers"
    return f"a rotation of the stream {stream.name!r} changes the outputs"


def _folds(prover: Prover, symmetry: Symmetry) -> Iterator[tuple[Space, tuple[Fold, ...]]]:
    """Yield every space of single entries that norms scale, with the norms that fold into the layers that read them."""
    readers = {space: _readers(prover, space) for space in symmetry.spaces if set(space.group.sizes) == {1}}
    streams = {space: found for space, found in readers.items() if _gains(found, prover)}
    draws = max((2 + 2 * len(found) // space.width() for space, found in streams.items()), default=0)
    effects = _effects(prover, [reader for found in streams.values() for reader in found], draws)
    for space, found in streams.items():
        yield space, tuple(_solve(prover, {reader: effects[reader] for reader in found}))


def _readers(prover: Prover, space: Space) -> list[Reader]:
    """Return the tensors of one name with a whole axis in a space."""
    return [
        Reader(axis.tensor, axis.dim)
        for axis in space.axes
        if axis.is_whole
        and len(prover.names.get(axis.tensor, ())) == 1
        and prover.tensor(axis.tensor).shape[axis.dim] == space.width()
    ]


def _gains(readers: Sequence[Reader], prover: Prover) -> list[Reader]:
    return [r for r in readers if prover.tensor(r.tensor).dim() == 1 and r.tensor.endswith(".weight")]


def _effects(prover: Prover, readers: Sequence[Reader], draws: int) -> dict[Reader, Tensor]:
    """Return how much each of several functions changes if a tensor is scaled, entry by entry along its axis."""
    result: dict[Reader, list[Tensor]] = {reader: [] for reader in readers}
    for seed in range(draws):
        gradients = prover.gradients(seed)
        for reader, drawn in result.items():
            tensor = prover.tensor(reader.tensor)
            product = tensor * gradients.get(reader.tensor, torch.zeros_like(tensor))
            drawn.append(product.movedim(reader.axis, 0).reshape(tensor.shape[reader.axis], -1).sum(1))
    return {reader: torch.cat(drawn) for reader, drawn in result.items()}


def _solve(prover: Prover, effects: Mapping[Reader, Tensor]) -> Iterator[Fold]:
    layers = [reader for reader in effects if prover.tensor(reader.tensor).dim() > 1]
    matrix = torch.stack([effects[layer] for layer in layers], dim=1)
    sizes = matrix.norm(dim=0)
    # Of a layer without an effect on the outputs nothing tells what it reads.
    for gain in _gains(list(effects), prover) if bool(sizes.all()) else ():
        norm = gain.tensor.removesuffix(".weight")
        target = effects[gain] + effects.get(Reader(f"{norm}.bias", 0), torch.zeros_like(effects[gain]))
        chosen = torch.linalg.lstsq(matrix / sizes, target[:, None]).solution[:, 0] / sizes > 1 / 2
        if (matrix @ chosen.to(matrix) - target).norm() < _TOLERANCE * target.norm():
            yield Fold(norm, tuple(layer for layer, reads in zip(layers, chosen.tolist(), strict=True) if reads))
