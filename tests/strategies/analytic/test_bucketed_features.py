"""Every example is in one bucket of each group, and the last layer's columns are added up for these."""

import pytest
import torch

from fedbasin import BucketedFeatures


def features(net, inputs):
    seen = []
    handle = net.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    net(inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_an_example_is_in_one_bucket_of_each_group(bits):
    net = BucketedFeatures(6, 3, 64, bits)
    inputs = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    buckets = features(net, inputs).unflatten(1, (-1, 2**bits))
    assert torch.equal(buckets.sum(2), torch.ones(500, 64 // 2**bits))
    assert set(buckets.unique().tolist()) == {0.0, 1.0}
    # No half of the buckets is idle.
    assert float((buckets.sum(0) > 0).double().mean()) > 0.5


def test_a_bucket_is_the_number_that_its_bits_write():
    net = BucketedFeatures(6, 3, 16, 2)
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    bits = (net.thresholds(inputs) > 0).long()
    codes = features(net, inputs).unflatten(1, (-1, 4)).argmax(2)
    assert torch.equal(codes, bits[:, 0::2] + 2 * bits[:, 1::2])


def test_the_outputs_are_sums_of_the_columns_of_an_examples_buckets():
    net = BucketedFeatures(6, 3, 16, 2)
    torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    codes = features(net, inputs).unflatten(1, (-1, 4)).argmax(2)
    tables = net.head.weight.T.unflatten(0, (-1, 4))
    expected = sum(table[code] for table, code in zip(tables, codes.T, strict=True))
    torch.testing.assert_close(net(inputs), expected)


@pytest.mark.parametrize(("width", "bits"), [(1000, 4), (2, 2), (1, 1)])
def test_a_width_that_leaves_a_group_short_is_refused(width, bits):
    with pytest.raises(ValueError, match=f"width = {width}: groups of {bits} bits have {2**bits} buckets each; give"):
        BucketedFeatures(6, 3, width, bits)


def test_groups_without_bits_are_refused():
    with pytest.raises(ValueError, match="bits = 0: bucketed features need 1 or more"):
        BucketedFeatures(6, 3, 8, 0)
