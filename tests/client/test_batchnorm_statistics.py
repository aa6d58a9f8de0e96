from copy import deepcopy

import pytest
import torch
from torch import nn

from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.strategies.capture.batchnorm_statistics import measuring, normalising_by_batch
from fedbasin.strategies.fusion.batchnorm import find_norms


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, eps=1e-3)
        self.flat, self.after = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.fleeting = nn.BatchNorm1d(4, track_running_stats=False)
        self.unused = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.norm(input=self.conv(x)).relu().mean((2, 3))
        return self.fleeting(self.plain(self.after(self.flat(x))))


def images(count=12):
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(count))


def net():
    torch.manual_seed(0)
    return Net().eval()


def test_norms_with_statistics_gain_and_shift_are_found():
    assert find_norms(net()) == (BatchNorm("norm", 1e-3), BatchNorm("after", 1e-5), BatchNorm("unused", 1e-5))
    assert find_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == ()
    assert find_norms(nn.BatchNorm1d(2)) == ()  # nothing of it could be fitted


def test_a_frozen_norm_keeps_its_statistics():
    frozen = net()
    frozen.norm.requires_grad_(requires_grad=False)
    assert find_norms(frozen) == (BatchNorm("after", 1e-5), BatchNorm("unused", 1e-5))


@pytest.mark.parametrize("size", [12, 5, 2])
def test_what_is_read_in_batches_has_the_statistics_of_all_of_it(size):
    model = net()
    with torch.no_grad(), measuring(model, find_norms(model)) as moments:
        for batch in images().split(size):
            model(batch)
        read = model.conv(images()).transpose(0, 1).flatten(1)
    mean, variance = moments[BatchNorm("norm", 1e-3)].statistics(*torch.zeros(2, 3))
    torch.testing.assert_close(mean, read.mean(1))
    torch.testing.assert_close(variance, read.var(1, unbiased=False))


def test_one_that_reads_nothing_keeps_what_it_has():
    model = net()
    with torch.no_grad(), measuring(model, find_norms(model)) as moments:
        model(images())
    mean, variance = torch.ones(4), torch.full((4,), 2.0)
    assert moments[BatchNorm("unused", 1e-5)].statistics(mean, variance) == (mean, variance)


def test_copies_and_later_runs_are_not_watched():
    model, norms = net(), [BatchNorm("norm", 1e-3)]
    with torch.no_grad(), measuring(model, norms) as moments:
        model(images())
        copy = deepcopy(model)
        seen = [tensor.clone() for tensor in moments[norms[0]].statistics(*torch.zeros(2, 3))]
        copy(images(7))
    with torch.no_grad():
        model(images(7))
    for now, then in zip(moments[norms[0]].statistics(*torch.zeros(2, 3)), seen, strict=True):
        assert torch.equal(now, then)


def test_statistics_have_the_dtype_of_the_models():
    model, norm = net().double(), BatchNorm("norm", 1e-3)
    with torch.no_grad(), measuring(model, [norm]) as moments:
        model(images().double())
    given = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert [t.dtype for t in moments[norm].statistics(*given)] == 2 * [torch.bfloat16]


@pytest.mark.parametrize("name", ["conv", "nothing"])
def test_a_module_that_is_no_batchnorm_is_refused_by_name(name):
    with (
        pytest.raises(ValueError, match=rf"{name} is not a BatchNorm layer of this Net; use the same model"),
        measuring(net(), [BatchNorm(name, 1e-5)]),
    ):
        pass


def test_normalising_by_batch_is_training_that_leaves_running_statistics_alone():
    model, trained = net(), net().train()
    before = deepcopy(model.state_dict())
    with normalising_by_batch(model):
        torch.testing.assert_close(model(images()), trained(images()))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(module.training for module in model.modules())
    assert [model.norm.track_running_stats, model.fleeting.track_running_stats] == [True, False]
