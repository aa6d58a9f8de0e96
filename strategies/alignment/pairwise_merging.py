"""Merging in pairs: a chain or a tree in which each model is aligned to what it is about to be merged with.

    chain    m_1 = c_1,    m_k = ((k - 1) m_{k-1} + g . c_k) / k        c_k aligned to m_{k-1}
    tree     m = (m_left + g . m_right) / 2                             m_right aligned to m_left

A star, in which everyone aligns to one anchor, links each model to the anchor but not to the others; with learned
transforms only pairs are linked (Ito et al. 2024, arXiv 2402.04051, on more than two models). Means are weighted by
examples. A merge of several models is aligned as one, by one of the clients that are in it.

Both are generators: they yield the next link, are sent what became of it, and return the merge.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedbasin.strategies.tensors.state import State, floating, interpolate

Merge = Literal["star", "chain", "tree"]


@dataclass(frozen=True, eq=False)
class Merged:
    """The mean of one or more clients' models in one frame.

    Attributes:
        model: its floating tensors.
        examples: behind it.
        nodes: the clients that are in it.
    """

    model: State
    examples: float
    nodes: tuple[int, ...]

    def joined(self, other: "Merged") -> "Merged":
        """The mean of both, weighted by examples."""
        examples = self.examples + other.examples
        share = other.examples / examples if examples else 0.5
        model = interpolate(floating(self.model), floating(other.model), share)
        return Merged(model, examples, (*self.nodes, *other.nodes))


@dataclass(frozen=True, eq=False)
class Link:
    """What one client is asked for.

    Attributes:
        node: the client.
        anchor: what to align to; None asks for the client's own model as it is.
        moving: what to align; None for the client's own model.
    """

    node: int
    anchor: Merged | None = None
    moving: Merged | None = None


# Sent for each link: the aligned model, or None where the client failed.
Links: TypeAlias = Generator[Link, Merged | None, Merged | None]


def chain(nodes: Sequence[int]) -> Links:
    """One client after the other aligns its model to the running merge; one that fails is left out."""
    merged: Merged | None = None
    for node in nodes:
        found = yield Link(node, merged)
        if found is not None:
            merged = found if merged is None else merged.joined(found)
    return merged


def tree(nodes: Sequence[int]) -> Links:
    """Halves are merged by themselves, and the second aligned to the first by the first of its clients that can.

    A half that none of its clients can align is left out.
    """
    if len(nodes) <= 1:
        return (yield from chain(nodes))
    half = (len(nodes) + 1) // 2
    left = yield from tree(nodes[:half])
    if left is None:
        return (yield from tree(nodes[half:]))
    if len(nodes) - half == 1:
        found = yield Link(nodes[-1], left)
        return left if found is None else left.joined(found)
    right = yield from tree(nodes[half:])
    for node in right.nodes if right is not None else ():
        found = yield Link(node, left, right)
        if found is not None:
            return left.joined(found)
    return left


LINKS: Mapping[str, Callable[[Sequence[int]], Links]] = {"chain": chain, "tree": tree}


def follow(links: Links, ask: Callable[[Link], Merged | None]) -> Merged | None:
    """Ask for every link in turn; returns the merge, or None if nobody could answer."""
    try:
        link = next(links)
        while True:
            link = links.send(ask(link))
    except StopIteration as end:
        return end.value
