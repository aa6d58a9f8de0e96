"""Sums of earlier rounds count once, as far as this round's class means say that they still hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.fusion.head_memory import HeadMemory, HeadSums

W = torch.float64
CLASSES, FEATURES, ROWS = 4, 24, 200
seeds = st.integers(0, 2**16)
LARGE = 2**20


def draw(seed):
    return torch.Generator().manual_seed(seed)


def rows(seed):
    """Features of all classes, and their labels."""
    centres = torch.randn(CLASSES, FEATURES, generator=draw(0), dtype=W)
    labels = torch.arange(ROWS) % CLASSES
    return centres[labels] + 0.1 * torch.randn(ROWS, FEATURES, generator=draw(seed), dtype=W), labels


def sums(features, labels, factor=1.0):
    """The sums of a client; `factor` is that of a temperature behind the head."""
    inputs = torch.cat([features, torch.ones(len(features), 1, dtype=W)], 1) * factor
    return HeadSums(inputs.T @ inputs, torch.zeros(CLASSES, FEATURES + 1, dtype=W).index_add_(0, labels, inputs))


def memory(*clients, most=LARGE):
    """A memory of clients 1, 2, ..., each last asked in the round of its number."""
    result = HeadMemory(most)
    for number, client in enumerate(clients, 1):
        result.add(number, number, client)
    return result


def close(a, b):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-7)


def remembered_part(earlier, fresh):
    """The part of the remembered examples that counts."""
    total = memory(earlier).complete(fresh, {9})
    return float((total.gram[-1, -1] - fresh.gram[-1, -1]) / earlier.gram[-1, -1])


@given(seeds)
def test_where_every_client_is_in_the_round_its_sums_are_all(seed):
    fresh = sums(*rows(seed))
    assert memory(fresh, fresh).complete(fresh, {1, 2, 3}) is fresh


@given(seeds, st.sampled_from([1.0, 0.5]))
def test_features_that_have_not_moved_or_all_alike_count_in_full(seed, factor):
    features, labels = rows(seed)
    fresh = sums(features, labels, factor)
    step = torch.randn(FEATURES, generator=draw(seed), dtype=W)
    for earlier in (fresh, sums(features + step, labels, factor)):
        close(memory(earlier).complete(fresh, {9}), HeadSums(2 * fresh.gram, 2 * fresh.sums))


@given(seeds)
def test_features_that_have_moved_completely_count_for_nothing(seed):
    features, labels = rows(seed)
    fresh, mean = sums(features, labels), features.mean(0)
    assert remembered_part(sums(2 * mean - features, labels), fresh) == 0.0
    # Other features altogether: what the means of few classes have in common by chance.
    others = torch.randn(CLASSES, FEATURES, generator=draw(seed + 1), dtype=W)[labels]
    assert remembered_part(sums(others, labels), fresh) < 0.3


@given(seeds)
def test_the_farther_features_have_moved_the_less_they_count(seed):
    features, labels = rows(seed)
    movement = torch.randn(CLASSES, FEATURES, generator=draw(seed + 1), dtype=W)[labels]
    parts = [remembered_part(sums(features + size * movement, labels), sums(features, labels)) for size in (0, 0.3, 3)]
    assert parts[0] > parts[1] > parts[2]
    assert parts[0] == pytest.approx(1)


def test_classes_that_no_client_has_twice_say_nothing():
    features, labels = rows(0)
    assert remembered_part(sums(features[labels == 0], labels[labels == 0]), sums(features, labels)) == 0.0


@given(seeds)
def test_a_client_counts_once_with_what_it_sent_last(seed):
    older, newer, fresh = (sums(*rows(seed + index)) for index in range(3))
    twice, once = HeadMemory(LARGE), HeadMemory(LARGE)
    twice.add(1, 7, older)
    for each in (twice, once):
        each.add(2, 7, newer)
    close(twice.complete(fresh, {9}), once.complete(fresh, {9}))
    assert twice.complete(fresh, {7}) is fresh


@given(seeds, st.permutations(range(4)))
def test_neither_the_order_of_replies_nor_a_checkpoint_changes_a_bit(seed, order):
    clients = {index: (index // 2, sums(*rows(seed + index))) for index in range(4)}
    shuffled, saved = HeadMemory(LARGE), HeadMemory(LARGE)
    for index in order:
        shuffled.add(clients[index][0], index, clients[index][1])
    saved.restore(shuffled.tensors())
    ordered = HeadMemory(LARGE)
    for index, (number, client) in clients.items():
        ordered.add(number, index, client)
    fresh = sums(*rows(seed + 9))
    for left, right in ((shuffled, ordered), (saved, ordered)):
        pairs = zip(left.complete(fresh, {9}), right.complete(fresh, {9}), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@given(st.integers(0, 5))
def test_the_oldest_are_forgotten_where_there_are_too_many(count):
    client = sums(*rows(0))
    bounded = memory(*[client] * 4, most=count * client.nbytes)
    assert sorted(bounded.clients) == list(range(1, 5))[max(0, 4 - count) :]
    bounded.keep({4})
    assert set(bounded.clients) <= {4}
