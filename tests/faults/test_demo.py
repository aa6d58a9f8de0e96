import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.deploy.test_local import living_in
from tests.waiting import LONG

pytestmark = [pytest.mark.deployed, pytest.mark.slow]


def interrupt(tmp_path, word, delay_seconds):
    """Runs the demo, presses Ctrl-C this long after it has said this word, and gives its status and what it said."""
    command = [sys.executable, "-m", "fedbasin.deploy.demo", "--folder", str(tmp_path)]
    said = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    ) as demo:
        overdue = threading.Timer(LONG, demo.kill)
        overdue.start()
        for line in demo.stdout:
            said.append(line)
            if word in line:
                time.sleep(delay_seconds)
                assert living_in(tmp_path / "processes")
                # As a terminal does: to the whole group in the foreground.
                os.killpg(demo.pid, signal.SIGINT)
                word = "never said"
        overdue.cancel()
    return demo.returncode, "".join(said)


@pytest.mark.parametrize(("word", "delay_seconds"), [("starting", 1), ("plain FedAvg", 10)], ids=["start", "round"])
def test_ctrl_c_ends_the_demo_and_every_process_of_it(tmp_path, word, delay_seconds):
    status, said = interrupt(tmp_path, word, delay_seconds)
    assert status == 130, said
    assert "Interrupted" in said
    assert living_in(tmp_path / "processes") == []
