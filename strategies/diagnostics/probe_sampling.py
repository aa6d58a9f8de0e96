"""Sampling of the clients that probe in a round: an exact fraction of them, without telling one of the others.

    draw(node) = SHA-256(round / node)        a client probes where its draw is at most the bound

The bound is the draw of the last client inside the fraction, so it reveals nothing about the other clients.
"""

import hashlib
import math
from collections.abc import Iterable


def draw(node: int, server_round: int) -> int:
    """Return the node's pseudo-random number in a round, uniform in 64 bits."""
    # A hash and not a generator: server and client get the same number in every version of Python and torch.
    digest = hashlib.sha256(f"{server_round}/{node}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def bound(nodes: Iterable[int], server_round: int, share: float) -> int:
    """Return the largest draw that still probes; at least one node does.

    Raises:
        ValueError: there are no nodes, or the share is outside (0, 1].
    """
    draws = sorted(draw(node, server_round) for node in nodes)
    if not draws or not 0 < share <= 1:
        raise ValueError(
            f"a share {share} of {len(draws)} nodes; ask at least one node, and give a share above 0 up to 1"
        )
    # Halves are rounded up; `round` would round them to even numbers, and 0.5 of 5 and of 7 nodes to 2 and 4.
    return draws[max(1, math.floor(share * len(draws) + 0.5)) - 1]
