"""What an observer does with callers who mean it ill, or who are too many."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
from fedbasin.proto.observer_service import RUN_KEY
from fedbasin.proto.report import ClientReport, StageReport
from fedbasin.server.cli import app
from fedbasin.server.observe import published_models
from fedbasin.server.observe.access import AccessError, Guard, Pass, read_token
from fedbasin.server.observe.arrival import ArrivalReader, ReaderError
from fedbasin.server.observe.history import Limits
from fedbasin.server.observe.observer import Addresses
from fedbasin.server.observe.push import LARGEST_REPORT_BYTES, ObserverClient, connect
from fedbasin.server.page import bounded_http
from fedbasin.server.run.resumption.run_folder import read_run_key
from tests.observing import observer, push, report, served
from tests.server.reports import run_of
from tests.waiting import LONG, wait_until


def refused(call, *arguments, **options):
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    return caught.value.code(), caught.value.details()


@contextmanager
def page_of(addresses):
    with httpx.Client(base_url=addresses.page, trust_env=False, timeout=LONG) as client:
        yield client


def raw(addresses, content):
    """A connection to the page on which something was sent."""
    address = urllib.parse.urlsplit(addresses.page)
    peer = socket.create_connection((address.hostname, address.port), LONG)
    peer.sendall(content)
    return peer


# Who may report.


def test_only_the_holder_of_its_key_reports_on_a_run():
    with served() as (_, stub):
        stub.push_round(report(1), run_key="a" * 16)
        for told in (report(1), report(2), report(1, seconds=3)):
            code, details = refused(stub.push_round, told, run_key="b" * 16)
            assert code == grpc.StatusCode.PERMISSION_DENIED
            assert "'run'" in details
        stub.push_round(report(2), run_key="a" * 16)
        assert [told.round for told in stub.get_rounds("run")] == [1, 2]


def test_the_holder_of_a_run_is_known_after_a_restart(tmp_path):
    with served(store=tmp_path) as (_, stub):
        stub.push_round(report(1), run_key="a" * 16)
    with served(store=tmp_path) as (_, stub):
        assert refused(stub.push_round, report(2), run_key="b" * 16)[0] == grpc.StatusCode.PERMISSION_DENIED
        stub.push_round(report(2), run_key="a" * 16)


@pytest.mark.parametrize("metadata", [(), ((RUN_KEY, ""),), ((RUN_KEY, "short"),)])
def test_a_report_without_a_key_is_refused_and_the_message_says_what_to_send(metadata):
    with observer() as addresses, connect(addresses.observer) as channel:
        push_round = ObserverStub(channel).PushRound
        code, details = refused(push_round, report(1).to_message(), metadata=metadata)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert RUN_KEY in details


def test_the_key_of_a_run_lies_in_its_folder_for_its_owner_alone(tmp_path):
    key = read_run_key(tmp_path)
    assert read_run_key(tmp_path) == key
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    with served() as (addresses, stub):
        for number in (1, 2):  # a run that goes on in the folder is another process
            client = ObserverClient(addresses.observer, run_key=read_run_key(tmp_path))
            assert client.push(report(number), LONG)
            client.close()
        assert refused(stub.push_round, report(3))[0] == grpc.StatusCode.PERMISSION_DENIED


# What may be sent.


@pytest.mark.parametrize(
    ("bad", "field"),
    [(report(1, run="r" * 1000), "run_id"), (report(1, recipe="r" * 1000), "recipe"), (report(2**32 - 1), "round")],
)
def test_what_is_too_long_or_too_large_to_keep_is_refused_and_the_message_names_the_field(bad, field):
    with served() as (_, stub):
        code, details = refused(stub.push_round, bad)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(field)


def test_bytes_that_are_no_report_are_refused():
    with observer() as addresses, connect(addresses.observer) as channel:
        send = channel.unary_unary("/fedbasin.v1.Observer/PushRound")
        for content in (b"", b"\xff" * 100, b"\xff" * 200_000):
            code, _ = refused(send, content, metadata=((RUN_KEY, "k" * 16),))
            assert code == grpc.StatusCode.INVALID_ARGUMENT


def test_what_a_report_has_that_this_version_does_not_know_is_not_kept():
    told = report(1).to_bytes()
    with served() as (addresses, stub):
        with connect(addresses.observer) as channel:
            send = channel.unary_unary("/fedbasin.v1.Observer/PushRound")
            send(told + b"\xfa\x7f\x04junk", metadata=((RUN_KEY, "k" * 16),))
        assert [heard.to_bytes() for heard in stub.get_rounds()] == [told]


def large(number, run="large", replies=5000):
    clients = tuple(ClientReport(i, "accepted", detail="x" * 40) for i in range(replies))
    return report(number, run, stages=(StageReport("fuse", clients=clients),))


def test_a_report_beyond_the_limit_is_refused_and_the_run_goes_on(caplog):
    with observer() as addresses:
        told = report(1, stages=(StageReport("x" * LARGEST_REPORT_BYTES),))
        assert not push(addresses.observer, told)
        assert push(addresses.observer, report(2))
    assert "round 1 was not pushed" in caplog.text


def test_while_a_large_report_is_read_small_ones_are_taken_and_pages_drawn():
    with served() as (addresses, stub), page_of(addresses) as client:
        future = stub.start_push(large(1), LONG)
        small = 0
        while not future.done():
            small += 1
            stub.push_round(report(small, "small"), LONG)
            assert client.get("/metrics").status_code == 200
        future.result()
        assert small > 1
        assert len(stub.get_rounds("large")[0].stages[0].clients) == 5000


def test_an_observer_whose_reading_process_ends_says_so_and_reads_the_next():
    async def story():
        reader = ArrivalReader()
        wire = large(1).to_bytes()
        assert (await reader.read(wire)).round == 1
        (process,) = reader._process._processes.values()
        os.kill(process.pid, signal.SIGKILL)
        ended = [await asyncio.gather(reader.read(wire), return_exceptions=True) for _ in range(3)]
        assert [str(error) for (error,) in ended if isinstance(error, ReaderError)]
        assert (await reader.read(wire)).round == 1
        reader.close()

    asyncio.run(story())


def test_a_long_history_comes_in_several_replies():
    with served() as (_, stub):
        filling = (StageReport("x" * 1_500_000),)
        for number in range(1, 6):
            stub.push_round(report(number, stages=filling))
        stub.push_round(report(6, stages=(StageReport("x" * 5_000_000),)))
        assert [told.round for told in stub.get_rounds("run")] == [1, 2, 3, 4, 5, 6]
        assert [told.round for told in stub.get_rounds("", 5)] == [5, 6]


# How many may connect.


@pytest.mark.parametrize("half", [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ", b"GET / HT"])
def test_a_request_that_does_not_come_is_not_waited_for(monkeypatch, half):
    monkeypatch.setattr(bounded_http, "HEADER_SECONDS", 0.2)
    with observer() as addresses, raw(addresses, half) as peer:
        assert cut_off(peer)
        with page_of(addresses) as client:
            assert client.get("/").status_code == 200


def test_a_second_request_on_a_connection_is_not_waited_for_either(monkeypatch):
    monkeypatch.setattr(bounded_http, "HEADER_SECONDS", 0.2)
    request = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with observer() as addresses, raw(addresses, request + request[:-2]) as peer:
        assert b"200 OK" in peer.recv(100)
        assert cut_off(peer)


def cut_off(peer):
    """Wait for the end of a connection; the timeout of the socket fails a test that waits in vain."""
    try:
        while peer.recv(100_000):
            pass
    except ConnectionError:
        pass
    return True


def test_who_reads_events_is_not_taken_for_one_who_does_not_ask(monkeypatch):
    monkeypatch.setattr(bounded_http, "HEADER_SECONDS", 0.1)
    first, second = run_of(rounds=2)
    with observer() as addresses, page_of(addresses) as client:
        push(addresses.observer, first)
        with client.stream("GET", "/api/events") as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith("id:")) == "id: 1"
            time.sleep(1.5)  # beyond the deadline and a check after it
            push(addresses.observer, second)
            assert next(line for line in lines if line.startswith("id:")) == "id: 2"


def test_half_sent_requests_beyond_the_limit_give_way_to_whole_ones(monkeypatch):
    monkeypatch.setattr("fedbasin.server.page.listen.count_connections", lambda: 20)
    with observer() as addresses, ExitStack() as held:
        peers = [held.enter_context(raw(addresses, b"GET / HTTP/1.1\r\n")) for _ in range(60)]
        with page_of(addresses) as client:
            assert client.get("/").status_code == 200
        for peer in peers:
            peer.setblocking(False)
        open_still = [peer for peer in peers if not ended(peer)]
        assert len(open_still) <= 20


def ended(peer):
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_readers_beyond_the_limit_are_told_so_and_block_nobody():
    (told,) = run_of(rounds=1, of=2)
    with served(limits=Limits(watchers=3)) as (addresses, stub), ExitStack() as held:
        stub.push_round(told)
        client = held.enter_context(page_of(addresses))
        events = [held.enter_context(client.stream("GET", "/api/events")).iter_lines() for _ in range(2)]
        for lines in events:
            next(lines)
        watch = stub.watch_rounds()
        next(watch)
        busy = client.get("/api/events")
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "10")
        code, details = refused(next, stub.watch_rounds(timeout=LONG))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 readers" in details
        assert client.get("/").status_code == 200
        stub.push_round(replace(told, round=2, last=True))
        assert all("event: end" in lines for lines in events)
        assert [heard.round for heard in watch] == [2]


def test_a_reader_that_goes_makes_room_for_another():
    (told,) = run_of(rounds=1, of=2)
    with served(limits=Limits(watchers=1)) as (addresses, stub), page_of(addresses) as client:
        stub.push_round(told)

        def reads():
            with client.stream("GET", "/api/events") as answer:
                return answer.status_code == 200

        for _ in range(3):
            wait_until(reads, "the place of a reader that went is still taken")


def test_more_readers_than_files_leave_page_and_calls_as_they_were():
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); "
    program = limited + "sys.argv[0] = 'fedbasin'; from fedbasin.server.cli import main; main()"
    command = [sys.executable, "-c", program, "observe", "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            addresses = Addresses(*(process.stdout.readline().split()[1] for _ in range(3)))
            request = b"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            with ExitStack() as held:
                for _ in range(200):
                    try:
                        held.enter_context(raw(addresses, request))
                    except ConnectionError:
                        continue
                assert push(addresses.observer, report(1))
                with page_of(addresses) as client:
                    assert client.get("/").status_code == 200
        finally:
            process.terminate()
            process.wait(LONG)


def test_downloads_beyond_the_limit_are_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(published_models, "_MOST_DOWNLOADS", 0)
    with served(models=tmp_path) as (_, stub):
        code, details = refused(next, stub.get_model("run", timeout=LONG))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "downloads" in details


# Who may ask.


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "observer"])
def test_beyond_this_machine_an_observer_without_a_token_does_not_start(host):
    with pytest.raises(AccessError, match=r"without a token.*--insecure"):
        Guard().check(host)
    Guard(insecure=True).check(host)


def test_the_command_refuses_to_be_open_to_all_and_says_what_insecure_means():
    asked = CliRunner().invoke(app, ["observe", "--host", "0.0.0.0", "--port", "0", "--metrics-port", "0"])
    assert asked.exit_code == 1
    for word in ("read reports", "push reports", "--token-file", "127.0.0.1", "--insecure"):
        assert word in asked.stderr
    assert "whoever reaches the ports" in text_of(CliRunner().invoke(app, ["observe", "--help"]).stdout)


def text_of(help_page):
    return " ".join(help_page.replace("│", " ").split())


def test_a_token_is_made_once_for_its_owner_alone(tmp_path):
    file = tmp_path / "token"
    # A store that cannot be opened ends the command behind the token.
    (tmp_path / "store").write_text("no folder")
    command = [
        "observe",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--token-file",
        file,
        "--store",
        tmp_path / "store" / "x",
    ]
    first = CliRunner().invoke(app, [str(word) for word in command])
    assert f"made a token in {file}" in first.stderr
    token = read_token(file)
    assert file.stat().st_mode & 0o077 == 0
    again = CliRunner().invoke(app, [str(word) for word in command])
    assert "made a token" not in again.stderr
    assert read_token(file) == token


def test_a_token_goes_out_in_plain_text_only_where_that_is_asked_for(tmp_path):
    (tmp_path / "token").write_text("t" * 16)
    with pytest.raises(AccessError, match="insecure"):
        connect("observer.example:9470", Pass(token_file=tmp_path / "token"))
    connect("observer.example:9470", Pass(token_file=tmp_path / "token", insecure=True)).close()


@pytest.mark.parametrize("guard", [Guard(), Guard(insecure=True)])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_name_that_is_not_known_is_refused_wherever_the_page_listens(guard, host):
    if host == "0.0.0.0" and not guard.insecure:
        pytest.skip("does not start")
    with observer(host=host, guard=guard, allowed_hosts=("observer",)) as addresses:
        page = addresses.page.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=page, trust_env=False, timeout=LONG) as client:
            for path in ("/", "/metrics", "/api/runs", "/api/events", "/static/page.js"):
                foreign = client.get(path, headers={"host": "evil.example"})
                assert foreign.status_code == 421
                assert "--allowed-host" in foreign.text
            for known in ("observer", "Observer:9471", "localhost:1", "[::1]"):
                assert client.get("/metrics", headers={"host": known}).status_code == 200


# Whatever is asked.

PATHS = ["/", "/spaces", "/metrics", "/api/runs", "/api/runs/{}/rounds", "/api/runs/{}/events", "/api/events",
         "/static/{}", "/{}"]  # fmt: skip
NAMES = st.sampled_from(["run", "with", "round", "from", "x"])
WORDS = st.one_of(
    st.sampled_from(["done", "", "0", "1", "-1", "9" * 5000, "²", "٣", "1e9", "1_000", " 1", "nan", "../..", "%00", "[/x]",
                     "\x1b[2J", "<b>", "a" * 3000, "4294967296", "true"]),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.integers(-(2**70), 2**70).map(str),
)  # fmt: skip


@pytest.fixture(scope="module")
def asked():
    """A page with a run that has ended, so that its events end too."""
    with observer() as addresses, page_of(addresses) as client:
        for told in run_of("done", rounds=2):
            assert push(addresses.observer, told)
        yield client


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(PATHS),
    word=WORDS,
    query=st.lists(st.tuples(NAMES, WORDS), max_size=4),
    seen=st.none() | WORDS,
    method=st.sampled_from(["GET", "GET", "GET", "HEAD", "POST"]),
)
def test_no_question_is_a_fault_of_the_observer(asked, path, word, query, seen, method):
    address = path.format(urllib.parse.quote(word, safe=""))
    headers = {} if seen is None else {"last-event-id": urllib.parse.quote(seen, safe="²<>[]/").encode("latin-1")}
    answer = asked.request(method, address, params=query, headers=headers)
    assert answer.status_code in {200, 400, 404, 405}
    assert "Traceback" not in answer.text
