"""The matchers by the names that settings and messages use."""

from enum import Enum


class Matcher(Enum):
    """The criterion by which a client is aligned; the value explains it."""

    weights = "which weights agree; needs no data"
    sinkhorn = "which weights agree, all spaces deciding together before any is settled; needs no data"
    graph = "which weights agree, all layers as one graph; needs no data"
    activations = "which features agree on the client's data; only a client can do it"
    learned = "the loss on the client's data between the two models; only a client can do it"
