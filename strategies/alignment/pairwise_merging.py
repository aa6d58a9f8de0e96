"""Pairwise merging: a chain or a tree of merges, in each of which one model is aligned to the other.

    chain    m_1 = c_1,    m_k = ((k - 1) m_{k-1} + g . c_k) / k        c_k aligned to m_{k-1}
    tree     m = (m_left + g . m_right) / 2                             m_right aligned to m_left

A star, in which every model is aligned to one anchor, connects each model to the anchor but not to the others; learned
transforms connect pairs only (Ito et al. 2024, arXiv 2402.04051, on more than two models). Means are weighted by
examples. A mean of several models is aligned as one, by one of the clients that contributed to it.

Both orders are generators: they yield a link, are sent the aligned model, and return the last mean.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedbasin.strategies.fusion.attention_products import fuse_products
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State, floating, interpolate

Merge = Literal["star", "chain", "tree"]


@dataclass(frozen=True, eq=False)
class MergedModel:
    """The mean of one or more clients' models in one frame.

    Attributes:
        model: the mean's floating tensors.
        examples: number of examples behind the mean.
        nodes: the clients that contributed.
        products_of: symmetry of the model, where the heads of attention are merged by their products; None merges them
            as all other tensors.
    """

    model: State
    examples: float
    nodes: tuple[int, ...]
    products_of: Symmetry | None = None

    def combine(self, other: "MergedModel") -> "MergedModel":
        """Return the mean of both models, weighted by examples."""
        examples = self.examples + other.examples
        # Clients may report no examples.
        share = other.examples / examples if examples else 0.5
        model = interpolate(floating(self.model), floating(other.model), share)
        if self.products_of is not None and 0 < share < 1:
            model = fuse_products(self.products_of, model, (self.model, other.model), (1 - share, share))
        return MergedModel(model, examples, (*self.nodes, *other.nodes), self.products_of)


@dataclass(frozen=True, eq=False)
class Link:
    """A request to one client to align one model to another.

    Attributes:
        node: the client.
        anchor: the model to align to; None asks for the client's own model as it is.
        moving: the model to align; None means the client's own model.
    """

    node: int
    anchor: MergedModel | None = None
    moving: MergedModel | None = None


# Each link is answered by the aligned model, or by None where the client failed.
Links: TypeAlias = Generator[Link, MergedModel | None, MergedModel | None]


def chain(nodes: Sequence[int]) -> Links:
    """Let one client after the other align its model to the mean so far; a client that fails is left out."""
    merged: MergedModel | None = None
    for node in nodes:
        aligned = yield Link(node, merged)
        if aligned is not None:
            merged = aligned if merged is None else merged.combine(aligned)
    return merged


def tree(nodes: Sequence[int]) -> Links:
    """Merge each half of the clients by itself, then align the second half's mean to the first's.

    The second half's clients are asked in turn until one of them aligns the mean; if none can, that half is left out.
    """
    if len(nodes) <= 1:
        return (yield from chain(nodes))
    half = (len(nodes) + 1) // 2
    left = yield from tree(nodes[:half])
    if left is None:
        return (yield from tree(nodes[half:]))
    if len(nodes) - half == 1:
        # A single client has its model already: asking for it first would cost a message.
        aligned = yield Link(nodes[-1], left)
        return left if aligned is None else left.combine(aligned)
    right = yield from tree(nodes[half:])
    for node in right.nodes if right is not None else ():
        aligned = yield Link(node, left, right)
        if aligned is not None:
            return left.combine(aligned)
    return left


LINKS: Mapping[str, Callable[[Sequence[int]], Links]] = {"chain": chain, "tree": tree}
