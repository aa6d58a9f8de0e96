"""HTML that is safe against injection: whatever is not `Html` already is escaped."""

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

from fedbasin.server.printable import printable

Attribute: TypeAlias = str | float | bool | None

_VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})


class Html(str):
    """Text that is HTML; only this module makes it from other text."""

    __slots__ = ()


def tag(name: str, /, *content: object, **attributes: Attribute) -> Html:
    """Return an element.

    Args:
        name: name of the element.
        content: `Html` is taken as it is, anything else as escaped text.
        attributes: `class_` is `class`, `aria_label` is `aria-label`; None and False are left out, True is
            the bare name.
    """
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    return Html(f"<{head}>" if name in _VOID else f"<{head}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Return the parts one after the other, with other text than `Html` escaped.

    Control characters are written as escapes here, and not in attributes, whose values browsers send back.
    """
    # The exact type: a subclass of Html made elsewhere would not have been escaped here.
    return Html("".join(part if type(part) is Html else escape(printable(str(part))) for part in parts))


def trusted(text: str) -> Html:
    """Return text of this project's own files, such as its style sheet, as HTML."""
    return Html(text)


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
