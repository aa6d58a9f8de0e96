"""The rules beside those of mergekit on the same tensors, where mergekit is installed; where they differ, and why."""

import pytest
import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.merging_rules import RULES
from tests.strategies.fusion.rules.inputs import SHAPES, fine_tuned, merge

api = pytest.importorskip("mergekit.merge_methods.api", reason="compared only where mergekit 0.1.5 is installed")

WEIGHTS = [0.5, 0.3, 1.1]
TASKS = [
    (name, options)
    for name in ("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
    for options in (
        {"weight": WEIGHTS},
        {"weight": WEIGHTS, "density": 0.4, "normalize": True},
        {"weight": WEIGHTS, "density": [0.1, 0.5, 0.9], "normalize": False, "lambda": 0.7},
    )
]
CASES = [
    ("linear", {"weight": WEIGHTS}),
    ("linear", {"weight": WEIGHTS, "normalize": False}),
    *((name, options) for name, options in TASKS if name != "task_arithmetic" or "density" not in options),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("ram", {}),
    ("ramplus_tl", {}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("multislerp", {"weight": WEIGHTS}),
    ("karcher", {}),
]
PAIRS = [
    ("slerp", {"t": 0.3}),
    ("nuslerp", {"weight": [0.4, 0.9]}),
    ("nuslerp", {"weight": [0.4, 0.9], "nuslerp_flatten": False}),
    ("nuslerp", {"weight": [0.4, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nearswap", {"t": 0.05}),
    ("arcee_fusion", {}),
    ("passthrough", {"scale": 0.4}),
]


def theirs(name: str, anchor: Tensor | None, models: list[Tensor], **options: object) -> Tensor:
    tensors = models if anchor is None else [anchor, *models]
    return api.merge_tensors(tensors, name, parameters=options, base_index=None if anchor is None else 0)


def ours(name: str, anchor: Tensor | None, models: list[Tensor], weight: list[float] = (), **options: object) -> Tensor:
    return merge(name, anchor, models, weight, **options)


def compare(name: str, anchor: Tensor, models: list[Tensor], **options: object) -> None:
    origin = anchor if RULES[name].anchor == "required" else None
    expected = theirs(name, origin, models, **options)
    torch.testing.assert_close(ours(name, origin, models, **options), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_rules_of_several_models(name: str, options: dict, shape: tuple[int, ...]) -> None:
    if name == "model_stock" and options and len(shape) > 2:
        pytest.skip("its filters of a convolution are the kernels' last axis, ours whole kernels, as in the paper")
    compare(name, *fine_tuned(shape, spread=1.0), **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=str)
def test_rules_of_two_models(name: str, options: dict, shape: tuple[int, ...]) -> None:
    if name == "arcee_fusion" and len(shape) > 2:
        pytest.skip("its rows of a convolution are the kernels' last axis, ours whole kernels")
    anchor, models = fine_tuned(shape, count=2, spread=1.0)
    compare(name, anchor, models if name == "nuslerp" else models[:1], **options)


def test_slerp_is_exact_below_the_angle_where_theirs_is_linear() -> None:
    anchor, (model,) = fine_tuned((40, 30), count=1, spread=0.02)
    exact = merge("slerp", anchor, [model], t=0.5)
    torch.testing.assert_close(theirs("slerp", anchor, [model], t=0.5), torch.lerp(anchor, model, 0.5))
    assert 1e-6 < float((exact - torch.lerp(anchor, model, 0.5)).norm() / exact.norm()) < 1.3e-4


def test_their_rescale_of_dare_restores_the_norm_and_ours_the_expectation() -> None:
    anchor, (model,) = fine_tuned((40, 30), count=1)
    delta = model - anchor
    for name, options in (("dare_linear", {}), ("della_linear", {"epsilon": 0.1})):
        change = theirs(name, anchor, [model], weight=[1.0], density=0.5, **options) - anchor
        assert float(change.abs().sum()) == pytest.approx(float(delta.abs().sum()))
    kept = merge("dare_linear", anchor, [model], density=0.5) - anchor
    torch.testing.assert_close(kept[kept != 0], 2 * delta[kept != 0])


def test_their_ties_adds_what_a_negative_weight_takes_away_when_it_normalises() -> None:
    anchor, (model,) = fine_tuned(count=1)
    torch.testing.assert_close(theirs("ties", anchor, [model], weight=[-1.0], density=1.0), model)
    torch.testing.assert_close(merge("ties", anchor, [model], [-1.0]), 2 * anchor - model)


def test_their_sce_weighs_models_alike_where_all_changes_are_small() -> None:
    anchor, models = fine_tuned((9, 8), spread=1e-5)
    exact = merge("sce", anchor, models) - anchor
    assert float((theirs("sce", anchor, models) - anchor - exact).norm() / exact.norm()) > 0.05


def test_narrow_dtypes_are_computed_in_single_precision_here() -> None:
    anchor, models = fine_tuned((40, 30), dtype=torch.bfloat16)
    exact = merge("task_arithmetic", anchor.double(), [model.double() for model in models], [0.3] * 3)
    errors = [
        float((result.double() - exact).norm())
        for result in (
            merge("task_arithmetic", anchor, models, [0.3] * 3),
            theirs("task_arithmetic", anchor, models, weight=[0.3] * 3),
        )
    ]
    assert errors[0] < errors[1]
