"""A disk that becomes full in the middle of a run: the last whole round stays, and the run goes on from it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = [*IN_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace: unshare, and a kernel that lets users mount")
@pytest.mark.parametrize(
    ("robust", "keep"),
    [*(("", keep) for keep in (60_000, 90_000, 120_000, 150_000)), ("median", 150_000), ("median", 250_000)],
)
def test_a_run_on_a_full_disk_goes_on_from_its_last_whole_round(robust, keep, tmp_path):
    command = [*IN_NAMESPACE, sys.executable, "-m", "tests.faults.full_disk", str(tmp_path / "disk"), robust, str(keep)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": f"{ROOT / '.links'}:{ROOT}"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    happened = json.loads(done.stdout.splitlines()[-1])
    assert happened["error"] is not None
    assert happened["equal"]
