"""How a global model comes from an observer to a file: in pieces, checked, and in one step at the end."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import grpc

from fedbasin.proto.fedbasin_pb2 import ModelChunk, ModelRequest
from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
from fedbasin.server.observe.access import Pass
from fedbasin.server.observe.push import connect


class DownloadError(RuntimeError):
    """No model, or not the one that was sent; the target is as it was before."""


def download(
    address: str, run_id: str, target: Path, server_round: int = 0, own: Pass | None = None
) -> int:
    """Fetches a run's global model from an observer that shows its run folders.

    Args:
        address: `host:port` of `fedbasin observe --models`.
        run_id: name of the run's folder.
        target: the file to write, in safetensors; until all of it is here and checked, it is not touched.
        server_round: which round's model; 0 takes whichever is kept.
        own: what the observer wants to see.

    Returns:
        The round of the model.

    Raises:
        DownloadError: the observer refused, broke off, or sent something else than it announced.
        AccessError: `own` names files that cannot be used.
        OSError: the target cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    request = ModelRequest(run_id=run_id, round=server_round)
    try:
        with connect(address, own) as channel:
            made = _write(ObserverStub(channel).GetModel(request), part)
        part.replace(target)
    except grpc.RpcError as error:
        raise DownloadError(
            f"no model of '{run_id}' from {address}: {error.code().name}, {error.details()}"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return made


def _write(chunks: Iterable[ModelChunk], part: Path) -> int:
    """Writes the pieces, flushed to the disk; returns the round."""
    digest, last, offset = hashlib.sha256(), ModelChunk(), 0
    with part.open("wb") as file:
        for last in chunks:
            if last.offset != offset:
                raise DownloadError(
                    f"a piece for byte {last.offset} came where {offset} is next; try again"
                )
            offset += file.write(last.data)
            digest.update(last.data)
    if (offset, digest.digest()) != (last.total_bytes, last.sha256):
        raise DownloadError(
            f"{offset} of {last.total_bytes} bytes came, with another SHA-256 than announced; try again"
        )
    return last.round
