"""What is left when a command is cut off, and what a terminal sees: real processes, signals and limits."""

import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

FEDBASIN = [sys.executable, "-m", "fedbasin.server.cli"]
SYMMETRY = {"symmetry": "hidden  S(6)  w[0]\n"}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """To align two models whose writing takes a while."""
    for name in "ab":
        state = {f"kept.{number}": torch.zeros(2**21) for number in range(8)}
        save_file(state | {"w": torch.randn(6, 4)}, tmp_path / f"{name}.safetensors", SYMMETRY)
    paths = [str(tmp_path / f"{name}.safetensors") for name in "bao"]
    return [*FEDBASIN, "align", paths[0], "--anchor", paths[1], "-o", paths[2]]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_ctrl_c_leaves_nothing_behind(command: list[str], tmp_path: Path) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            while not list(tmp_path.glob(".*.part")):
                assert process.poll() is None, "it ended before it was interrupted"
                time.sleep(0.0005)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert process.stderr.read() == b""
        finally:
            process.kill()
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_disk_that_is_full_leaves_nothing_behind(command: list[str], tmp_path: Path) -> None:
    half = 2**25
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)),
    )
    assert done.returncode == 2
    assert (
        "o.safetensors: cannot be written: File too large; nothing was left behind" in done.stderr
    )
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_terminal_sees_how_far_it_is(command: list[str]) -> None:
    reader, writer = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer) as process:
        os.close(writer)
        seen = b"".join(iter(lambda: _read(reader), b""))
        assert process.wait(30) == 0
    os.close(reader)
    assert b"matching" in seen
    assert b"writing" in seen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say that the other end is closed
        return b""
