"""A run derives the symmetry of its model, and needs no example where the model says what it takes."""

import pytest
import torch
from torch import nn

from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.server.run.symmetry_of_run import symmetry_of_run
from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.discovery import discover
from tests.strategies.symmetry.tiny_transformers import hf


@pytest.fixture(autouse=True)
def _no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def classifier() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=32, max_position_embeddings=16, **sizes)).eval()


def test_a_model_of_transformers_needs_no_example(tmp_path) -> None:
    model = classifier()
    side, symmetry = symmetry_of_run(Settings(), model, None, None, model.state_dict())
    assert side == "client"
    assert symmetry is not None
    tokens = {"input_ids": torch.arange(12).reshape(2, 6)}
    # The example of the run is not the user's, and both give the same symmetry.
    assert symmetry == discover(model, tokens).symmetry
    assert check(model, symmetry, tokens).passed
    # The next run finds it again.
    assert len([*(tmp_path / "fedbasin" / "symmetries").iterdir()]) == 1


def test_another_model_needs_one() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert symmetry_of_run(Settings(), model, None, None, model.state_dict()) == ("off", None)
    with pytest.raises(SettingsError, match="pass example=inputs to FedBasin"):
        symmetry_of_run(Settings(align="client"), model, None, None, model.state_dict())
