"""States in Flower's own form: one array per tensor, under the tensor's name.

Messages have this form if Flower's wrappers and mods compute with them. Reading is checked and copies nothing.
"""

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedbasin.proto.packing import PackingError

_MAGIC = b"\x93NUMPY\x01\x00"
# Patterns and not NumPy's parser, which evaluates Python literals and fails with many kinds of exceptions.
_DTYPE = re.compile(rb"\{'descr': '([^']{1,16})', 'fortran_order': (?:False|True), 'shape': \([\d, ]*\), \} *\n")
_READ = rb"<[fiu][248]|\|[iub]1"
_HEADER = re.compile(
    rb"\{'descr': '(" + _READ + rb")', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,18}(?:, |,(?=\))|(?=\)))){0,32})\), \} *\n"
)


def write_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the state as an ordinary ArrayRecord.

    Raises:
        PackingError: a tensor has a dtype that NumPy lacks (bfloat16): send it packed.
    """
    try:
        return ArrayRecord({n: Array(t.detach().cpu().numpy()) for n, t in state.items()})
    except TypeError as error:
        raise PackingError(f"{error}; set packed, or cast the tensor") from error


def read_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of an ordinary ArrayRecord, as read-only views into its bytes.

    Raises:
        PackingError: an array is not an .npy file, or its header and length contradict each other.
    """
    return {name: _view(name, array) for name, array in record.items()}


def _view(name: str, array: Array) -> Tensor:
    start = len(_MAGIC) + 2 + int.from_bytes(array.data[len(_MAGIC) : len(_MAGIC) + 2], "little")
    header = _HEADER.fullmatch(array.data, len(_MAGIC) + 2, start)
    if header is None or not array.data.startswith(_MAGIC):
        raise PackingError(f"array {name!r} {_fault(array.data, start)}")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(size) for size in header[3].decode().replace(",", " ").split())
    # Checked before memory is viewed; empty dimensions count as 1, because strides are computed from them too.
    extent = math.prod(size or 1 for size in shape)
    if extent > 2**60 or math.prod(shape) * dtype.itemsize != len(array.data) - start:
        raise PackingError(
            f"array {name!r} claims {shape} of {dtype} over {len(array.data) - start} bytes; "
            "it is truncated or forged, send it again"
        )
    values = np.frombuffer(array.data, dtype, offset=start)
    fortran = header[2] == b"True"
    return _tensor(values.reshape(shape[::-1]).T if fortran else values.reshape(shape))


def _fault(data: bytes, start: int) -> str:
    """Return why an array cannot be read, in words."""
    other = _DTYPE.fullmatch(data, len(_MAGIC) + 2, start) if data.startswith(_MAGIC) else None
    if other is None:
        return "is not an .npy 1.0 file of numbers; send it as Flower's Array does"
    if re.fullmatch(_READ, other[1]):
        return "has more than 32 axes, or larger ones than any tensor; reshape it"
    return f"has the NumPy dtype {other[1].decode('latin-1')!r}, which cannot be fused; convert it to the model's own"


def _tensor(values: np.ndarray) -> Tensor:
    # DLPack, because from_numpy warns of read-only memory; an array without elements has none to share.
    return from_dlpack(values) if values.size else torch.from_numpy(values.copy())
