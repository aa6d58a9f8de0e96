"""A sample of the fuzzer, and every reply that it once found: `make fuzz` tries a hundred thousand."""

import json
from pathlib import Path

import pytest

from tests.fuzz.stages import RUNS, count_outcomes, record, try_reply

CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text())
SAMPLE = ["fedavg server", "regmean client", "features off", "kfac off", "auto client"]


@pytest.mark.parametrize("run", SAMPLE)
def test_a_mutated_reply_is_added_or_refused_by_name(run):
    outcomes = count_outcomes(run, 60, 0)
    assert len(outcomes) > 3


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_mutated_replies_of_every_recipe_are_added_or_refused_by_name(run):
    assert len(count_outcomes(run, 300, 1000)) > 3


@pytest.mark.parametrize("entry", CORPUS, ids=lambda entry: f"{entry['run']}-{entry['seed']}")
def test_a_reply_that_was_once_mishandled(entry):
    try_reply(entry["run"], entry["place"] % len(record(entry["run"])), entry["seed"])
