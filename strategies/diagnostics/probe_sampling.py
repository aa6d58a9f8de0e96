"""Which clients of a round probe: exactly a share of those asked, known to each without being told of the others.

    draw(node) = SHA-256(round / node)        a client probes where its draw is at most the bound

The bound is the draw of the last one that the share lets in, so it says nothing about who else was asked.
"""

import hashlib
import math
from collections.abc import Iterable


def draw(node: int, server_round: int) -> int:
    """A node's number of this round, uniform in 64 bits."""
    digest = hashlib.sha256(f"{server_round}/{node}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def bound(nodes: Iterable[int], server_round: int, share: float) -> int:
    """The largest draw that still probes; at least one node does.

    Raises:
        ValueError: no nodes, or a share outside (0, 1].
    """
    draws = sorted(draw(node, server_round) for node in nodes)
    if not draws or not 0 < share <= 1:
        raise ValueError(
            f"a share {share} of {len(draws)} nodes; ask at least one node, and give a share above 0 up to 1"
        )
    return draws[max(1, math.floor(share * len(draws) + 0.5)) - 1]
