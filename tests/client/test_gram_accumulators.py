"""What clients send of their layers' inputs, in every form, and what a fit makes of it."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fedbasin.client.refit.regression import regress
from fedbasin.proto.encoding import Encoding, GramForm, GramKind
from fedbasin.proto.request import Refit
from fedbasin.strategies.fusion.compression.formats import decode, layout
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update, join
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.round.refit import RefitLayers
from fedbasin.strategies.statistics.gram import gram_pieces, grams
from tests.accepting import accept

W = torch.float64
FORMS = [
    GramForm(),
    GramForm(GramKind.half),
    GramForm(GramKind.byte),
    GramForm(GramKind.sketch, 3),
    GramForm(GramKind.blocks, 2),
    GramForm(GramKind.diagonal),
]
BLOCK = ("2.weight", "2.bias")


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(W)


def data(client):
    draw = torch.Generator().manual_seed(client)
    inputs = torch.randn(40, 4, generator=draw, dtype=W) + client
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in inputs.split(20)]


def images():
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(6, 4, 5, 5, generator=draw, dtype=W), torch.zeros(6, dtype=torch.long))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_of_every_group_is_as_its_layout_says(form, bias):
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2, bias=bias), nn.Flatten()).to(W)
    (layer,) = gram_layers(model)
    asked = {layer.block: Encoding(form)}
    (pieces,) = gram_pieces(model, images(), encodings=asked).values()
    expected = layout(form, layer.inputs, bias)
    assert list(pieces) == list(expected)
    for name, piece in pieces.items():
        assert piece.shape == (2, *expected[name].shape)
        assert piece.dtype == expected[name].dtype
    (exact,) = grams(model, images()).values()
    found = decode(pieces, form, bias)
    torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1), exact.diagonal(dim1=-2, dim2=-1), rtol=1e-5, atol=1e-5)


def test_a_sketch_with_as_many_rows_as_inputs_is_nearly_exact():
    model = net(0)
    encodings = {layer.block: Encoding(GramForm(GramKind.sketch, 12)) for layer in gram_layers(model)}
    exact = grams(model, data(1))
    for block, pieces in gram_pieces(model, data(1), encodings=encodings).items():
        found = decode(pieces, encodings[block].gram, bias=True)
        torch.testing.assert_close(found, exact[block], rtol=1e-4, atol=1e-3)


def test_what_cannot_be_shrunk_is_refused():
    encodings = {BLOCK: Encoding(GramForm(GramKind.sketch, 2))}
    with pytest.raises(ValueError, match=r"shrink = 0.5: a sketch"):
        gram_pieces(net(0), data(1), 0.5, encodings)
    with pytest.raises(ValueError, match=r"choose a factor from 0"):
        gram_pieces(net(0), data(1), 1.5)


def fitted(model, form, rounds, ridge=1e-3):
    """Repeated fits of the last layer to what two clients' models compute there, and the objective after each."""
    owns, state, losses = [net(1), net(2)], model.state_dict(), []
    for _ in range(rounds):
        stage = RefitLayers(state, Refit((BLOCK,), "features"), ridge)
        for client, own in enumerate(owns):
            asked = {BLOCK: Encoding(form)}
            args = net(0), own.state_dict(), state, [BLOCK], Target.features, data(client)
            sums = regress(*args, asked)[BLOCK]
            gram = decode(sums.inputs.dominating_pieces(), form, bias=True)
            accept(stage, client, Update({}, 1.0, {BLOCK: Gram(gram)}, {BLOCK: sums.moment}))
        state = stage.finish()
        losses.append(objective(state, owns))
    return state, losses


@torch.no_grad()
def objective(state, owns):
    """The sum of squares that a fit lowers."""
    model, total = net(0), 0.0
    model.load_state_dict(state)
    for client, own in enumerate(owns):
        for inputs, _ in data(client):
            total += float((model(inputs) - own(inputs)).square().sum())
    return total


@given(st.sampled_from(FORMS), st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_a_step_in_any_form_never_makes_the_fit_worse(form, seed):
    model = net(seed)
    _, losses = fitted(model, form, 2)
    steps = [objective(model.state_dict(), [net(1), net(2)]), *losses]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(steps))


@pytest.mark.parametrize("form", FORMS)
def test_steps_in_any_form_end_where_the_exact_one_does(form):
    model = net(0)
    exact, _ = fitted(model, GramForm(), 4)
    found, losses = fitted(model, form, 40 if form.kind in {GramKind.blocks, GramKind.diagonal} else 8)
    least = objective(exact, [net(1), net(2)])
    assert losses[-1] <= 1.02 * least
    assert join(BLOCK, found).isfinite().all()
