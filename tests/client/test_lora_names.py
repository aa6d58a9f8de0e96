"""Which tensors of a client's own model those are that travel."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft import get_peft_model_state_dict as saved
from torch import nn

from fedbasin.client.lora_names import complete_state, model_names


def adapted(**config):
    base = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 2))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], **config))


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["3"]}, {"use_dora": True}], ids=str)
def test_what_peft_saves_is_found_in_its_model(config):
    model = adapted(**config)
    state, own = saved(model), model.state_dict()
    names = model_names(model, state)
    assert len(set(names.values())) == len(state)
    for name, tensor in state.items():
        assert torch.equal(own[names[name]], tensor), name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(names.values()) == trained


def test_a_models_own_names_stay():
    model = adapted()
    assert model_names(model, model.state_dict()) == {n: n for n in model.state_dict()}


def test_the_base_completes_what_travels():
    model = adapted()
    moved = {name: tensor + 1 for name, tensor in saved(model).items()}
    found = complete_state(model, moved)
    assert found.keys() == model.state_dict().keys()
    model.load_state_dict(found)
    for name, tensor in saved(model).items():
        assert torch.equal(tensor, moved[name])


def test_a_state_without_adapters_is_not_completed():
    assert complete_state(nn.Linear(2, 2), {"weight": torch.ones(2, 2)}).keys() == {"weight"}


def test_tensors_that_the_model_lacks_are_named():
    with pytest.raises(ValueError, match=r"no tensor 'x\.lora_A\.weight'.*with its adapters"):
        complete_state(adapted(), {"x.lora_A.weight": torch.ones(2, 8)})
