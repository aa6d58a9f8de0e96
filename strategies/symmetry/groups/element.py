"""A group element as a block-monomial matrix: a permutation of blocks and an invertible map inside each block.

    T = sum_i  e_i e_order[i]^T (x) blocks[i]        so      (T z)_i = blocks[i] z_order[i]

One type serves every group: a permutation has blocks of size one, a rotation is a single block, rotated heads have the
identity as order, and permuted heads with a rotation each use both. A *role* is one feature space that the element acts
on. An attention head has two roles (query-key and value-output), which are permuted together.

A map that is not orthogonal comes with its *contragredient*, the inverse transpose, on a role of its own: tensors
that write the space are on one role and tensors that read it on the other, because `W T^-1` applies `T^-T` to the
input axis. An orthogonal map is its own contragredient and needs no second role.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Element:
    """An element of a group: one order of the blocks and, role by role, one map for each block.

    Attributes:
        order: block `order[i]` of the argument becomes block `i` of the result.
        blocks: maps of each role, or None where every map is the identity.
        sizes: block size of each role.
        duals: for each role the role with the inverse transposes; empty if all maps are orthogonal.
    """

    order: Int[Tensor, " count"]
    blocks: tuple[Float[Tensor, "count size size"] | None, ...]
    sizes: tuple[int, ...]
    duals: tuple[int, ...] = ()

    @property
    def is_monomial(self) -> bool:
        """True if entries are only moved and scaled, never mixed, so that a diagonal statistic can follow."""
        return all(b is None or bool(((b != 0).sum(-1) == 1).all()) for b in self.blocks)

    @property
    def is_identity(self) -> bool:
        """True if the element changes nothing."""
        return self.is_in_place and all(
            block is None or torch.equal(block, torch.eye(block.shape[-1]).expand_as(block)) for block in self.blocks
        )

    @property
    def is_in_place(self) -> bool:
        """True if no block changes places."""
        return torch.equal(self.order, torch.arange(len(self.order)))

    def act(self, tensor: Tensor, axis: int, role: int = 0) -> Tensor:
        """Apply T along one axis, whose length is a multiple of `count * size`.

        The multiple is the number of consecutive entries that one unit owns, such as the pixels of a channel after a
        flatten: they move together.
        """
        length = tensor.shape[axis]
        order = self.order.to(tensor.device)
        run = length // len(order)
        blocks = self.blocks[role]
        # Permutations copy entries without arithmetic, so they are exact in every precision.
        if blocks is None or self.sizes[role] == 1:
            offsets = torch.arange(run, device=tensor.device)
            permuted = _select(tensor, axis, (order[:, None] * run + offsets).reshape(-1))
            return permuted if blocks is None else _scale(permuted, blocks.reshape(-1), axis)
        rows = tensor.movedim(axis, 0)
        units = rows.reshape(len(order), self.sizes[role], -1)
        if not self.is_in_place:
            units = units[order]
        # Half precision is mixed in single precision and rounded once.
        compute = torch.promote_types(tensor.dtype, torch.float32)
        mixed = torch.bmm(blocks.to(tensor.device, compute), units.to(compute))
        return mixed.to(tensor.dtype).reshape(rows.shape).movedim(0, axis)

    def inverse(self) -> "Element":
        """Return the element that undoes this one."""
        back = torch.argsort(self.order)
        # The transpose of a contragredient is the inverse, so no matrix is inverted.
        duals = (self.blocks[self.dual(role)] for role in range(len(self.sizes)))
        blocks = tuple(None if b is None else b[back].mT.contiguous() for b in duals)
        return Element(back, blocks, self.sizes, self.duals)

    def after(self, earlier: "Element") -> "Element":
        """Return the product in which `earlier` acts first and this element second."""
        pairs = zip(self.blocks, earlier.blocks, strict=True)
        blocks = tuple(_product(outer, inner, self.order) for outer, inner in pairs)
        return Element(earlier.order[self.order], blocks, self.sizes, self.duals)

    def dual(self, role: int) -> int:
        """Return the role with the inverse transposes of the maps of `role`."""
        return self.duals[role] if self.duals else role

    def squared(self) -> "Element":
        """Return the action of a monomial element on squared gradients, each on the dual role of its parameter.

        Signs vanish, and a scale that divides the parameter multiplies its gradient.
        """
        roles = (self.blocks[self.dual(role)] for role in range(len(self.sizes)))
        return Element(self.order, tuple(None if b is None else b.square() for b in roles), self.sizes)

    def displacement(self) -> float:
        """Return the distance from the identity, from 0 to 1.

        The larger of two numbers: the fraction of blocks that change places, and the largest `||T - I||_F / (2
        sqrt(n))` of all roles. It is capped at 1, which a scale could exceed.
        """
        home = self.order == torch.arange(len(self.order))
        displaced = 1.0 - float(home.double().mean())
        rotated = [
            float(torch.linalg.matrix_norm(b - torch.eye(b.shape[-1])).square().mean().sqrt())
            / (2 * b.shape[-1] ** 0.5)
            for b in self.blocks
            if b is not None
        ]
        return min(1.0, max([displaced, *rotated]))


def _select(tensor: Tensor, axis: int, order: Tensor) -> Tensor:
    if axis != tensor.dim() - 1:
        return tensor.index_select(axis, order)
    # The same along rows, and three times as fast.
    return tensor.gather(axis, order.expand(tensor.shape))


def _scale(tensor: Tensor, scales: Float[Tensor, " count"], axis: int) -> Tensor:
    # Elementwise: a batch of 1 x 1 products would be slower and would round a change of sign.
    spread = scales.to(tensor).repeat_interleave(tensor.shape[axis] // len(scales))
    return tensor * spread.reshape(-1, *(1,) * (tensor.dim() - axis - 1))


def _product(outer: Tensor | None, inner: Tensor | None, order: Tensor) -> Tensor | None:
    if inner is None:
        return outer
    return inner[order] if outer is None else outer @ inner[order]
