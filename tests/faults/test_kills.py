"""Kills at random moments, from a seed: the same app started again ends in the bits of a run that nobody disturbed."""

import random
import sys

import pytest
import torch

from fedbasin.server.run.resumption import checkpoint
from fedbasin.server.run.resumption.run_folder import RECORD
from tests import running, tiny
from tests.faults.supervised import KINDS, Killer, supervised
from tests.faults.test_clients import APP

ROUNDS = 2
ROOMS = ("/server/run/", "/server/exchange/", "/strategies/round/", "/strategies/judging/")
SETTINGS = {
    "fedavgm": {"recipe": "fedavgm"},
    "regmean": {"recipe": "regmean", "start": "own"},
    "head": {"recipe": "head"},
}


class KilledError(BaseException):
    """The process is gone."""


class Lines:
    """Counts the lines of the loop that are executed, and ends the process before one of them."""

    def __init__(self, last=None):
        self.count, self._last = 0, last

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _enter(self, frame, event, argument):
        return self._line if any(room in frame.f_code.co_filename for room in ROOMS) else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count == self._last:
                sys.settrace(None)
                raise KilledError
        return self._line


def start(federation, folder, settings):
    return running.run(
        federation, tiny.net(), ROUNDS, align="client", folder=str(folder), symmetry=tiny.symmetry(), **settings
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=SETTINGS)
def undisturbed(request, tmp_path_factory):
    """The settings of a recipe, the model of a run that nobody disturbs, and the number of its lines."""
    settings = SETTINGS[request.param]
    with Lines() as lines:
        run = start(tiny.federation(2), tmp_path_factory.mktemp("undisturbed"), settings)
    return settings, run.state_dict, lines.count


def kill(folder, undisturbed, seed, most):
    """Kill a run at random lines, several times where it is started again, and compare it; return the kills."""
    settings, expected, lines = undisturbed
    draw, federation, run, kills = random.Random(seed), tiny.federation(2), None, 0
    while run is None:
        with Lines(draw.randrange(1, lines) if kills < most else None):
            try:
                run = start(federation, folder, settings)
            except KilledError:
                kills += 1
    assert same(run.state_dict, expected)
    assert [report.round for report in run.reports] == list(range(1, ROUNDS + 1))
    assert same(checkpoint.load(run.folder).model, expected)
    return kills


def test_a_server_that_is_killed_at_any_line_of_its_loop_ends_as_if_undisturbed(tmp_path, undisturbed):
    assert kill(tmp_path, undisturbed, seed=0, most=2) > 0


@pytest.mark.slow
def test_thirty_kills_of_the_loop(tmp_path, undisturbed):
    kills = seed = 0
    # Where a line is drawn that the rest of a run does not reach, the run completes.
    while kills < 30:
        seed += 1
        kills += kill(tmp_path / str(seed), undisturbed, seed, most=5)


@pytest.mark.deployed
@pytest.mark.slow
def test_real_processes_that_are_killed_end_in_the_same_model_before_their_deadline(tmp_path):
    rounds, kills = 20, 22
    runs = tmp_path / "runs"

    def finished():
        return [r.parent for r in runs.glob(f"*/{RECORD}") if '"finished": true' in r.read_text()]

    with supervised(tmp_path / "deployment", 2) as deployment:
        killer = Killer(deployment, seed=3, most=kills, seconds=(15, 40))
        killer.start()
        config = {
            "num-server-rounds": rounds,
            "fedbasin.folder": str(runs),
            "fedbasin.observer": deployment.observer,
            "fedbasin.quorum": 1.0,
            "fedbasin.attempts": 20,
            "fedbasin.round-timeout-seconds": 240.0,
        }
        # On a fast machine the run ends before so many are killed; then those that came must have done no harm.
        deployment.run(APP, config, finished, timeout_seconds=2400)
        killer.stopped.set()
        killer.join()
    # Folders of runs that died before their first round was saved lie beside it.
    (folder,) = finished()
    assert [report.round for report in checkpoint.read_reports(folder)] == list(range(1, rounds + 1))
    # Both clients add their number, 1 and 2, in every round.
    assert torch.equal(checkpoint.load(folder).model["weight"], torch.full((2, 2), 1.5 * rounds))
    assert deployment.kills
    assert set(deployment.kills) <= set(KINDS)
