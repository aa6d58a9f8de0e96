from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedbasin.strategies.tensors.batches import Batch, evaluating, forward, read_batches


def test_what_a_loader_yields_is_read_as_batches():
    data = TensorDataset(torch.randn(10, 4), torch.arange(10))
    batches = list(read_batches(DataLoader(data, batch_size=4), nn.Linear(4, 2)))
    assert [len(batch.targets) for batch in batches] == [4, 4, 2]
    assert all(batch.mask is None for batch in batches)


@pytest.mark.parametrize("inputs", ["img", "image", "x", "pixel_values"])
@pytest.mark.parametrize("targets", ["label", "labels", "y"])
def test_dictionaries_of_images_and_labels_are_read_as_batches(inputs, targets):
    images, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    (batch,) = read_batches([{inputs: images, "index": torch.arange(5), targets: labels}], nn.Linear(4, 2))
    assert torch.equal(batch.inputs, images)
    assert torch.equal(batch.targets, labels)
    assert batch.mask is None


def test_dictionaries_of_tokens_are_read_with_their_mask():
    mask = torch.tensor([[1, 1, 0]])
    item = {"input_ids": torch.ones(1, 3), "attention_mask": mask, "labels": torch.zeros(1)}
    (batch,) = read_batches([item], nn.Linear(4, 2))
    assert list(batch.inputs) == ["input_ids", "attention_mask"]
    assert torch.equal(batch.inputs["attention_mask"], mask)
    assert torch.equal(batch.mask, mask.bool())
    assert torch.equal(batch.targets, item["labels"])


@pytest.mark.parametrize(
    "item",
    [
        {"img": torch.zeros(1)},
        {"img": torch.zeros(1), "x": torch.zeros(1), "y": torch.zeros(1)},
        {"img": torch.zeros(1), "label": torch.zeros(1), "target": torch.zeros(1)},
        {"picture": torch.zeros(1), "label": torch.zeros(1)},
    ],
)
def test_dictionaries_that_can_be_read_in_no_or_several_ways_are_refused(item):
    keys = ", ".join(map(repr, item))
    with pytest.raises(TypeError, match=f"dictionary with the keys {keys}.*yield one of each"):
        list(read_batches([item], nn.Linear(4, 2)))


def test_batches_follow_the_model_to_its_device():
    model = nn.Linear(4, 2, device="meta")
    mask = torch.ones(3, 5, dtype=torch.bool)
    (batch,) = read_batches([({"ids": torch.zeros(3, 5)}, torch.zeros(3), mask)], model)
    assert {batch.inputs["ids"].device, batch.targets.device, batch.mask.device} == {torch.device("meta")}


def test_mappings_are_passed_by_name_and_logits_taken_from_the_attribute():
    @dataclass
    class Output:
        logits: Tensor

    class Model(nn.Module):
        def forward(self, first, second):
            return Output(first - second)

    inputs = {"second": torch.ones(2, 3), "first": torch.zeros(2, 3)}
    assert torch.equal(forward(Model(), Batch(inputs, torch.zeros(2))), -torch.ones(2, 3))


def test_a_state_takes_the_place_of_the_models_own():
    model = nn.Linear(4, 2)
    zero = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    batch = Batch(torch.randn(3, 4), torch.zeros(3))
    assert torch.equal(forward(model, batch, zero), torch.zeros(3, 2))
    assert not torch.equal(forward(model, batch), torch.zeros(3, 2))


def test_modes_are_restored_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError), evaluating(model):
        model(torch.zeros(2, 4))
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3), "yield .inputs, targets."),
        ((torch.zeros(3),), "a tuple of 1"),
        ((7, torch.zeros(3)), "inputs of a batch are a int"),
        ((torch.zeros(3), [1, 2, 3]), "targets of a batch are a list"),
    ],
)
def test_what_is_no_batch_is_refused(item, message):
    with pytest.raises(TypeError, match=message):
        list(read_batches([item], nn.Linear(4, 2)))


@pytest.mark.parametrize("mask", [torch.ones(3, 5), torch.ones(3, dtype=torch.bool)])
def test_a_mask_that_is_not_boolean_by_tokens_is_refused(mask):
    with pytest.raises(ValueError, match="true where a token counts"):
        Batch(torch.zeros(3, 5), torch.zeros(3), mask)


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 4), torch.zeros(0))]])
def test_no_data_is_refused(batches):
    with pytest.raises(ValueError, match="no examples"):
        list(read_batches(batches, nn.Linear(4, 2)))


def test_an_output_without_logits_is_refused():
    class Named(nn.Module):
        def forward(self, inputs):
            return {"scores": inputs}

    with pytest.raises(TypeError, match="Named returned a dict"):
        forward(Named(), Batch(torch.zeros(2, 3), torch.zeros(2)))


def test_batches_without_examples_are_left_out():
    batch = torch.randn(3, 2), torch.zeros(3)
    empty = batch[0][:0], batch[1][:0]
    assert [len(b.targets) for b in read_batches([empty, batch, empty], nn.Linear(2, 1))] == [3]
    with pytest.raises(ValueError, match="held no examples"):
        list(read_batches([empty], nn.Linear(2, 1)))


def test_a_compiled_model_is_run_as_it_was_written():
    graphs = []
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    compiled = torch.compile(plain, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    batch = Batch(torch.randn(4, 3), torch.zeros(4))
    state = {f"_orig_mod.{name}": 2 * tensor for name, tensor in plain.state_dict().items()}
    outputs = forward(compiled, batch, state)
    assert torch.equal(outputs, 2 * plain(batch.inputs))
    assert not graphs
    compiled(batch.inputs)  # the app's own call is compiled as before
    assert len(graphs) == 1


class KeepsBias(nn.Linear):
    """Computes its bias once in evaluation mode, and forgets it in training mode, as LeViT's attention does."""

    kept = None

    def train(self, mode=True):
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, inputs):
        if not self.training:
            self.kept = 2 * self.bias if self.kept is None else self.kept
        return inputs @ self.weight.mT + (2 * self.bias if self.training else self.kept)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_module_keeps_of_one_state_is_not_used_with_another(training):
    model = KeepsBias(3, 2).train(training)
    batch = Batch(torch.zeros(4, 3), torch.zeros(4))
    for value in (1.0, 5.0):
        state = {"weight": model.weight, "bias": torch.full((2,), value)}
        with evaluating(model), torch.no_grad():
            assert torch.equal(forward(model, batch, state), torch.full((4, 2), 2 * value))
    assert model.training == training
    assert torch.equal(model(batch.inputs), 2 * model.bias.expand(4, 2))
