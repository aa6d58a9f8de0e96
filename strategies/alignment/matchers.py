"""The matchers by name, as settings and messages have them."""

from enum import Enum


class Matcher(Enum):
    """What decides how a client is aligned."""

    weights = "which weights agree; needs no data"
    sinkhorn = (
        "which weights agree, all spaces deciding together before any is settled; needs no data"
    )
    activations = "which features agree on the client's data; only a client can do it"
    learned = "the loss on the client's data between the two models; only a client can do it"
