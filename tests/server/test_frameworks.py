"""Apps that train with Hugging Face models or in the shape of Lightning, as their examples for Flower are written."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from fedbasin import FedBasin, basin
from tests import tiny
from tests.federation import Federation

NAMES = tiny.OF_ANY_MODEL
SAMPLE = ("auto", "fedavg", "regmean")
WORDS, PLACES, CLASSES = 20, 6, 3


def distilbert():
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=WORDS,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=PLACES,
        num_labels=CLASSES,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    )
    return DistilBertForSequenceClassification(config)


def sentences(context):
    """Batches as a tokenizer and a data collator give them: dictionaries with an attention mask and labels."""
    draw = torch.Generator().manual_seed(context.node_config["partition-id"])
    batches = []
    for _ in range(3):
        words = torch.randint(1, WORDS, (8, PLACES), generator=draw)
        mask = torch.ones_like(words)
        mask[: len(mask) // 2, PLACES - 2 :] = 0
        batches.append({"input_ids": words, "attention_mask": mask, "labels": words[:, 0] % CLASSES})
    return batches


class LitClassifier(nn.Module):
    """Has what LightningModules have: the network as an attribute, the loss and the optimizer as methods."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_index):
        del batch_index
        inputs, targets = batch
        return self.loss(self(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def pictures(context):
    draw = torch.Generator().manual_seed(context.node_config["partition-id"])
    inputs = torch.randn(60, 1, 3, 4, generator=draw)
    dataset = torch.utils.data.TensorDataset(inputs, inputs.flatten(1)[:, :CLASSES].argmax(1))
    return torch.utils.data.DataLoader(dataset, batch_size=16)


def train_transformer(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def train_lightning(model, batches):
    optimizer = model.configure_optimizers()
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        model.training_step(batch, index).backward()
        optimizer.step()


def transformer_loss(model, batches):
    return sum(model(**batch).loss.item() for batch in batches) / len(batches)


def lightning_loss(model, batches):
    return sum(cross_entropy(model(x), y).item() for x, y in batches) / len(batches)


FRAMEWORKS = {
    "transformers": (distilbert, sentences, train_transformer, transformer_loss),
    "lightning": (LitClassifier, pictures, train_lightning, lightning_loss),
}


@pytest.mark.parametrize(
    ("framework", "recipe"),
    [
        pytest.param(framework, recipe, marks=() if recipe in SAMPLE else pytest.mark.slow)
        for framework in FRAMEWORKS
        for recipe in NAMES
    ],
)
def test_runs_and_learns(tmp_path, framework, recipe):
    build, load, fit, loss = FRAMEWORKS[framework]
    app = ClientApp(mods=[basin(model=build, data=load)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, batches = build(), load(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        fit(model, batches)
        metrics = MetricRecord({"num-examples": 10 + context.node_config["partition-id"]})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = build().eval()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        with torch.no_grad():
            metrics = MetricRecord({"loss": loss(model, load(context)), "num-examples": 10})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    first = next(iter(load(Context(1, 1, {"partition-id": 0}, RecordDict(), {}))))
    example = {k: v for k, v in first.items() if k != "labels"} if isinstance(first, dict) else first[0]
    strategy = FedBasin(model=build(), example=example, recipe=recipe, folder=tmp_path, poll_seconds=0.01)
    result = strategy.start(
        Federation(app, {}, 3).grid(), ArrayRecord(build().state_dict()), 3, train_config=ConfigRecord({"lr": 0.01})
    )
    losses = [m["loss"] for m in result.evaluate_metrics_clientapp.values()]
    assert losses[-1] < losses[0]
    for report in result.reports:
        assert {c.outcome for stage in report.stages for c in stage.clients} == {"accepted"}
    build().load_state_dict(result.state_dict)
