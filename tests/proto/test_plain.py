"""Flower's own arrays are read without a copy, and forged ones are refused before a size is believed."""

import io
import re

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto import plain
from fedbasin.proto.packing import PackingError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_a_state_that_is_written_is_read(dtype, shape):
    state = {"w": torch.ones(shape).to(dtype), "b": torch.arange(2.0)}
    found = plain.read_arrays(plain.write_arrays(state))
    assert list(found) == ["w", "b"]
    assert (found["w"].dtype, found["w"].shape) == (dtype, shape)
    assert torch.equal(found["w"], state["w"])


def test_it_is_what_flower_reads_and_writes():
    state = {"w": torch.randn(2, 3), "count": torch.tensor(4)}
    for name, tensor in plain.write_arrays(state).to_torch_state_dict().items():
        assert torch.equal(tensor, state[name])
    for name, tensor in plain.read_arrays(ArrayRecord(state)).items():
        assert torch.equal(tensor, state[name])


def test_a_transposed_tensor_keeps_its_values():
    w = torch.arange(6.0).reshape(2, 3).mT
    record = ArrayRecord({"w": Array(w.numpy())})
    assert b"'fortran_order': True" in record["w"].data
    found = plain.read_arrays(record)["w"]
    assert torch.equal(found, w)
    assert found.shape == (3, 2)


def test_reading_copies_nothing():
    record = plain.write_arrays({"w": torch.zeros(1000)})
    data = np.frombuffer(record["w"].data, np.uint8)
    start = plain.read_arrays(record)["w"].data_ptr() - data.__array_interface__["data"][0]
    assert start == len(data) - 4000


def test_what_numpy_lacks_is_refused_with_the_remedy():
    with pytest.raises(PackingError, match=r"BFloat16.*set packed"):
        plain.write_arrays({"w": torch.zeros(2).bfloat16()})


def forged(header, elements=b"\0" * 16):
    padded = header.ljust(117).encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + elements
    return ArrayRecord({"layer.w": Array("float32", (4,), "numpy.ndarray", data)})


def shaped(shape, descr="<f4", fortran=False):
    return f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}"


def test_the_forged_headers_below_are_read_where_they_are_true():
    assert plain.read_arrays(forged(shaped("(4,)")))["layer.w"].shape == (4,)
    assert plain.read_arrays(forged(shaped("(2, 2)")))["layer.w"].shape == (2, 2)
    assert plain.read_arrays(forged(shaped("()", "<f8"), b"\0" * 8))["layer.w"].shape == ()


@pytest.mark.parametrize(
    "header",
    [
        shaped("(5,)"),
        shaped("(250000000000,)"),
        shaped("(-2, -2)"),
        shaped("(0, 1000000000000000000, 1000000000000000000)"),
        shaped("(4,)", "<c8"),
        shaped("(4,)", "<U4"),
        shaped("(4,)", "|O"),
        shaped("(4,)", ">f4"),
        shaped("(16,)", "|f1"),
        shaped("(4,)", "<f4") + "((((",
        "(" * 100,
        "-" * 100 + "1",
        "{'descr': ",
        "",
    ],
)
def test_a_forged_header_is_refused_by_the_arrays_name(header):
    with pytest.raises(PackingError, match=r"'layer\.w'"):
        plain.read_arrays(forged(header))


@pytest.mark.parametrize("dtype", ["<c8", "<c16", ">f4", "<U3", "|S4", "|O", "|V1", "<M8[s]", "<f16"])
def test_a_dtype_that_cannot_be_fused_is_named(dtype):
    with pytest.raises(PackingError, match=re.escape(f"the NumPy dtype '{dtype}'") + r".*convert it"):
        plain.read_arrays(forged(shaped("(4,)", dtype)))


def test_too_many_axes_are_named():
    with pytest.raises(PackingError, match="more than 32 axes"):
        plain.read_arrays(forged(shaped(f"({'1, ' * 33})"), b"\0" * 4))


@given(data=st.binary(max_size=300))
def test_any_other_bytes_are_refused_by_name(data):
    record = ArrayRecord({"w": Array("float32", (4,), "numpy.ndarray", data)})
    with pytest.raises(PackingError, match="'w'"):
        plain.read_arrays(record)


@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused_by_name(position, byte):
    stream = io.BytesIO()
    np.save(stream, np.ones((3, 4), np.float32))
    data = bytearray(stream.getvalue())
    data[position % len(data)] = byte
    record = ArrayRecord({"w": Array("float32", (3, 4), "numpy.ndarray", bytes(data))})
    try:
        found = plain.read_arrays(record)["w"]
    except PackingError:
        return
    assert found.numel() * found.element_size() == 48
