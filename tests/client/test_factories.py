"""Every form in which an app may give its model and its data."""

from functools import partial

import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedbasin.client import basin
from fedbasin.client.factories import data_factory, model_factory
from fedbasin.strategies.tensors.batches import read_batches

CONTEXT = Context(1, 7, {"width": 3}, RecordDict(), {})
BATCHES = [(torch.randn(5, 4), torch.arange(5) % 3)]


class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)


class Wide(nn.Linear):
    def __init__(self, width):
        super().__init__(4, width)


class OfContext(nn.Linear):
    def __init__(self, context):
        super().__init__(4, context.node_config["width"])


def make_net():
    return Net()


def of_context(context):
    return Wide(context.node_config["width"])


def with_defaults(width=3, *, context):
    return Wide(context.node_config["width"] if width == 3 else 0)


class Maker:
    def __call__(self, ctx):
        return Wide(ctx.node_config["width"])

    def make(self, context: Context) -> nn.Module:
        return Wide(context.node_config["width"])


MODELS = {
    "a class": Net,
    "a class of the context": OfContext,
    "a function": make_net,
    "a function of the context": of_context,
    "a lambda of the context": lambda context: of_context(context),
    "a lambda that calls it otherwise": lambda c: of_context(c),
    "a lambda": lambda: Net(),
    "a class with its arguments": partial(Wide, 3),
    "a function with defaults": with_defaults,
    "a callable object": Maker(),
    "a method": Maker().make,
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_is_made_from(model):
    made = [model_factory(model)(CONTEXT) for _ in range(2)]
    assert [each.out_features for each in made] == [3, 3]
    assert made[0] is not made[1]
    assert basin(model=model)


DATA = {
    "a list": BATCHES,
    "a loader": DataLoader(TensorDataset(*BATCHES[0]), batch_size=2),
    "a function": lambda: BATCHES,
    "a function of the context": lambda context: BATCHES if context is CONTEXT else [],
    "a generator function": lambda: iter(BATCHES),
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_data_is_read_anew_from(data):
    batches = data_factory(data)
    for _ in range(2):
        assert sum(len(batch.targets) for batch in read_batches(batches(CONTEXT), Net())) == 5
    assert basin(model=Net, data=data, held_out=data)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(), r"model= is a Net, one module.*pass its class.*lambda context: Net\(\.\.\.\)"),
        (Wide, r"model=Wide needs the arguments \(width\); pass model=lambda context: Wide"),
        (lambda a, b: Net(), r"needs the arguments \(a, b\); pass model=lambda context"),
        ("Net", "model= is a str; pass the model's class or a function"),
    ],
)
def test_what_makes_no_model_is_refused(model, message):
    with pytest.raises(TypeError, match=message):
        basin(model=model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter(BATCHES), "list_iterator, which can be read only once; pass a DataLoader, a list"),
        (None, "held_out= is a NoneType; pass a DataLoader, a list of batches, or a function"),
        (lambda a, b: BATCHES, r"needs the arguments \(a, b\); pass held_out=lambda context"),
    ],
)
def test_what_gives_no_batches_is_refused(data, message):
    with pytest.raises(TypeError, match=message):
        basin(model=Net, held_out=data)


@pytest.mark.parametrize("share", [-0.1, 1.0, 7, float("nan")])
def test_a_share_that_leaves_nothing_to_fit_is_refused(share):
    with pytest.raises(ValueError, match="a share is at least 0 and below 1"):
        basin(model=Net, data=BATCHES, held_out=share)
