"""Names of the operators of torchvision, which cannot load them beside a build of torch that is not its own.

They must be declared before the first import, which may be that of `transformers`.
"""

import importlib.util
import re
import sys
from pathlib import Path

import torch

_LIBRARY: list[torch.library.Library] = []


def declare() -> None:
    """Declare the operators for which torchvision registers shapes, if it is installed and does not fit torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in dict.fromkeys(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', source)):
            _LIBRARY[0].define(f"{name}(Tensor a) -> Tensor")
