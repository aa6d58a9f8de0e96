"""A real observer on loopback: pushes, watchers, health, metrics, and what survives a restart."""

import asyncio
import math
import socket
import sqlite3
import threading
import urllib.request
from contextlib import closing, suppress
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
from fedbasin.proto.observer_service import RUN_KEY, SERVICE, RemoteObserver
from fedbasin.proto.report import SCHEMA_VERSION, ClientReport, StageReport
from fedbasin.server.observe.arrival import digest
from fedbasin.server.observe.history import History, Limits
from fedbasin.server.observe.push import ObserverClient, connect
from fedbasin.server.observe.store import FILE
from tests.observing import observer, push, report, served
from tests.waiting import LONG


def numbers(reports):
    return [one.round for one in reports]


def rounds_of(stub, run="", first=0):
    return numbers(stub.get_rounds(run, first))


def scrape(addresses):
    with urllib.request.urlopen(addresses.metrics, timeout=LONG) as page:
        families = text_string_to_metric_families(page.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return {one.name: one.value for one in samples if one.labels.get("recipe") == "fedavg"}


def refused(call, *arguments):
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return caught.value.code(), caught.value.details()


@pytest.fixture(scope="module")
def shared():
    with served() as pair:
        yield pair


def test_a_pushed_report_comes_back_as_it_was(shared):
    addresses, stub = shared
    told = report(1, "as-it-was", evaluate_metrics={"loss": math.nan, "accuracy": 0.5}, model_digest=b"\0\xff")
    assert push(addresses.observer, told)
    (heard,) = stub.get_rounds("as-it-was")
    assert heard.to_bytes() == told.to_bytes()


def test_the_same_report_again_changes_nothing():
    with served() as (addresses, stub):
        told = report(1, evaluate_metrics={"loss": math.nan})
        assert push(addresses.observer, told)
        assert push(addresses.observer, told)
        assert rounds_of(stub) == [1]
        assert scrape(addresses)["fedbasin_rounds_total"] == 1


def test_another_report_for_a_known_round_is_refused(shared):
    _, stub = shared
    stub.push_round(report(1, "twice"))
    code, details = refused(stub.push_round, report(1, "twice", seconds=2))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert "'twice'" in details
    assert "round 1" in details


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (report(1, schema_version=SCHEMA_VERSION - 1), "schema_version"),
        (report(1, schema_version=0), "schema_version"),
        (report(1, run=""), "run_id"),
        (report(0), "round"),
    ],
)
def test_a_bad_report_is_refused_and_the_message_names_the_field(shared, bad, field):
    addresses, stub = shared
    code, details = refused(stub.push_round, bad)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(field)
    assert not push(addresses.observer, bad)


def test_a_time_that_no_dataclass_can_hold_is_refused_and_the_message_names_the_field(shared):
    bad = report(1).to_message()
    bad.finished.seconds = 2**60
    with connect(shared[0].observer) as channel:
        push_round = partial(ObserverStub(channel).PushRound, metadata=((RUN_KEY, "k" * 16),))
        code, details = refused(push_round, bad)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("finished")


def test_rounds_are_given_from_the_one_asked_for(shared):
    _, stub = shared
    for number in (1, 2, 3):
        stub.push_round(report(number, "ranged"))
    assert rounds_of(stub, "ranged", first=2) == [2, 3]


def test_an_unknown_run_is_not_found_and_the_message_lists_the_known(shared):
    _, stub = shared
    stub.push_round(report(1, "known"))
    code, details = refused(stub.get_rounds, "unknown")
    assert code == grpc.StatusCode.NOT_FOUND
    assert "known" in details.split("there are:")[1]


def test_runs_are_listed_as_they_began_and_no_name_means_the_newest():
    with served() as (_, stub):
        assert rounds_of(stub) == []
        stub.push_round(report(1, "old"))
        stub.push_round(report(1, "new", last=True))
        stub.push_round(report(2, "old"))
        runs = stub.list_runs()
        assert [(run.run_id, run.rounds_done, run.finished) for run in runs] == [("old", 2, False), ("new", 1, True)]
        assert rounds_of(stub) == [1]


def test_reports_larger_than_grpc_allows_by_default_travel_both_ways(shared):
    addresses, stub = shared
    clients = tuple(ClientReport(i, "accepted", detail="x" * 500) for i in range(12_000))
    large = report(1, "large", stages=(StageReport("train", clients=clients),))
    assert len(large.to_bytes()) > 6_000_000
    assert push(addresses.observer, large)
    assert rounds_of(stub, "large") == [1]


def test_twenty_watchers_see_every_report_in_order():
    with served() as (addresses, stub):

        def watch(seen):
            with connect(addresses.observer) as channel:
                seen.extend(numbers(RemoteObserver(channel).watch_rounds("run", timeout=LONG)))

        stub.push_round(report(1))  # some of it is history, the rest comes live
        views = [[] for _ in range(20)]
        threads = [threading.Thread(target=watch, args=(view,)) for view in views]
        for thread in threads:
            thread.start()
        for number in range(2, 60):
            stub.push_round(report(number))
        stub.push_round(report(60, last=True))
        for thread in threads:
            thread.join()
        assert views == [list(range(1, 61))] * 20


def test_a_watcher_may_come_before_the_run():
    with served() as (addresses, stub):
        stream = stub.watch_rounds(from_round=2, timeout=LONG)
        for number in (1, 2):
            push(addresses.observer, report(number, last=number == 2))
        assert numbers(stream) == [2]


def test_a_run_that_failed_is_listed_with_its_problem_and_ends_every_watch(shared):
    _, stub = shared
    stream = stub.watch_rounds("failed", timeout=LONG)
    stub.push_round(report(1, "failed"))
    stub.push_round(report(2, "failed", problem="QuorumLostError: stage fuse: 1 of 3"))
    assert numbers(stream) == [1, 2]
    (run,) = [run for run in stub.list_runs() if run.run_id == "failed"]
    assert (run.rounds_done, run.finished) == (1, False)
    assert run.problem.startswith("QuorumLostError")


def test_a_run_that_failed_in_its_first_round_has_done_none(shared):
    _, stub = shared
    stub.push_round(report(1, "stillborn", problem="TooFewNodesError"))
    runs = {run.run_id: run for run in stub.list_runs()}
    assert runs["stillborn"].rounds_done == 0


def test_prometheus_is_given_exemplars_where_it_asks_for_openmetrics(shared):
    addresses, stub = shared
    stub.push_round(report(7, "exemplary"))
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    asked = urllib.request.Request(addresses.metrics, headers=accept)
    with urllib.request.urlopen(asked, timeout=LONG) as page:
        assert page.headers["Content-Type"].startswith("application/openmetrics-text")
        assert '# {round="7",run="exemplary"}' in page.read().decode()
    with urllib.request.urlopen(addresses.metrics, timeout=LONG) as page:
        assert page.headers["Content-Type"].startswith("text/plain")
        assert "exemplary" not in page.read().decode()


def test_watching_a_finished_run_ends_at_once(shared):
    _, stub = shared
    stub.push_round(report(1, "over"))
    stub.push_round(report(2, "over", last=True))
    assert numbers(stub.watch_rounds("over", timeout=LONG)) == [1, 2]
    assert numbers(stub.watch_rounds("over", 3, timeout=LONG)) == []


def test_watchers_that_never_read_hold_up_no_push():
    with served() as (addresses, stub):
        channels = [connect(addresses.observer) for _ in range(20)]
        # gRPC reads ahead at most a few 64 KiB windows: 20 MB in all cannot be on their way.
        stuck = [RemoteObserver(channel).watch_rounds("run") for channel in channels]
        filling = (StageReport("x" * 100_000),)
        for number in range(1, 201):
            # One that is held up is held up for good, and false in the end.
            assert push(addresses.observer, report(number, stages=filling))
        assert rounds_of(stub) == list(range(1, 201))
        for stream, channel in zip(stuck, channels, strict=True):
            stream.cancel()
            channel.close()


def test_health_is_serving(shared):
    addresses, _ = shared
    with grpc.insecure_channel(addresses.observer) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING


def test_a_second_observer_on_the_same_port_says_so(shared):
    addresses, _ = shared
    port = int(addresses.observer.rpartition(":")[2])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"), observer(port=port):
        pass


def test_a_push_into_the_void_is_false_and_nothing_worse(caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused for sure
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert not push(address, report(7))
    assert "round 7" in caplog.text
    assert address in caplog.text


def test_a_push_to_one_who_never_answers_ends_with_its_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not push(f"127.0.0.1:{silent.getsockname()[1]}", report(1), timeout_seconds=0.5)


@pytest.mark.parametrize("address", ["", "::::", "http://nowhere:1", "127.0.0.1"])
def test_a_push_to_no_address_is_false(address):
    assert not push(address, report(1), timeout_seconds=1)


def test_a_push_outlasts_an_observer_that_is_not_there_at_first():
    with served() as (addresses, stub), socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(LONG)
        passing = threading.Thread(target=late, args=(door, addresses.observer))
        passing.start()
        big = report(1, stages=(StageReport("x" * 1_000_000),))
        assert push(f"127.0.0.1:{door.getsockname()[1]}", big)
        passing.join()
        assert rounds_of(stub) == [1]


def late(door, address):
    """Hangs up on the first who calls, and puts the second through."""
    door.accept()[0].close()
    caller, _ = door.accept()
    host, _, port = address.rpartition(":")
    with caller, socket.create_connection((host, int(port))) as observer:
        answering = threading.Thread(target=pour, args=(observer, caller))
        answering.start()
        pour(caller, observer)
        answering.join()


def pour(source, target):
    """All that comes from one to the other, and the end of it."""
    with suppress(OSError):  # either may hang up at any time
        while content := source.recv(65536):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)


def test_a_restarted_observer_has_its_history_and_its_counters(tmp_path):
    with served(store=tmp_path) as (_, stub):
        for number in (1, 2):
            stub.push_round(report(number, evaluate_metrics={"loss": math.nan}))
    with served(store=tmp_path) as (addresses, stub):
        assert rounds_of(stub) == [1, 2]
        stub.push_round(report(2, evaluate_metrics={"loss": math.nan}))  # known: pushed again after a lost reply
        stub.push_round(report(3))
        assert scrape(addresses)["fedbasin_rounds_total"] == 3
    with served(store=tmp_path) as (_, stub):
        assert rounds_of(stub) == [1, 2, 3]


def test_a_line_is_dialled_once_and_outlives_an_observer_that_restarts(tmp_path, monkeypatch):
    dialled = []
    monkeypatch.setattr("fedbasin.server.observe.push.connect", lambda *to: dialled.append(to) or connect(*to))
    with served(store=tmp_path) as (addresses, _):
        client = ObserverClient(addresses.observer)
        assert client.push(report(1))
        assert client.push(report(2))
        assert len(dialled) == 1
    port = int(addresses.observer.rpartition(":")[2])
    with served(store=tmp_path, port=port) as (_, stub):
        assert client.push(report(3), timeout_seconds=LONG)
        assert rounds_of(stub) == [1, 2, 3]
        client.close()
        assert client.push(report(4))
        client.close()
    assert not client.push(report(5), timeout_seconds=1)
    client.close()


def test_a_report_that_is_none_of_this_version_is_skipped_by_name(tmp_path, caplog):
    with served(store=tmp_path) as (_, stub):
        for number in (1, 2, 3):
            stub.push_round(report(number))
    old = report(1, schema_version=SCHEMA_VERSION - 1).to_bytes()
    with closing(sqlite3.connect(tmp_path / FILE)) as database, database:
        database.execute("UPDATE reports SET report = ? WHERE round = 1", (old,))
        database.execute("UPDATE reports SET report = ? WHERE round = 2", (b"\xff\xff",))
    with served(store=tmp_path) as (_, stub):
        assert rounds_of(stub) == [3]
        stub.push_round(report(1))  # a run that goes on may send it again
    for number in (1, 2):
        assert f"run 'run', round {number}: skipped" in caplog.text
    with served(store=tmp_path) as (_, stub):
        assert rounds_of(stub) == [1, 3]


def test_a_store_that_is_no_database_is_refused_by_name(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a database" * 1000)
    with pytest.raises(OSError, match=FILE), observer(store=tmp_path):
        pass


def test_two_observers_do_not_share_a_store(tmp_path):
    with observer(store=tmp_path), pytest.raises(OSError, match="another observer"), observer(store=tmp_path):
        pass


def add(history, told):
    return history.add(digest(told, told.to_bytes()), b"holder")


def test_the_history_is_bounded_by_runs_and_by_rounds():
    history = History(Limits(runs=2, rounds=3))
    for run in ("a", "b"):
        for number in range(1, 6):
            add(history, report(number, run))
    assert add(history, report(6, "a")) == [("a", 3)]
    assert add(history, report(1, "c")) == [("b", 3), ("b", 4), ("b", 5)]  # b has been silent for longest
    assert [run.run_id for run in history.runs()] == ["a", "c"]
    assert numbers(history.entries("a")) == [4, 5, 6]


def test_the_history_is_bounded_by_bytes_and_the_largest_run_pays():
    arrival = digest(report(1, "a"), report(1, "a").to_bytes())
    size = len(arrival.wire) + len(arrival.brief)
    history = History(Limits(wire_bytes=4 * size))
    add(history, report(1, "b"))
    for number in (1, 2, 3):
        add(history, report(number, "a"))
    for number in (4, 5):
        add(history, report(number, "a"))
    assert numbers(history.entries("a")) == [3, 4, 5]
    assert numbers(history.entries("b")) == [1]
    add(history, report(2, "b"))
    assert numbers(history.entries("a")) == [4, 5]
    assert numbers(history.entries("b")) == [1, 2]


def test_runs_that_have_reported_lately_make_no_room_for_others():
    with served(limits=Limits(runs=2)) as (_, stub):
        for run in ("a", "b"):
            stub.push_round(report(1, run))
        code, details = refused(stub.push_round, report(1, "c"))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "'c'" in details
        stub.push_round(report(2, "a"))
        assert [run.run_id for run in stub.list_runs()] == ["a", "b"]


def test_runs_that_are_silent_make_room_for_others():
    with served(limits=Limits(runs=2, silent_seconds=0)) as (_, stub):
        for run in ("a", "b", "c"):
            stub.push_round(report(1, run))
        assert [run.run_id for run in stub.list_runs()] == ["b", "c"]


def test_the_store_is_bounded_as_the_history_is(tmp_path):
    limits = Limits(rounds=2)
    with served(store=tmp_path, limits=limits) as (_, stub):
        for number in range(1, 6):
            stub.push_round(report(number))
    with served(store=tmp_path) as (_, stub):
        assert rounds_of(stub) == [4, 5]


def test_a_watcher_that_falls_behind_the_bound_goes_on_with_what_is_left():
    async def story():
        history = History(Limits(rounds=2))
        add(history, report(1))
        seen = []
        async for one in history.watch("run"):
            seen.append(one.round)
            if one.round == 1:
                for number in range(2, 6):
                    add(history, report(number, last=number == 5))
        return seen

    assert asyncio.run(story()) == [1, 4, 5]


def test_a_watcher_of_a_forgotten_run_hears_of_it_again_when_it_speaks():
    async def story():
        history = History(Limits(runs=1))
        add(history, report(1, "a"))
        seen = []
        async for one in history.watch("a"):
            seen.append(one.round)
            if one.round == 1:
                add(history, report(1, "b"))
                add(history, report(2, "a", last=True))
        return seen

    assert asyncio.run(story()) == [1, 2]
