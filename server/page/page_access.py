"""Who may read the page: those with the observer's token, and no site that a reader's browser happens to visit.

/metrics stays open, as the gRPC health service does: scrapers have no secrets, and it names no client.
"""

import base64
import binascii
import hmac

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbasin.server.observe.access import Guard, is_loopback, read_token

_OPEN = "/metrics"
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def guards(guard: Guard, host: str) -> list[Middleware]:
    """What looks at a request before the page does.

    Args:
        guard: what the observer asks of its callers.
        host: address that it listens on.

    Raises:
        AccessError: the token cannot be read, or can be guessed.
    """
    names = [Middleware(LocalNames)] if is_loopback(host) else []
    if guard.token_file is None:
        return names
    return [*names, Middleware(TokenCheck, token=read_token(guard.token_file))]


class TokenCheck:
    """Asks for the token: as a password that a browser prompts for, any user name, or as a bearer token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shown = _shown(Headers(scope=scope).get("authorization", ""))
        app: ASGIApp = self._app
        if scope["path"] != _OPEN and not hmac.compare_digest(shown, self._token):
            app = PlainTextResponse(
                "This observer wants its token: as the password, with any user name.\n",
                401,
                {"www-authenticate": 'Basic realm="fedbasin", charset="UTF-8"'},
            )
        await app(scope, receive, send)


class LocalNames:
    """Refuses names that lead to this machine but are not its own.

    An observer on loopback has no login. Without this, any site could let its own name point to 127.0.0.1 and read
    the reports through a visitor's browser (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        app: ASGIApp = self._app
        if _name(host) not in _LOCAL:
            app = PlainTextResponse(
                f"'{host}' is no name of this machine; ask for 127.0.0.1, or let the observer listen on another "
                "address with --host\n",
                421,
            )
        await app(scope, receive, send)


def _name(host: str) -> str:
    """The host without its port."""
    inside, bracket, _ = host.removeprefix("[").partition("]")
    return inside if bracket else host.rpartition(":")[0] if ":" in host else host


def _shown(header: str) -> bytes:
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.encode()
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
