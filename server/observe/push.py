"""How a ServerApp tells the observer about a round: the call may fail, the run never fails with it."""

import json
import logging

import grpc

from fedbasin.proto.fedbasin_pb2 import PushReply, RoundReport
from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
from fedbasin.server.observe.access import AccessError, Pass

LARGEST_REPORT_BYTES = 64 * 2**20  # some 50 000 clients; gRPC's own limit is 4 MiB

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_log = logging.getLogger("flwr.fedbasin")

_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "fedbasin.v1.Observer"}],
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
    ("grpc.per_rpc_retry_buffer_size", LARGEST_REPORT_BYTES),  # what is larger is not tried again
    ("grpc.enable_http_proxy", 0),  # a proxy for the world does not know a neighbour
)


def connect(address: str, own: Pass | None = None) -> grpc.Channel:
    """A channel to an observer; nothing is sent yet.

    Raises:
        AccessError: `own` names files that cannot be used.
    """
    return (own or Pass()).channel(address, _OPTIONS)


class Line:
    """A run's line to its observer: dialled for the first report, then kept.

    Attributes:
        address: `host:port` of `fedbasin observe`.
        own: what the observer wants to see.
    """

    def __init__(self, address: str, own: Pass | None = None) -> None:
        self.address = address
        self.own = own
        self._channel: grpc.Channel | None = None
        self._sent: tuple[RoundReport, grpc.CallFuture[PushReply]] | None = None

    def send(self, report: RoundReport, timeout_seconds: float = 5.0) -> bool:
        """Hands a round report over and does not wait: an observer that is slow slows no round.

        The report before is waited for. The observer takes the same report any number of times, so a reply that was
        lost does no harm; where nobody answers the call is tried again for a moment.

        Args:
            report: what happened in the round.
            timeout_seconds: for everything, tries included.

        Returns:
            Whether it is on its way.
        """
        self.settle()
        try:
            self._channel = self._channel or connect(self.address, self.own)
        except AccessError as error:
            _warn(report, self.address, str(error))
            return False
        call = ObserverStub(self._channel).PushRound.future(report, timeout=timeout_seconds)
        self._sent = report, call
        return True

    def settle(self) -> bool:
        """Waits for the last report; whether the observer has it. Where not, the reason is logged as a warning."""
        if self._sent is None:
            return True
        (report, call), self._sent = self._sent, None
        try:
            call.result()
        except grpc.RpcError as error:
            _warn(report, self.address, f"{error.code().name}: {error.details()}")
            self._hang_up()  # the next report dials anew, with the certificates that the files have then
            return False
        return True

    def push(self, report: RoundReport, timeout_seconds: float = 5.0) -> bool:
        """Hands a round report over and waits; whether the observer has it. See `send`."""
        return self.send(report, timeout_seconds) and self.settle()

    def close(self) -> None:
        """Waits for the last report and hangs up; another one dials again."""
        self.settle()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def push(
    address: str, report: RoundReport, timeout_seconds: float = 5.0, own: Pass | None = None
) -> bool:
    """One report over a line of its own; see `Line.push`."""
    line = Line(address, own)
    try:
        return line.push(report, timeout_seconds)
    finally:
        line.close()


def _warn(report: RoundReport, address: str, reason: str) -> None:
    _log.warning(
        "round %d was not pushed to the observer at %s (%s); the run goes on, its metrics lack this round",
        report.round,
        address,
        reason,
    )
