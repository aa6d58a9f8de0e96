"""Tests of interrupted commands and of their progress in a terminal, with real processes, signals and limits."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.waiting import LONG

FEDBASIN = [sys.executable, "-m", "fedbasin.server.cli"]
# The real command, which stays in the middle of writing because the bytes of one tensor never come.
HELD = """
import itertools, time
from fedbasin.server import cli
from fedbasin.server.files import writing

content, written = writing._bytes, itertools.count()

def held(tensor):
    if next(written) == 3:
        print("held", flush=True)
        time.sleep(3600)
    return content(tensor)

writing._bytes = held
cli.main()
"""
SYMMETRY = {"symmetry": "hidden  S(6)  w[0]\n"}
# The command sets its own limit: code of ours between fork and exec may meet the threads of other tests' gRPC.
FULL = """
import resource
from fedbasin.server import cli

half = 2**25
resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
cli.main()
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Return the command that aligns two models of several tensors."""
    for name in "ab":
        state = {f"kept.{number}": torch.zeros(2**21) for number in range(8)}
        save_file(state | {"w": torch.randn(6, 4)}, tmp_path / f"{name}.safetensors", SYMMETRY)
    paths = [str(tmp_path / f"{name}.safetensors") for name in "bao"]
    return [*FEDBASIN, "align", paths[0], "--anchor", paths[1], "-o", paths[2]]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_ctrl_c_leaves_nothing_behind(command: list[str], tmp_path: Path) -> None:
    held = [sys.executable, "-c", HELD, *command[len(FEDBASIN) :]]
    with subprocess.Popen(held, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            assert list(tmp_path.glob(".*.part"))
            process.send_signal(signal.SIGINT)
            assert process.wait(LONG) == 130
            assert process.stderr.read() == b""
        finally:
            process.kill()
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_disk_that_is_full_leaves_nothing_behind(command: list[str], tmp_path: Path) -> None:
    full = [sys.executable, "-c", FULL, *command[len(FEDBASIN) :]]
    done = subprocess.run(full, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 2
    assert "o.safetensors: cannot be written: File too large; nothing was left behind" in done.stderr
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_terminal_sees_how_far_it_is(command: list[str]) -> None:
    reader, writer = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer) as process:
        os.close(writer)
        seen = b"".join(iter(lambda: _read(reader), b""))
        assert process.wait(LONG) == 0
    os.close(reader)
    assert b"matching" in seen
    assert b"writing" in seen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say that the other end is closed
        return b""


# As HELD, but a merge writes from several threads, which end what they have begun.
SLOW = """
import itertools, time
from fedbasin.server import cli
from fedbasin.server.files.merge.layout import TensorWriter

write, written = TensorWriter.write, itertools.count()

def slow(self, name, tensor):
    if next(written) == 3:
        print("held", flush=True)
    time.sleep(0.2)
    write(self, name, tensor)

TensorWriter.write = slow
cli.main()
"""


@pytest.fixture
def merge(tmp_path: Path) -> list[str]:
    """Return the arguments that merge two models of many tensors."""
    for name in "ab":
        save_file({f"t{number}": torch.zeros(2**21) for number in range(12)}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in "abo"]
    return ["merge", *paths[:2], "--rule", "linear", "-o", paths[2]]


def test_ctrl_c_in_a_merge_leaves_nothing_behind(merge: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, *merge]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            assert list(tmp_path.glob(".*.part"))
            process.send_signal(signal.SIGINT)
            assert process.wait(LONG) == 130
            assert process.stderr.read() == b""
        finally:
            process.kill()
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_disk_that_is_full_in_a_merge_leaves_nothing_behind(merge: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, *merge], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 2
    assert "o.safetensors: cannot be written: File too large; nothing was left behind" in done.stderr
    assert left(tmp_path) == ["a.safetensors", "b.safetensors"]
