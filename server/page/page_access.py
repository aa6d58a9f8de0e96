"""Access to the page: for readers with the observer's token, and for no site that a reader's browser visits.

/metrics stays open, as the gRPC health service does: scrapers have no secrets, and it names no client.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbasin.server.observe.access import Guard, read_token

_OPEN = "/metrics"
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST = re.compile(r"(\[(?P<address>[^\[\]]+)\]|(?P<name>[^:\[\]]+))(:[0-9]*)?")


def page_guards(guard: Guard, host: str, allowed_hosts: Iterable[str] = ()) -> list[Middleware]:
    """Return the middleware that checks a request before the page sees it.

    Args:
        guard: proof that the observer requires of its callers.
        host: address on which it listens.
        allowed_hosts: names under which it may be reached, beside those of this machine and the address.

    Raises:
        AccessError: the token cannot be read, or can be guessed.
    """
    names = Middleware(AllowedHosts, names=_LOCAL | {host, *allowed_hosts})
    if guard.token_file is None:
        return [names]
    return [names, Middleware(TokenCheck, token=read_token(guard.token_file))]


class TokenCheck:
    """A middleware that requires the token: as a password with any user name, or as a bearer token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = _read_token(Headers(scope=scope).get("authorization", ""))
        app: ASGIApp = self._app
        if scope["path"] != _OPEN and not hmac.compare_digest(token, self._token):
            app = PlainTextResponse(
                "This observer requires its token: as the password, with any user name.\n",
                401,
                {"www-authenticate": 'Basic realm="fedbasin", charset="UTF-8"'},
            )
        await app(scope, receive, send)


class AllowedHosts:
    """A middleware that refuses host names that lead to this machine but are not known to be its own.

    Without it, any site could let its own name point to this machine and read the reports through a visitor's browser
    (DNS rebinding), which has no token to show on loopback, and shows the one that it has stored elsewhere.
    """

    # Starlette's TrustedHostMiddleware takes the address [::1] for the name "[".
    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Comparing host and origin would not help: with a rebound name they are equal.
        host = Headers(scope=scope).get("host", "")
        app: ASGIApp = self._app
        if _strip_port(host).lower() not in self._names:
            app = PlainTextResponse(
                f"'{host}' is not a name of this observer; use 127.0.0.1 on its machine, or start it with "
                "--allowed-host and the name\n",
                421,
            )
        await app(scope, receive, send)


def _strip_port(host: str) -> str:
    """Return the name or address in a Host header; nothing where it has another form."""
    match = _HOST.fullmatch(host)
    return (match["address"] or match["name"]) if match else ""


def _read_token(header: str) -> bytes:
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.encode()
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
