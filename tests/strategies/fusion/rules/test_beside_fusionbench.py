"""The rules beside those of FusionBench on the same tensors, where it is installed; where they differ, and why."""

import pytest
import torch
from torch import Tensor

from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.precisions import Diagonal, Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.statistics.gram_accumulators import shrink_off_diagonal
from tests.strategies.fusion.rules.inputs import fine_tuned, merge

SKIP = {"reason": "compared only where fusion_bench 0.2 is installed"}
METHODS = "fusion_bench.method"
ties_merging = pytest.importorskip(f"{METHODS}.ties_merging.ties_merging_utils", **SKIP)
iso = pytest.importorskip(f"{METHODS}.isotropic_merging.iso_utils", **SKIP)
tsv = pytest.importorskip(f"{METHODS}.task_singular_vector.utils.TSVM_utils", **SKIP)
slerping = pytest.importorskip(f"{METHODS}.slerp.slerp_utils", **SKIP)
stock = pytest.importorskip(f"{METHODS}.model_stock.model_stock", **SKIP)
wudi = pytest.importorskip(f"{METHODS}.wudi.wudi", **SKIP)
fisher = pytest.importorskip(f"{METHODS}.fisher_merging.fisher_merging", **SKIP)
regmean = pytest.importorskip(f"{METHODS}.regmean.regmean", **SKIP)
dropping = pytest.importorskip(f"{METHODS}.dare.utils", **SKIP)

SHAPES = ((40, 30), (30, 40), (11,))


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def vectors(anchor: Tensor, models: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"x": model - anchor} for model in models]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_isotropic(shape: tuple[int, ...], count: int) -> None:
    anchor, models = fine_tuned(shape, count)
    change = iso.iso_c(vectors(anchor, models), "cpu")["x"]
    close(merge("iso_c", anchor, models, **{"lambda": 0.8}), anchor + 0.8 * change)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_task_singular_vectors(shape: tuple[int, ...], count: int) -> None:
    anchor, models = fine_tuned(shape, count)
    change = tsv.compute_and_sum_svd_mem_reduction(vectors(anchor, models), accelerator="cpu")["x"]
    close(merge("tsv_m", anchor, models), anchor + change)


def test_their_singular_vectors_vanish_where_models_outnumber_the_rows() -> None:
    anchor, models = fine_tuned((2, 9), 3)
    assert not tsv.compute_and_sum_svd_mem_reduction(vectors(anchor, models), accelerator="cpu")["x"].any()
    assert float((merge("tsv_m", anchor, models) - anchor).norm()) > 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_model_stock_of_two(shape: tuple[int, ...]) -> None:
    anchor, (a, b) = fine_tuned(shape, 2, spread=1.0)
    states = {"x": a}, {"x": b}, {"x": anchor}
    ratio = stock.compute_ratio(stock.compute_angle(*states))
    # Their angle is rounded to float32.
    torch.testing.assert_close(
        merge("model_stock", anchor, [a, b]), stock.merge_weights(*states, ratio)["x"], rtol=1e-5, atol=1e-5
    )


def test_slerp() -> None:
    anchor, (model,) = fine_tuned((40, 30), 1, spread=1.0)
    close(merge("slerp", anchor, [model], t=0.3), slerping.slerp(0.3, anchor, model))
    # Below 1.8 degrees theirs is linear, as mergekit's.
    anchor, (model,) = fine_tuned((40, 30), 1, spread=0.02)
    close(slerping.slerp(0.3, anchor, model), torch.lerp(anchor, model, 0.3))


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_ties(density: float, kind: str) -> None:
    anchor, models = fine_tuned((400,), 3)
    changes = torch.stack([model - anchor for model in models])
    theirs = anchor + ties_merging.ties_merging(changes.clone(), density, kind)
    # Theirs keeps one entry more than the fraction: all from the k-th smallest on.
    kept = (int(density * 400) + 1.5) / 400
    close(merge("ties", anchor, models, density=kept, normalize=kind == "mean"), theirs)


def test_their_ties_trims_the_whole_model_at_once() -> None:
    anchor, models = fine_tuned((400,), 3)
    loud = [model - anchor for model in models]
    quiet = [0.01 * change for change in loud]
    together = torch.stack([torch.cat(pair) for pair in zip(loud, quiet, strict=True)])
    assert not ties_merging.ties_merging(together, 0.2, "mean")[400:].any()
    assert (merge("ties", torch.zeros(400).double(), quiet, density=0.2) != 0).any()


def test_wudi_is_below_what_their_descent_reaches() -> None:
    anchor, models = fine_tuned((20, 30), 3)
    changes = vectors(anchor, models)

    def interference(change: Tensor) -> float:
        return sum(float(((change - d["x"]) @ d["x"].T).square().sum() / d["x"].square().sum()) for d in changes)

    with torch.enable_grad():
        theirs = wudi.wudi_merging(changes, "cpu", 300)["x"].detach()
    ours = merge("wudi", anchor, models) - anchor
    assert interference(ours) < interference(theirs) < interference(sum(d["x"] for d in changes))
    vector, several = fine_tuned((11,), 3)
    close(merge("wudi", vector, several), vector + wudi.wudi_merging(vectors(vector, several), "cpu", 1)["x"].detach())


def test_fisher_without_their_floor_and_norm() -> None:
    _, models = fine_tuned((7, 5), 3)
    values = [torch.rand(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    theirs = fisher.merging_with_fisher_weights(
        {"x": models}, [{"x": v} for v in values], torch.tensor([1.0, 2.0, 0.5]).double(), False, 0.0
    )["x"]
    total = Accumulator.zero({"x": models[0]})
    for model, value, weight in zip(models, values, (1.0, 2.0, 0.5), strict=True):
        total.add(Update({"x": model}, 1.0, {("x",): Diagonal(value)}).scaled(weight))
    close(total.finalize({"x": models[0]})["x"], theirs)


@pytest.mark.parametrize("shrink", [1.0, 0.4])
def test_regmean_of_layers_without_bias(shrink: float) -> None:
    _, models = fine_tuned((7, 5), 3)
    rows = [torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    grams = [x.T @ x for x in rows]
    weights = [{"x": gram / 20} for gram in grams]
    theirs = regmean.merging_with_regmean_weights({"x.weight": models}, weights, shrink)["x.weight"]
    total = Accumulator.zero({"x.weight": models[0]})
    for model, gram in zip(models, grams, strict=True):
        total.add(Update({"x.weight": model}, 1.0, {("x.weight",): Gram(shrink_off_diagonal(gram, shrink))}))
    close(total.finalize({"x.weight": models[0]})["x.weight"], theirs)


def test_dare_divides_what_is_kept_by_its_probability_as_theirs() -> None:
    anchor, (model,) = fine_tuned((40, 30), 1)
    parameter = torch.nn.Parameter(model - anchor)
    dropping.param_random_drop_(parameter, 0.7, rescale=True)
    for change in (parameter.detach(), merge("dare_linear", anchor, [model], density=0.3) - anchor):
        close(change[change != 0], (model - anchor)[change != 0] / 0.3)
