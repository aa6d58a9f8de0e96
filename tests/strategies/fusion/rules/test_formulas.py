"""Every rule against its formula, computed another way: by sorting, by entries, by angles."""

import math

import pytest
import torch
from torch import Tensor

from tests.strategies.fusion.rules.inputs import SHAPES, fine_tuned, merge

WEIGHTS = [0.5, 0.3, 1.1]


def near(result: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected.to(result.dtype), rtol=tolerance, atol=tolerance)


def largest(delta: Tensor, count: int) -> Tensor:
    """Keep the `count` largest entries, by sorting."""
    kept = torch.zeros(delta.numel(), dtype=delta.dtype)
    kept[delta.abs().flatten().argsort(descending=True)[:count]] = 1
    return delta * kept.reshape(delta.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_and_task_arithmetic(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    anchor, models = fine_tuned(shape, dtype=dtype)
    total = sum(w * m.double() for w, m in zip(WEIGHTS, models, strict=True))
    near(merge("linear", None, models, WEIGHTS), total / sum(WEIGHTS))
    near(merge("linear", None, models, WEIGHTS, normalize=False), total)
    change = sum(w * (m.double() - anchor.double()) for w, m in zip(WEIGHTS, models, strict=True))
    near(merge("task_arithmetic", anchor, models, WEIGHTS, **{"lambda": 0.7}), anchor + 0.7 * change)
    near(merge("task_arithmetic", anchor, models, WEIGHTS, normalize=True), anchor + change / sum(WEIGHTS))


def test_a_negative_weight_takes_a_task_away() -> None:
    anchor, (model,) = fine_tuned(count=1)
    near(merge("task_arithmetic", anchor, [model], [-1.0]), 2 * anchor - model)
    near(merge("ties", anchor, [model], [-1.0], density=1.0), 2 * anchor - model)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(shape: tuple[int, ...], density: float, normalize: bool) -> None:
    anchor, models = fine_tuned(shape)
    count = max(1, int(density * anchor.numel())) if density else 0
    parts = [w * largest(m - anchor, count) for w, m in zip(WEIGHTS, models, strict=True)]
    expected = anchor.clone().flatten()
    for entry in range(anchor.numel()) if anchor.numel() < 100 else range(0, anchor.numel(), 997):
        values = [float(part.flatten()[entry]) for part in parts]
        sign = 1 if sum(values) >= 0 else -1
        agreed = [(value, w) for value, w in zip(values, WEIGHTS, strict=True) if value * sign > 0]
        divisor = sum(w for _, w in agreed) if normalize and agreed else 1.0
        expected[entry] += sum(value for value, _ in agreed) / divisor
    result = merge("ties", anchor, models, WEIGHTS, density=density, normalize=normalize).flatten()
    step = 1 if anchor.numel() < 100 else 997
    near(result[::step], expected[::step])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.95, 0.2), (0.0, 0.1), (1.0, 0.1)])
def test_breadcrumbs(shape: tuple[int, ...], density: float, gamma: float) -> None:
    anchor, models = fine_tuned(shape)
    size = anchor.numel()
    kept = int(density * size)
    lowest = max(0, size - kept - int(gamma * size))
    expected = anchor.clone()
    for w, model in zip(WEIGHTS, models, strict=True):
        delta = (model - anchor).flatten()
        mask = torch.zeros(size, dtype=torch.float64)
        mask[delta.abs().argsort()[lowest : lowest + kept]] = 1
        expected += w * (delta * (mask if density < 1 else 1)).reshape(shape)
    near(merge("breadcrumbs", anchor, models, WEIGHTS, density=density, gamma=gamma), expected)


@pytest.mark.parametrize("shape", [(40, 30), (300,)], ids=str)
@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_random_pruning_keeps_the_expectation_and_the_density(name: str, shape: tuple[int, ...]) -> None:
    anchor, (model,) = fine_tuned(shape, count=1)
    results = []
    for seed in range(400):
        from fedbasin.strategies.fusion.rules.merging_rules import RULES

        extra = {"epsilon": [0.2]} if name == "della_linear" else {}
        arguments = {"density": [0.4], "rescale": True, "normalize": False, "scale": 1.0, **extra}
        results.append(RULES[name].function(anchor, [model], [1.0], seeds=[seed], **arguments) - anchor)
    draws = torch.stack(results)
    assert float((draws != 0).double().mean()) == pytest.approx(0.4, abs=0.02)
    # Four standard errors of the mean of 400 draws that are kept with a probability of at least .2.
    assert float((draws.mean(dim=0) - (model - anchor)).norm() / (model - anchor).norm()) < 4 * math.sqrt(4 / 400)


def test_large_entries_are_kept_more_often_by_della() -> None:
    anchor, (model,) = fine_tuned((400, 20), count=1)
    merged = merge("della_linear", anchor, [model], density=0.5, epsilon=0.4, rescale=False)
    ranks = (model - anchor).abs().argsort(dim=1).argsort(dim=1)
    kept = (merged != anchor).double()
    assert float(kept[ranks >= 15].mean()) > 0.75 > 0.25 > float(kept[ranks < 5].mean())


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_rules_draw_each_model_and_repeat_themselves(name: str) -> None:
    anchor, (model,) = fine_tuned((40, 30), count=1)
    once, again = (merge(name, anchor, [model], density=0.5) for _ in range(2))
    assert torch.equal(once, again)
    # The same task vector twice, with two masks: more entries are changed than by one.
    both = merge(name, anchor, [model, model], density=0.5)
    assert (both != anchor).sum() > 1.2 * (once != anchor).sum()


def test_a_probability_outside_0_to_1_is_refused() -> None:
    anchor, models = fine_tuned()
    with pytest.raises(ValueError, match=r"density 0\.9 with epsilon 0\.15 gives probabilities outside 0 to 1"):
        merge("della", anchor, models, density=0.9)


@pytest.mark.parametrize("part", [0.1, 0.6, 1.0])
def test_sce(part: float) -> None:
    anchor, models = fine_tuned((9, 8), spread=1e-3)
    deltas = torch.stack([model - anchor for model in models])
    if part < 1:
        spread = deltas.var(dim=0, correction=0).flatten()
        mask = torch.zeros(spread.numel(), dtype=torch.bool)
        mask[spread.argsort(descending=True)[: int(part * spread.numel())]] = True
        deltas = deltas * mask.reshape(9, 8)
    weights = deltas.square().sum(dim=(1, 2))
    agreed = (deltas.sign() == torch.where(deltas.sum(dim=0) >= 0, 1, -1)).double()
    factors = weights[:, None, None] * agreed
    change = (factors * deltas).sum(dim=0) / factors.sum(dim=0).clamp(min=1e-300)
    near(merge("sce", anchor, models, select_topk=part), anchor + change, 1e-9)


def test_ram() -> None:
    anchor = torch.zeros(4, dtype=torch.float64)
    models = [torch.tensor(row, dtype=torch.float64) for row in ([1.0, 0, 4, 1e-6], [0, 2.0, 2, 0])]
    near(merge("ram", anchor, models), torch.tensor([1.0, 2, 3, 0]))
    # Each changed one entry alone and one with the other: 1 + .1 min(1, .5).
    near(merge("ramplus_tl", anchor, models, r=0.1, alpha=0.5), torch.tensor([1.05, 2.1, 3, 0]))


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_model_stock(filter_wise: bool, count: int) -> None:
    anchor, models = fine_tuned((6, 5), count)
    rows = range(6) if filter_wise else [slice(None)]
    expected = anchor.clone()
    for row in rows:
        deltas = [(model - anchor)[row].flatten() for model in models]
        angles = [torch.dot(a, b) / (a.norm() * b.norm()) for i, a in enumerate(deltas) for b in deltas[:i]]
        cosine = sum(angles) / len(angles)
        ratio = count * cosine / (1 + (count - 1) * cosine)
        expected[row] += ratio * sum(model - anchor for model in models)[row] / count
    near(merge("model_stock", anchor, models, filter_wise=filter_wise), expected)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spread", [1e-3, 3.0])
def test_slerp_divides_the_angle(t: float, spread: float) -> None:
    anchor, (model,) = fine_tuned(count=1, spread=spread)
    model *= anchor.norm() / model.norm()
    point = merge("slerp", anchor, [model], t=t)

    def angle(a: Tensor, b: Tensor) -> float:
        return 2 * math.asin(float((a / a.norm() - b / b.norm()).norm()) / 2)

    assert float(point.norm()) == pytest.approx(float(anchor.norm()), rel=1e-9)
    assert angle(anchor, point) == pytest.approx(t * angle(anchor, model), abs=1e-7)
    assert angle(point, model) == pytest.approx((1 - t) * angle(anchor, model), abs=1e-7)


@pytest.mark.parametrize("other", ["parallel", "opposite", "zero"])
def test_vectors_without_an_angle_are_interpolated_linearly(other: str) -> None:
    anchor, _ = fine_tuned()
    model = {"parallel": 2 * anchor, "opposite": -anchor, "zero": torch.zeros_like(anchor)}[other]
    near(merge("slerp", anchor, [model], t=0.25), 0.75 * anchor + 0.25 * model)
    for options in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}):
        near(merge("nuslerp", None, [anchor, model], [3, 1], **options), 0.75 * anchor + 0.25 * model)


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("with_anchor", [False, True])
def test_nuslerp_of_vectors_is_slerp_of_each(row_wise: bool, with_anchor: bool) -> None:
    anchor, (a, b) = fine_tuned(count=2, spread=1.0)
    origin = anchor if with_anchor else torch.zeros_like(anchor)
    options = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    result = merge("nuslerp", anchor if with_anchor else None, [a, b], [0.4, 1.2], **options)
    flip = (lambda x: x.T) if row_wise else (lambda x: x)
    pairs = zip(flip(a - origin), flip(b - origin), strict=True)
    rows = torch.stack([merge("slerp", x.contiguous(), [y.contiguous()], t=0.75) for x, y in pairs])
    near(result, origin + flip(rows))
    whole = merge("nuslerp", anchor if with_anchor else None, [a, b], [0.4, 1.2])
    near(whole, origin + merge("slerp", a - origin, [b - origin], t=0.75))


def test_multislerp_has_the_mean_direction_and_the_mean_norm() -> None:
    anchor, models = fine_tuned(spread=2.0)
    for origin in (None, anchor):
        vectors = [m if origin is None else m - origin for m in models]
        direction = sum(w * v / v.norm() for w, v in zip(WEIGHTS, vectors, strict=True))
        norm = sum(w * v.norm() for w, v in zip(WEIGHTS, vectors, strict=True)) / sum(WEIGHTS)
        expected = direction / direction.norm() * norm
        near(merge("multislerp", origin, models, WEIGHTS), expected if origin is None else origin + expected)


def test_directions_that_cancel_have_no_mean() -> None:
    a, b = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="directions of the tensors cancel"):
        merge("multislerp", None, [a, -a, b, -b])
    near(merge("multislerp", None, [a, -a]), torch.zeros(2))


@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_the_karcher_mean_balances_the_tangents(spread: float) -> None:
    _, models = fine_tuned((30, 4), spread=spread)
    mean = merge("karcher", None, models, WEIGHTS, max_iter=50, tol=1e-12)
    norm = sum(w * m.norm() for w, m in zip(WEIGHTS, models, strict=True)) / sum(WEIGHTS)
    near(mean.norm(), norm)
    centre, total = mean / mean.norm(), torch.zeros_like(mean)
    for w, model in zip(WEIGHTS, models, strict=True):
        unit = model / model.norm()
        tangent = unit - (unit * centre).sum() * centre
        angle = 2 * math.asin(float((unit - centre).norm()) / 2)
        total += w * angle * tangent / tangent.norm()
    assert float(total.norm()) < 1e-7


def test_the_karcher_mean_of_equal_tensors_ends_at_a_tolerance_of_zero() -> None:
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    near(merge("karcher", None, [tensor, tensor.clone()], tol=0.0), tensor)


def test_the_karcher_mean_of_two_is_the_middle_of_the_arc() -> None:
    a, b = fine_tuned(count=2, spread=1.0)[1]
    b *= a.norm() / b.norm()
    near(merge("karcher", None, [a, b]), merge("slerp", a, [b], t=0.5))


def test_nearswap_moves_by_at_most_t() -> None:
    anchor, model = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.05, 1.0, -2.0])
    near(merge("nearswap", anchor, [model], t=0.1), torch.tensor([0.05, 0.1, -0.1]))


def test_arcee_fusion() -> None:
    anchor, (model,) = fine_tuned((20, 10), count=1, spread=1.0, dtype=torch.float32)
    p, q = model.double().softmax(dim=-1) + 1e-8, anchor.double().softmax(dim=-1) + 1e-8
    scores = (model - anchor).abs().double() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    ranked = scores.flatten().sort().values
    first, median, third = (ranked[int(part * (len(ranked) - 1))] for part in (0.25, 0.5, 0.75))
    taken = scores >= median + 1.5 * (third - first)
    assert 0 < taken.sum() < taken.numel() / 2
    near(merge("arcee_fusion", anchor, [model]), torch.where(taken, model, anchor))


def test_moving_average_of_checkpoints() -> None:
    _, (a, b, c) = fine_tuned()
    near(merge("ema", None, [a, b, c], decay=0.9), 0.9 * (0.9 * a + 0.1 * b) + 0.1 * c)


def test_passthrough() -> None:
    anchor, _ = fine_tuned()
    assert merge("passthrough", None, [anchor]) is anchor
    near(merge("passthrough", None, [anchor], scale=0.5), anchor / 2)


def test_iso_c_has_one_singular_value() -> None:
    anchor, models = fine_tuned()
    total = sum(w * (m - anchor) for w, m in zip(WEIGHTS, models, strict=True))
    values = torch.linalg.svdvals(merge("iso_c", anchor, models, WEIGHTS) - anchor)
    near(values, torch.linalg.svdvals(total).mean().expand(5))
    near(merge("iso_c", anchor[0], [m[0] for m in models]), sum(m[0] for m in models) / 3)


def test_tsv_m_adds_task_vectors_that_do_not_meet() -> None:
    anchor = torch.zeros(6, 6, dtype=torch.float64)
    models = [anchor.clone(), anchor.clone()]
    models[0][0, 0], models[1][3, 4] = 2.0, 1.0
    near(merge("tsv_m", anchor, models), models[0] + models[1])
    # Of two equal ones the directions are made orthogonal, so none counts twice along the same one.
    twice = merge("tsv_m", anchor, [models[0], models[0]])
    assert float(twice.norm()) < 1.5 * float((2 * models[0]).norm())


def test_wudi_gives_each_task_vector_its_own_inputs() -> None:
    anchor = torch.zeros(4, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = torch.linalg.qr(torch.randn(8, 6, generator=generator, dtype=torch.float64)).Q.T
    models = [a @ inputs[:3], b @ inputs[3:]]
    near(merge("wudi", anchor, models), models[0] + models[1])
    anchor, models = fine_tuned()
    merged = merge("wudi", anchor, models) - anchor
    gradient = sum((merged - m + anchor) @ (m - anchor).T @ (m - anchor) / (m - anchor).square().sum() for m in models)
    assert float(gradient.norm()) < 1e-9
