import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from fedbasin.strategies.capture import layer_calls
from fedbasin.strategies.statistics.fisher import diagonal_fisher
from fedbasin.strategies.statistics.gram import grams

W = torch.float64


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(count, classes=3):
    return torch.zeros(count, dtype=torch.long)


def with_ones(rows):
    return pad(rows.to(W), (0, 1), value=1.0)


def outer(rows):
    return rows.to(W).T @ rows.to(W)


def hooks_of(model):
    return [module for module in model.modules() if module._forward_hooks]


class TestGrams:
    def test_each_linear_layer_has_the_gram_of_its_inputs(self):
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3, bias=False))
        x = normal(20, 5)
        found = grams(model, [(x[:12], labels(12)), (x[12:], labels(8))])
        assert list(found) == [("0.weight", "0.bias"), ("3.weight",)]
        hidden = torch.relu(model[0](x)).detach()
        torch.testing.assert_close(found["0.weight", "0.bias"], outer(with_ones(x)))
        torch.testing.assert_close(found["3.weight",], outer(hidden), rtol=1e-5, atol=1e-6)

    def test_the_split_into_batches_and_clients_does_not_show(self):
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(W)
        x = normal(30, 5, dtype=W)
        whole = grams(model, [(x, labels(30))])
        parts = [grams(model, [(part, labels(10))]) for part in x.split(10)]
        for block, gram in whole.items():
            summed = sum(part[block] for part in parts)
            torch.testing.assert_close(summed, gram, rtol=1e-13, atol=1e-13)

    def test_small_parts_give_the_same_sum(self, monkeypatch):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3)).to(W)
        data = [(normal(9, 2, 6, 6, dtype=W), labels(9))]
        whole = grams(model, data)
        monkeypatch.setattr(layer_calls, "ROW_ELEMENTS", 1)
        for block, gram in grams(model, data).items():
            torch.testing.assert_close(gram, whole[block], rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize(
        ("kernel", "stride", "padding", "dilation", "mode", "bias"),
        [
            (3, 1, 0, 1, "zeros", True),
            ((3, 2), (2, 1), (1, 0), 1, "zeros", True),
            (3, 2, 2, (1, 2), "zeros", False),
            (3, 1, "same", 1, "zeros", True),
            ((4, 3), 1, "same", (1, 2), "zeros", True),
            (2, 1, "valid", 2, "zeros", True),
            (3, 1, (2, 1), 1, "reflect", True),
            ((4, 2), 1, "same", 1, "circular", True),
        ],
    )
    def test_solving_with_a_convolutions_gram_gives_its_weights_back(
        self, kernel, stride, padding, dilation, mode, bias
    ):
        # The strongest statement about rows: least squares from them to the outputs is the layer itself.
        conv = nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=bias, padding_mode=mode, dtype=W)
        x = normal(10, 2, 8, 9, dtype=W)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch: "same" padding of an even kernel makes a copy
            found = grams(nn.Sequential(conv), [(x, labels(10))])
            outputs = conv(x).detach().transpose(0, 1).flatten(1)
        (gram,) = found.values()
        weight = conv.weight.detach().flatten(1)
        if bias:
            weight = torch.cat([weight, conv.bias.detach().unsqueeze(1)], 1)
            assert gram[-1, -1] == outputs.shape[1]
        # |y|^2 = w G w^T for every output channel, and for their sums and differences.
        torch.testing.assert_close(weight @ gram @ weight.T, outputs @ outputs.T)

    def test_a_convolution_sees_the_patches_in_the_order_of_its_weights(self):
        conv = nn.Conv2d(2, 3, (2, 3), dtype=W)
        x = normal(4, 2, 2, 3, dtype=W)
        (gram,) = grams(nn.Sequential(conv), [(x, labels(4))]).values()
        torch.testing.assert_close(gram, outer(with_ones(x.flatten(1))))

    @pytest.mark.parametrize("groups", [2, 4])
    def test_a_grouped_convolution_has_a_gram_for_each_group(self, groups):
        conv = nn.Conv2d(4, 8, 3, groups=groups, dtype=W)
        x = normal(3, 4, 5, 6, dtype=W)
        (found,) = grams(nn.Sequential(conv), [(x, labels(3))]).values()
        alone = [
            grams(nn.Sequential(nn.Conv2d(4 // groups, 2, 3, dtype=W)), [(part, labels(3))])
            for part in x.chunk(groups, 1)
        ]
        expected = torch.stack([gram for part in alone for gram in part.values()])
        torch.testing.assert_close(found, expected)

    def test_padding_is_left_out(self):
        class Classifier(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens, self.flat = nn.Linear(4, 6), nn.Linear(6, 5)
                self.heads, self.pooled = nn.Linear(5, 5), nn.Linear(5, 3)

            def forward(self, x):
                x = self.tokens(x)
                x = self.flat(x.flatten(0, 1)).unflatten(0, x.shape[:2])
                x = self.heads(x.unsqueeze(2).expand(-1, -1, 2, -1))
                return self.pooled(x[:, 0, 0])

        model = Classifier().to(W)
        x = normal(3, 4, 4, dtype=W)
        mask = torch.arange(4) < torch.tensor([4, 1, 2]).unsqueeze(1)
        found = grams(model, [(x, labels(3), mask)])
        torch.testing.assert_close(found["tokens.weight", "tokens.bias"], outer(with_ones(x[mask])))
        counts = {block[0]: gram[-1, -1].item() for block, gram in found.items()}
        assert counts == {"tokens.weight": 7, "flat.weight": 7, "heads.weight": 14, "pooled.weight": 3}
        noise = x.masked_fill(~mask.unsqueeze(-1), 1e6)
        noisy = grams(model, [(noise, labels(3), mask)])
        assert torch.equal(noisy["tokens.weight", "tokens.bias"], found["tokens.weight", "tokens.bias"])

    def test_a_mask_that_does_not_fit_is_refused_by_name(self):
        model = nn.Sequential(nn.Linear(4, 2))
        mask = torch.ones(3, 5, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"'0.weight' reads \[5, 3, 4\]"):
            grams(model, [(normal(5, 3, 4), labels(3), mask)])
        assert not hooks_of(model)

    def test_a_layer_used_twice_adds_both_uses(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = self.again = nn.Linear(4, 4)

            def forward(self, x):
                return self.again(input=self.layer(x))

        model, x = Twice().to(W), normal(6, 4, dtype=W)
        found = grams(model, [(x, labels(6))])
        second = model.layer(x).detach()
        assert list(found) == [("layer.weight", "layer.bias")]
        expected = outer(with_ones(torch.cat([x, second])))
        torch.testing.assert_close(found["layer.weight", "layer.bias"], expected)

    def test_layers_that_share_a_weight_have_one_gram(self):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(W)
        model[1].weight = model[0].weight
        x = normal(6, 4, dtype=W)
        found = grams(model, [(x, labels(6))])
        assert list(found) == [("0.weight",)]
        torch.testing.assert_close(found["0.weight",], outer(torch.cat([x, model[0](x).detach()])))

    def test_weights_that_have_another_use_have_none(self):
        head_tied_to_embedding = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
        head_tied_to_embedding[1].weight = head_tied_to_embedding[0].weight
        tokens = torch.randint(7, (3, 5))
        assert not grams(head_tied_to_embedding, [(tokens, labels(3))])

        two_biases = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        two_biases[1].weight = two_biases[0].weight
        assert list(grams(two_biases, [(normal(3, 4), labels(3))])) == [("2.weight", "2.bias")]

    def test_parametrized_weights_have_none(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
        assert list(grams(model, [(normal(3, 4), labels(3))])) == [("1.weight", "1.bias")]

    def test_layers_that_were_never_called_have_zeros(self):
        model = nn.Sequential(nn.Linear(4, 2))
        model.unused = nn.Linear(3, 3)
        model.forward = model[0].forward
        found = grams(model, [(normal(3, 4), labels(3))])
        assert not found["unused.weight", "unused.bias"].any()
        assert found["0.weight", "0.bias"][-1, -1] == 3

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_projections_inside_attention_have_grams(self, batch_first):
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dtype=W).eval()
        x = normal(3, 5, 8, dtype=W)
        found = grams(encoder, [(x, labels(3))])
        names = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
        assert {block[0].rsplit("weight")[0].rstrip("._") for block in found} == set(names)
        expected = outer(with_ones(x.flatten(0, 1)))
        torch.testing.assert_close(found["self_attn.in_proj_weight", "self_attn.in_proj_bias"], expected)
        out = found["self_attn.out_proj.weight", "self_attn.out_proj.bias"]
        assert out[-1, -1] == 15
        # What the output projection reads, from the attention's own output.
        attention = encoder.self_attn
        y = attention(x, x, x, need_weights=False)[0].detach().flatten(0, 1) - attention.out_proj.bias
        rows = torch.linalg.solve(attention.out_proj.weight, y.T).T.detach()
        torch.testing.assert_close(out, outer(with_ones(rows)), rtol=1e-6, atol=1e-8)

    def test_shrinking_leaves_the_diagonal(self):
        model, data = nn.Sequential(nn.Linear(4, 2)), [(normal(9, 4), labels(9))]
        (full,) = grams(model, data).values()
        (shrunk,) = grams(model, data, shrink=0.3).values()
        diagonal = torch.diag(full.diagonal())
        torch.testing.assert_close(shrunk, diagonal + 0.3 * (full - diagonal), rtol=1e-13, atol=1e-13)
        assert torch.equal(shrunk.diagonal(), full.diagonal())
        assert torch.linalg.eigvalsh(shrunk).min() >= 0
        with pytest.raises(ValueError, match=r"shrink = 1\.1"):
            grams(model, data, shrink=1.1)

    def test_grams_are_exactly_symmetric(self):
        model = nn.Sequential(nn.Linear(33, 2))
        (gram,) = grams(model, [(normal(50, 33), labels(50))]).values()
        assert torch.equal(gram, gram.T)

    def test_the_model_is_left_as_it_was_even_after_an_error(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        grams(model, [(normal(5, 4), labels(5))])
        with pytest.raises(RuntimeError):
            grams(model, [(normal(5, 3), labels(5))])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert not hooks_of(model)

    def test_no_data_is_refused(self):
        with pytest.raises(ValueError, match="no examples"):
            grams(nn.Linear(4, 2), [])


class Encoder(nn.Module):
    """PyTorch's own encoder, which has a fused path for padded batches in evaluation mode."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x, padding):
        return self.head(self.body(x, src_key_padding_mask=padding)[:, 0])


def test_padded_encoders_are_read_layer_by_layer():
    model = Encoder()
    keep = torch.arange(5) < torch.tensor([5, 2, 3, 1]).unsqueeze(1)
    data = [({"x": normal(4, 5, 8), "padding": ~keep}, labels(4), keep)]
    found = grams(model, data)
    counts = {block[0]: gram[-1, -1].item() for block, gram in found.items()}
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    inner = {f"body.layers.{i}.{name}": 11 for i in (0, 1) for name in names}
    assert counts == inner | {"head.weight": 4}
    assert diagonal_fisher(model, data).keys() == dict(model.named_parameters()).keys()
    assert torch.backends.mha.get_fastpath_enabled()
