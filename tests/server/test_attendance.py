"""Runs whose process is gone: they are lost, on the page, in the list of runs and in the metrics."""

import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager

import grpc
import pytest

from fedbasin.proto.observer_service import RunSummary
from fedbasin.server.observe import push as pushing
from fedbasin.server.observe.history import Limits
from fedbasin.server.observe.push import ObserverClient
from tests import tiny
from tests.observing import push, report, served
from tests.running import run
from tests.waiting import LONG, wait_until

SOON = Limits(absent_seconds=0.3)
PROCESS = """
import sys, time
from fedbasin.proto.observer_service import RunSummary
from fedbasin.server.observe.push import ObserverClient
client = ObserverClient(sys.argv[1], run_key=sys.argv[2])
client.attend(RunSummary("run", "fedavg", rounds=9))
{work}
"""
SLEEP = "time.sleep(600)"
# A regular expression that takes hours, in which no other thread of the process gets the interpreter.
BUSY = "import re; time.sleep(1); re.match('(a+)+b', 'a' * 60)"


@contextmanager
def process(addresses, work=SLEEP, key="k" * 16):
    """The process of a run; killed at the end at the latest."""
    command = [sys.executable, "-c", PROCESS.format(work=work), addresses.observer, key]
    child = subprocess.Popen(command)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def states(stub):
    return {run.run_id: run.state for run in stub.list_runs(timeout=LONG)}


def wait_for(stub, state, run_id="run"):
    wait_until(lambda: states(stub).get(run_id) == state, f"the run is not {state}")


def shown(addresses, path=""):
    with urllib.request.urlopen(addresses.page + path, timeout=LONG) as answer:
        return answer.read().decode()


def gauge(addresses, state, recipe="fedavg"):
    return f'fedbasin_run_state{{recipe="{recipe}",state="{state}"}} 1.0' in shown(addresses, "metrics")


def test_a_run_whose_process_is_killed_in_its_first_round_is_lost():
    with served(limits=SOON) as (addresses, stub), process(addresses) as child:
        wait_for(stub, "starting")
        assert gauge(addresses, "starting")
        assert "Run run (fedavg) is in its first round" in shown(addresses)
        assert stub.get_rounds("run", timeout=LONG) == ()
        push(addresses.observer, report(1, "another", recipe="fisher"))
        page = shown(addresses)
        assert "is in its first round" in page
        assert '<option value="run"' not in page
        child.kill()
        wait_for(stub, "lost")
        wait_until(lambda: gauge(addresses, "lost"), "the metrics do not say it")
        assert "was lost in its first round" in shown(addresses)


def test_a_run_whose_process_is_killed_in_a_later_round_is_lost():
    with served(limits=SOON) as (addresses, stub), process(addresses) as child:
        wait_for(stub, "starting")
        stub.push_round(report(1), run_key="k" * 16)
        assert states(stub) == {"run": "running"}
        child.kill()
        wait_for(stub, "lost")
        wait_until(lambda: gauge(addresses, "lost"), "the metrics do not say it")
        page = shown(addresses)
        assert "The run is lost: its process is gone" in page
        assert '<p class="state" id="state" role="status" data-state="lost">lost</p>' in page


def test_a_process_that_keeps_the_interpreter_busy_for_long_is_not_lost():
    with served(limits=SOON) as (addresses, stub), process(addresses, BUSY) as busy:
        wait_for(stub, "starting")
        # Longer than the pause before the work, and then longer than the time after which the run would be lost.
        with pytest.raises(subprocess.TimeoutExpired):
            busy.wait(2)
        assert states(stub) == {"run": "starting"}


def test_a_run_that_ends_is_not_lost():
    with served(limits=SOON) as (addresses, stub):
        with closing(ObserverClient(addresses.observer)) as client:
            client.attend(RunSummary("run", "fedavg", rounds=1))
            wait_for(stub, "starting")
            client.push(report(1, rounds=1, last=True), LONG)
        time.sleep(2 * SOON.absent_seconds)
        assert states(stub) == {"run": "finished"}
        assert gauge(addresses, "finished")


def test_a_run_is_attended_while_it_runs_and_not_afterwards(tmp_path):
    heard = []
    with served(limits=SOON) as (addresses, stub):

        def look(number, arrays):
            if number:
                wait_until(lambda: states(stub), "the observer does not know the run")
            heard.append(set(states(stub).values()))

        config = {"symmetry": tiny.symmetry(), "evaluate_fn": look, "folder": tmp_path, "fraction_evaluate": 0.0}
        run(tiny.federation(), tiny.net(), 1, observer=addresses.observer, **config)
        assert heard[-1] == {"starting"}
        assert set(states(stub).values()) == {"finished"}


def test_after_a_restart_of_the_observer_runs_come_back_or_are_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "_LOOK_SECONDS", 0.1)
    with served(store=tmp_path) as (addresses, _):
        push(addresses.observer, report(1, "killed"))
        push(addresses.observer, report(1, "alive"))
        push(addresses.observer, report(1, "ended", last=True))
        port = int(addresses.observer.split(":")[1])
        client = ObserverClient(addresses.observer)
        client.attend(RunSummary("alive", "fedavg", rounds=9))
    with closing(client), served(store=tmp_path, port=port, limits=Limits(absent_seconds=2)) as (addresses, stub):
        assert states(stub) == {"killed": "running", "alive": "running", "ended": "finished"}
        wait_for(stub, "lost", "killed")
        assert states(stub) == {"killed": "lost", "alive": "running", "ended": "finished"}


def test_only_the_holder_of_a_run_attends_it():
    with served(limits=SOON) as (_, stub):
        stub.push_round(report(1))
        with pytest.raises(grpc.RpcError, match="reported on with another key"):
            stub.attend(RunSummary("run"), "the key of somebody else").result(LONG)
        with pytest.raises(grpc.RpcError, match="key of its run"):
            stub.attend(RunSummary("run"), "short").result(LONG)
        with pytest.raises(grpc.RpcError, match="run_id is empty"):
            stub.attend(RunSummary("")).result(LONG)


def test_a_run_that_is_attended_takes_no_report_of_others():
    with served() as (addresses, stub), closing(ObserverClient(addresses.observer)) as client:
        client.attend(RunSummary("run", "fedavg", rounds=1))
        wait_for(stub, "starting")
        with pytest.raises(grpc.RpcError, match="reported on with another key"):
            stub.push_round(report(1), run_key="the key of somebody else")


def test_there_are_no_more_attendances_than_readers_may_be(tmp_path):
    with served(limits=Limits(watchers=1)) as (addresses, stub), closing(ObserverClient(addresses.observer)) as client:
        client.attend(RunSummary("run", "fedavg", rounds=1))
        wait_for(stub, "starting")
        with pytest.raises(grpc.RpcError, match="as many as it may have"):
            stub.attend(RunSummary("another")).result(LONG)
