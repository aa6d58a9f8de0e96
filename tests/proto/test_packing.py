import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto.fedbasin_pb2 import TensorSpec
from fedbasin.proto.packing import PackingError, digest, nbytes, pack, unpack

DTYPES = {
    torch.float32: 4,
    torch.float64: 8,
    torch.float16: 2,
    torch.bfloat16: 2,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 4,
    torch.int64: 8,
    torch.uint8: 1,
    torch.bool: 1,
}


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = int(np.prod(shape, dtype=int)) * DTYPES[dtype]
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.tensor(list(raw), dtype=torch.uint8).view(dtype)
    tensor = flat.view(shape)
    return tensor.mT if len(shape) > 1 and draw(st.booleans()) else tensor


states = st.dictionaries(st.text(max_size=8), tensors(), max_size=6)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(left, right):
    return (
        left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)
    )  # NaN payloads included


def address(data):
    return np.frombuffer(data, np.uint8).ctypes.data


@given(states)
def test_unpacking_what_was_packed_gives_the_same_bits_under_the_same_names(state):
    record, specs = pack(state)
    read = unpack(record, specs)
    assert list(read) == list(state)
    assert all(same(read[name], state[name]) for name in state)


@given(states)
def test_a_manifest_survives_the_wire(state):
    record, specs = pack(state)
    sent = [TensorSpec.FromString(spec.SerializeToString()) for spec in specs]
    assert all(same(tensor, state[name]) for name, tensor in unpack(record, sent).items())


@given(states)
def test_the_arrays_are_those_flower_itself_would_have_made(state):
    record, _ = pack(state)
    for array in record.values():
        again = Array(array.numpy())
        assert (array.dtype, array.shape, array.stype) == (again.dtype, again.shape, again.stype)
        assert array.data == again.data


@given(states, st.data())
def test_a_flipped_byte_gives_data_of_equal_size_or_a_packing_error(state, data):
    record, specs = pack(state)
    if not record:
        return
    key = data.draw(st.sampled_from(sorted(record)))
    raw = bytearray(record[key].data)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    record[key] = Array(record[key].dtype, record[key].shape, record[key].stype, bytes(raw))
    try:
        read = unpack(record, specs)
    except PackingError:
        return
    assert all(read[name].shape == tensor.shape for name, tensor in state.items())


@given(
    states,
    st.lists(
        st.builds(
            TensorSpec,
            name=st.text(max_size=3),
            dtype=st.sampled_from(["float32", "bfloat16", "bool", "int64", "complex64", ""]),
            shape=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)), max_size=40),
            offset=st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)),
        ),
        max_size=4,
    ),
)
def test_any_manifest_gives_the_shapes_it_names_or_a_packing_error(state, specs):
    record, _ = pack(state)
    try:
        read = unpack(record, specs)
    except PackingError:
        return
    assert [list(tensor.shape) for tensor in read.values()] == [list(s.shape) for s in specs]


HEADERS = st.builds(
    lambda descr, fortran, shape, pad: (
        f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}{' ' * pad}\n"
    ).encode(),
    st.sampled_from(["<f4", ">f4", "<f8", "|O", "|b1", "<u2"]),
    st.sampled_from(["True", "False"]),
    st.sampled_from(["(3,)", "(250000000000,)", "(-1,)", "()", "(1, 3)"]),
    st.integers(0, 70),
)


@given(
    st.sampled_from(["float32", "bool", "bfloat16"]),
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda header, body: b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body,
            HEADERS,
            st.binary(max_size=20),
        ),
    ),
)
def test_arbitrary_bytes_give_data_of_equal_size_or_a_packing_error(dtype, data):
    record = ArrayRecord({dtype: Array(dtype, (3,), "numpy.ndarray", data)})
    try:
        read = unpack(record, [TensorSpec(name="w", dtype=dtype, shape=[3])])
    except PackingError:
        return
    assert read["w"].nbytes <= len(data)


def test_a_forged_size_allocates_nothing():
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (250000000000,), }"
    header = header.ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12)
    record = ArrayRecord({"float32": Array("float32", (3,), "numpy.ndarray", data)})
    tracemalloc.start()
    try:
        with pytest.raises(PackingError, match="250000000000"):
            unpack(record, [TensorSpec(name="w", dtype="float32", shape=[3])])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_unpacked_tensors_are_views_into_the_bytes_of_the_record(dtype):
    record, specs = pack({"a": torch.ones(3, 5).to(dtype), "b": torch.zeros(7).to(dtype)})
    (array,) = record.values()
    begin = address(array.data)
    for tensor in unpack(record, specs).values():
        assert begin < tensor.data_ptr() <= begin + len(array.data) - tensor.nbytes


def test_packing_contiguous_tensors_copies_each_byte_once():
    state = {str(i): torch.zeros(2**18) for i in range(8)}
    tracemalloc.start()
    try:
        record, _ = pack(state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 8 * 2**20 < nbytes(record) <= peak < 8.5 * 2**20


def test_views_outlive_their_record():
    tensor = unpack(*pack({"w": torch.arange(1000.0)}))["w"]
    assert tensor.sum() == 499500


def test_tensors_that_share_storage_are_each_written_in_full():
    base = torch.arange(6.0)
    state = {"a": base[1:4], "b": base.view(2, 3).T, "c": base, "d": base[0].expand(4)}
    read = unpack(*pack(state))
    assert all(same(read[name], state[name]) for name in state)


def test_parameters_and_negated_views_are_packed_by_value():
    negated = torch.tensor([1 + 2j]).conj().imag
    assert negated.is_neg()
    state = {"p": torch.nn.Parameter(torch.ones(2)), "n": negated}
    read = unpack(*pack(state))
    assert read["p"].tolist() == [1, 1]
    assert read["n"].tolist() == [-2]


def test_an_empty_state_is_an_empty_record():
    record, specs = pack({})
    assert (dict(record), specs, unpack(record, specs), nbytes(record)) == ({}, [], {}, 0)


def test_one_array_per_dtype_in_alphabetic_order():
    record, specs = pack({"n": torch.tensor(3), "w": torch.ones(2, 2), "b": torch.ones(2)})
    assert list(record) == ["float32", "int64"]
    assert [(s.name, s.dtype, list(s.shape), s.offset) for s in specs] == [
        ("n", "int64", [], 0),
        ("w", "float32", [2, 2], 0),
        ("b", "float32", [2], 4),
    ]


def test_a_part_of_a_record_can_be_read_alone():
    record, specs = pack({"a": torch.ones(2), "b": torch.zeros(3)})
    assert unpack(record, specs[1:])["b"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (torch.zeros(1, dtype=torch.complex64), "complex64"),
        (torch.zeros(1).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros([1] * 33), "33 dimensions"),
    ],
)
def test_what_does_not_travel_is_refused_by_name(tensor, named):
    with pytest.raises(PackingError, match=f"'layer'.*{named}"):
        pack({"layer": tensor})


def spec(name="w", dtype="float32", shape=(4,), offset=0):
    return TensorSpec(name=name, dtype=dtype, shape=shape, offset=offset)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([spec("a"), spec("b", offset=3)], "'a' and 'b' overlap"),
        ([spec(), spec(offset=4)], "'w' is in the manifest twice"),
        ([spec(shape=(9,))], "ends at element 9 .* which has 8"),
        ([spec(offset=5)], "ends at element 9"),
        ([spec(shape=(0,), offset=9)], "ends at element 9"),
        ([spec(shape=(0, 2**62))], "claims 2 dimensions"),
        ([spec(shape=[1] * 33)], "claims 33 dimensions"),
        ([spec(dtype="float33")], "dtype 'float33'"),
        ([spec(dtype="int8")], "no array 'int8'"),
    ],
)
def test_a_bad_manifest_is_named(specs, message):
    record, _ = pack({"w": torch.zeros(8)})
    with pytest.raises(PackingError, match=message):
        unpack(record, specs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "claims 2 elements"),
        (lambda data: data + b"\0", "claims 2 elements"),
        (lambda data: data[:40], "does not begin"),
        (lambda data: data.replace(b"<f4", b"<i4"), "holds '<i4'"),
        (lambda data: data.replace(b"False", b"True "), "no header"),
        (lambda data: data.replace(b"False", b"True").replace(b"\n", b" \n"), "fortran_order True"),
        (lambda data: data.replace(b"NUMPY\x01", b"NUMPY\x02"), "does not begin"),
    ],
)
def test_a_bad_array_is_named(change, message):
    record, specs = pack({"w": torch.ones(2)})
    data = change(record["float32"].data)
    record["float32"] = Array("float32", (2,), "numpy.ndarray", data)
    with pytest.raises(PackingError, match=message):
        unpack(record, specs)


def test_booleans_of_other_bytes_than_zero_and_one_are_refused():
    record, specs = pack({"mask": torch.ones(2, dtype=torch.bool)})
    data = record["bool"].data[:-1] + b"\2"
    record["bool"] = Array("bool", (2,), "numpy.ndarray", data)
    with pytest.raises(PackingError, match="0 and 1"):
        unpack(record, specs)


def test_another_serialisation_is_refused():
    record = ArrayRecord({"float32": Array("float32", (1,), "zstd", bytes(4))})
    with pytest.raises(PackingError, match="zstd"):
        unpack(record, [spec(shape=(1,))])


@given(states, st.randoms())
def test_the_digest_does_not_depend_on_the_order_of_names(state, random):
    names = list(state)
    random.shuffle(names)
    assert digest({name: state[name] for name in names}) == digest(state)
    assert digest(unpack(*pack(state))) == digest(state)


def test_the_digest_tells_names_shapes_dtypes_and_values_apart():
    one = torch.zeros(2, 2)
    others = [
        {"v": one},
        {"w": one.view(4)},
        {"w": one.view(torch.int32)},
        {"w": one + 1},
        {"w": one[:1], "x": one[1:]},
        {},
    ]
    assert len({digest(state) for state in [{"w": one}, *others]}) == 7
