"""GPT-2's linear layers are stored as `[in, out]`: all that is said of them is what is said of ordinary ones."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fedbasin.client.refit.regression import regress
from fedbasin.client.refit.used_layers import read_layer_graph
from fedbasin.proto.request import Refit
from fedbasin.strategies.fusion.accumulator import Ridge, fuse
from fedbasin.strategies.fusion.layers import gram_layers, kronecker_layers
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update, join, split, tensor_names
from fedbasin.strategies.judging.checks import check_update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.round.refit import RefitLayers
from fedbasin.strategies.statistics.gram import grams
from fedbasin.strategies.symmetry.transform import random
from tests.accepting import accept
from tests.strategies.symmetry.tiny_transformers import symmetry_of

W = torch.float64
RIDGE = Ridge(1e-2)


def gpt2(seed=0):
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30, "n_positions": 12}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 3}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **tokens)).to(W).eval()


def texts(seed=0):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 30, (20, 7), generator=draw)
    return [({"input_ids": tokens}, torch.randint(3, (20,), generator=draw))]


class Plain(nn.Module):
    """Two layers, the first square; as GPT-2 stores them or as others do."""

    def __init__(self, seed, *, transposed):
        super().__init__()
        torch.manual_seed(seed)
        first, second = nn.Linear(5, 5).to(W), nn.Linear(5, 3).to(W)
        self.first = stored_otherwise(first) if transposed else first
        self.second = stored_otherwise(second) if transposed else second

    def forward(self, x):
        return self.second(self.first(x).relu())


def stored_otherwise(linear):
    layer = Conv1D(linear.out_features, linear.in_features).to(W)
    layer.load_state_dict({"weight": linear.weight.T.contiguous(), "bias": linear.bias})
    return layer


def numbers(seed):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(30, 5, generator=draw, dtype=W), torch.zeros(30, dtype=torch.long))]


def ordinary(state):
    """A state of the transposed network as the ordinary one has it."""
    return {name: t.T if name.endswith("weight") else t for name, t in state.items()}


def test_every_product_of_gpt2_but_those_of_its_tables_is_known():
    model = gpt2()
    layers = {layer.block[0]: (layer.inputs, layer.outputs) for layer in gram_layers(model)}
    parts = {"attn.c_attn": (17, 48), "attn.c_proj": (17, 16), "mlp.c_fc": (17, 64)}
    parts["mlp.c_proj"] = (65, 16)
    blocks = {f"transformer.h.{i}.{k}.weight.T": size for i in (0, 1) for k, size in parts.items()}
    assert layers == {**blocks, "score.weight": (16, 3)}
    assert [layer.block for layer in kronecker_layers(model)] == [("score.weight",)]


def test_its_gram_matrices_are_those_of_what_its_layers_read():
    model, read = gpt2(), {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    found = grams(model, texts())
    assert len(read) == 8
    for name, inputs in read.items():
        rows = nn.functional.pad(inputs.detach().flatten(0, -2), (0, 1), value=1.0)
        torch.testing.assert_close(found[f"{name}.weight.T", f"{name}.bias"], rows.T @ rows)


def test_blocks_are_joined_as_they_multiply_and_split_again():
    state = gpt2().state_dict()
    for layer in gram_layers(gpt2()):
        joined = join(layer.block, state)
        assert joined.shape == (layer.outputs, layer.inputs)
        again = split(layer.block, joined, state)
        assert set(again) == set(tensor_names(layer.block))
        assert all(torch.equal(again[name], state[name]) for name in again)
        assert all(tensor.is_contiguous() for tensor in again.values())


def said(transposed, seed):
    model = Plain(seed, transposed=transposed)
    found = {block: Gram(gram) for block, gram in grams(model, numbers(seed)).items()}
    return Update(model.state_dict(), 30.0, found)


def test_regmean_is_that_of_the_ordinary_network():
    fused, expected = (
        fuse(Plain(0, transposed=kind).state_dict(), [said(kind, 1), said(kind, 2)], RIDGE) for kind in (True, False)
    )
    for name, tensor in ordinary(fused).items():
        torch.testing.assert_close(tensor, expected[name])
    average = (said(True, 1).parameters["first.weight"] + said(True, 2).parameters["first.weight"]) / 2
    assert not torch.allclose(fused["first.weight"], average)


@pytest.mark.parametrize("target", [Target.features, Target.weights])
def test_a_fit_is_that_of_the_ordinary_network(target):
    found = []
    for transposed in (True, False):
        model = Plain(0, transposed=transposed)
        fused, asked = model.state_dict(), read_layer_graph(model, numbers(1))
        blocks = tuple(block for level in asked.levels for block in level)
        stage = RefitLayers(fused, Refit(tuple(blocks), target.name), 1e-2)
        for seed in (1, 2):
            own = Plain(seed, transposed=transposed).state_dict()
            sums = regress(deepcopy(model), own, fused, blocks, target, numbers(seed))
            known = {block: Gram(of.gram) for block, of in sums.items()}
            moments = {block: of.moment for block, of in sums.items()}
            accept(stage, seed, Update({}, 30.0, known, moments))
        found.append(stage.finish())
    for name, tensor in ordinary(found[0]).items():
        torch.testing.assert_close(tensor, found[1][name])


def test_gram_matrices_move_with_the_model_that_a_server_aligns():
    model, moved = gpt2(), gpt2()
    symmetry = symmetry_of(model)
    transform = random(symmetry, torch.Generator().manual_seed(5))
    moved.load_state_dict(transform.act(model.state_dict()))
    own = {block: Gram(gram) for block, gram in grams(model, texts()).items()}
    update = Update(model.state_dict(), 20.0, own).apply(transform)
    after = grams(moved, texts())
    assert any(not torch.allclose(after[block], own[block].matrix) for block in after)
    for block, gram in after.items():
        torch.testing.assert_close(update.precisions[block].matrix, gram)


def test_gpt2_is_fitted_branch_by_branch():
    model = gpt2()
    asked = read_layer_graph(model, texts())
    assert len(asked.levels) == 9
    fused = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = gpt2(1).state_dict()
    for level in asked.levels[:4]:
        sums = regress(deepcopy(model), own, fused, level, Target.features, texts())
        stage = RefitLayers(fused, Refit(tuple(level), "features"), 1e-9)
        known = {block: Gram(of.gram) for block, of in sums.items()}
        moments = {block: of.moment for block, of in sums.items()}
        accept(stage, 1, Update({}, 20.0, known, moments))
        fused = stage.finish()
        changed = {n for n in fused if not torch.equal(fused[n], model.state_dict()[n])}
        assert {name for block in level for name in tensor_names(block)} <= changed
        model.load_state_dict(fused)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(5, 4).to(W), nn.Parameter(torch.ones(4, 3, dtype=W))

    def forward(self, x):
        hidden = self.layer(x)
        return torch.addmm(input=torch.zeros(3, dtype=W), mat1=hidden, mat2=self.table)


def test_a_product_that_is_called_by_keywords_is_nobodys():
    found = grams(ByKeyword(), numbers(0))
    assert list(found) == [("layer.weight", "layer.bias")]
    assert found["layer.weight", "layer.bias"].any()


BLOCK = ("first.weight.T", "first.bias")
BAD = {
    "a layer under both names": {BLOCK: 6, ("first.weight", "first.bias"): 6},
    "a vector": {("first.bias.T",): 5},
    "another's bias": {("second.weight.T", "first.bias"): 6},
    "no such tensor": {("third.weight.T",): 5},
}


@pytest.mark.parametrize("sizes", BAD.values(), ids=BAD)
def test_what_is_no_layer_is_refused(sizes):
    state = Plain(0, transposed=True).state_dict()
    precisions = {block: Gram(torch.eye(size, dtype=W)) for block, size in sizes.items()}
    with pytest.raises(Refusal) as refused:
        check_update(Update(state, 1.0, precisions), state)
    assert refused.value.outcome is Outcome.unexpected_statistic


def test_a_matrix_for_the_outputs_is_refused():
    state = Plain(0, transposed=True).state_dict()
    block = ("second.weight.T", "second.bias")
    check_update(Update(state, 1.0, {block: Gram(torch.eye(6, dtype=W))}), state)
    with pytest.raises(Refusal, match="wrong_shape"):
        check_update(Update(state, 1.0, {block: Gram(torch.eye(4, dtype=W))}), state)
