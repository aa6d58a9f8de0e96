"""Labels that contradict most other clients' are found from sums, and honest ones are kept however they are shared out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.label_agreement import contradicting_labels
from tests.benchmarks.hostile.federation import ATTACKS, HOSTILE, accuracy

HEAD = ("head.weight", "head.bias")
FEATURES, CLASSES, CLIENTS = 6, 4, 8
EXAMPLES = 40  # of a class and client

seeds = given(seed=st.integers(0, 2**32 - 1))
few = settings(max_examples=15, deadline=None)


def sums(features: Tensor, labels: Tensor, temperature: float = 1.0) -> Update:
    rows = torch.cat([features, torch.ones(len(features), 1)], 1).double() * temperature
    of_classes = torch.nn.functional.one_hot(labels, CLASSES).double().mT @ rows
    return Update({}, len(rows), {HEAD: Gram(rows.mT @ rows)}, {HEAD: of_classes})


class Cohort:
    """Clients with some of four classes whose means are `distance` standard deviations from the origin."""

    def __init__(self, seed: int, classes: list[list[int]], distance: float = 5.0) -> None:
        draw = torch.Generator().manual_seed(seed)
        corners = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=draw)).Q[:CLASSES]
        self.labels = [torch.tensor(own).repeat(EXAMPLES) for own in classes]
        self.features = [
            distance * corners[labels] + torch.randn(len(labels), FEATURES, generator=draw) for labels in self.labels
        ]

    def flip(self, client: int) -> None:
        self.labels[client] = CLASSES - 1 - self.labels[client]

    def updates(self, temperature: float = 1.0) -> dict[int, Update]:
        pairs = zip(self.features, self.labels, strict=True)
        return {node: sums(*pair, temperature) for node, pair in enumerate(pairs)}

    def refused(self, temperature: float = 1.0) -> set[int]:
        return refused(self.updates(temperature))


def refused(updates: dict[int, Update]) -> set[int]:
    """All that are refused, one after the other."""
    out: set[int] = set()
    while found := contradicting_labels({n: (lambda u=u: u) for n, u in updates.items() if n not in out}):
        assert len(found) == 1
        out |= set(found)
    return out


ALL = [list(range(CLASSES))] * CLIENTS


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), min_size=1, max_size=10),
)
def test_honest_clients_are_kept_however_classes_are_shared_out(seed, classes):
    assert not Cohort(seed, classes).refused()


@few
@given(seed=st.integers(0, 2**32 - 1), hostile=st.sets(st.integers(0, CLIENTS - 1), min_size=1, max_size=3))
def test_a_minority_with_exchanged_labels_is_refused(seed, hostile):
    cohort = Cohort(seed, ALL)
    for client in hostile:
        cohort.flip(client)
    assert cohort.refused() == hostile


@few
@seeds
def test_a_temperature_behind_the_head_changes_nothing(seed):
    cohort = Cohort(seed, ALL)
    cohort.flip(2)
    assert cohort.refused(temperature=0.05) == cohort.refused(temperature=20.0) == {2}


def test_a_class_that_nobody_else_has_says_nothing():
    # The last client's examples of its own class lie where all others have the first class.
    cohort = Cohort(0, [[0, 1, 2]] * 6 + [[3]])
    cohort.features[-1] = cohort.features[0][cohort.labels[0] == 0]
    assert not cohort.refused()


def test_nobody_is_judged_by_features_that_do_not_separate_the_classes():
    cohort = Cohort(0, ALL, distance=0.0)
    cohort.flip(0)
    assert not cohort.refused()


def test_four_clients_have_no_majority():
    cohort = Cohort(0, ALL[:4])
    cohort.flip(0)
    assert not cohort.refused()


@pytest.mark.parametrize("change", ["no bias", "no examples", "constant features"])
def test_sums_that_tell_nothing_refuse_nobody(change):
    cohort = Cohort(0, ALL)
    cohort.flip(0)
    if change == "constant features":
        cohort.features = [torch.ones_like(features) for features in cohort.features]
    updates = cohort.updates()
    if change == "no bias":
        block = HEAD[:1]
        updates = {
            n: Update({}, 1, {block: u.precisions[HEAD]}, {block: u.cross_moments[HEAD]}) for n, u in updates.items()
        }
    if change == "no examples":
        updates = {n: u.scaled(0.0) for n, u in updates.items()}
    assert not refused(updates)


@pytest.mark.slow
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "none"])
def test_the_default_recipe_stays_within_three_points_of_the_run_without_an_attack(attack):
    assert len(HOSTILE) == 2
    assert accuracy("auto", ATTACKS[attack]) > accuracy("auto", ATTACKS["none"]) - 0.03
