"""Access to an observer: TLS on both sides, and a token that every call but the health check carries."""

import hmac
import os
import re
import secrets
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from grpc import aio

_HEADER = "authorization"
_OPEN = "/grpc.health.v1.Health/Check"  # probes have no secrets
_SHORTEST_TOKEN = 16
# gRPC takes other words too, and then waits for what never answers: a URL, or a host whose port would be 443.
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]|[\w.-]+):([1-9][0-9]{0,4})", re.ASCII)
_LAST_PORT = 65535


class AccessError(ValueError):
    """Files or options that do not give a secure connection; the message names them and the remedy."""


@dataclass(frozen=True)
class Guard:
    """The proof that an observer requires of its callers; none by default.

    Attributes:
        cert: the observer's certificate chain, PEM; with it the service speaks TLS only.
        key: private key of the certificate, PEM.
        client_ca: PEM of the authorities whose client certificates are accepted; None requires no certificate.
        token_file: file with the token on its only line.
        insecure: whether an address that other machines reach may lack a proof, or take the token in plain text.
    """

    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False

    def check(self, host: str) -> None:
        """Refuse files that cannot be used, and combinations that are not safe, or look so and are not.

        Raises:
            AccessError: one of certificate and key is missing, a file is not what it should be, everyone could reach
                the observer, or the token would cross a network in plain text.
        """
        if (self.cert is None) != (self.key is None):
            raise AccessError("a certificate needs its key; give --tls-cert and --tls-key together")
        if self.client_ca and not self.cert:
            raise AccessError("client certificates need TLS; give --tls-cert and --tls-key too")
        risk = self.risk(host)
        if risk and not self.insecure:
            raise AccessError(f"{risk}, or listen on 127.0.0.1; --insecure goes on without")
        if self.token_file:
            read_token(self.token_file)
        if self.cert and self.key:
            _check_files(self.cert, self.key, self.client_ca)

    def risk(self, host: str) -> str:
        """Return what others could do on an address, and the remedy; empty where they could do nothing."""
        if is_loopback(host):
            return ""
        if not (self.token_file or self.client_ca):
            return (
                f"on {host} without a token, everyone who reaches the ports could read reports, fetch models and push "
                "reports; give --token-file, --tls-cert and --tls-key"
            )
        if not self.cert:
            return f"on {host} without TLS, everyone on the way could read the token; give --tls-cert and --tls-key"
        return ""

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return the credentials of a port; None for plain text.

        Raises:
            AccessError: a file cannot be read.
        """
        if not (self.cert and self.key):
            return None
        # gRPC takes the key before the certificate.
        pair = (_read_file(self.key), _read_file(self.cert))
        authorities = _read_file(self.client_ca) if self.client_ca else None
        # The last argument makes the client's certificate mandatory: one that may be left out protects nothing.
        return grpc.ssl_server_credentials([pair], authorities, authorities is not None)

    def interceptors(self) -> list[aio.ServerInterceptor]:
        """Return the interceptors that check a call before the service sees it.

        Raises:
            AccessError: the token cannot be read, or can be guessed.
        """
        return [_TokenCheck(read_token(self.token_file))] if self.token_file else []


@dataclass(frozen=True)
class Pass:
    """The proof that a caller shows to an observer; none by default.

    Attributes:
        ca: PEM of the authorities that may have signed the observer's certificate; with it the channel is TLS.
        token_file: file with the token on its only line.
        cert: the caller's certificate chain, PEM, where the observer requires one.
        key: private key of the caller's certificate, PEM.
        insecure: whether the token may go to another machine in plain text.
    """

    ca: Path | None = None
    token_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    insecure: bool = False

    def channel(self, address: str, options: tuple[tuple[str, Any], ...]) -> grpc.Channel:
        """Open a channel to an observer; nothing is sent yet.

        Raises:
            AccessError: the address is no host and port, a file is missing or is not what it should be, or the token would
                cross a network in plain text.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None or int(match[3]) > _LAST_PORT:
            raise AccessError(f"{address!r} is no HOST:PORT, such as 127.0.0.1:9470 or [::1]:9470; write it so")
        if (self.cert is None) != (self.key is None):
            raise AccessError("a certificate needs its key; name both files, or neither")
        if not self.ca:
            return self._with_token(address, grpc.insecure_channel(address, options))
        _check_files(self.cert, self.key, self.ca)
        pair = (_read_file(self.key), _read_file(self.cert)) if self.key and self.cert else ()
        credentials = grpc.ssl_channel_credentials(_read_file(self.ca), *pair)
        return self._with_token(address, grpc.secure_channel(address, credentials, options))

    def _with_token(self, address: str, channel: grpc.Channel) -> grpc.Channel:
        if not self.token_file:
            return channel
        if not (self.ca or self.insecure or is_loopback(address.rpartition(":")[0].strip("[]"))):
            raise AccessError(
                f"the token for {address} would go out in plain text; name the authority of the observer's "
                "certificate too, or set insecure where nobody is on the way"
            )
        return grpc.intercept_channel(channel, _TokenBearer(read_token(self.token_file)))


def make_token(path: Path) -> bool:
    """Make a token in a file that is not there yet, readable by its owner alone; return whether it was made.

    Raises:
        AccessError: the file cannot be made.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{secrets.token_hex(32)}\n")
    except FileExistsError:
        return False
    except OSError as error:
        raise AccessError(f"{path} cannot be made: {error.strerror}") from error
    return True


def read_token(path: Path) -> str:
    """Read the token in a file.

    Raises:
        AccessError: the file cannot be read, or has not one line of at least 16 printable ASCII characters.
    """
    # `openssl rand` and editors end the line, and the end is not part of the token. HTTP headers and gRPC's metadata
    # carry printable ASCII only.
    token = _read_file(path).decode("ascii", errors="replace").strip()
    if len(token) < _SHORTEST_TOKEN or not all("!" <= letter <= "~" for letter in token):
        raise AccessError(
            f"{path} has no token: one line of at least {_SHORTEST_TOKEN} printable characters; "
            f"make one with `openssl rand -hex 32 > {path}`"
        )
    return token


class _TokenCheck(aio.ServerInterceptor):  # type: ignore[misc] # grpc ships no types
    """An interceptor that lets a call pass if it carries the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the handler of the service, or one that only refuses."""
        shown = dict(handler_call_details.invocation_metadata).get(_HEADER, "")
        # `compare_digest` takes the same time wherever the two differ, so that a token cannot be found byte by byte.
        if handler_call_details.method == _OPEN or hmac.compare_digest(shown.encode(), self._expected):
            return await continuation(handler_call_details)
        # A unary handler also ends streaming calls: it aborts before the first reply.
        # Two texts, so that a caller who sent no token does not look for a mistake in the file.
        return grpc.unary_unary_rpc_method_handler(_refuse_token if shown else _require_token)


async def _require_token(request: bytes, context: aio.ServicerContext) -> None:
    del request
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "this observer requires a token: metadata `authorization: Bearer TOKEN`, with the token of its --token-file",
    )


async def _refuse_token(request: bytes, context: aio.ServicerContext) -> None:
    del request
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "the token is not this observer's; compare the caller's token file with its --token-file",
    )


class _Call(NamedTuple):
    """The attributes of a call that grpc reads."""

    method: str
    timeout: float | None
    metadata: list[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _TokenBearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[misc] # grpc ships no types
    """An interceptor that adds the token to every call of a channel."""

    def __init__(self, token: str) -> None:
        self._metadata = (_HEADER, f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Start a call with the token in its metadata."""
        return continuation(self._sign(client_call_details), request)

    intercept_unary_stream = intercept_unary_unary

    def _sign(self, call: Any) -> _Call:
        metadata = [*(call.metadata or ()), self._metadata]
        return _Call(call.method, call.timeout, metadata, call.credentials, call.wait_for_ready, call.compression)


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_files(cert: Path | None, key: Path | None, authorities: Path | None) -> None:
    """Refuse files that OpenSSL cannot use; gRPC would only say that the port cannot be opened, or that nobody answers."""
    # OpenSSL does not name the file that it cannot read.
    for path in filter(None, (cert, key, authorities)):
        _read_file(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if cert:
            context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        raise AccessError(f"{cert} and {key} are not a certificate and its key in PEM: {error}") from error
    try:
        if authorities:
            context.load_verify_locations(authorities)
    except ssl.SSLError as error:
        raise AccessError(f"{authorities} has no certificate of an authority in PEM: {error}") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}") from error
