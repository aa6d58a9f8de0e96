"""A real observer on loopback, and a real Prometheus that scrapes it."""

import asyncio
import json
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from fedbasin.proto.observer_service import RemoteObserver
from fedbasin.proto.report import RoundReport
from fedbasin.server.observe import push as pushing
from fedbasin.server.observe.access import Pass
from fedbasin.server.observe.observer import ObserverSettings, serving
from fedbasin.server.observe.push import connect
from tests.needing import needed
from tests.waiting import LONG, wait_until

RULES = Path(__file__).parent.parent / "deploy" / "prometheus" / "rules.yml"


@contextmanager
def observer(**settings):
    """An observer on a loop of its own; yields its addresses."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = serving(ObserverSettings(**{"port": 0, "metrics_port": 0} | settings))
    try:
        addresses = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(LONG)
        try:
            yield addresses
        finally:
            # Also where the test skips or fails: a server left open would raise in some later test.
            closing = context.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(closing, loop).result(LONG)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def served(credentials=None, **settings):
    """An observer and a client of it; yields its addresses and the client."""
    with observer(**settings) as addresses, connect(addresses.observer, credentials or Pass()) as channel:
        yield addresses, RemoteObserver(channel)


def push(address, report, timeout_seconds=LONG, credentials=None):
    """As a run does, but more patient: a run rather goes on than wait for an observer that is slow."""
    return pushing.push(address, report, timeout_seconds, credentials)


def report(round_, run="run", **fields):
    return RoundReport(run, round_, **{"rounds": 9, "recipe": "fedavg"} | fields)


class Prometheus:
    """What a running Prometheus answers."""

    def __init__(self, address):
        self.address = address

    def get(self, path, **query):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=LONG) as answer:
            return json.load(answer)["data"]

    def values(self, expression):
        """The samples of an expression now."""
        return [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]

    def wait_for(self, expression):
        """Until the expression has a sample."""
        wait_until(lambda: self.values(expression), f"{expression} has no sample")


@contextmanager
def prometheus(target, folder, scrape_seconds=1):
    """A Prometheus on a free port that scrapes an observer's page and evaluates our rules."""
    program = needed("prometheus")
    config = {
        "global": {"scrape_interval": f"{scrape_seconds}s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "fedbasin", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/tsdb",
                f"--web.listen-address={address}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(address, process, folder / "prometheus.log")
        yield Prometheus(address)
    finally:
        process.terminate()
        process.wait(LONG)


def _wait_until_ready(address, process, log):
    def ready():
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://{address}/-/ready", timeout=LONG).close()
        except OSError:
            return False
        return True

    wait_until(ready, f"Prometheus is not ready; its log is {log}")
