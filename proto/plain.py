"""States as Flower itself writes them: one array per tensor, under the tensor's name.

For messages that Flower's own wrappers and mods compute with. Reading is checked and copies nothing.
"""

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedbasin.proto.packing import PackingError


def write(state: Mapping[str, Tensor]) -> ArrayRecord:
    """The state as an ordinary ArrayRecord.

    Raises:
        PackingError: a tensor has a dtype that NumPy lacks (bfloat16): send it packed.
    """
    try:
        return ArrayRecord({n: Array(t.detach().cpu().numpy()) for n, t in state.items()})
    except TypeError as error:
        raise PackingError(f"{error}; set packed, or cast the tensor") from error


def read(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of an ordinary ArrayRecord, as read-only views into its bytes.

    Raises:
        PackingError: an array is no .npy, or its header and its length contradict each other.
    """
    return {name: _view(name, array) for name, array in record.items()}


def _view(name: str, array: Array) -> Tensor:
    stream = io.BytesIO(array.data[:4096])
    try:
        if npy.read_magic(stream) != (1, 0):
            raise PackingError(f"array {name!r} is no .npy 1.0; send it as Flower's Array does")
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
        start = stream.tell()
        # Header and length must agree before a size is believed.
        if (
            fortran
            or dtype.hasobject
            or math.prod(shape) * dtype.itemsize != len(array.data) - start
        ):
            raise PackingError(
                f"array {name!r} claims {shape} of {dtype} over {len(array.data) - start} bytes; "
                "it is truncated or forged, send it again"
            )
        values = np.frombuffer(array.data, dtype, offset=start).reshape(shape)
        return from_dlpack(values) if values.size else torch.from_numpy(values.copy())
    except (ValueError, TypeError, BufferError, RuntimeError) as error:
        raise (
            error
            if isinstance(error, PackingError)
            else PackingError(f"array {name!r}: {error}; send it as Flower's Array does")
        ) from error
