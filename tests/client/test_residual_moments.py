"""What is left to explain says the same as what is wanted: exactly so where the Gram matrix is exact."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from fedbasin.client.refit.head_sums import head_equations
from fedbasin.client.refit.regression import regress, select_layers
from fedbasin.proto.request import Refit
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import closed_form
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update, join
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.round.refit import RefitHead, RefitLayers
from fedbasin.strategies.tasks.model_task import TASKS
from tests.accepting import accept

W = torch.float64
BLOCK = ("2.weight", "2.bias")
RIDGE = 1e-2


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(W)


def data(client, target=None):
    draw = torch.Generator().manual_seed(client)
    inputs = torch.randn(30 + client, 4, generator=draw, dtype=W) + 2.0
    return inputs, inputs[:, :3].square() if target is Target.values else inputs[:, :3].argmax(1)


def inputs_of_last(model, client):
    hidden = model[:2](data(client)[0])
    return torch.cat([hidden, torch.ones(len(hidden), 1, dtype=W)], 1)


def wanted(target, own, model, client):
    if target is Target.labels:
        return nn.functional.one_hot(data(client)[1], 3).to(W)
    if target is Target.values:
        return data(client, target)[1]
    if target is Target.weights:
        return own[2](model[:2](data(client)[0]))
    return own(data(client)[0])


def sums_of(model, own, fused, target, batches):
    if target in (Target.features, Target.weights):
        return regress(deepcopy(model), own.state_dict(), fused, [BLOCK], target, batches)[BLOCK]
    (layer,) = select_layers(model, [BLOCK])
    task = TASKS["classification" if target is Target.labels else "regression"]
    return head_equations(model, fused, layer, task, batches)


def fitted(target):
    model, owns = net(0), [net(1), net(2)]
    fused = model.state_dict()
    refit = Refit((BLOCK,), target.name)
    is_head = target is Target.labels
    stage = RefitHead(fused, refit, Ridge(RIDGE, "anchor")) if is_head else RefitLayers(fused, refit, RIDGE)
    for client, own in enumerate(owns):
        batches = [data(client, target)]
        sums = sums_of(model, own, fused, target, batches)
        accept(stage, client, Update({}, 1.0, {BLOCK: Gram(sums.gram)}, {BLOCK: sums.moment}))
    return model, owns, stage.finish()


@pytest.mark.parametrize("target", Target)
@torch.no_grad()
def test_a_fit_to_residuals_is_the_fit_to_the_targets(target):
    model, owns, found = fitted(target)
    grams = sum(inputs_of_last(model, k).T @ inputs_of_last(model, k) for k in range(2))
    moments = sum(wanted(target, own, model, k).T @ inputs_of_last(model, k) for k, own in enumerate(owns))
    if target is Target.labels:
        expected = closed_form(BLOCK, Gram(grams), moments, Ridge(RIDGE))
    else:
        rho = RIDGE * grams.diagonal().mean()
        lifted = grams + rho * torch.eye(7, dtype=W)
        drawn = moments + rho * join(BLOCK, model.state_dict())
        expected = torch.linalg.solve(lifted, drawn.T).T
    torch.testing.assert_close(join(BLOCK, found), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_clients_that_already_agree_move_nothing():
    model = net(0)
    fused = model.state_dict()
    sums = regress(deepcopy(model), fused, fused, [BLOCK], Target.features, [data(0)])[BLOCK]
    assert sums.moment.abs().max() < 1e-12 * sums.gram.abs().max()
