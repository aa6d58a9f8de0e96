"""A real observer on loopback, and a real Prometheus that scrapes it."""

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
from fedbasin.server.observe.access import Pass
from fedbasin.server.observe.observer import Settings, serving
from fedbasin.server.observe.push import connect

RULES = Path(__file__).parent.parent / "deploy" / "prometheus" / "rules.yml"


@contextmanager
def observer(**settings):
    """An observer on a loop of its own; yields its addresses."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = serving(Settings(**{"port": 0, "metrics_port": 0} | settings))
    try:
        addresses = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(30)
        try:
            yield addresses
        finally:
            # Also where the test skips or fails: a server left open would raise in some later test.
            closing = context.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(closing, loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def served(own=None, **settings):
    """An observer and a client of it."""
    with observer(**settings) as addresses, connect(addresses.observer, own or Pass()) as channel:
        yield addresses, ObserverStub(channel)


def report(round_, run="run", **fields):
    given = {"schema_version": pb.SCHEMA_VERSION, "rounds": 9, "recipe": "fedavg"} | fields
    return pb.RoundReport(run_id=run, round=round_, **given)


class Prometheus:
    """What a running Prometheus answers."""

    def __init__(self, address):
        self.address = address

    def get(self, path, **query):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, expression):
        """The samples of an expression now."""
        return [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]

    def wait_for(self, expression, seconds=20):
        """Until the expression has a sample."""
        end = time.monotonic() + seconds
        while not self.values(expression):
            assert time.monotonic() < end, f"{expression} has no sample after {seconds} s"
            time.sleep(0.1)


@contextmanager
def prometheus(target, folder, scrape_seconds=1):
    """A Prometheus on a free port that scrapes an observer's page and evaluates our rules."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not on PATH; Debian and Ubuntu: apt-get install prometheus")
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
        process.wait(10)


def _wait_until_ready(address, process, log):
    for _ in range(200):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError(log.read_text())
