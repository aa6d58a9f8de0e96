import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.diagnostics.bent_paths import Bent, straight
from fedbasin.strategies.tensors.state import interpolate

quickly = settings(max_examples=25, deadline=None)

values = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3)
times = st.floats(0, 1)
KINDS = ("bezier", "chain")


def state(numbers):
    return {"w": torch.tensor(numbers, dtype=torch.float64), "steps": torch.tensor(len(numbers))}


@pytest.mark.parametrize("kind", KINDS)
@quickly
@given(values, values, times)
def test_an_untrained_bend_in_the_middle_is_the_straight_line(kind, a, b, t):
    curve, line = straight(state(a), state(b), kind).at(t), interpolate(state(a), state(b), t)
    torch.testing.assert_close(curve["w"], line["w"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@quickly
@given(values, values, values)
def test_the_ends_are_exact_wherever_the_bend_is(kind, a, bend, b):
    curve = Bent(kind, state(a), state(bend), state(b))
    assert torch.equal(curve.at(0)["w"], state(a)["w"])
    assert torch.equal(curve.at(1)["w"], state(b)["w"])


@quickly
@given(values, values, values, times)
def test_a_bezier_curve_is_its_polynomial(a, bend, b, t):
    found = Bent("bezier", state(a), state(bend), state(b)).at(t)["w"]
    x, y, z = (torch.tensor(v, dtype=torch.float64) for v in (a, bend, b))
    expected = (1 - t) ** 2 * x + 2 * t * (1 - t) * y + t**2 * z
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@quickly
@given(values, values, values)
def test_a_chain_goes_through_its_bend_and_straight_to_it(a, bend, b):
    curve = Bent("chain", state(a), state(bend), state(b))
    assert torch.equal(curve.at(0.5)["w"], state(bend)["w"])
    quarter = interpolate(state(a), state(bend), 0.5)["w"]
    torch.testing.assert_close(curve.at(0.25)["w"], quarter, rtol=0, atol=1e-9)
    three = interpolate(state(bend), state(b), 0.5)["w"]
    torch.testing.assert_close(curve.at(0.75)["w"], three, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_curve_can_be_differentiated_in_its_bend(kind):
    bend = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    curve = Bent(kind, state([1.0] * 3), {"w": bend}, state([2.0] * 3))
    (gradient,) = torch.autograd.grad(curve.at(0.25)["w"].sum(), bend)
    assert torch.allclose(
        gradient, torch.tensor(2 * 0.25 * 0.75 if kind == "bezier" else 0.5).double()
    )
