"""Runs that report to a real observer: what it hears of those that fail, and with what they come to it."""

import pytest

from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.observe.access import Guard, Pass
from fedbasin.server.observe.push import ObserverClient
from fedbasin.server.run.settings import SettingsError
from tests import tiny
from tests.observing import served
from tests.running import run
from tests.waiting import LONG

TOKEN = "a-token-of-the-tests"


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A run gives its observer five seconds and then goes on; a loaded machine may take longer."""
    monkeypatch.setattr(ObserverClient.send, "__defaults__", (LONG,))


def start(federation, folder, rounds=1, evaluate_fn=None, **config):
    return run(
        federation,
        tiny.net(),
        rounds,
        symmetry=tiny.symmetry(),
        evaluate_fn=evaluate_fn,
        folder=folder,
        fraction_evaluate=0.0,
        **config,
    )


@pytest.fixture
def token_file(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    return tmp_path / "token"


def heard(stub):
    return list(stub.get_rounds(timeout=LONG))


def test_a_run_that_loses_its_quorum_says_so_with_the_replies_of_the_stage(tmp_path):
    federation = tiny.federation()

    def fail_in_round_2(number, arrays):
        for context in federation.contexts.values():
            context.run_config["fail"] = number == 1

    with served() as (addresses, stub):
        with pytest.raises(QuorumLostError):
            start(federation, tmp_path / "runs", 3, fail_in_round_2, observer=addresses.observer)
        first, second = heard(stub)
    assert (first.round, first.problem) == (1, "")
    assert (second.round, second.last) == (2, False)
    assert second.problem.startswith("QuorumLostError: stage fuse: 0 of 3")
    assert {client.outcome for client in second.stages[0].clients} == {"client_error"}


def test_a_run_that_its_own_app_ends_says_so(tmp_path):
    def broken(number, arrays):
        if number:
            raise ZeroDivisionError("no test images")

    with served() as (addresses, stub):
        with pytest.raises(ZeroDivisionError):
            start(tiny.federation(), tmp_path / "runs", 2, broken, observer=addresses.observer)
        (only,) = heard(stub)
    assert only.problem == "ZeroDivisionError: no test images"


def test_a_run_shows_its_observer_the_token(tmp_path, token_file):
    own = Pass(token_file=token_file)
    with served(own, guard=Guard(token_file=token_file)) as (addresses, stub):
        config = {"observer": addresses.observer, "observer_token_file": str(token_file)}
        start(tiny.federation(), tmp_path / "runs", **config)
        assert [one.round for one in heard(stub)] == [1]


@pytest.mark.parametrize("file", ["observer_token_file", "observer_ca"])
def test_a_file_that_cannot_be_used_is_refused_before_the_first_message(tmp_path, file):
    federation = tiny.federation()
    with pytest.raises(SettingsError, match="gone cannot be read"):
        start(federation, tmp_path / "runs", observer="127.0.0.1:1", **{file: str(tmp_path / "gone")})
    assert not federation.asked
