"""Clients that train low-rank adapters alone: an ordinary `peft` app with fedbasin's mod, on a generated task."""

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, get_peft_model
from peft import get_peft_model_state_dict as saved
from peft import set_peft_model_state_dict as load
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from fedbasin.client import basin
from fedbasin.strategies.fusion.lora.lora_factors import as_module, narrow
from tests.federation import Federation

WORDS, PLACES, CLASSES = 12, 6, 3
RANK = 3


@cache
def _base() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return BertForSequenceClassification(_config()).state_dict()


def _config() -> BertConfig:
    return BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=PLACES,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def model(rank: int = RANK, seed: int = 0, **scaling: object) -> PeftModel:
    """A tiny BERT with adapters on queries, values and the embedding, and a head that is trained whole.

    Args:
        rank: of the adapters.
        seed: of their first factors.
        scaling: settings of the adapters' scale, in place of an alpha in proportion to the rank.
    """
    base = BertForSequenceClassification(_config())
    base.load_state_dict(_base())
    torch.manual_seed(seed)
    targets = ["query", "value", "word_embeddings"]
    # alpha in proportion to the rank: clients of several ranks then scale their products alike.
    settings = {"lora_alpha": 2 * rank, **scaling}
    config = LoraConfig(r=rank, target_modules=targets, modules_to_save=["classifier"], **settings)
    return get_peft_model(base, config)


def server_model(rank: int = RANK) -> torch.nn.Module:
    return as_module(saved(model(rank)))


def examples(node: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sequences whose class is the number of their first word, modulo the classes."""
    draw = torch.Generator().manual_seed(node)
    words = torch.randint(WORDS, (24 + node, PLACES), generator=draw)
    return {"input_ids": words}, words[:, 0] % CLASSES


def make_app(rank=lambda node: RANK, ignores_frozen=(), scaling=lambda node: {}, device="cpu") -> ClientApp:
    """The app; `app.sent` has every client's last state, by node.

    Args:
        rank: of each client's adapters.
        ignores_frozen: nodes that train also what a round freezes.
        scaling: settings of each client's scale.
        device: where the mod's model lives; training is on the CPU, so that every device has the same models.
    """

    def node_of(context: Context) -> int:
        return int(context.node_config["partition-id"])

    app = ClientApp(
        mods=[
            basin(
                model=lambda context: model(
                    rank(node_of(context)), seed=7 + node_of(context), **scaling(node_of(context))
                ).to(device),
                data=lambda context: [examples(node_of(context))],
            )
        ]
    )
    app.sent, app.configs = {}, []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = node_of(context)
        config = message.content["config"]
        app.configs.append(dict(config))
        net = model(rank(node), **scaling(node))
        load(net, narrow(message.content["arrays"].to_torch_state_dict(), rank(node)))
        frozen = str(config.get("frozen-factor", ""))
        if frozen and node not in ignores_frozen:
            for name, parameter in net.named_parameters():
                parts = (frozen, frozen.replace("lora_", "lora_embedding_"))
                if any(part in name for part in parts):
                    parameter.requires_grad_(False)
        inputs, targets = examples(node)
        optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
        for _ in range(4):
            optimiser.zero_grad()
            loss = cross_entropy(net(**inputs).logits, targets)
            loss.backward()
            optimiser.step()
        app.sent[node] = {name: t.clone() for name, t in saved(net).items()}
        metrics = MetricRecord({"loss": loss.item(), "num-examples": len(targets)})
        content = {"arrays": ArrayRecord(saved(net)), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    return app


def federation(clients=3, app=None, tamper=None, **config):
    """Clients 100, 101, ...; keywords are settings of fedbasin, with underscores."""
    own = {f"fedbasin.{name.replace('_', '-')}": value for name, value in config.items()}
    settings = {
        "fedbasin.min-available-nodes": clients,
        "fedbasin.poll-seconds": 0.001,
        "fedbasin.fraction-evaluate": 0.0,
        **own,
    }
    return Federation(app or make_app(), settings, clients, tamper or {})
