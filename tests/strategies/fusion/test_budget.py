"""The chooser: never above the budget, and more bytes are never worse."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fedbasin.proto.encoding import GramForm, GramKind, MomentKind
from fedbasin.strategies.fusion.compression.budget import BudgetError, choose, spent
from fedbasin.strategies.fusion.layers import Layer

ORDER = list(GramKind)


@st.composite
def models(draw):
    sizes = st.tuples(st.integers(2, 600), st.integers(1, 600), st.sampled_from([1, 3]), st.booleans())
    return [
        Layer((f"{i}.weight", f"{i}.bias")[: 1 + bias], inputs, outputs * groups, groups)
        for i, (inputs, outputs, groups, bias) in enumerate(draw(st.lists(sizes, min_size=1, max_size=5)))
    ]


def rank(encoding):
    """Worse is larger; a sketch of fewer rows is worse."""
    gram = encoding.gram
    return ORDER.index(gram.kind), -gram.size, list(MomentKind).index(encoding.moment)


def bounds(layers, moments, sketches):
    full = spent(layers, choose(layers, 0, cross_moments=moments), cross_moments=moments)
    try:
        choose(layers, 1, cross_moments=moments, sketches=sketches)
    except BudgetError as error:
        return int(str(error).split("set at least ")[1].split(",")[0]), full
    raise AssertionError


@given(models(), st.booleans(), st.booleans(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_budget_is_kept_and_more_is_never_worse(layers, moments, sketches, low, high):
    least, full = bounds(layers, moments, sketches)
    low, high = sorted(least + int(share * (full - least)) for share in (low, high))
    how = {"cross_moments": moments, "sketches": sketches}
    less, more = choose(layers, low, **how), choose(layers, high, **how)
    assert spent(layers, less, cross_moments=moments) <= low
    assert spent(layers, more, cross_moments=moments) <= high
    for layer in layers:
        for worse, better in zip(rank(less[layer.block]), rank(more[layer.block]), strict=True):
            if worse != better:
                assert worse > better
                break
        assert rank(less[layer.block])[2] >= rank(more[layer.block])[2]
        assert less[layer.block].inputs == layer.inputs
        assert sketches or less[layer.block].gram.kind is not GramKind.sketch


@given(models(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_just_enough_is_enough(layers, moments):
    least, _ = bounds(layers, moments, sketches=True)
    chosen = choose(layers, least, cross_moments=moments)
    assert spent(layers, chosen, cross_moments=moments) == least
    with pytest.raises(BudgetError, match=f"= {least - 1}, "):
        choose(layers, least - 1, cross_moments=moments)


def test_without_a_bound_everything_is_exact():
    layers = [Layer(("a", "b"), 65, 10)]
    (encoding,) = choose(layers, 0, cross_moments=True).values()
    assert (encoding.gram, encoding.moment, encoding.inputs) == (GramForm(), MomentKind.float32, 65)


def test_the_largest_layer_pays_first():
    layers = [Layer(("small",), 16, 4), Layer(("large",), 256, 4)]
    full = spent(layers, choose(layers, 0, cross_moments=False), cross_moments=False)
    chosen = choose(layers, full - 1, cross_moments=False)
    assert chosen[("small",)].gram == GramForm()
    assert chosen[("large",)].gram == GramForm(GramKind.half)
