"""Attention written out is PyTorch's own, for every option that it covers."""

from inspect import signature

import pytest
import torch
from torch.nn import functional as F

from fedbasin.strategies.capture.attention_calls import attend, is_plain

L, N, E, HEADS = 5, 3, 8, 2


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def arguments(query=None, key=None, value=None, **options):
    query = draw(L, N, E) if query is None else query
    key = query if key is None else key
    plain = {
        "num_heads": HEADS,
        "in_proj_weight": draw(3 * E, E),
        "in_proj_bias": draw(3 * E),
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weight": draw(E, E),
        "out_proj_bias": draw(E),
        "embed_dim_to_check": E,
    }
    return {"query": query, "key": key, "value": key if value is None else value, **plain, **options}


PADDED = torch.arange(L) >= torch.tensor([5, 2, 4]).unsqueeze(1)
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_proj_bias": None, "out_proj_bias": None},
        {"key_padding_mask": PADDED},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": draw(L, L)},
        {"attn_mask": CAUSAL, "key_padding_mask": PADDED},
        {"attn_mask": draw(N * HEADS, L, L)},
        {"average_attn_weights": False},
        {"query": draw(L, E)},
        {"key": draw(4, N, E)},
        {"key": draw(4, N, E), "value": draw(4, N, E) + 1},
        {"dropout_p": 0.5, "training": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_attention_written_out_is_pytorchs_own(options, need_weights):
    given = arguments(**options, need_weights=need_weights)
    assert is_plain(**given)
    expected = F.multi_head_attention_forward(**given)
    found = attend(**given)
    torch.testing.assert_close(found[0], expected[0])
    if need_weights:
        torch.testing.assert_close(found[1], expected[1])
    else:
        assert found[1] is None


def test_options_that_are_not_covered_are_known():
    row = draw(1, 1, E)
    for rare in (
        {"bias_k": row, "bias_v": row},
        {"add_zero_attn": True},
        {"use_separate_proj_weight": True},
        {"static_k": row},
    ):
        assert not is_plain(**arguments(**rare))
    names = signature(F.multi_head_attention_forward).parameters
    assert set(arguments()) <= set(names)
