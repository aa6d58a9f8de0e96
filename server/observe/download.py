"""The download of a global model from an observer: in pieces, checked, and moved to its place in one step."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import grpc

from fedbasin.proto.observer_service import ModelChunk, RemoteObserver
from fedbasin.server.observe.access import Pass
from fedbasin.server.observe.push import connect


class DownloadError(RuntimeError):
    """A download that failed; the target is as it was before."""


def download(address: str, run_id: str, target: Path, server_round: int = 0, credentials: Pass | None = None) -> int:
    """Fetch the global model of a run from an observer.

    Args:
        address: `host:port` of `fedbasin observe --models`.
        run_id: name of the run's folder, or the id of a run that was resumed there.
        target: the file to write, in safetensors; it is not touched until the model is complete and checked.
        server_round: round of the model; 0 takes whichever is kept.
        credentials: certificates and token for the observer.

    Returns:
        The round of the model.

    Raises:
        DownloadError: the observer refused, broke off, or sent something else than it announced.
        AccessError: the credentials name files that cannot be used.
        OSError: the target cannot be written.
    """
    # Beside the target, so that replacing it is a rename within one file system and leaves no half-written model.
    part = target.with_name(f"{target.name}.part")
    try:
        with connect(address, credentials) as channel:
            received_round = _write(RemoteObserver(channel).get_model(run_id, server_round), part)
        part.replace(target)
    except grpc.RpcError as error:
        raise DownloadError(f"no model of '{run_id}' from {address}: {error.code().name}, {error.details()}") from error
    finally:
        part.unlink(missing_ok=True)
    return received_round


def _write(chunks: Iterable[ModelChunk], part: Path) -> int:
    """Write the pieces to a file and return the round of the model."""
    digest, last, offset = hashlib.sha256(), ModelChunk(0, b"", 0, 0), 0
    with part.open("wb") as file:
        for last in chunks:
            if last.offset != offset:
                raise DownloadError(f"a piece for byte {last.offset} came where {offset} is next; try again")
            offset += file.write(last.data)
            digest.update(last.data)
    # A stream without pieces fails here too: the empty piece has no digest.
    if (offset, digest.digest()) != (last.total_bytes, last.sha256):
        raise DownloadError(
            f"{offset} of {last.total_bytes} bytes came, with another SHA-256 than announced; try again"
        )
    return last.round
