"""Limits on everything in a reply but its tensors, checked before anything is decoded.

Tensors are bounded by `max-update-bytes`, headers by what the model has use for (`fedbasin.proto.reply`). A reply's
metrics, settings and error texts have no natural size, so that their limits are constants, far above what an app sends.
"""

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedbasin.proto.header import HEADER, records
from fedbasin.proto.packing import nbytes
from fedbasin.strategies.judging.outcomes import Outcome, Refusal

MOST_RECORDS = 100
MOST_METRICS = 1000
MOST_NUMBERS = 10_000
LONGEST_NAME = 256
MOST_CONFIG_BYTES = 2**20
_ENTRY_BYTES = 100  # of an array in memory, beside its data
_LONGEST_REASON = 2000


def check_limits(content: RecordDict, max_bytes: int) -> None:
    """Check the sizes and names of a reply's records.

    Args:
        content: the content of the reply.
        max_bytes: largest size of the arrays, their names included.

    Raises:
        Refusal: something is larger than the server takes, or a name cannot be printed.
    """
    if len(content) > MOST_RECORDS:
        raise Refusal(Outcome.too_large, f"{len(content)} records where {MOST_RECORDS} are allowed")
    _check_arrays(content, max_bytes)
    _check_metrics(content)
    _check_config(content)
    for name in content:
        _check_name("record", name)


def shortened(reason: str) -> str:
    """Return the text of an error or a refusal, cut off with a remark where it is long."""
    rest = len(reason) - _LONGEST_REASON
    return reason if rest <= 0 else f"{reason[:_LONGEST_REASON]} ... ({rest} more characters)"


def _check_arrays(content: RecordDict, max_bytes: int) -> None:
    arrays = records(content, ArrayRecord).values()
    size = sum(nbytes(record) for record in arrays)
    if size > max_bytes:
        raise Refusal(Outcome.too_large, f"{size} bytes where {max_bytes} are allowed")
    entries = sum(_ENTRY_BYTES + len(name) + 8 * len(array.shape) for r in arrays for name, array in r.items())
    if entries > max(max_bytes, MOST_CONFIG_BYTES):
        raise Refusal(Outcome.too_large, f"{sum(map(len, arrays))} arrays, most of which can hold nothing")


def _check_metrics(content: RecordDict) -> None:
    metrics = [entry for record in records(content, MetricRecord).values() for entry in record.items()]
    if len(metrics) > MOST_METRICS:
        raise Refusal(Outcome.too_large, f"{len(metrics)} metrics where {MOST_METRICS} are allowed")
    numbers = sum(len(value) if isinstance(value, list) else 1 for _, value in metrics)
    if numbers > MOST_NUMBERS:
        raise Refusal(Outcome.too_large, f"metrics of {numbers} numbers where {MOST_NUMBERS} are allowed")
    for name, _ in metrics:
        _check_name("metric", name)


def _check_config(content: RecordDict) -> None:
    size = sum(
        len(key) + _length(value)
        for name, record in records(content, ConfigRecord).items()
        for key, value in record.items()
        if name != HEADER
    )
    if size > MOST_CONFIG_BYTES:
        raise Refusal(Outcome.too_large, f"settings of {size} bytes where {MOST_CONFIG_BYTES} are allowed")


def _length(value: object) -> int:
    if isinstance(value, list):
        return sum(map(_length, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _check_name(what: str, name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise Refusal(
            Outcome.too_large, f"a {what} with a name of {len(name)} characters where {LONGEST_NAME} are allowed"
        )
    if not name.isprintable() or not name:
        raise Refusal(Outcome.malformed, f"the {what} {name!r} has a name that cannot be printed; give it another")
