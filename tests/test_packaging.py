import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy, so that no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_every_module_of_every_room_and_nothing_else(wheel: Path) -> None:
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")}
    rooms = ("client", "proto", "server", "strategies")
    written = {
        f"fedbasin/{path.relative_to(ROOT)}"
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
    }
    written |= {f"fedbasin/deploy/{path.name}" for path in (ROOT / "deploy").glob("*.py")}
    assert packed == written | {"fedbasin/__init__.py"}


def test_the_wheel_carries_types_and_the_wire_format(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "fedbasin/proto/fedbasin.proto" in names
    assert "fedbasin/proto/fedbasin_pb2.pyi" in names
    assert "fedbasin/py.typed" in names


def test_the_wheel_imports_by_itself(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import fedbasin.server.run.serve as s, fedbasin.client; print(s.__file__)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        check=True,
        text=True,
    )
    assert run.stdout.strip().startswith(str(tmp_path))


def test_the_command_line_is_installed() -> None:
    script = Path(sys.executable).with_name("fedbasin")
    run = subprocess.run([script, "version"], capture_output=True, check=True, text=True)
    assert run.stdout.strip() == "0.1.0"
