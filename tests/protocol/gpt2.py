"""A tiny GPT-2 of `transformers` with random weights."""

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.protocol.spec import SpecError
from tests.protocol.task import Task


class Gpt2(nn.Module):
    """Logits of the next token at every place."""

    def __init__(self, task: Task, width: int, blocks: int) -> None:
        super().__init__()
        if task.kind != "language-modelling":
            raise SpecError(f"gpt2 predicts the next token, and this task is {task.kind}")
        config = GPT2Config(
            vocab_size=task.tokens,
            n_positions=task.shape[-1],
            n_embd=width,
            n_layer=blocks,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.net = GPT2LMHeadModel(config)

    def forward(self, x: Int[Tensor, "batch place"]) -> Float[Tensor, "batch place token"]:
        return self.net(input_ids=x).logits
