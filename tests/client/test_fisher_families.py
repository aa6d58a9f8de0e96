"""Fisher information of classifiers of `transformers` on padded sentences; many decide by their attention mask."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from fedbasin.strategies.statistics.fisher import diagonal_fisher

WORDS, PLACES, CLASSES, END = 20, 6, 3, 1
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": {},
    "roberta": {},
    "deberta-v2": {},
    "distilbert": {},
    "gpt2": {},
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "t5": {"d_kv": 8, "d_ff": 24, "eos_token_id": END, "decoder_start_token_id": 0},
}


def sentences():
    words = torch.randint(2, WORDS, (4, PLACES), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(words)
    words[:, -1] = END
    words[:2, 3], words[:2, 4:], mask[:2, 4:] = END, 0, 0
    return {"input_ids": words, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}


# torch runs Mixtral's product of experts row by row, which is slower and right.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_batch_is_the_sum_of_its_sentences(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = sentences()
    if family == "t5":
        # It takes the last token of every sentence, of which each needs as many.
        batch["input_ids"][:2, 3] = 2
        batch["input_ids"][:2, -1] = END
    alone = [diagonal_fisher(model, [{k: v[row : row + 1] for k, v in batch.items()}]) for row in range(4)]
    together = diagonal_fisher(model, [batch])
    assert sum(float(fisher.sum()) for fisher in together.values()) > 0
    for name, fisher in together.items():
        torch.testing.assert_close(fisher, sum(one[name] for one in alone), rtol=1e-3, atol=1e-6)
