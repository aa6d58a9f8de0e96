"""A group element as a block-monomial matrix: a permutation of blocks and an invertible map in each.

    T = sum_i  e_i e_order[i]^T (x) blocks[i]        so      (T z)_i = blocks[i] z_order[i]

One type serves every group of the project: a permutation is blocks of size one, a rotation is one block,
rotated heads are an identity order, exchanged heads with their rotations are both. A *role* is one feature
space that the element acts on; a head has two (query-key and value-output), which are exchanged together.

A map that is not orthogonal comes with its *contragredient*, the inverse transpose, on a role of its own: what
writes a space is on the one role, what reads it on the other, as `(W T^-1)` is `T^-T` on the input axis. An
orthogonal map is its own contragredient and needs no second role.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Element:
    """What one space does to its feature spaces, the roles.

    Attributes:
        order: block `order[i]` of the argument becomes block `i`.
        blocks: for each role the maps, or None where every block stays as it is.
        sizes: block size of each role.
        duals: for each role the role that has the inverse transposes; empty where all maps are orthogonal.
    """

    order: Int[Tensor, " count"]
    blocks: tuple[Float[Tensor, "count size size"] | None, ...]
    sizes: tuple[int, ...]
    duals: tuple[int, ...] = ()

    @property
    def is_monomial(self) -> bool:
        """Whether entries are moved and scaled, not mixed: a diagonal statistic can follow."""
        return all(b is None or bool(((b != 0).sum(-1) == 1).all()) for b in self.blocks)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed."""
        return self.is_in_place and all(
            block is None or torch.equal(block, torch.eye(block.shape[-1]).expand_as(block))
            for block in self.blocks
        )

    @property
    def is_in_place(self) -> bool:
        """Whether no block changes places."""
        return torch.equal(self.order, torch.arange(len(self.order)))

    def act(self, tensor: Tensor, axis: int, role: int = 0) -> Tensor:
        """Apply T along one axis, whose length is a multiple of `count * size`.

        The multiple is the number of consecutive entries that one unit owns, as the pixels of a channel
        do after a flatten: they move together.
        """
        length = tensor.shape[axis]
        order = self.order.to(tensor.device)
        owned = length // len(order)
        blocks = self.blocks[role]
        if blocks is None or self.sizes[role] == 1:
            offsets = torch.arange(owned, device=tensor.device)
            moved = tensor.index_select(axis, (order[:, None] * owned + offsets).reshape(-1))
            return moved if blocks is None else _scaled(moved, blocks.reshape(-1), axis)
        moved = tensor.movedim(axis, 0)
        units = moved.reshape(len(order), self.sizes[role], -1)
        if not self.is_in_place:
            units = units[order]
        # Half precision is mixed in single and rounded once.
        compute = torch.promote_types(tensor.dtype, torch.float32)
        mixed = torch.bmm(blocks.to(tensor.device, compute), units.to(compute))
        return mixed.to(tensor.dtype).reshape(moved.shape).movedim(0, axis)

    def inverse(self) -> "Element":
        """The element that undoes this one."""
        back = torch.argsort(self.order)
        undoing = (self.blocks[self.dual(role)] for role in range(len(self.sizes)))
        blocks = tuple(None if b is None else b[back].mT.contiguous() for b in undoing)
        return Element(back, blocks, self.sizes, self.duals)

    def after(self, first: "Element") -> "Element":
        """The product: `first` acts, then `self`."""
        pairs = zip(self.blocks, first.blocks, strict=True)
        blocks = tuple(_product(own, other, self.order) for own, other in pairs)
        return Element(first.order[self.order], blocks, self.sizes, self.duals)

    def dual(self, role: int) -> int:
        """The role with the inverse transposes of a role's maps."""
        return self.duals[role] if self.duals else role

    def squared(self) -> "Element":
        """What a monomial element does to squared gradients, each on the dual role of its parameter.

        Signs vanish, and what divides the parameter multiplies its gradient.
        """
        roles = (self.blocks[self.dual(role)] for role in range(len(self.sizes)))
        return Element(
            self.order, tuple(None if b is None else b.square() for b in roles), self.sizes
        )

    def moved(self) -> float:
        """How far from the identity, from 0 to 1.

        The share of displaced blocks, or `||T - I||_F / (2 sqrt(n))` of the role that turns most,
        whichever is more; at most 1, which a scale may exceed.
        """
        home = self.order == torch.arange(len(self.order))
        displaced = 1.0 - float(home.double().mean())
        turned = [
            float(torch.linalg.matrix_norm(b - torch.eye(b.shape[-1])).square().mean().sqrt())
            / (2 * b.shape[-1] ** 0.5)
            for b in self.blocks
            if b is not None
        ]
        return min(1.0, max([displaced, *turned]))


def _scaled(tensor: Tensor, scales: Float[Tensor, " count"], axis: int) -> Tensor:
    """Every unit's entries times its scale: no product of small matrices, and no rounding of a sign."""
    spread = scales.to(tensor).repeat_interleave(tensor.shape[axis] // len(scales))
    return tensor * spread.reshape(-1, *(1,) * (tensor.dim() - axis - 1))


def _product(outer: Tensor | None, inner: Tensor | None, order: Tensor) -> Tensor | None:
    if inner is None:
        return outer
    return inner[order] if outer is None else outer @ inner[order]
