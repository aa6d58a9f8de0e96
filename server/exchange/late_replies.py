"""Replies that come after their stage has ended: used by their age in a later round, or refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fedbasin.proto.request import Request

# What a late reply must have been asked for in the same words to be part of a later sum.
_SAME = ("stage", "kind", "start", "statistic", "shrink", "symmetry", "encodings", "frozen_factor")


@dataclass(frozen=True, eq=False)
class Unanswered:
    """A message whose reply has not come while its stage lasted.

    Attributes:
        node_id: the node that was asked.
        request: the request, without its tensors.
    """

    node_id: int
    request: Request


def without_tensors(request: Request) -> Request:
    """Return a request that can be held for rounds: as it was sent, without its models."""
    nothing = torch.empty(0)
    return replace(
        request,
        anchor=dict.fromkeys(request.anchor, nothing),
        moving=dict.fromkeys(request.moving, nothing),
        identity_bounds={},
    )


def is_usable(request: Request, now: Request, late_rounds: int) -> bool:
    """Return whether the reply to an earlier request may be part of this round's sum.

    Args:
        request: the earlier request.
        now: the request of this round.
        late_rounds: largest age of a reply that is used, in rounds.
    """
    age = now.round - request.round
    # Where another stage of the round follows, a client of the round before has not kept the models for it.
    return 0 < age <= late_rounds and not now.keep and all(getattr(request, f) == getattr(now, f) for f in _SAME)


def staleness_weight(age: int) -> float:
    """Return the factor on the weight of a reply that is some rounds old.

    It is the polynomial of FedAsync, with its exponent: Xie, Koyejo and Gupta, Asynchronous Federated Optimization,
    2019, arXiv 1903.03934.
    """
    return (1 + age) ** -0.5


def remember(
    waiting: Mapping[str, int], known: Mapping[str, Unanswered], request: Request, late_rounds: int
) -> dict[str, Unanswered]:
    """Return the messages whose replies may still come, of this stage and of those before.

    Args:
        waiting: the nodes that have not answered, by the id of the message.
        known: messages of earlier stages.
        request: the request of this stage.
        late_rounds: largest age of a reply that is used; one round older is the last that is still named.
    """
    question = without_tensors(request)
    messages = {key: known.get(key) or Unanswered(node, question) for key, node in waiting.items()}
    return {key: m for key, m in messages.items() if request.round - m.request.round <= late_rounds}
