"""A fit is a ridge regression over all clients' sums, and what does not belong into the sum leaves no trace."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.proto.encoding import Encoding, GramForm, GramKind
from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.proto.request import PathSpec, Refit
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence, closed_form
from fedbasin.strategies.fusion.head_memory import HeadMemory
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update, join
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.round.choice import best_point
from fedbasin.strategies.round.refit import ProbePath, RefitHead, RefitLayers
from tests.accepting import accept

FIRST, SECOND, CONV = ("first.weight", "first.bias"), ("second.weight",), ("conv.weight",)
RIDGE = 1e-2
W = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=W)


def batch_norm(name, *sizes):
    learned, measured = (torch.ones(size, dtype=W) for size in sizes)
    names = {"weight": learned, "bias": learned, "running_mean": measured, "running_var": measured}
    return {f"{name}.{key}": tensor for key, tensor in names.items()}


def model(seed=0):
    return {
        "first.weight": normal(6, 4, seed=seed),
        "first.bias": normal(6, seed=seed + 1),
        "norm": normal(6, seed=seed + 2),
        "second.weight": normal(3, 6, seed=seed + 3),
        "conv.weight": normal(4, 2, 3, 3, seed=seed + 4),
        **batch_norm("bn", 4, 4),
        **batch_norm("odd", 4, 5),
        "count": torch.tensor(seed),
    }


def refit(*blocks, target="features", norms=()):
    return Refit(blocks or (FIRST, SECOND), target, norms=norms)


def rows(block, seed):
    """A client's inputs of a layer and what is left to explain of its outputs."""
    out, width = join(block, model()).shape
    return normal(40, width, seed=seed), normal(40, out, seed=seed + 50)


def answer(*blocks, seed=0, examples=40.0):
    blocks = blocks or (FIRST, SECOND)
    data = {block: rows(block, seed + i) for i, block in enumerate(blocks)}
    return Update(
        {},
        examples,
        {block: Gram(x.T @ x) for block, (x, _) in data.items()},
        {block: z.T @ x for block, (x, z) in data.items()},
    )


def labelled(block, seed=0):
    """A client's sums of a head: a one behind the inputs where the block has a bias, and a class for each row."""
    x, z = rows(block, seed)
    if len(block) > 1:
        x[:, -1] = 1.0
    classes = torch.nn.functional.one_hot(z.argmax(1), z.shape[1]).to(W)
    return Update({}, 40.0, {block: Gram(x.T @ x)}, {block: classes.T @ x})


def fitted(stage, *updates):
    for node, update in enumerate(updates):
        accept(stage, node, update)
    return stage.finish()


def ridge_step(block, seeds, strength=RIDGE):
    """Least squares over all rows at once, with rows of its own for the regulariser."""
    x, z = (torch.cat(parts) for parts in zip(*(rows(block, seed) for seed in seeds), strict=True))
    rho = strength * (x.T @ x).diagonal().mean()
    x = torch.cat([x, rho.sqrt() * torch.eye(x.shape[1], dtype=W)])
    z = torch.cat([z, torch.zeros(x.shape[1], z.shape[1], dtype=W)])
    return torch.linalg.lstsq(x, z).solution.T


def test_the_layer_moves_by_the_ridge_regression_on_what_is_left_to_explain():
    before = model()
    found = fitted(RefitLayers(before, refit(FIRST), RIDGE), *(answer(FIRST, seed=s) for s in (1, 2)))
    torch.testing.assert_close(join(FIRST, found) - join(FIRST, before), ridge_step(FIRST, (1, 2)))


@pytest.mark.parametrize(("kind", "name", "ridge"), [(RefitLayers, "fit", RIDGE), (RefitHead, "head", Ridge(RIDGE))])
def test_it_requests_the_layers_and_how_their_sums_are_sent(kind, name, ridge):
    first, conv = Encoding(GramForm(GramKind.half)), Encoding(GramForm(GramKind.byte))
    stage = kind(model(), refit(FIRST), ridge, encodings={FIRST: first, CONV: conv})
    assert (stage.request.stage, stage.request.kind) == (name, "train")
    assert stage.request.refit == refit(FIRST)
    assert stage.request.encodings == {FIRST: first}


def test_all_else_stays():
    before = model()
    found = fitted(RefitLayers(before, refit(FIRST), RIDGE), answer(FIRST))
    assert list(found) == list(before)
    assert all(found[name] is before[name] for name in before if name not in FIRST)


def test_a_share_of_the_step_is_taken():
    before = model()
    whole, half = (fitted(RefitLayers(before, refit(), RIDGE, share), answer()) for share in (1.0, 0.5))
    for name in (*FIRST, *SECOND):
        torch.testing.assert_close(half[name], (before[name] + whole[name]) / 2)


@pytest.mark.parametrize("block", [FIRST, SECOND])
@pytest.mark.parametrize("ridge", [Ridge(RIDGE), Evidence()])
def test_a_head_to_labels_is_what_the_sum_over_all_clients_stands_for(block, ridge):
    head, updates = refit(block, target="labels"), [labelled(block, seed) for seed in (1, 2)]
    gram = Gram(sum(update.precisions[block].matrix for update in updates))
    moment = sum(update.cross_moments[block] for update in updates)
    stage = RefitHead(model(), head, ridge)
    found = fitted(stage, *updates)
    assert stage.request.stage == "head"
    torch.testing.assert_close(join(block, found), closed_form(block, gram, moment, ridge).to(W))


def test_classes_that_are_no_parts_of_the_rows_are_refused():
    good = labelled(FIRST)
    moment = good.cross_moments[FIRST].clone()
    moment[:, -1] *= 2
    with pytest.raises(Refusal, match=r"^inconsistent: the statistic of first\.weight"):
        accept(
            RefitHead(model(), refit(FIRST, target="labels"), Evidence()),
            1,
            replace(good, cross_moments={FIRST: moment}),
        )


def test_all_else_is_drawn_to_the_model_so_far():
    before = model()
    found = fitted(RefitLayers(before, refit(), 1e12), answer())
    for name in (*FIRST, *SECOND):
        torch.testing.assert_close(found[name], before[name])


def test_directions_that_no_client_has_seen_stay_as_they_are():
    before = model()
    x, z = rows(SECOND, 0)
    x[:, 3:] = 0
    update = Update({}, 40.0, {SECOND: Gram(x.T @ x)}, {SECOND: z.T @ x})
    found = fitted(RefitLayers(before, refit(SECOND), RIDGE), update)
    torch.testing.assert_close(found["second.weight"][:, 3:], before["second.weight"][:, 3:])
    assert (found["second.weight"][:, :3] != before["second.weight"][:, :3]).all()


def test_a_layer_that_no_example_reaches_stays():
    before = model()
    nothing = Update({}, 1.0, {SECOND: Gram(torch.zeros(6, 6, dtype=W))}, {SECOND: torch.zeros(3, 6, dtype=W)})
    assert torch.equal(
        fitted(RefitLayers(before, refit(SECOND), RIDGE), nothing)["second.weight"], before["second.weight"]
    )


def test_a_grouped_convolution_is_fitted_group_by_group():
    before = model()
    x, z = normal(2, 40, 9, seed=1), normal(2, 40, 2, seed=2)
    before["conv.weight"] = before["conv.weight"][:, :1].contiguous()
    update = Update({}, 40.0, {CONV: Gram(x.mT @ x)}, {CONV: (z.mT @ x).flatten(0, 1)})
    found = fitted(RefitLayers(before, refit(CONV), 1e-9), update)
    moved = (found["conv.weight"] - before["conv.weight"]).flatten(1).unflatten(0, (2, 2))
    expected = torch.linalg.lstsq(x, z).solution.mT
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_keep_their_dtype(dtype):
    before = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model().items()}
    found = fitted(RefitLayers(before, refit(), RIDGE), answer())
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in before.items()}


@settings(deadline=None, max_examples=20)
@given(order=st.permutations([1, 2, 3, 4]))
def test_the_order_of_arrival_does_not_show(order):
    stage = RefitLayers(model(), refit(), RIDGE)
    found = fitted(stage, *(answer(seed=10 * s, examples=float(s)) for s in order))
    other = fitted(RefitLayers(model(), refit(), RIDGE), *(answer(seed=10 * s) for s in (1, 2, 3, 4)))
    for name in other:
        torch.testing.assert_close(found[name], other[name])


@settings(deadline=None, max_examples=20)
@given(outputs=st.permutations(range(3)), inputs=st.permutations(range(6)))
def test_a_fit_of_permuted_clients_is_the_permuted_fit(outputs, inputs):
    before, seeds = model(), (1, 2)
    moved = {**before, "second.weight": before["second.weight"][outputs][:, inputs]}

    def permuted(update):
        gram, moment = update.precisions[SECOND].matrix, update.cross_moments[SECOND]
        return replace(
            update,
            precisions={SECOND: Gram(gram[inputs][:, inputs])},
            cross_moments={SECOND: moment[outputs][:, inputs]},
        )

    updates = [answer(SECOND, seed=seed) for seed in seeds]
    plain = fitted(RefitLayers(before, refit(SECOND), RIDGE), *updates)
    found = fitted(RefitLayers(moved, refit(SECOND), RIDGE), *map(permuted, updates))
    torch.testing.assert_close(found["second.weight"], plain["second.weight"][outputs][:, inputs], rtol=1e-9, atol=1e-9)


def changed(block, gram=None, moment=None, **fields):
    """The honest answer with something else of one layer."""
    honest = answer()
    precisions, moments = dict(honest.precisions), dict(honest.cross_moments)
    if gram is not None:
        precisions[block] = Gram(gram(precisions[block].matrix.clone()))
    if moment is not None:
        moments[block] = moment(moments[block].clone())
    return replace(honest, precisions=precisions, cross_moments=moments, **fields)


def nan(tensor):
    tensor.view(-1)[0] = float("nan")
    return tensor


def skewed(matrix):
    matrix[0, 1] += matrix.abs().max()
    return matrix


O = Outcome  # noqa: E741 - the table's first column
REFUSED = {
    "no examples": (O.bad_weight, lambda: changed(FIRST, examples=0.0)),
    "a layer less": (O.missing_statistic, lambda: answer(FIRST)),
    "a layer more": (O.unexpected_statistic, lambda: answer(FIRST, SECOND, CONV)),
    "no such layer": (
        O.unexpected_statistic,
        lambda: replace(
            answer(), precisions={**answer().precisions, ("x",): Gram(torch.eye(2, dtype=W))}
        ),
    ),
    "a Gram of another size": (O.wrong_shape, lambda: changed(FIRST, lambda g: g[:-1, :-1])),
    "a Gram of groups": (O.wrong_shape, lambda: changed(FIRST, lambda g: g.expand(2, 5, 5))),
    "groups that do not divide": (O.wrong_shape, lambda: changed(FIRST, lambda g: g.expand(4, 5, 5))),
    "NaN in a Gram": (O.non_finite, lambda: changed(SECOND, nan)),
    "a skewed Gram": (O.not_symmetric, lambda: changed(SECOND, skewed)),
    "a negative Gram": (O.not_positive, lambda: changed(SECOND, torch.neg)),
    "a moment of another shape": (O.wrong_shape, lambda: changed(FIRST, moment=lambda m: m.mT)),
    "a moment of one number": (O.wrong_shape, lambda: changed(FIRST, moment=lambda m: m[:1, :1])),
    "NaN in a moment": (O.non_finite, lambda: changed(SECOND, moment=nan)),
    "an infinite moment": (O.non_finite, lambda: changed(SECOND, moment=lambda m: m / 0)),
}  # fmt: skip


@pytest.mark.parametrize(("outcome", "bad"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_belong_into_the_sum_is_named_and_leaves_no_trace(outcome, bad):
    stage = RefitLayers(model(), refit(), RIDGE)
    accept(stage, 1, answer(seed=1))
    with pytest.raises(Refusal) as refused:
        accept(stage, 2, bad())
    assert refused.value.outcome is outcome
    accept(stage, 3, answer(seed=3))
    expected = fitted(RefitLayers(model(), refit(), RIDGE), answer(seed=1), answer(seed=3))
    for name, tensor in stage.finish().items():
        assert torch.equal(tensor, expected[name])


def measured(**changes):
    statistics = {"bn.running_mean": torch.zeros(4, dtype=W), "bn.running_var": torch.ones(4, dtype=W)}
    statistics |= {name.replace("_", ".", 1): tensor for name, tensor in changes.items()}
    known = {name: tensor for name, tensor in statistics.items() if tensor is not None}
    return replace(answer(), parameters=known)


STATISTICS = {
    "none": (O.missing_tensor, lambda: answer()),
    "one alone": (O.missing_tensor, lambda: measured(bn_running_var=None)),
    "another tensor": (O.unexpected_tensor, lambda: measured(bn_weight=torch.ones(4, dtype=W))),
    "another size": (O.wrong_shape, lambda: measured(bn_running_mean=torch.ones(3, dtype=W))),
    "NaN": (O.non_finite, lambda: measured(bn_running_mean=nan(torch.ones(4, dtype=W)))),
    "a negative variance": (O.not_positive, lambda: measured(bn_running_var=-torch.ones(4, dtype=W))),
}  # fmt: skip


@pytest.mark.parametrize(("outcome", "bad"), STATISTICS.values(), ids=STATISTICS)
def test_running_statistics_that_were_not_asked_for_so_are_refused(outcome, bad):
    stage = RefitLayers(model(), refit(norms=(BatchNorm("bn", 1e-5),)), RIDGE)
    accept(stage, 1, measured())
    with pytest.raises(Refusal) as refused:
        accept(stage, 2, bad())
    assert refused.value.outcome is outcome
    found = stage.finish()
    assert torch.equal(found["bn.running_var"], torch.ones(4, dtype=W))


def test_running_statistics_that_nobody_asked_for_are_refused():
    stage = RefitLayers(model(), refit(), RIDGE)
    with pytest.raises(Refusal, match="unexpected_tensor"):
        accept(stage, 1, measured())


def test_a_client_with_other_groups_than_those_before_is_refused():
    x = normal(40, 18, seed=1)
    whole = Update({}, 40.0, {CONV: Gram(x.T @ x)}, {CONV: torch.zeros(4, 18, dtype=W)})
    grams = Gram((x.T @ x).expand(2, 18, 18))
    stage = RefitLayers(model(), refit(CONV), RIDGE)
    accept(stage, 1, whole)
    with pytest.raises(Refusal, match=r"wrong_shape: the statistic of conv\.weight"):
        accept(stage, 2, replace(whole, precisions={CONV: grams}))


class TestProbe:
    def test_asks_for_the_path_and_ends_in_the_model(self):
        stage = ProbePath(model(), sequence=2, path=PathSpec(0.5, 2.0), points=5)
        assert (stage.request.stage, stage.request.kind) == ("probe", "evaluate")
        assert stage.request.path_points == 5
        assert stage.request.refit == Refit((), "", 2, PathSpec(0.5, 2.0))
        accept(stage, 1, Update({}, 3.0))
        assert stage.finish().keys() == model().keys()
        with pytest.raises(Refusal, match="bad_weight"):
            accept(stage, 2, Update({}, float("nan")))

    @given(st.lists(st.floats(0.0, 1e3), min_size=5, max_size=5))
    def test_the_best_point_is_one_that_was_looked_at_and_none_is_better(self, losses):
        points = (0.0, 0.25, 0.5, 0.75, 1.0)
        found = best_point(Path(points, tuple(losses), (0.0,) * 5, 1.0))
        assert losses[points.index(found)] == min(losses)

    @pytest.mark.parametrize(
        ("losses", "best"), [((1, 2, 3), 0.0), ((3, 2, 1), 1.0), ((1, 1, 1), 0.0), ((2, 1, 1), 0.5)]
    )
    def test_of_equal_points_the_nearest_is_taken(self, losses, best):
        assert best_point(Path((0.0, 0.5, 1.0), losses, (0.0,) * 3, 1.0)) == best

    def test_nobodys_word_leaves_the_fused_model(self):
        assert best_point(None) == 0.0
        assert best_point(Path((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), 0.0)) == 0.0


@pytest.mark.parametrize(("factor", "remembered"), [(1.0, {1}), (1e150, set())])
def test_sums_without_a_finite_solution_are_not_remembered(factor, remembered):
    memory = HeadMemory(2**20)
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in model().items()}
    stage = RefitHead(single, refit(FIRST, target="labels"), Evidence(), memory=memory, number=1)
    update = labelled(FIRST)
    stage.add(1, replace(update, cross_moments={FIRST: factor * update.cross_moments[FIRST]}))
    assert bool(stage.finish()["first.weight"].isfinite().all()) == bool(remembered)
    assert set(memory.clients) == remembered
