import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.symmetry.folding import Fold, Reader, fold, parse_fold
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError, parse


class Normed(nn.Module):
    """A norm that two layers read."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.left = nn.Linear(6, 3, bias=bias)
        self.right = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.left(y) * self.right(y)


FOLD = Fold("norm", (Reader("left.weight", 1), Reader("right.weight", 1)))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: tensor.detach() + torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("bias", [True, False])
def test_folding_keeps_function_names_and_shapes(bias: bool) -> None:
    model = Normed(bias=bias).double()
    state = state_of(model)
    folded = fold([FOLD], state)
    x = torch.randn(4, 6, dtype=torch.float64)
    before, after = (functional_call(model, s, (x,)) for s in (state, folded))
    torch.testing.assert_close(after, before, atol=1e-12, rtol=1e-12)
    assert {n: t.shape for n, t in folded.items()} == {n: t.shape for n, t in state.items()}
    assert torch.equal(folded["norm.weight"], torch.ones(6, dtype=torch.float64))


def test_a_norms_bias_goes_to_its_readers_where_all_have_one() -> None:
    folded = fold([FOLD], state_of(Normed()))
    assert not folded["norm.bias"].any()
    kept = fold([FOLD], state_of(Normed(bias=False)))
    assert kept["norm.bias"].all()


@pytest.mark.parametrize("bias", [True, False])
def test_folding_twice_changes_nothing_more(bias: bool) -> None:
    once = fold([FOLD], state_of(Normed(bias=bias)))
    torch.testing.assert_close(fold([FOLD], once), once, rtol=0, atol=0)


def test_a_reader_stored_the_other_way_is_folded_along_its_axis() -> None:
    draw = torch.Generator().manual_seed(0)
    state = {
        "norm.weight": torch.rand(4, generator=draw) + 0.5,
        "norm.bias": torch.randn(4, generator=draw),
        "c.weight": torch.randn(4, 7, generator=draw),
        "c.bias": torch.randn(7, generator=draw),
    }
    folded = fold([Fold("norm", (Reader("c.weight", 0),))], state)
    normed = torch.randn(3, 4, generator=draw)
    before = (normed * state["norm.weight"] + state["norm.bias"]) @ state["c.weight"]
    torch.testing.assert_close(normed @ folded["c.weight"] + folded["c.bias"], before + state["c.bias"])


def test_a_vanished_gain_is_refused_only_where_a_bias_would_be_divided_by_it() -> None:
    state = state_of(Normed(bias=False))
    state["norm.weight"][2] = 0.0
    with pytest.raises(SymmetryError, match=r"norm\.weight is 0 at entry 2.*give left\.weight"):
        fold([FOLD], state)
    state["norm.bias"][2] = 0.0
    assert fold([FOLD], state)["norm.bias"][2] == 0
    vanished = state_of(Normed())
    vanished["norm.weight"][2] = 0.0
    assert torch.isfinite(fold([FOLD], vanished)["left.weight"]).all()


def test_the_notation_is_read_back() -> None:
    assert parse_fold(str(FOLD)) == FOLD
    symmetry = Symmetry((), (FOLD,))
    assert parse(f"# a comment\n{symmetry}") == symmetry
    assert symmetry.digest != Symmetry(()).digest


@pytest.mark.parametrize("line", ["norm ->", "-> a.weight[1]", "norm -> a.weight", "a b -> c[1]"])
def test_what_is_no_fold_is_refused(line: str) -> None:
    with pytest.raises(SymmetryError, match="not a fold"):
        parse_fold(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("other -> left.weight[1]", "no tensor 'other.weight'"),
        ("norm -> gone.weight[1]", "no tensor 'gone.weight'"),
        ("norm -> left.weight[0]", "does not meet the 6 entries"),
        ("left -> right.weight[1]", "one weight per entry"),
    ],
)
def test_a_fold_of_another_model_is_refused(line: str, message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        parse(line).check(state_of(Normed()))


def test_a_reader_of_two_norms_is_refused() -> None:
    state = state_of(Normed()) | {"also.weight": torch.ones(6)}
    symmetry = parse("norm -> left.weight[1]\nalso -> left.weight[1]")
    with pytest.raises(SymmetryError, match="reads norm and also"):
        symmetry.check(state)


def test_a_reader_that_is_another_tensor_too_is_refused() -> None:
    model = Normed()
    state = dict(model.state_dict())
    state["table.weight"] = state["left.weight"]
    with pytest.raises(SymmetryError, match=r"left\.weight and table\.weight are one tensor"):
        Symmetry((), (FOLD,)).check(state)
