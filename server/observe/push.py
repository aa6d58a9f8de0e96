"""The connection of a ServerApp to its observer: a call may fail, and the run never fails with it."""

import json
import logging
import threading
from contextlib import suppress
from typing import Any

import grpc

from fedbasin.proto.observer_service import PROCESS_KEY, SERVICE, RemoteObserver, RunSummary
from fedbasin.proto.report import RoundReport
from fedbasin.server.observe.access import AccessError, Pass

_LOOK_SECONDS = 2.0  # between two looks whether the call of an attendance is still open

LARGEST_REPORT_BYTES = 16 * 2**20  # some 12 000 clients whose models have 40 spaces; gRPC's own limit is 4 MiB

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_log = logging.getLogger("flwr.fedbasin")

_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # a long history is large
    ("grpc.service_config", json.dumps(_RETRIES)),
    ("grpc.initial_reconnect_backoff_ms", 100),  # the first try after a second would be the last
    ("grpc.per_rpc_retry_buffer_size", LARGEST_REPORT_BYTES),  # a larger report is not sent again
    ("grpc.enable_http_proxy", 0),  # a proxy to the internet cannot reach a local observer
)


def connect(address: str, credentials: Pass | None = None) -> grpc.Channel:
    """Open a channel to an observer; nothing is sent yet.

    Args:
        address: `host:port` of `fedbasin observe`.
        credentials: certificates and token for the observer.

    Raises:
        AccessError: the credentials name files that cannot be used.
    """
    return (credentials or Pass()).channel(address, _OPTIONS)


class ObserverClient:
    """The reports of one run to its observer, over a channel that is opened for the first and then kept.

    Attributes:
        address: `host:port` of `fedbasin observe`.
        credentials: certificates and token for the observer.
        run_key: secret of the run, without which nobody else can report on it; by default this process is its holder.
    """

    def __init__(self, address: str, credentials: Pass | None = None, run_key: str = PROCESS_KEY) -> None:
        self.address = address
        self.credentials = credentials
        self.run_key = run_key
        self._channel: grpc.Channel | None = None
        self._pending: tuple[RoundReport, grpc.CallFuture[Any]] | None = None
        self._closed = threading.Event()
        self._attending: threading.Thread | None = None

    def attend(self, run: RunSummary) -> None:
        """Let the observer know until `close` that this process works on a run, whether or not it answers now."""
        self._closed.clear()
        self._attending = threading.Thread(target=self._attend, args=(run,), daemon=True)
        self._attending.start()

    def _attend(self, run: RunSummary) -> None:
        pause = 0.0
        while not self._closed.wait(pause):
            pause = _LOOK_SECONDS
            # The log has the reason from the reports where the observer cannot be reached.
            with suppress(AccessError), connect(self.address, self.credentials) as channel:
                call = RemoteObserver(channel).attend(run, self.run_key)
                while not (self._closed.wait(_LOOK_SECONDS) or call.done()):
                    pass

    def send(self, report: RoundReport, timeout_seconds: float = 5.0) -> bool:
        """Send a report without waiting for the reply: a slow observer slows no round.

        The report before is waited for. The observer takes the same report any number of times, so a reply that was
        lost does no harm; where nobody answers the call is tried again for a moment.

        Args:
            report: report of the round.
            timeout_seconds: time for everything, tries included.

        Returns:
            True if the report is on its way.
        """
        self.settle()
        try:
            self._channel = self._channel or connect(self.address, self.credentials)
        except AccessError as error:
            _warn(report, self.address, str(error))
            return False
        call = RemoteObserver(self._channel).start_push(report, timeout_seconds, self.run_key)
        self._pending = report, call
        return True

    def settle(self) -> bool:
        """Wait until the observer has the last report; return False and log a warning where it has not."""
        if self._pending is None:
            return True
        (report, call), self._pending = self._pending, None
        try:
            call.result()
        except grpc.RpcError as error:
            _warn(report, self.address, f"{error.code().name}: {error.details()}")
            # The next report connects anew, with the certificates that the files have then.
            self._disconnect()
            return False
        return True

    def push(self, report: RoundReport, timeout_seconds: float = 5.0) -> bool:
        """Send a report and wait; return whether the observer has it."""
        return self.send(report, timeout_seconds) and self.settle()

    def close(self) -> None:
        """Wait for the last report, end the attendance and disconnect; another report connects again."""
        self.settle()
        self._closed.set()
        if self._attending is not None:
            self._attending.join()
            self._attending = None
        self._disconnect()

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def push(address: str, report: RoundReport, timeout_seconds: float = 5.0, credentials: Pass | None = None) -> bool:
    """Send one report over a channel of its own and return whether the observer has it."""
    client = ObserverClient(address, credentials)
    try:
        return client.push(report, timeout_seconds)
    finally:
        client.close()


def _warn(report: RoundReport, address: str, reason: str) -> None:
    _log.warning(
        "round %d was not pushed to the observer at %s (%s); the run goes on, its metrics lack this round",
        report.round,
        address,
        reason,
    )
