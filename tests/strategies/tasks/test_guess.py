"""The task of a batch, where outputs and targets leave no choice, and the reason where they do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbasin.strategies.tasks.guess import first_outputs, task_of_batch
from fedbasin.strategies.tasks.likelihoods import TaskError
from fedbasin.strategies.tasks.model_task import TASKS, task_of
from fedbasin.strategies.tensors.batches import Batch
from tests.tasks import EXAMPLES, Auxiliary, rows


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def whole(*shape, below=3):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("example", [e for e in EXAMPLES.values() if e.task is None], ids=lambda e: e.name)
def test_examples_of_every_task_are_known(example):
    assert task_of_batch(*first_outputs(example.model(), [example.batch(0)])).name == example.name


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(2, 5),
    places=st.lists(st.integers(2, 6), max_size=2),
    classes=st.integers(7, 9),
    last=st.booleans(),
)
def test_classes_are_known_on_either_axis(count, places, classes, last):
    targets = whole(count, *places)
    axis = -1 if last or not places else 1
    outputs = draw(count, *places, classes).movedim(-1, axis)
    expected = "classification" if not places else "tokens" if axis == -1 else "pixels"
    assert task_of_batch(outputs, Batch(draw(count), targets)).name == expected


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), squeezed=st.booleans(), labels=st.booleans())
def test_numbers_and_labels_are_known_in_any_shape(shape, squeezed, labels):
    targets = draw(9, *shape)
    targets = (targets > 0).float() if labels else targets
    one_each = labels and ((targets.sum(-1) == 1).all() or len(targets.unique()) < 2)
    batch = Batch(draw(9), targets.squeeze(-1) if squeezed and shape[-1] == 1 and shape != [1] else targets)
    if not one_each:
        assert task_of_batch(draw(9, *shape), batch).name == ("multi-label" if labels else "regression")


TOKENS = whole(4, 6, below=9)
OPEN = {
    "one class of all": (draw(8, 4), torch.eye(4)[whole(8, below=4)], "exactly one label"),
    "probabilities": (draw(8, 4), draw(8, 4).softmax(-1), "sum to 1"),
    "the same everywhere": (draw(8, 1), torch.ones(8, 1), "the same"),
    "behind a sigmoid": (draw(8, 4).requires_grad_().sigmoid(), (draw(8, 4) > 0).float(), "sigmoid"),
    "behind a squeezed one": (draw(8, 1).requires_grad_().sigmoid()[:, 0], (draw(8) > 0).float(), "sigmoid"),
    "behind a softmax": (draw(8, 4).softmax(-1), whole(8), "probabilities"),
    "whole numbers of one output": (draw(8, 1), whole(8), "labels or numbers"),
    "either axis": (draw(8, 5, 5), whole(8, 5), "last axis or on the second"),
    "fewer outputs": (draw(4, 3), whole(8), "one row for each example"),
    "other numbers": (draw(8, 3), draw(8, 2), "differ"),
}


@pytest.mark.parametrize(("outputs", "targets", "reason"), OPEN.values(), ids=OPEN)
def test_what_leaves_a_choice_is_refused_with_its_reason(outputs, targets, reason):
    with pytest.raises(
        TaskError, match=f"not plain: .*{reason}.*pass basin\\(task=...\\) one of 'classification'.*--task"
    ):
        task_of_batch(outputs, Batch(draw(len(targets)), targets))


@pytest.mark.parametrize(
    ("inputs", "targets", "expected"),
    [
        (TOKENS, TOKENS, "language-modelling"),
        ({"input_ids": TOKENS}, TOKENS.masked_fill(TOKENS == 2, -100), "language-modelling"),
        ({"input_ids": TOKENS, "decoder_input_ids": TOKENS.roll(1, 1)}, TOKENS, "tokens"),
        (TOKENS, TOKENS.roll(-1, 1), "tokens"),
        (TOKENS, torch.full_like(TOKENS, -100), "tokens"),
    ],
    ids=["inputs", "inputs apart from padding", "of a decoder", "shifted already", "none"],
)
def test_language_models_are_known_by_targets_that_are_the_inputs(inputs, targets, expected):
    assert task_of_batch(draw(4, 6, 9), Batch(inputs, targets)).name == expected


def test_of_several_outputs_the_first_counts():
    model = Auxiliary()
    outputs, _ = first_outputs(model, [(rows(0), whole(16))])
    assert torch.equal(outputs, model(rows(0))[0])


def test_looking_at_a_batch_keeps_the_random_numbers():
    loader = torch.utils.data.DataLoader([(row, 0) for row in rows(0)], 4, shuffle=True)
    model = nn.Linear(4, 3)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first_outputs(model, loader)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_name_is_refused():
    with pytest.raises(TaskError, match="'sorting': choose one of classification, multi-label"):
        task_of("sorting")
    assert all(task_of(name) is task for name, task in TASKS.items())
