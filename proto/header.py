"""Headers in Flower messages: the typed part of a request or a reply, serialised beside the tensors.

A message's content holds the records

    arrays       the tensors of a model: one array per tensor, or packed into one flat array per dtype
    config       the app's own settings; in requests also the header, under the key `fedbasin`
    fedbasin     the header of a reply
    statistics   the tensors of a client's statistics, packed; absent where there are none
    moving       a merged model that the client aligns in place of its own, packed; only in some requests

and the app's own metrics. A request has no record beyond Flower's two, because Flower's mods refuse messages with more
than one ArrayRecord and one ConfigRecord. Its header is text, so that an app without the mod may still write its
config as JSON.
"""

import base64
from itertools import chain
from typing import NamedTuple, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage

from fedbasin.proto import fedbasin_pb2 as pb

SCHEMA_VERSION: int = pb.SCHEMA_VERSION

HEADER = "fedbasin"
STATISTICS = "statistics"
MOVING = "moving"

_Header = TypeVar("_Header", pb.Request, pb.Reply)
_Record = TypeVar("_Record", ArrayRecord, ConfigRecord, MetricRecord)


class WireError(ValueError):
    """A message whose header is missing or does not parse."""


class SchemaVersionError(WireError):
    """A header of another schema version."""


class HeaderSizeError(WireError):
    """A header with more bytes or more entries than its reader has use for."""


class HeaderBound(NamedTuple):
    """The largest header that a reader decodes.

    Attributes:
        characters: length of the text in which it travels.
        entries: number of nested messages, each of which takes more memory decoded than sent.
    """

    characters: int
    entries: int


def records(content: RecordDict, kind: type[_Record]) -> dict[str, _Record]:
    """Return a content's records of one kind, by name.

    `content.array_records` and its like refer to themselves: a caller that reads them keeps the content, with every
    tensor in it, until the garbage collector runs.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def has_header(content: RecordDict) -> bool:
    """Return whether the content was written by fedbasin."""
    configs = records(content, ConfigRecord).items()
    return any(name == HEADER or HEADER in config for name, config in configs)


def write_header(content: RecordDict, header: pb.Request | pb.Reply, record: str = HEADER) -> None:
    """Put a header into a message's content, with this schema version.

    Args:
        content: the message's content.
        header: the header.
        record: name of the ConfigRecord that takes it, which is made if there is none.
    """
    header.schema_version = SCHEMA_VERSION
    data = header.SerializeToString(deterministic=True)
    config = records(content, ConfigRecord).get(record, ConfigRecord())
    content[record] = ConfigRecord({**config, HEADER: base64.b64encode(data).decode()})


def without_header(config: ConfigRecord) -> ConfigRecord:
    """Return the app's own settings of a record."""
    return ConfigRecord({key: value for key, value in config.items() if key != HEADER})


def read_header(content: RecordDict, header: _Header, bound: HeaderBound | None = None) -> _Header:
    """Read the header of a message's content.

    Args:
        content: the message's content.
        header: an empty header, which is filled.
        bound: the largest header that is decoded; None for no limit.

    Raises:
        WireError: the header is missing or does not parse.
        HeaderSizeError: the header is larger than its bound.
        SchemaVersionError: the header is of another version.
    """
    text = _header_of(content)
    if text is None:
        raise WireError(f"the content has no ConfigRecord with text under {HEADER!r}")
    if bound and len(text) > bound.characters:
        raise HeaderSizeError(f"a header of {len(text)} characters where {bound.characters} are allowed")
    try:
        header.ParseFromString(base64.b64decode(text, validate=True))
    except (DecodeError, ValueError) as error:
        raise WireError(f"the header does not parse: {error}") from error
    if bound and (entries := _entries(header, bound.entries)) > bound.entries:
        raise HeaderSizeError(f"a header of {entries} entries or more where {bound.entries} are allowed")
    if header.schema_version != SCHEMA_VERSION:
        raise SchemaVersionError(f"schema version {header.schema_version}, and this is version {SCHEMA_VERSION}")
    return header


def _entries(message: ProtobufMessage, most: int) -> int:
    """Return the number of messages within a message, at every depth; counting ends above a number."""
    # By length first: each entry that is looked at becomes an object that is larger than it was on the wire.
    nested = [
        value if field.is_repeated else (value,)
        for field, value in message.ListFields()
        if field.message_type and not field.message_type.GetOptions().map_entry
    ]
    count = sum(map(len, nested))
    for entry in chain.from_iterable(nested if count <= most else ()):
        count += _entries(entry, most)
        if count > most:
            break
    return count


def _header_of(content: RecordDict) -> str | None:
    for config in records(content, ConfigRecord).values():
        text = config.get(HEADER)
        if isinstance(text, str):
            return text
    return None


def array_record(content: RecordDict, record: str) -> ArrayRecord:
    """Return the arrays in a record.

    Raises:
        WireError: there is no such record.
    """
    arrays = records(content, ArrayRecord).get(record)
    if arrays is None:
        raise WireError(f"the content has no record {record!r} of arrays")
    return arrays
