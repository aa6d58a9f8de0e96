import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.distributions import MultivariateNormal
from torch.nn.functional import one_hot

from fedbasin.proto.encoding import GramForm, GramKind, MomentKind
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.compression.formats import decode, decode_cross_moment, encode, encode_cross_moment
from fedbasin.strategies.fusion.head import MARGIN, Evidence, closed_form, maximise_evidence
from fedbasin.strategies.fusion.precisions import Gram, Sketched

BLOCK = ("head.weight", "head.bias")
CLASSES = 3


def examples(rows, noise, seed=0, inputs=8):
    """Labels that a linear teacher gives, some of them wrong."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=draw, dtype=torch.float64)
    labels = (x @ torch.randn(inputs, CLASSES, generator=draw, dtype=torch.float64)).argmax(1)
    wrong = torch.rand(rows, generator=draw) < noise
    labels = labels.where(~wrong, torch.randint(CLASSES, (rows,), generator=draw))
    ones = torch.ones(rows, 1, dtype=torch.float64)
    return torch.cat([x, ones], 1), (one_hot(labels, CLASSES) * 2.0 - 1).double() * MARGIN


def sums(x, y):
    """What clients say: labels are one at an example's class."""
    return Gram(x.T @ x), (y > 0).to(x.dtype).T @ x


def known(x, y):
    precision, of_classes = sums(x, y)
    return precision.matrix, of_classes


def by_rows(x, y, strength):
    """How unlikely the labels are, from the covariance that the weights behind them give the rows."""
    rho = strength * (x.T @ x).diagonal().mean()
    covariance = torch.eye(len(x), dtype=x.dtype) + x @ x.T / rho
    scale = (y * torch.linalg.solve(covariance, y)).sum() / y.numel()
    normal = MultivariateNormal(torch.zeros(len(x), dtype=x.dtype), scale * covariance)
    return -normal.log_prob(y.T).sum()


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(4, 60), noise=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**16))
def test_sums_choose_what_the_rows_would(rows, noise, seed):
    x, y = examples(rows, noise, seed)
    chosen = maximise_evidence(*known(x, y))
    best = min(by_rows(x, y, 10 ** (half / 2)) for half in range(-8, 5))
    torch.testing.assert_close(by_rows(x, y, chosen), best)


def test_wrong_labels_call_for_a_stronger_ridge():
    clean, noisy = (maximise_evidence(*known(x, y)) for x, y in (examples(40, noise) for noise in (0.0, 0.9)))
    assert clean < noisy


@pytest.mark.parametrize("seed", range(3))
def test_the_chosen_strength_is_near_the_best_on_fresh_examples(seed):
    def wrong(strength):
        x, y = examples(60, 0.5, seed, inputs=40)
        rho = strength * (x.T @ x).diagonal().mean() * torch.eye(41, dtype=x.dtype)
        head = torch.linalg.solve(x.T @ x + rho, x.T @ y)
        return x, y, head

    x, y, _ = wrong(1.0)
    chosen = maximise_evidence(*known(x, y))
    truth = torch.linalg.lstsq(*examples(20_000, 0.0, seed, inputs=40)).solution
    error = {s: (wrong(s)[2] - truth).square().sum() for s in (1e-4, chosen)}
    assert error[chosen] < error[1e-4] / 2


def by_class(x, y, rho):
    """Discriminants from the rows of each class, half of the way to the size of the least squared error."""
    features, labels = x[:, :-1], y.argmax(1)
    members = [features[labels == label] for label in range(y.shape[1])]
    smoothed = [torch.cat([part, features.mean(0)[None]]) for part in members]
    means = torch.stack([part.mean(0) for part in smoothed])
    spread = sum((part - mean).T @ (part - mean) for part, mean in zip(members, means, strict=True))
    slopes = torch.linalg.solve((spread + rho * torch.eye(len(spread))) / len(x), means.T).T
    shares = torch.tensor([float(len(part)) for part in smoothed], dtype=x.dtype)
    scores = torch.cat([slopes, (shares.log() - (slopes * means).sum(1) / 2)[:, None]], 1)
    scores = scores - scores.mean(0)
    size = torch.linalg.lstsq((x @ scores.T).reshape(-1, 1), y.reshape(-1, 1)).solution
    return scores * size.sqrt()


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(4, 60), strength=st.sampled_from([1e-3, 0.1, 10.0]), seed=st.integers(0, 2**16))
def test_sums_give_the_discriminants_that_the_rows_would(rows, strength, seed):
    x, y = examples(rows, 0.2, seed)
    precision, of_classes = sums(x, y)
    found = closed_form(BLOCK, precision, of_classes, Ridge(strength))
    expected = by_class(x, y, strength * precision.matrix.diagonal().mean())
    # Sums of products lose up to half of the digits that the rows themselves keep.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_head_on_many_examples_says_what_scikit_learns_discriminants_say():
    x, y = examples(5000, 0.3)
    found = closed_form(BLOCK, *sums(x, y), Ridge(1e-9))
    peer = LinearDiscriminantAnalysis().fit(x[:, :-1].numpy(), y.argmax(1).numpy())
    same = (x @ found.T).argmax(1).numpy() == peer.predict(x[:, :-1].numpy())
    assert same.mean() > 0.998


def test_a_class_between_two_others_is_seen_where_least_squares_hides_it():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(100)
    x = 4.0 * labels[:, None].double() + torch.randn(300, 1, generator=draw, dtype=torch.float64)
    x = torch.cat([x, torch.ones(300, 1, dtype=torch.float64)], 1)
    y = (one_hot(labels, 3) * 2.0 - 1).double() * MARGIN
    squares = torch.linalg.lstsq(x, y).solution.T
    right = [
        ((x @ head.T).argmax(1) == labels).double().mean()
        for head in (squares, closed_form(BLOCK, *sums(x, y), Ridge(1e-6)))
    ]
    assert right[0] < 0.7
    assert right[1] > 0.95


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), by=st.permutations(range(CLASSES)))
def test_classes_and_inputs_may_change_places(seed, by):
    x, y = examples(30, 0.2, seed)
    turn = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    moved = closed_form(BLOCK, *sums(x[:, [*turn, 8]], y[:, by]), Evidence())
    torch.testing.assert_close(moved, closed_form(BLOCK, *sums(x, y), Evidence())[by][:, [*turn, 8]])


def test_a_class_without_examples_is_in_nobodys_way():
    x, y = examples(200, 0.0)
    more = torch.cat([y, torch.full((200, 1), -MARGIN, dtype=y.dtype)], 1)
    scores = x @ closed_form(BLOCK, *sums(x, more), Ridge(1e-3)).T
    assert (scores.argmax(1) < CLASSES).all()


def test_one_class_alone_has_nothing_to_be_told_from():
    x, _ = examples(20, 0.0)
    y = torch.full((20, 1), MARGIN, dtype=x.dtype)
    assert torch.equal(closed_form(BLOCK, *sums(x, y), Ridge(0.1)), torch.zeros(1, 9).double())


@pytest.mark.parametrize("rows", [3, 60])
def test_sums_rounded_as_they_travel_give_nearly_the_same_head(rows):
    x, y = examples(rows, 0.2, inputs=30)
    precision, of_classes = sums(x, y)
    exact = closed_form(BLOCK, precision, of_classes, Ridge(1e-3))
    rounded = closed_form(BLOCK, Gram(precision.matrix.float()), of_classes.float(), Ridge(1e-3))
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("ridge", [Ridge(0.25), Evidence(otherwise=0.25)])
def test_a_head_without_a_bias_is_least_squares(ridge):
    x, y = examples(40, 0.5)
    precision, of_classes = sums(x, y)
    rho = 0.25 * precision.matrix.diagonal().mean() * torch.eye(9, dtype=x.dtype)
    expected = torch.linalg.solve(precision.matrix + rho, x.T @ y).T
    torch.testing.assert_close(closed_form(BLOCK[:1], precision, of_classes, ridge), expected)


def test_a_head_whose_inputs_are_known_by_a_sketch_is_least_squares():
    x, y = examples(40, 0.5)
    sketch = Sketched(x, torch.zeros(9, dtype=x.dtype))
    rho = 0.25 * (x.T @ x).diagonal().mean() * torch.eye(9, dtype=x.dtype)
    expected = torch.linalg.solve(x.T @ x + rho, x.T @ y).T
    found = closed_form(BLOCK, sketch, sums(x, y)[1], Evidence(otherwise=0.25))
    torch.testing.assert_close(found, expected)


def test_the_regulariser_is_the_one_of_the_sums():
    x, y = examples(40, 0.5)
    strength = maximise_evidence(*known(x, y))
    found = closed_form(BLOCK, *sums(x, y), Evidence())
    torch.testing.assert_close(found, closed_form(BLOCK, *sums(x, y), Ridge(strength)))


@pytest.mark.parametrize("ridge", [Ridge(0.25), Evidence()])
def test_a_head_that_no_example_reaches_is_zero(ridge):
    nothing = torch.zeros(9, 9, dtype=torch.float64)
    assert not closed_form(BLOCK, Gram(nothing), nothing[:3], ridge).any()


@pytest.mark.parametrize("form", [GramForm(GramKind.half), GramForm(GramKind.byte)])
@pytest.mark.parametrize("rows", [10, 200])
def test_sums_in_fewer_bytes_give_a_head_nearly_as_good(form, rows):
    x, y = examples(rows + 2000, 0.0, inputs=20)
    (x, fresh), (y, labels) = x.split((rows, 2000)), y.split((rows, 2000))
    gram, of_classes = known(x, y)
    lossy = decode(encode(gram, form, bias=True), form, bias=True)
    moment = MomentKind.byte if form.kind is GramKind.byte else MomentKind.float16
    coarse = decode_cross_moment(encode_cross_moment(of_classes, moment))
    right = [
        ((fresh @ closed_form(BLOCK, Gram(g), c, Evidence()).T).argmax(1) == labels.argmax(1))
        for g, c in ((gram, of_classes), (lossy, coarse))
    ]
    exact, inexact = (found.double().mean() for found in right)
    assert inexact > 0.85 * exact
