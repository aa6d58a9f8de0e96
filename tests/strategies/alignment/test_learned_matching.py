from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.alignment.activation_matching import match_activations
from fedbasin.strategies.alignment.learned_matching import Search, match_learned
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.capture.feature_correlations import correlations
from fedbasin.strategies.diagnostics.evaluation import evaluate
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import Symmetry, parse
from fedbasin.strategies.tensors.state import State, interpolate
from tests.strategies.symmetry.by_hand.residual_rotation import rotating_residual_transformer
from tests.strategies.symmetry.families import FAMILIES, Transformer

SHORT = Search(steps=25, smoothing=0.0)


def drawn(make: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def digits(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(64, 8, 8, generator=draw)
    labels = torch.arange(64) % 3
    for label in range(3):
        images[labels == label, :, label] += 2.0
    return list(zip(images.split(16), labels.split(16), strict=True))


def trained(seed: int) -> dict[str, Tensor]:
    model = drawn(Small, seed)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(25):
        for images, labels in digits():
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return state_of(model)


class Small(Transformer):
    def __init__(self) -> None:
        super().__init__(width=8, heads=2)


@pytest.fixture(scope="module")
def pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return trained(1), trained(2)


@pytest.fixture(scope="module")
def symmetry() -> Symmetry:
    return rotating_residual_transformer(state_of(Small()), heads=2)


def outputs(model: nn.Module, state: State, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return functional_call(model.eval(), dict(state), (inputs,), tie_weights=False)


def loss_between(model: nn.Module, one: State, other: State, t: float = 0.5) -> float:
    return evaluate(model, interpolate(one, other, t), digits()).loss


def smoothed_loss_between(anchor: State, client: State, smoothing: float = 0.1) -> float:
    middle = interpolate(anchor, client, 0.5)
    losses = [
        nn.functional.cross_entropy(outputs(Small(), middle, images), labels, label_smoothing=smoothing)
        for images, labels in digits()
    ]
    return float(torch.stack(losses).mean())


def test_the_function_is_kept(symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    anchor, client = pair
    found = match_learned(symmetry, Small(), anchor, client, digits(), search=SHORT)
    images = digits(1)[0][0]
    before, after = (outputs(Small(), state, images) for state in (client, found.state))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.transform.act(symmetry.fold(client)), found.state, atol=1e-5, rtol=1e-4)


def test_the_middle_of_the_path_is_better_than_after_matching_by_weights(
    symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    anchor, client = pair
    model, start = Small(), match_weights(symmetry, *pair)
    found = match_learned(symmetry, model, anchor, client, digits(), search=SHORT)
    folded = symmetry.fold(anchor)
    assert loss_between(model, folded, found.state) < 0.9 * loss_between(model, folded, start.state)
    assert not any(space.certified for space in found.report.spaces)
    assert found.report.distance_before == start.report.distance_before


def test_the_loss_is_lowered_where_the_two_will_be_merged(
    symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    anchor, client = pair
    model, folded = Small(), symmetry.fold(anchor)
    near = match_learned(symmetry, model, anchor, client, digits(), 0.2, Search(40, spread=0.02, smoothing=0.0))
    far = match_learned(symmetry, model, anchor, client, digits(), 0.8, Search(40, spread=0.02, smoothing=0.0))
    assert loss_between(model, folded, near.state, 0.2) < loss_between(model, folded, far.state, 0.2)


def test_without_steps_it_is_the_better_of_weights_and_activations(
    symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    anchor, client = pair
    found = match_learned(symmetry, Small(), *pair, digits(), search=Search(steps=0, smoothing=0.1))
    features = correlations(symmetry, Small(), symmetry.fold(anchor), symmetry.fold(client), digits())
    starts = [match_weights(symmetry, *pair).state, match_activations(symmetry, *pair, features).state]
    folded = symmetry.fold(anchor)
    losses = [smoothed_loss_between(folded, start) for start in starts]
    assert losses[0] != losses[1]
    torch.testing.assert_close(found.state, starts[losses.index(min(losses))], rtol=0, atol=0)


@pytest.mark.parametrize("memorised", [True, False])
def test_labels_are_smoothed_where_the_client_has_memorised_its_examples(
    symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]], memorised: bool
) -> None:
    # Labels that the client itself gives, or others, of which it is not sure.
    images = digits()[0][0]
    labels = outputs(Small(), pair[1], images).argmax(1)
    sure = {**pair[1], "head.weight": 20 * pair[1]["head.weight"], "head.bias": 20 * pair[1]["head.bias"]}
    data = [(images, labels if memorised else labels.roll(1))]
    loss = evaluate(Small(), sure, data).loss / len(labels)
    assert (loss < 0.1) == memorised
    chosen, smoothed, plain = (
        match_learned(symmetry, Small(), pair[0], sure, data, search=Search(steps=5, smoothing=smoothing)).state
        for smoothing in (None, 0.1, 0.0)
    )
    same, other = (smoothed, plain) if memorised else (plain, smoothed)
    torch.testing.assert_close(chosen, same, rtol=0, atol=0)
    assert any(not torch.equal(chosen[name], other[name]) for name in chosen)


def test_steps_that_make_it_worse_are_not_taken(
    symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    wild = Search(steps=3, rate=50.0, smoothing=0.0)
    found = match_learned(symmetry, Small(), *pair, digits(), search=wild)
    start = match_learned(symmetry, Small(), *pair, digits(), search=Search(steps=0, smoothing=0.0))
    torch.testing.assert_close(found.state, start.state, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_transform(
    symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    model = Small().train()
    states = [match_learned(symmetry, model, *pair, digits(), search=Search(5, seed=seed)).state for seed in (1, 1, 2)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "convnet", "group_norm", "tied"])
def test_every_group_can_be_learned(name: str) -> None:
    make, example = FAMILIES[name]
    torch.manual_seed(0)
    model, anchor, client = make(), state_of(make()), state_of(make())
    targets = torch.zeros(model(example).shape[:-1], dtype=torch.long)
    symmetry = discover(model, example).symmetry
    inputs = example if not example.is_floating_point() else torch.randn(example.shape)
    found = match_learned(symmetry, model, anchor, client, [(inputs, targets)], search=Search(3))
    before, after = (outputs(model, state, inputs) for state in (client, found.state))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_averaged_running_statistics_play_no_part() -> None:
    make, example = FAMILIES["convnet"]
    model, anchor, client = (drawn(make, seed) for seed in (0, 1, 2))
    symmetry = discover(model, example).symmetry
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, *example.shape[1:], generator=draw), torch.arange(6) % 4) for _ in range(2)]
    shifted = {n: t + 3 if n.endswith("running_mean") else t for n, t in state_of(anchor).items()}
    before = {name: tensor.clone() for name, tensor in shifted.items()}
    found = [
        match_learned(symmetry, model, state, state_of(client), batches, search=Search(20)).transform
        for state in (state_of(anchor), shifted)
    ]
    assert not found[0].is_identity
    torch.testing.assert_close(*(transform.act(state_of(client)) for transform in found), rtol=0, atol=0)
    torch.testing.assert_close(shifted, before, rtol=0, atol=0)


@pytest.mark.parametrize("group", ["R(8,4) wr S(2)", "CO(8) wr S(2)", "(O(8))xS(2) wr S(1)"])
def test_inner_groups_of_heads_are_drawn_into_the_search_or_left_alone(group: str) -> None:
    weights = {"w": torch.randn(16, 3), "v": torch.randn(4, 16)}
    axes = "w[0]@0 v[1]@1" if "CO" in group or "x" in group else "w[0] v[1]"
    symmetry = parse(f"heads  {group}  {axes}")
    if "x" in group:
        symmetry = parse(f"heads  {group}  k[0]@0 w[0]@1 v[1]@1")
        weights["k"] = torch.randn(8, 3)
    other = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    found = match_learned(
        symmetry, Product(list(weights)), weights, other, [(torch.randn(9, 3), torch.arange(9) % 4)],
        search=Search(4),
    )  # fmt: skip
    product, moved = other["v"] @ other["w"], found.state["v"] @ found.state["w"]
    torch.testing.assert_close(moved, product, atol=1e-4, rtol=1e-4)


class Product(nn.Module):
    """Two linear maps, and a third that is not used."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        shapes = {"w": (16, 3), "v": (4, 16), "k": (8, 3)}
        for name in names:
            setattr(self, name, nn.Parameter(torch.zeros(shapes[name])))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.mT @ self.v.mT


def test_batches_that_can_be_read_once_are_refused(
    symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    once: Iterator[tuple[Tensor, Tensor]] = iter(digits())
    with pytest.raises(TypeError, match="pass a list or a DataLoader"):
        match_learned(symmetry, Small(), *pair, once)


def test_a_loss_that_is_no_number_is_refused(
    symmetry: Symmetry, pair: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    anchor, client = pair
    broken = [(torch.full((2, 8, 8), torch.inf), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match="not finite"):
        match_learned(symmetry, Small(), anchor, client, broken)
