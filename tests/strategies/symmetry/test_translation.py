import itertools

import pytest
import torch
from torch import Tensor

from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.translation import nearest, parse_shift, random, translate
from fedbasin.strategies.tensors.state import distance
from tests.strategies.symmetry.by_hand.prenorm_transformer import preln_transformer
from tests.strategies.symmetry.families import Transformer
from tests.strategies.symmetry.test_groups import drawn
from tests.strategies.symmetry.tiny_transformers import MODELS, symmetry_of

SHIFTED = [
    *("bert", "bert_classes", "roberta", "distilbert", "gpt2", "vit", "clip"),
    *("gpt_neox", "llama_alone_biases", "deberta_v2", "deberta_v2_shared", "deberta_v2_plain"),
]


def of(name: str) -> tuple[Symmetry, dict[str, Tensor]]:
    model = MODELS[name].model().double()
    return symmetry_of(model), model.state_dict()


@pytest.mark.parametrize("name", SHIFTED)
def test_shifts_alone_keep_the_function(name: str) -> None:
    model = MODELS[name].model()
    shifts = symmetry_of(model).shifts
    assert shifts
    assert check(model, Symmetry((), shifts=shifts), *MODELS[name].inputs.values()).passed


def test_what_has_no_biases_has_no_shifts() -> None:
    for name in ("llama", "qwen2", "t5", "mixtral"):
        assert not symmetry_of(MODELS[name].model()).shifts


WRONG = {
    "keys under rotary positions": ("llama_biases", "model.layers.0.self_attn.k_proj.bias"),
    "keys that are turned in part": ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias[8:16/24]"),
    "keys that positions read": ("deberta_v2", "deberta.encoder.layer.0.attention.self.key_proj.bias"),
    "queries": ("bert", "bert.encoder.layer.0.attention.self.query.bias"),
    "values that nothing takes up": ("bert", "bert.encoder.layer.0.attention.self.value.bias"),
    "normalised keys": ("qwen3_biases", "model.layers.0.self_attn.k_proj.bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bias_that_is_seen_is_noticed(case: str) -> None:
    name, shift = WRONG[case]
    wrong = parse(f"+ {shift}")
    report = check(MODELS[name].model(), wrong, *MODELS[name].inputs.values())
    assert report.guilty == (f"+ {shift}",)


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox"])
def test_translations_are_a_group(name: str) -> None:
    symmetry, state = of(name)
    one, other = (random(symmetry.shifts, state, drawn(seed)) for seed in (0, 1))
    moved = translate(one, state)
    assert distance(moved, state) > 0.1
    assert distance(translate({shift: -vector for shift, vector in one.items()}, moved), state) < 1e-12
    both = {shift: vector + other[shift] for shift, vector in one.items()}
    assert distance(translate(both, state), translate(other, moved)) < 1e-12
    assert distance(translate(both, state), translate(one, translate(other, state))) < 1e-12


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox", "vit"])
def test_a_planted_translation_is_undone(name: str) -> None:
    symmetry, anchor = of(name)
    client = translate(random(symmetry.shifts, anchor, drawn(2)), anchor)
    assert distance(symmetry.translate(anchor, client), anchor) < 1e-12


def test_no_translation_is_closer_than_the_nearest() -> None:
    symmetry, anchor = of("gpt2")
    client = {n: t + 0.2 * torch.randn(t.shape, generator=drawn(3)) for n, t in anchor.items()}
    best = nearest(symmetry.shifts, anchor, client)
    closest = distance(translate(best, client), anchor)
    assert closest < distance(client, anchor)
    for seed, size in itertools.product(range(5), (1e-3, 1)):
        other = random(symmetry.shifts, client, drawn(seed))
        step = {shift: size * vector for shift, vector in other.items()}
        assert distance(translate(step, translate(best, client)), anchor) > closest


def test_a_translated_client_is_translated_once() -> None:
    symmetry, anchor = of("bert")
    near = {n: t + 0.1 * torch.randn(t.shape, generator=drawn(5)) for n, t in anchor.items()}
    client = translate(random(symmetry.shifts, anchor, drawn(4)), near)
    once = symmetry.translate(anchor, client)
    assert distance(symmetry.translate(anchor, once), once) < 1e-12


def test_shifts_are_written_and_read_back() -> None:
    symmetry = preln_transformer(Transformer().state_dict(), heads=4)
    assert len(symmetry.shifts) == 4
    assert parse(str(symmetry)) == symmetry
    assert not preln_transformer(Transformer(bias=False).state_dict(), heads=4).shifts
    for name in ("gpt2", "gpt_neox"):
        found, _ = of(name)
        assert found.shifts
        assert parse(str(found)) == found


@pytest.mark.parametrize("line", ["+ a[0]", "+ a b[1]", "+ a b[2] c", "+ a[1:2] b", "+"])
def test_what_is_no_shift_is_refused(line: str) -> None:
    with pytest.raises(SymmetryError):
        parse(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("+ b.bias w[1] o", "no tensor 'b.bias'"),
        ("+ w", "shape"),
        ("+ v[2:9]", "shape"),
        ("+ v[0:2/3]", "shape"),
        ("+ v w[0] o", "bias by values"),
    ],
)
def test_a_shift_that_does_not_fit_is_refused(line: str, said: str) -> None:
    state = {"v": torch.zeros(4), "w": torch.zeros(3, 4), "o": torch.zeros(3)}
    parse("+ v w[1] o").check(state)
    assert parse_shift("+ v[1:3]").width(state) == 2
    with pytest.raises(SymmetryError, match=said):
        parse(line).check(state)
