"""Merging rules as accumulators of a round: laws over all of them, and equality with the rule of tensors."""

import pytest
import torch
from torch import Tensor

from fedbasin.strategies.fusion.accumulator import fuse
from fedbasin.strategies.fusion.rules.federated_rule import FEDERATED_RULES, federated_rule
from fedbasin.strategies.fusion.rules.merging_rules import RULES
from fedbasin.strategies.fusion.rules.robust.client_distances import TooFewClientsError
from fedbasin.strategies.fusion.rules.rule_accumulator import RuleAccumulator
from fedbasin.strategies.fusion.rules.task_vectors.ties import ties
from fedbasin.strategies.fusion.spool import SpoolFiles
from fedbasin.strategies.fusion.update import Update

ANCHOR = {
    "fc.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
    "fc.bias": torch.zeros(6),
    "norm.running_mean": torch.zeros(6),
    "norm.running_var": torch.ones(6),
    "norm.num_batches_tracked": torch.tensor(3),
}


def model(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(t.shape, generator=generator) for name, t in ANCHOR.items()}
    return {n: t + 0.1 * noise[n].abs() if t.is_floating_point() else t for n, t in ANCHOR.items()}


def merged(text: str, updates: list[Update], seed: str = "0 1") -> dict[str, Tensor]:
    accumulator = RuleAccumulator(ANCHOR, federated_rule(text), SpoolFiles().open(), seed)
    for update in updates:
        accumulator.add(update)
    return accumulator.finalize(ANCHOR)


UPDATES = [Update(model(seed), examples) for seed, examples in ((1, 10.0), (2, 30.0), (3, 20.0))]


@pytest.mark.parametrize("name", FEDERATED_RULES)
def test_clients_that_are_the_anchor_give_it_and_their_order_does_not_matter(name: str) -> None:
    still = merged(name, [Update(ANCHOR, 5.0)] * 3)
    for key, tensor in ANCHOR.items():
        torch.testing.assert_close(still[key], tensor, atol=1e-6, rtol=1e-6)
    forward, backward = merged(name, UPDATES), merged(name, UPDATES[::-1])
    assert forward.keys() == ANCHOR.keys()
    for key, tensor in forward.items():
        assert tensor.dtype == ANCHOR[key].dtype
        torch.testing.assert_close(backward[key], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_rules_that_are_the_mean_give_the_mean(name: str) -> None:
    expected = fuse(ANCHOR, UPDATES)
    for key, tensor in merged(name, UPDATES).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=1e-6)


def test_parameters_and_weights_reach_the_rule() -> None:
    result = merged("ties density=0.4 lambda=0.5 normalize=false", UPDATES)
    tensors = [update.parameters["fc.weight"] for update in UPDATES]
    expected = ties(ANCHOR["fc.weight"], tensors, [1 / 6, 1 / 2, 1 / 3], density=[0.4] * 3, normalize=False, scale=0.5)
    torch.testing.assert_close(result["fc.weight"], expected, atol=1e-6, rtol=1e-6)
    pooled = fuse(ANCHOR, UPDATES)
    assert torch.equal(result["norm.running_var"], pooled["norm.running_var"])


@pytest.mark.parametrize("name", [name for name in FEDERATED_RULES if RULES[name].random])
def test_draws_differ_by_seed_and_repeat(name: str) -> None:
    text = f"{name} density=0.5" + (" epsilon=0.1" if name.startswith("della") else "")
    first, again, later = merged(text, UPDATES), merged(text, UPDATES), merged(text, UPDATES, "0 2")
    assert torch.equal(first["fc.weight"], again["fc.weight"])
    assert not torch.equal(first["fc.weight"], later["fc.weight"])


def test_too_few_clients_are_named() -> None:
    with pytest.raises(TooFewClientsError, match="model_stock"):
        merged("model_stock", UPDATES[:1])
    assert merged("ties", []) == ANCHOR


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tie", "choose one of"),
        ("slerp t=0.5", "choose one of"),
        ("fisher", "choose one of"),
        ("ties density", "is no parameter"),
        ("ties gamma=1", "NAME=VALUE of normalize, lambda, density"),
        ("ties density=many", "give a number"),
        ("ties normalize=1", "it is true or false"),
        ("ties density=1 density=2", "has two values"),
    ],
)
def test_settings_that_name_no_rule_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        federated_rule(text)
