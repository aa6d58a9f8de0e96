"""Laws of merging rules, over all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.fusion.rules.merging_rules import RULES
from tests.strategies.fusion.rules.inputs import SHAPES, fine_tuned, merge

GIVEN = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}
# A stack of single models has nothing to compare; these take as many models as there are.
SPECTRAL = {"iso_c", "tsv_m", "wudi"}


def counts(name: str) -> list[int]:
    rule = RULES[name]
    return [count for count in (1, 2, 3) if rule.least <= count <= (rule.most or 3)]


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("name", sorted(RULES))
def test_models_that_are_the_anchor_give_the_anchor(name: str, shape: tuple[int, ...]) -> None:
    anchor, _ = fine_tuned(shape)
    for count in counts(name):
        result = merge(name, anchor, [anchor] * count, **GIVEN.get(name, {}))
        torch.testing.assert_close(result, anchor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sorted(set(RULES) - {"dare_ties", "dare_linear", "della", "della_linear"}))
def test_narrow_dtypes_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    anchor, models = fine_tuned((20, 10), counts(name)[-1], dtype=dtype)
    wide = merge(name, anchor.double(), [model.double() for model in models], **GIVEN.get(name, {}))
    result = merge(name, anchor, models, **GIVEN.get(name, {}))
    assert result.dtype == dtype
    # Half a unit in the last place of the result, and the errors of a computation in float32.
    step = torch.finfo(dtype).eps / 2 + (2e-4 if name in SPECTRAL else 1e-5)
    assert float(((result.double() - wide).abs() / wide.abs().clamp(min=0.1)).max()) <= step


@pytest.mark.parametrize("name", sorted(set(RULES) - {"ema"}))
def test_units_may_be_permuted_before_or_after(name: str) -> None:
    if RULES[name].random:
        pytest.skip("its masks are drawn by place")
    anchor, models = fine_tuned((12, 9), counts(name)[-1])
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (12, 9))

    def permute(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows][:, columns].contiguous()

    before = merge(name, permute(anchor), [permute(model) for model in models], **GIVEN.get(name, {}))
    after = permute(merge(name, anchor, models, **GIVEN.get(name, {})))
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0, 1))
def test_ties_among_equal_magnitudes_do_not_depend_on_their_order(values: list[int], density: float) -> None:
    anchor, model = torch.zeros(len(values)), torch.tensor(values, dtype=torch.float32)
    kept = merge("ties", anchor, [model], density=density) != 0
    sizes = model.abs()
    least = max(1, int(density * len(values))) if density else 0
    assert kept.sum() >= min(least, int((sizes > 0).sum())) if density else not kept.any()
    # What is kept is at least as large as all that is dropped, and not of the same size.
    if kept.any() and (~kept & (sizes > 0)).any():
        assert sizes[kept].min() > sizes[~kept].max()
