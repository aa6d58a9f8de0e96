"""States packed as one flat array per dtype, with a manifest of the place of each tensor.

Flower moves each array as separate objects, so the time of a deployed round grows with the number of arrays; a
packed state has at most a dozen. Each array is a one-dimensional `.npy` as Flower writes it (NEP 1, NumPy format
version 1.0), named after its dtype, so that code that computes with Flower's arrays still works. bfloat16, which
NumPy lacks, is sent as its bits in a uint16 array named "bfloat16".
"""

import hashlib
import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedbasin.proto.fedbasin_pb2 import TensorSpec

_STYPE = "numpy.ndarray"
_STORAGE = {  # dtype of the tensors: what the .npy header says
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.float16: "<f2",
    torch.bfloat16: "<u2",
    torch.int8: "|i1",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.uint8: "|u1",
    torch.bool: "|b1",
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGE}
_KNOWN = ", ".join(sorted(_DTYPES))

_MAGIC = b"\x93NUMPY\x01\x00"
_LONGEST_HEADER = 256
_HEADER = re.compile(rb"\{'descr': '([^']{1,8})', 'fortran_order': (False|True), 'shape': \((\d{1,18}),\), \} *\n")
_MOST_DIMENSIONS = 32
_MOST_ELEMENTS = 2**60  # keeps every stride within a signed 64-bit integer


class PackingError(ValueError):
    """A state that cannot be packed, or a record and a manifest that do not describe a state."""


def pack(state: Mapping[str, Tensor]) -> tuple[ArrayRecord, list[TensorSpec]]:
    """Lay a state out as one flat array per dtype; each byte is copied once.

    Tensors that share storage are each written in full.

    Returns:
        The arrays in alphabetic order of their dtypes, and one spec per tensor in the order of `state`.

    Raises:
        PackingError: a tensor has a dtype or a layout that cannot be sent.
    """
    groups: dict[str, list[memoryview]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    specs = []
    for name, tensor in state.items():
        dtype = _dtype_name(name, tensor)
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tensor.shape, offset=sizes[dtype]))
        groups[dtype].append(_bytes_of(tensor))
        sizes[dtype] += tensor.numel()
    arrays = {dtype: _array(dtype, sizes[dtype], groups[dtype]) for dtype in sorted(groups)}
    return ArrayRecord(arrays), specs


def unpack(record: ArrayRecord, specs: Iterable[TensorSpec]) -> dict[str, Tensor]:
    """Return the tensors of a manifest, as views into the bytes of the record.

    Nothing is copied, and no header decides how much memory is allocated. The views must only be read: their memory
    belongs to immutable bytes. A manifest may name a part of the record's tensors.

    Raises:
        PackingError: an array or a spec is malformed, or the two contradict each other.
    """
    specs = list(specs)
    _check_disjoint(specs)
    arrays = {dtype: _elements(record, dtype) for dtype in dict.fromkeys(s.dtype for s in specs)}
    return {spec.name: _view(arrays[spec.dtype], spec) for spec in specs}


def digest(state: Mapping[str, Tensor]) -> bytes:
    """Return the SHA-256 of names, dtypes, shapes and values; the order of the mapping does not matter.

    Raises:
        PackingError: a tensor has a dtype or a layout that cannot be sent.
    """
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        # A repr ends where its tuple closes and says how many bytes follow: no two states read alike.
        sha.update(repr((name, _dtype_name(name, tensor), tuple(tensor.shape))).encode())
        sha.update(_bytes_of(tensor))
    return sha.digest()


def nbytes(record: ArrayRecord) -> int:
    """Return the number of bytes of the record's arrays, headers included."""
    return sum(len(array.data) for array in record.values())


def _dtype_name(name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise PackingError(f"tensor '{name}' is {dtype}, which cannot be sent; cast it to one of {_KNOWN}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise PackingError(
            f"tensor '{name}' ({tensor.layout}, on {tensor.device}) has no dense values to send; "
            "make it dense, on a device that holds data"
        )
    if tensor.dim() > _MOST_DIMENSIONS:
        raise PackingError(
            f"tensor '{name}' has {tensor.dim()} dimensions, at most {_MOST_DIMENSIONS} can be sent; reshape it"
        )
    return dtype


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the tensor's bytes in row-major order, copied only if they lie in another."""
    dense = tensor.detach().cpu().resolve_neg().contiguous()
    # Not reshape: one element may keep a stride of two, and then counts as contiguous all the same.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def _array(dtype: str, elements: int, parts: list[memoryview]) -> Array:
    storage = _STORAGE[_DTYPES[dtype]]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": storage, "fortran_order": False, "shape": (elements,)})
    data = b"".join([header.getvalue(), *parts])
    return Array(str(np.dtype(storage)), (elements,), _STYPE, data)


def _elements(record: ArrayRecord, dtype: str) -> Tensor:
    """Return the flat tensor in the array of a dtype, as a view into its bytes."""
    if dtype not in _DTYPES:
        raise PackingError(f"the manifest names the dtype '{dtype}'; known are {_KNOWN}")
    if dtype not in record:
        raise PackingError(
            f"the manifest has {dtype} tensors but the record has no array '{dtype}', "
            f"only {sorted(record)}; send the record that was packed with this manifest"
        )
    array = record[dtype]
    if array.stype != _STYPE:
        raise PackingError(f"array '{dtype}' is serialised as '{array.stype}', not '{_STYPE}'; use pack()")
    start = _check_header(array.data, dtype)
    flat = np.frombuffer(array.data, np.dtype(_STORAGE[_DTYPES[dtype]]), offset=start)
    if dtype == "bool" and flat.view(np.uint8).max(initial=0) > 1:
        raise PackingError("array 'bool' has bytes other than 0 and 1; it is corrupt, send it again")
    # DLPack, because from_numpy warns of read-only memory.
    return from_dlpack(flat).view(_DTYPES[dtype])


def _check_header(data: bytes, dtype: str) -> int:
    """Return the offset of the elements of a one-dimensional .npy, once header and length agree."""
    storage = _STORAGE[_DTYPES[dtype]]
    itemsize = np.dtype(storage).itemsize
    start = len(_MAGIC) + 2 + int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 2], "little")
    if not data.startswith(_MAGIC) or start > min(len(data), _LONGEST_HEADER) or start % itemsize:
        raise PackingError(f"array '{dtype}' does not begin as an .npy 1.0 file does; use pack()")
    header = _HEADER.fullmatch(data, len(_MAGIC) + 2, start)
    if header is None:
        raise PackingError(f"array '{dtype}' has no header of a one-dimensional .npy; use pack()")
    descr, fortran, count = header[1].decode("latin-1"), header[2], int(header[3])
    if descr != storage or fortran == b"True":
        raise PackingError(
            f"array '{dtype}' holds '{descr}' (fortran_order {fortran.decode()}), expected "
            f"'{storage}' in C order; use pack()"
        )
    if count * itemsize != len(data) - start:
        raise PackingError(
            f"array '{dtype}' claims {count} elements of {itemsize} bytes but {len(data) - start} "
            "bytes follow its header; it is truncated or forged, send it again"
        )
    return start


def _count(spec: TensorSpec) -> int:
    """Return the number of elements of a tensor, and refuse a shape that no memory could hold."""
    # The extent is bounded with empty dimensions left out: torch computes strides from them too.
    extent = math.prod(size or 1 for size in spec.shape[: _MOST_DIMENSIONS + 1])
    if len(spec.shape) > _MOST_DIMENSIONS or extent > _MOST_ELEMENTS:
        raise PackingError(
            f"tensor '{spec.name}' claims {len(spec.shape)} dimensions over {extent} elements, more "
            f"than {_MOST_DIMENSIONS} or {_MOST_ELEMENTS}; the manifest is corrupt, send it again"
        )
    return 0 if 0 in spec.shape else extent


def _check_disjoint(specs: list[TensorSpec]) -> None:
    names: set[str] = set()
    spans: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for spec in specs:
        if spec.name in names:
            raise PackingError(f"tensor '{spec.name}' is in the manifest twice; name it once")
        names.add(spec.name)
        if count := _count(spec):
            spans[spec.dtype].append((spec.offset, spec.offset + count, spec.name))
    for dtype, of_dtype in spans.items():
        for (_, end, name), (start, _, next_name) in pairwise(sorted(of_dtype)):
            if start < end:
                raise PackingError(
                    f"tensors '{name}' and '{next_name}' overlap: the first ends at element {end} of "
                    f"array '{dtype}', the second begins at {start}; the manifest is corrupt"
                )


def _view(flat: Tensor, spec: TensorSpec) -> Tensor:
    end = spec.offset + _count(spec)
    if end > len(flat):
        raise PackingError(
            f"tensor '{spec.name}' of shape {list(spec.shape)} ends at element {end} of array "
            f"'{spec.dtype}', which has {len(flat)}; record and manifest are not of one state"
        )
    return flat[spec.offset : end].view(tuple(spec.shape))
