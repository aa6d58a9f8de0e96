"""Runs in which two of ten clients lie about the losses by which all choose between models."""

import pytest

from tests.benchmarks.hostile.federation import Attack, accuracy, claim_losses

LIE = Attack(claim_losses(1e6))


@pytest.mark.parametrize(
    ("recipe", "settings"), [("auto", {}), ("head", {}), ("head", {"robust": "median"})], ids=["auto", "head", "median"]
)
def test_two_of_ten_cannot_take_the_closed_form_from_the_others(recipe, settings):
    honest, attacked = (accuracy(recipe, attack, **settings) for attack in (Attack(), LIE))
    assert attacked > honest - 0.05


def test_without_bounds_they_can():
    assert accuracy("head", LIE, bounds=False) < accuracy("head", Attack(), bounds=False) - 0.2
