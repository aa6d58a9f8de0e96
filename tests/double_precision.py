"""Execution of published models in the precision of their parameters, so that errors below float32 can be seen."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Doubled(TorchFunctionMode):
    """A context in which casts of double tensors to float32 are left out.

    Published models compute norms, rotary angles and softmax in float32 whatever the dtype of their parameters, which
    would hide every error below 1e-7.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with the cast to float32 left out."""
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to and torch.float32 in args:
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
