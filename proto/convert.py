"""Dataclasses to protobuf messages and back: fields correspond by name.

A dataclass says once what a message holds; this module follows its annotations. Numbers, strings and bytes are
copied, enumerations travel by name, a `tuple` is a repeated field, a `Mapping` is a map field or repeated entries of
`key` and `value`, `X | None` is an optional field, and a tuple of names is a message with one repeated field. Fields
whose metadata names a `record` hold tensors; they travel beside the header and are skipped here.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class ConversionError(ValueError):
    """A message that holds a value that this version does not know."""


class _Codec(NamedTuple):
    """The two directions of one kind of value.

    Attributes:
        write: returns what the constructor of the message takes for a value; a nested message is a dict.
        read: returns the value from the field of a message.
    """

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


class _Field(NamedTuple):
    """A field of a dataclass, and of the message that it travels in; `codec` is None where both hold the same value."""

    name: str
    optional: bool
    codec: _Codec | None


def to_protobuf(value: Any, message: M) -> M:
    """Fill a protobuf message from a dataclass.

    Args:
        value: an instance of a dataclass.
        message: an empty message with fields of the same names.

    Returns:
        The message.
    """
    # Through the constructor, which builds nested messages in C: ten times faster than setting field by field.
    cls: Any = type(value)
    message.MergeFrom(type(message)(**_arguments(_plan(cls, message.DESCRIPTOR), value)))
    return message


def from_protobuf(cls: type[T], message: Message) -> T:
    """Read a dataclass from a protobuf message.

    Args:
        cls: the dataclass.
        message: a message with fields of the same names.

    Raises:
        ConversionError: a name is not one of its enumeration, or a time cannot be represented.
        ValueError: the dataclass refuses the values.
    """
    kind: Any = cls
    instance: T = _instance(kind, _plan(kind, message.DESCRIPTOR), message)
    return instance


def _arguments(plan: tuple[_Field, ...], value: Any) -> dict[str, Any]:
    return {
        name: item if codec is None else codec.write(item)
        for name, _, codec in plan
        if (item := getattr(value, name)) is not None
    }


def _instance(cls: Any, plan: tuple[_Field, ...], message: Message) -> Any:
    values: dict[str, Any] = {}
    for name, optional, codec in plan:
        # Only optional fields have a presence; protobuf refuses to tell it of others.
        if optional and not message.HasField(name):
            values[name] = None
        # Most fields are plain numbers: a missing codec saves two calls for each of them.
        elif codec is None:
            values[name] = getattr(message, name)
        else:
            values[name] = codec.read(getattr(message, name))
    return cls(**values)


# Reports have thousands of nested dataclasses: annotations are looked at once for each class.
@cache
def _plan(cls: Any, descriptor: Descriptor) -> tuple[_Field, ...]:
    hints = get_type_hints(cls)
    fields = []
    for field in dataclasses.fields(cls):
        if "record" not in field.metadata and not field.metadata.get("local"):
            kind, optional = _unwrapped(hints[field.name])
            codec = _codec(kind, descriptor.fields_by_name[field.name])
            fields.append(_Field(field.name, optional, codec))
    return tuple(fields)


def _codec(kind: Any, field: FieldDescriptor) -> _Codec | None:
    if get_origin(kind) is tuple:
        return _sequence_codec(get_args(kind)[0], field)
    if get_origin(kind) is Mapping:
        key, value = get_args(kind)
        return _mapping_codec(key, value, field)
    if dataclasses.is_dataclass(kind):
        cls: Any = kind
        plan = _plan(cls, field.message_type)
        return _Codec(lambda value: _arguments(plan, value), lambda message: _instance(cls, plan, message))
    if kind is datetime:
        return _Codec(lambda time: time, lambda stamp: _read_time(field.name, stamp))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _Codec(lambda member: member.name, lambda name: _member(kind, name))
    return None


def _sequence_codec(item: Any, field: FieldDescriptor) -> _Codec:
    """Return the codec of a tuple: a repeated field, or a message whose one field is repeated."""
    if not field.is_repeated:
        return _wrapped_codec(item, field)
    codec = _wrapped_codec(get_args(item)[0], field) if get_origin(item) is tuple else None
    codec = codec or _codec(item, field)
    if codec is None:
        return _Codec(tuple, tuple)
    write, read = codec
    return _Codec(lambda items: [write(element) for element in items], lambda items: tuple(map(read, items)))


def _wrapped_codec(item: Any, field: FieldDescriptor) -> _Codec:
    message_type: Any = field.message_type  # not None: a tuple within a tuple is a message
    (inner,) = message_type.fields
    write, read = _sequence_codec(item, inner)
    return _Codec(lambda items: {inner.name: write(items)}, lambda message: read(getattr(message, inner.name)))


def _mapping_codec(key: Any, value: Any, field: FieldDescriptor) -> _Codec:
    message_type: Any = field.message_type  # not None: map fields have one too
    if message_type.GetOptions().map_entry:
        return _Codec(dict, dict)
    entry = message_type.fields_by_name
    keys, values = _codec(key, entry["key"]), _codec(value, entry["value"])
    if keys is None or values is None:
        raise TypeError(f"{field.full_name} has plain keys or values; make it a map field")
    return _Codec(
        lambda items: [{"key": keys.write(k), "value": values.write(v)} for k, v in items.items()],
        lambda entries: {keys.read(e.key): values.read(e.value) for e in entries},
    )


def _read_time(name: str, stamp: Any) -> datetime:
    try:
        time: datetime = stamp.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise ConversionError(f"{name} is not a time: {error}") from error
    return time


def _member(kind: type[Enum], name: str) -> Enum:
    try:
        return kind[name]
    except KeyError as error:
        names = ", ".join(kind.__members__)
        raise ConversionError(f"{name!r} is not a {kind.__name__}; this version knows {names}") from error


def _unwrapped(annotation: Any) -> tuple[Any, bool]:
    """Return the annotation without `None`, and whether it had that."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0], len(kinds) < len(get_args(annotation))
    return annotation, False
