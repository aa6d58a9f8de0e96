"""Models of which only low-rank adapters travel: their base has learned the first half of the classes, and stays.

The base is the same for every rule and every seed, and trained once in a process. Adapters are on all linear layers,
as `peft` makes them, with A drawn so that what it computes is as large as what it reads.
"""

import warnings
from functools import cache

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from tests.protocol.models import Make
from tests.protocol.spec import SpecError
from tests.protocol.task import Task
from tests.protocol.training import Training, fit

_PRETRAINING = Training(epochs=20)


class Bert(nn.Module):
    """A tiny BERT of `transformers` with random weights; logits from the first token."""

    def __init__(self, task: Task, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        if not task.tokens:
            raise SpecError("lora_bert reads tokens, and this task has numbers; choose lora")
        config = BertConfig(
            vocab_size=task.tokens,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=task.shape[-1],
            num_labels=task.classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.net = BertForSequenceClassification(config)

    def forward(self, x: Int[Tensor, "batch place"]) -> Float[Tensor, "batch classes"]:
        return self.net(input_ids=x).logits


def adapted(base: Make, task: Task, rank: int) -> PeftModel:
    """The pretrained base with fresh adapters, from PyTorch's own random numbers."""
    seed = torch.initial_seed()
    model = base(task)
    model.load_state_dict(_pretrained(base, task))
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    with warnings.catch_warnings():
        # peft asks transformers under a name that the latter is about to drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        result = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    torch.manual_seed(seed)
    for name, parameter in result.named_parameters():
        if "lora_A" in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return result


@cache
def _pretrained(base: Make, task: Task) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = base(task)
    inputs, labels = task.train
    known = labels < task.classes // 2
    fit(model, (inputs[known], labels[known]), _PRETRAINING, seed=0)
    return model.state_dict()
