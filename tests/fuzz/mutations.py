"""Mutations of a reply that know its structure: fields of the header, bytes and entries of arrays, metrics, records."""

import base64
import copy
import random
import struct

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.header import HEADER, STATISTICS

INTEGERS = [0, 1, 2, 3, 7, 63, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-300,
    1e30,
    1e300,
    -1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    2.0**53,
    2.0**54,
]
ENTRIES = [1e30, -1e30, 3.4e38, 1e19, -1e12, 1e6, float("nan"), float("inf"), -1.0, 0.0, 1e-45]
FACTORS = [-10.0, -1.0, 0.0, 1e-38, 3.0, 1e6, 1e20, 1e30, 3e38]
WORDS = ["", "a", "0.weight", "0.bias", "0.weight.T", ".T", "x" * 1000, "\x00", "é", "1.running_var", "float32", "bool"]
RECORDS = [HEADER, "arrays", STATISTICS, "metrics", "moving"]
# The .npy header of an array; beyond it lie the entries.
_HEADER_BYTES = 128


def mutate(rng: random.Random, content: RecordDict) -> RecordDict:
    """Return the content of a reply with one to three mutations; the original stays as it is."""
    records = dict(content.items())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choices(
            [_mutate_header, _mutate_header_bytes, _mutate_array, _mutate_entries, _mutate_metrics, _mutate_records],
            [45, 8, 15, 20, 8, 4],
        )[0](rng, records)
    return RecordDict(records)


def _header_of(records: dict) -> bytes | None:
    record = records.get(HEADER)
    text = record.get(HEADER) if isinstance(record, ConfigRecord) else None
    try:
        return base64.b64decode(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _set_header(records: dict, data: bytes) -> None:
    records[HEADER] = ConfigRecord({HEADER: base64.b64encode(data).decode()})


def _mutate_header(rng: random.Random, records: dict) -> None:
    data, message = _header_of(records), pb.Reply()
    if data is None:
        return
    try:
        message.ParseFromString(data)
    except DecodeError:
        return
    for _ in range(rng.choice([1, 1, 2, 4])):
        _mutate_message(rng, message)
    _set_header(records, message.SerializeToString())


def _mutate_message(rng: random.Random, message: Message) -> None:
    """Change one field somewhere in a message."""
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.message_type:
        _mutate_nested(rng, message, field)
        return
    value = _value(rng, field)
    if not field.is_repeated:
        message.ClearField(field.name) if rng.random() < 0.1 else setattr(message, field.name, value)
        return
    values = getattr(message, field.name)
    if values and rng.random() < 0.4:
        values[rng.randrange(len(values))] = value
    elif values and rng.random() < 0.5:
        del values[rng.randrange(len(values))]
    else:
        values.append(value)


def _mutate_nested(rng: random.Random, message: Message, field: FieldDescriptor) -> None:
    if not field.is_repeated:
        if rng.random() < 0.15:
            message.ClearField(field.name)
        else:
            _mutate_message(rng, getattr(message, field.name))
        return
    nested, chance = getattr(message, field.name), rng.random()
    if nested and chance < 0.5:
        _mutate_message(rng, rng.choice(nested))
    elif nested and chance < 0.62:
        nested.add().CopyFrom(copy.deepcopy(rng.choice(nested)))
    elif nested and chance < 0.8:
        del nested[rng.randrange(len(nested))]
    elif len(nested) > 1 and chance < 0.9:
        a, b = rng.sample(range(len(nested)), 2)
        first = copy.deepcopy(nested[a])
        nested[a].CopyFrom(nested[b])
        nested[b].CopyFrom(first)
    else:
        _mutate_message(rng, nested.add())


def _value(rng: random.Random, field: FieldDescriptor) -> object:
    if field.type == FieldDescriptor.TYPE_UINT32:
        return rng.choice([number for number in INTEGERS if number < 2**32])
    if field.type == FieldDescriptor.TYPE_UINT64:
        return rng.choice(INTEGERS)
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return rng.choice(NUMBERS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    return (
        rng.choice(WORDS) if field.type == FieldDescriptor.TYPE_STRING else rng.choice([b"", b"x", rng.randbytes(32)])
    )


def _mutate_header_bytes(rng: random.Random, records: dict) -> None:
    data = bytearray(_header_of(records) or b"")
    for _ in range(rng.randint(1, 6)):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    _set_header(records, bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.2 else data))


def _random_array(rng: random.Random, records: dict) -> tuple[str, dict, str] | None:
    names = [name for name, record in records.items() if isinstance(record, ArrayRecord) and len(record)]
    if not names:
        return None
    name = rng.choice(names)
    arrays = dict(records[name].items())
    return name, arrays, rng.choice(list(arrays))


def _mutate_array(rng: random.Random, records: dict) -> None:
    """Damage the bytes, the length, the name or the description of an array."""
    chosen = _random_array(rng, records)
    if chosen is None:
        return
    name, arrays, key = chosen
    array = arrays.pop(key)
    data, chance = bytearray(array.data), rng.random()
    if chance < 0.3 and data:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), rng.choice([_HEADER_BYTES, len(data)])))] = rng.randrange(256)
    elif chance < 0.45:
        data = data[: rng.randrange(len(data) + 1)]
    elif chance < 0.6:
        data += rng.randbytes(rng.randint(1, 64))
    elif chance < 0.75:
        key = rng.choice(["float64", "int64", "bool", "bfloat16", "junk"])
    elif chance < 0.85:
        records[name] = ArrayRecord(arrays)
        return
    stype = rng.choice(["numpy.ndarray", "pickle"]) if chance > 0.95 else array.stype
    arrays[key] = Array(array.dtype, array.shape, stype, bytes(data))
    records[name] = ArrayRecord(arrays)


def _mutate_entries(rng: random.Random, records: dict) -> None:
    """Change single entries of an array, or multiply all of it, as a liar does; only float32 arrays are of interest."""
    chosen = _random_array(rng, records)
    if chosen is None:
        return
    name, arrays, key = chosen
    array = arrays[key]
    data = bytearray(array.data)
    count = (len(data) - _HEADER_BYTES) // 4
    if array.dtype != "float32" or count < 1:
        return
    if rng.random() < 0.5:
        for _ in range(rng.choice([1, 1, 3])):
            struct.pack_into("<f", data, _HEADER_BYTES + 4 * rng.randrange(count), rng.choice(ENTRIES))
    else:
        factor = rng.choice(FACTORS)
        values = struct.unpack_from(f"<{count}f", data, _HEADER_BYTES)
        scaled = [max(-3.4e38, min(3.4e38, factor * value)) for value in values]
        struct.pack_into(f"<{count}f", data, _HEADER_BYTES, *scaled)
    arrays[key] = Array(array.dtype, array.shape, array.stype, bytes(data))
    records[name] = ArrayRecord(arrays)


def _mutate_metrics(rng: random.Random, records: dict) -> None:
    values = dict(records["metrics"].items()) if isinstance(records.get("metrics"), MetricRecord) else {}
    value = rng.choice([*NUMBERS, 0, -5, 2**62, [1.0, 2.0], []])
    records["metrics"] = MetricRecord({**values, rng.choice(["num-examples", "loss", "x" * 200, ""]): value})


def _mutate_records(rng: random.Random, records: dict) -> None:
    if not records:
        return
    name, chance = rng.choice(list(records)), rng.random()
    if chance < 0.4:
        del records[name]
    elif chance < 0.7:
        records[rng.choice(RECORDS)] = records[name]
    else:
        empty = [ConfigRecord({}), MetricRecord({}), ArrayRecord({}), ConfigRecord({HEADER: "text"})]
        records[rng.choice(RECORDS)] = rng.choice(empty)
