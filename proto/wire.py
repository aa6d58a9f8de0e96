"""Headers in Flower messages: the typed part of a request or an update, serialised beside the tensors.

A message's content holds the records

    fedbasin     the header, as bytes
    arrays       the tensors, packed into one flat array per dtype (see `packing`)
    statistics   the precisions' tensors, packed likewise; absent where there are none
    radii        the anchor's identity radii, packed likewise; only in requests that ask for alignment

and whatever the app puts there itself (`config`, `metrics`).
"""

from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.message import DecodeError

from fedbasin.proto import fedbasin_pb2 as pb

SCHEMA_VERSION: int = pb.SCHEMA_VERSION

HEADER = "fedbasin"
ARRAYS = "arrays"
STATISTICS = "statistics"
RADII = "radii"
MOVING = "moving"

_Header = TypeVar("_Header", pb.Request, pb.UpdateHeader)
_Record = TypeVar("_Record", ArrayRecord, ConfigRecord, MetricRecord)


class WireError(ValueError):
    """A message whose header is missing or does not parse."""


class SchemaVersionError(WireError):
    """A header of another schema version."""


def records(content: RecordDict, kind: type[_Record]) -> dict[str, _Record]:
    """A content's records of one kind, by name.

    As `content.array_records` and its like, which refer to themselves: whoever looks through them keeps
    the content, with every tensor in it, until the garbage collector comes by.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def write(content: RecordDict, header: pb.Request | pb.UpdateHeader) -> None:
    """Put the header into a message's content, with this schema version."""
    header.schema_version = SCHEMA_VERSION
    content[HEADER] = ConfigRecord({"header": header.SerializeToString()})


def has_header(content: RecordDict) -> bool:
    """Whether the content speaks fedbasin at all."""
    return HEADER in records(content, ConfigRecord)


def read_request(content: RecordDict) -> pb.Request:
    """The header of a request.

    Raises:
        WireError: it is missing or does not parse.
        SchemaVersionError: it is of another version.
    """
    return _read(content, pb.Request())


def read_update(content: RecordDict) -> pb.UpdateHeader:
    """The header of an update; raises as `read_request` does."""
    return _read(content, pb.UpdateHeader())


def header_bytes(content: RecordDict, record: str = HEADER) -> bytes:
    """A serialised header in a record.

    Raises:
        WireError: there is none.
    """
    found = records(content, ConfigRecord).get(record)
    data = found.get("header") if found else None
    if not isinstance(data, bytes):
        raise WireError(f"the content has no record {record!r} with bytes under 'header'")
    return data


def arrays(content: RecordDict, record: str) -> ArrayRecord:
    """The arrays in a record.

    Raises:
        WireError: there is no such record.
    """
    found = records(content, ArrayRecord).get(record)
    if found is None:
        raise WireError(f"the content has no record {record!r} of arrays")
    return found


def numbers(record: MetricRecord) -> dict[str, float]:
    """The scalar metrics of a record; lists are left out."""
    return {name: float(v) for name, v in record.items() if isinstance(v, int | float)}


def _read(content: RecordDict, header: _Header) -> _Header:
    try:
        header.ParseFromString(header_bytes(content))
    except DecodeError as error:
        raise WireError(f"the header does not parse: {error}") from error
    if header.schema_version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"schema version {header.schema_version}, and this is {SCHEMA_VERSION}"
        )
    return header
