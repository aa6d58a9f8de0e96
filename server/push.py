"""How a ServerApp tells the observer about a round: the call may fail, the run never fails with it."""

import json
import logging

import grpc

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
from fedbasin.server.access import AccessError, Pass

LARGEST_REPORT_BYTES = 64 * 2**20  # some 50 000 clients; gRPC's own limit is 4 MiB

_log = logging.getLogger(__name__)

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


def push(
    address: str, report: RoundReport, timeout_seconds: float = 5.0, own: Pass | None = None
) -> bool:
    """Hands a round report to the observer, trying again for a moment where nobody answers.

    The observer takes the same report any number of times, so a reply that was lost does no harm.

    Args:
        address: `host:port` of `fedbasin observe`.
        report: what happened in the round.
        timeout_seconds: for everything, tries included.
        own: what the observer wants to see.

    Returns:
        Whether the observer has the report. Where it has not, the reason is logged as a warning.
    """
    try:
        with connect(address, own) as channel:
            ObserverStub(channel).PushRound(report, timeout=timeout_seconds)
    except grpc.RpcError as error:
        _warn(report, address, f"{error.code().name}: {error.details()}")
        return False
    except AccessError as error:
        _warn(report, address, str(error))
        return False
    return True


def _warn(report: RoundReport, address: str, reason: str) -> None:
    _log.warning(
        "round %d was not pushed to the observer at %s (%s); the run goes on, its metrics lack this round",
        report.round,
        address,
        reason,
    )
