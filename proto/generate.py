"""Generation of the Python modules of the wire, and their types, from fedbasin.proto.

`python -m fedbasin.proto.generate` rewrites the generated files beside this one. They are committed, so
that installing fedbasin needs no compiler; it runs with the protobuf and grpcio of the generator or later.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.resources import files
from pathlib import Path

ROOM = Path(__file__).resolve().parent
_PACKAGE = "fedbasin/proto"


def generate(into: Path = ROOM) -> list[Path]:
    """Write the generated modules and their stubs.

    Args:
        into: an existing folder.

    Returns:
        The files written, in alphabetic order.

    Raises:
        subprocess.CalledProcessError: protoc failed; its message is on standard error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(_protoc(scratch), check=True)  # noqa: S603 - our own interpreter and arguments
        modules = sorted((Path(scratch) / _PACKAGE).iterdir())
        return [Path(shutil.copy(file, into)) for file in modules]


def _protoc(out: str) -> list[str]:
    """Return the command line; its virtual path makes the generated import line absolute."""
    scripts = sysconfig.get_path("scripts")
    return [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        f"--proto_path={_PACKAGE}={ROOM}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        *(f"--plugin=protoc-gen-{name}={scripts}/protoc-gen-{name}" for name in ("mypy", "mypy_grpc")),
        *(f"--{name}_out={out}" for name in ("python", "grpc_python")),
        *(f"--{name}_out=quiet:{out}" for name in ("mypy", "mypy_grpc")),
        f"{_PACKAGE}/fedbasin.proto",
    ]


if __name__ == "__main__":
    generate()
