"""torchvision is made ready before any test imports it."""

from tests.architectures.torchvision_operators import declare

declare()
