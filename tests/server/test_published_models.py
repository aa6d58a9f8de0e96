"""Global models out of a real observer: whole, checked, and only those that it was told to show."""

import asyncio
import hashlib
import re
import threading
import warnings
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto.observer_service import RemoteObserver
from fedbasin.server.observe import published_models as models
from fedbasin.server.observe.download import DownloadError, download
from fedbasin.server.observe.published_models import NoModelError, PublishedModels
from fedbasin.server.run.resumption import checkpoint
from fedbasin.server.run.resumption.checkpoint import Checkpoint
from fedbasin.server.run.resumption.run_folder import RECORD, RunFolder, RunRecord
from tests.observing import observer, push, report, served
from tests.waiting import LONG

ROOT = Path(__file__).parent.parent.parent
SIZE = 1_500_000  # floats: more than one piece


def keep(folder, run="run", server_round=3, value=1.0):
    model = {"weight": torch.full((SIZE,), value), "bias": torch.arange(3.0)}
    checkpoint.save(folder / run, Checkpoint(server_round, model, "{}"))


def is_open(file):
    """Whether this process has the file open."""
    with suppress(FileNotFoundError):  # one that has been closed since it was listed
        return any(descriptor.resolve() == file for descriptor in Path("/proc/self/fd").iterdir())
    return True


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    keep(folder)
    (folder / "begun").mkdir()
    keep(folder.parent, run="outside")
    (folder / "linked").symlink_to(folder.parent / "outside")
    (folder / "file").write_text("no folder")
    (folder / "linked-model").mkdir()
    (folder / "linked-model" / models.FILE).symlink_to(folder.parent / "outside" / models.FILE)
    (folder / "foreign").mkdir()
    (folder / "foreign" / models.FILE).write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return folder


@pytest.fixture(scope="module")
def shown(runs):
    with served(models=runs) as pair:
        yield pair


def test_the_files_are_those_that_runs_write():
    assert (models.FILE, models._RECORD) == (checkpoint.MODEL, RECORD)


def test_a_run_that_was_resumed_is_found_by_its_own_id(tmp_path):
    keep(tmp_path / "runs", "first")
    record = RunRecord("app", 9, runs=("first", "second"))
    RunFolder(tmp_path / "runs" / "first", record, resumes=True).write()
    with served(models=tmp_path / "runs") as (addresses, _):
        assert download(addresses.observer, "second", tmp_path / "model") == 3
        with pytest.raises(DownloadError, match="no run 'third' here; there are: first"):
            download(addresses.observer, "third", tmp_path / "model")


@pytest.mark.parametrize("asked", [0, 3])
def test_a_model_arrives_as_it_was_kept(shown, runs, tmp_path, asked):
    target = tmp_path / "model.safetensors"
    assert download(shown[0].observer, "run", target, asked) == 3
    assert target.read_bytes() == (runs / "run" / models.FILE).read_bytes()
    assert names(tmp_path) == ["model.safetensors"]


def test_pieces_come_in_order_and_the_last_has_the_digest(shown, runs):
    whole = (runs / "run" / models.FILE).read_bytes()
    *rest, last = shown[1].get_model("run")
    assert rest
    assert b"".join(piece.data for piece in (*rest, last)) == whole
    assert [piece.offset for piece in rest] == [len(rest[0].data) * i for i in range(len(rest))]
    assert not any(piece.sha256 for piece in rest)
    assert last.sha256 == hashlib.sha256(whole).digest()


@pytest.mark.parametrize(
    ("run", "asked", "advice"),
    [
        ("nowhere", 0, "there are: "),
        ("", 0, "there are: "),
        ("run", 2, "keeps the model of round 3"),
        ("begun", 0, "no model yet"),
        ("file", 0, "there are: "),
        ("foreign", 0, "fedbasin did not write it"),
        ("linked", 0, "there are: "),
        ("..", 0, "there are: "),
        (".", 0, "there are: "),
        ("../outside", 0, "there are: "),
        ("run/../run", 0, "there are: "),
        ("run\0", 0, "there are: "),
    ],
)
def test_what_is_not_there_is_not_found_and_the_message_says_what_is(shown, tmp_path, run, asked, advice):
    target = tmp_path / "model.safetensors"
    with pytest.raises(DownloadError, match=f"NOT_FOUND.*{re.escape(advice)}"):
        download(shown[0].observer, run, target, asked)
    assert names(tmp_path) == []


def test_a_model_that_is_a_link_is_not_followed(shown, tmp_path):
    with pytest.raises(DownloadError, match="INTERNAL"):
        download(shown[0].observer, "linked-model", tmp_path / "model")


@given(st.text(max_size=20) | st.lists(st.sampled_from(["..", "/", "run", ".", "outside"])).map("".join))
def test_no_name_leads_out_of_the_folder(runs, name):
    if name in {"run", "foreign", "begun"}:
        return
    with pytest.raises((NoModelError, OSError)):
        PublishedModels(runs)._open(name).close()


def test_an_observer_without_models_says_how_to_have_them(tmp_path):
    with observer() as addresses, pytest.raises(DownloadError, match="--models"):
        download(addresses.observer, "run", tmp_path / "model")


def test_a_download_that_a_new_round_overtakes_ends_with_the_model_it_began_with(tmp_path):
    keep(tmp_path, value=1.0)
    with served(models=tmp_path) as (_, stub):
        pieces = stub.get_model("run")
        first = next(pieces)
        old = (tmp_path / "run" / models.FILE).read_bytes()
        keep(tmp_path, server_round=4, value=2.0)
        assert first.data + b"".join(piece.data for piece in pieces) == old
        assert next(stub.get_model("run")).round == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pieces: pieces[:-1],
        lambda pieces: pieces[1:],
        lambda pieces: pieces[::-1],
        lambda pieces: [],
        lambda pieces: [*pieces[:-1], replace(pieces[-1], data=b"x" * 10)],
        lambda pieces: [*pieces[:-1], replace(pieces[-1], sha256=b"x" * 32)],
    ],
    ids=["cut off", "headless", "backwards", "empty", "changed", "another digest"],
)
def test_what_came_wrongly_never_becomes_the_target(shown, tmp_path, monkeypatch, spoil):
    pieces = list(shown[1].get_model("run"))
    target = tmp_path / "model.safetensors"
    target.write_text("before")

    monkeypatch.setattr(RemoteObserver, "get_model", lambda self, *request: iter(spoil(pieces)))
    with pytest.raises(DownloadError):
        download(shown[0].observer, "run", target)
    assert target.read_text() == "before"
    assert names(tmp_path) == ["model.safetensors"]


def test_a_reader_that_stops_in_the_middle_holds_up_no_push(tmp_path):
    keep(tmp_path)
    with served(models=tmp_path) as (addresses, stub):
        stuck = stub.get_model("run")
        next(stuck)
        for number in range(1, 50):
            assert push(addresses.observer, report(number))
        stuck.cancel()


def test_many_download_at_once(shown, runs, tmp_path):
    threads = [
        threading.Thread(target=download, args=(shown[0].observer, "run", tmp_path / str(number)))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = (runs / "run" / models.FILE).read_bytes()
    assert all((tmp_path / str(number)).read_bytes() == whole for number in range(8))


def test_the_reference_client_of_the_page_works(shown, runs, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "reference" / "observing-api.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(program.splitlines()) <= 10
    addresses, _ = shown
    for number in (1, 2):
        assert push(addresses.observer, report(number, evaluate_metrics={"loss": 0.5}, last=number == 2))
    monkeypatch.chdir(tmp_path)
    exec(compile(program.replace("127.0.0.1:9470", addresses.observer), "page", "exec"), {})
    assert capsys.readouterr().out.splitlines() == ["1 {'loss': 0.5}", "2 {'loss': 0.5}"]
    assert (tmp_path / "model.safetensors").read_bytes() == (runs / "run" / models.FILE).read_bytes()


def test_a_call_for_a_model_is_over_when_its_caller_is_gone(shown):
    call = shown[1].get_model("run")
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_call_that_is_given_up_closes_its_file(runs, pieces, monkeypatch):
    began, may_open, opened = threading.Event(), threading.Event(), threading.Event()
    really = PublishedModels._open

    def slowly(self, run_id):
        began.set()
        may_open.wait(LONG)
        file = really(self, run_id)
        opened.set()
        return file

    if pieces == 0:
        monkeypatch.setattr(PublishedModels, "_open", slowly)

    async def read(chunks):
        for _ in range(pieces):
            await anext(chunks)
            began.set()
        async for _ in chunks:
            await asyncio.sleep(LONG)

    async def give_up():
        published = PublishedModels(runs)
        async with aclosing(published.read_chunks("run", 0)) as chunks:
            reading = asyncio.create_task(read(chunks))
            await asyncio.to_thread(began.wait, LONG)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        if pieces == 0:
            may_open.set()
            await asyncio.to_thread(opened.wait, LONG)
        while is_open(runs / "run" / models.FILE):
            await asyncio.sleep(0.01)
        return published._downloads

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert asyncio.run(asyncio.wait_for(give_up(), LONG)) == 0
    assert not caught
