"""Federated aggregation on Flower that aligns clients' models before it fuses them."""

from importlib.metadata import version as _version

__version__ = _version("fedbasin")
