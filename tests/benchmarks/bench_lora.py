"""Adapters fused by their products, their factors and the inputs that they read: accuracy round by round.

`PYTHONPATH=. .venv/bin/python -m tests.benchmarks lora`; the tables of docs/lora.md are this figure.
"""

import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, get_peft_model
from peft import get_peft_model_state_dict as saved
from peft import set_peft_model_state_dict as load
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedbasin.client import basin
from fedbasin.server.serve import Hooks, serve
from fedbasin.strategies.batches import Batch, forward
from fedbasin.strategies.fusion.adapters import holding
from fedbasin.strategies.state import State
from tests.benchmarks.figures import Figure, Goal, Say
from tests.federation import Federation

RECIPES = ("lora", "lora-factors", "lora-rotated", "lora-gram", "lorm")
CLIENTS = 10
ALPHA = 0.3
SEEDS = (0, 1)
ROUNDS = 6
SHOWN = (1, 2, 3, 4, 6)
CLASSES = 10
GOAL = 0.93

HOW = f"""{CLIENTS} clients with label shares from Dirichlet({ALPHA}), a base that was trained on the first five of ten classes and
stays at home, adapters from a shared start, AdamW in batches of 32; test accuracy of the global model after each round,
mean of {len(SEEDS)} seeds. `digits`: a perceptron 64-256-256-10, adapters of rank 16 on all layers, 20 local epochs at 0.002.
`topics`: a BERT of two layers and width 32 from `transformers` reads texts of 16 words, whose odds the class decides;
adapters of rank 8 by `peft` on all its linear layers, 10 local epochs at 0.002.
Everything runs through `fedbasin.server.serve` and the clients' mod; `lorm` trains one factor in a round."""

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """A task and the model that is adapted to it.

    Attributes:
        base: makes the model without adapters.
        data: training and test examples.
        adapters: where they are.
        epochs: of a client, in a round.
        base_epochs: of the base, on half of the classes.
    """

    name: str
    base: Callable[[], nn.Module]
    data: Callable[[], tuple[Examples, Examples]]
    adapters: LoraConfig
    epochs: int
    base_epochs: int

    @cached_property
    def examples(self) -> tuple[Examples, Examples]:
        return self.data()

    @cached_property
    def pretrained(self) -> dict[str, Tensor]:
        """The base's state, trained once."""
        torch.manual_seed(0)
        model = self.base()
        inputs, labels = self.examples[0]
        known = labels < CLASSES // 2
        fit(model, (inputs[known], labels[known]), self.base_epochs, 1e-3, seed=0)
        return model.state_dict()

    def adapted(self, seed: int) -> PeftModel:
        model = self.base()
        model.load_state_dict(self.pretrained)
        with warnings.catch_warnings():
            # peft asks transformers under a name that the latter is about to drop.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            result = get_peft_model(model, self.adapters)
        torch.manual_seed(seed)
        for name, parameter in result.named_parameters():
            if "lora_A" in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        return result

    def shares(self, seed: int) -> list[Tensor]:
        """The clients' examples; nobody has none."""
        draw, labels = np.random.default_rng(seed), self.examples[0][1].numpy()
        parts: list[list[int]] = [[] for _ in range(CLIENTS)]
        for label in range(CLASSES):
            own = draw.permutation(np.where(labels == label)[0])
            cuts = (np.cumsum(draw.dirichlet([ALPHA] * CLIENTS)) * len(own)).astype(int)[:-1]
            for part, some in zip(parts, np.split(own, cuts), strict=True):
                part += list(some)
        return [torch.tensor(part) for part in parts if len(part) > 1]


def fit(model: nn.Module, examples: Examples, epochs: int, rate: float, seed: int) -> None:
    """Train in place what needs a gradient."""
    inputs, labels = examples
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, rate, fused=True)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=draw).split(32):
            optimiser.zero_grad()
            cross_entropy(logits(model, inputs[batch]), labels[batch]).backward()
            optimiser.step()


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return forward(model, Batch(inputs, torch.zeros(len(inputs))))


def accuracies(setting: Setting, recipe: str, seed: int) -> list[float]:
    """Of the global model, after each round."""
    shares, (train, test) = setting.shares(seed), setting.examples
    model = setting.adapted(seed)
    reached: list[float] = []

    def evaluate(number: int, state: State) -> dict[str, float]:
        load(model, dict(state))
        model.eval()
        with torch.no_grad():
            hits = logits(model, test[0]).argmax(1) == test[1]
        reached.extend([hits.double().mean().item()] if number else [])
        return {}

    app = make_app(setting, [(train[0][s], train[1][s]) for s in shares], model)
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "fedbasin.recipe": recipe,
            "fedbasin.fraction-evaluate": 0.0,
            "fedbasin.nodes": len(shares),
            "fedbasin.quorum": 1.0,
            "fedbasin.poll-seconds": 0.001,
            "fedbasin.folder": folder,
        }
        federation = Federation(app, config, len(shares))
        start, hooks = holding(saved(model)), Hooks(evaluate=evaluate)
        serve(federation.grid(), federation.server_context(), start, ROUNDS, hooks=hooks)
    return reached


def make_app(setting: Setting, shares: list[Examples], model: PeftModel) -> ClientApp:
    """An ordinary app of peft; all clients take turns with one model."""

    def own(context: Context) -> Examples:
        return shares[int(context.node_config["partition-id"])]

    app = ClientApp(mods=[basin(lambda _: model, lambda context: [own(context)])])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        load(model, message.content.array_records["arrays"].to_torch_state_dict())
        with freezing(model, str(config.get("frozen-factor", ""))):
            seed = 7 * int(str(config["server-round"])) + int(context.node_config["partition-id"])
            fit(model, own(context), setting.epochs, 2e-3, seed)
        arrays = ArrayRecord({name: t.contiguous() for name, t in saved(model).items()})
        metrics = MetricRecord({"num-examples": len(own(context)[1])})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


class freezing:  # noqa: N801 - read as a word, like contextlib's own
    """While active, one factor of a model's adapters has no gradient."""

    def __init__(self, model: nn.Module, factor: str) -> None:
        self._frozen = [p for n, p in model.named_parameters() if factor and factor in n]

    def __enter__(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)


def digits() -> tuple[Examples, Examples]:
    images, labels = load_digits(return_X_y=True)
    scaled = (images / 16).astype(np.float32)
    split = train_test_split(scaled, labels, test_size=0.3, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = map(torch.tensor, split)
    return (train, train_labels), (test, test_labels)


def perceptron() -> nn.Module:
    widths = [64, 256, 256, 10]
    layers = [nn.Linear(*sizes) for sizes in pairwise(widths)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


WORDS, PLACES, TRAINED, TESTED = 32, 16, 1000, 500


def topics() -> tuple[Examples, Examples]:
    draw = np.random.default_rng(0)
    odds = draw.dirichlet([0.2] * WORDS, CLASSES).cumsum(1)
    labels = np.arange(TRAINED + TESTED) % CLASSES
    thresholds = draw.random((len(labels), PLACES, 1))
    words = (thresholds < odds[labels][:, None]).argmax(2)
    texts, named = torch.tensor(words), torch.tensor(labels)
    return (texts[:TRAINED], named[:TRAINED]), (texts[TRAINED:], named[TRAINED:])


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=PLACES,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


SETTINGS = (
    Setting(
        "digits",
        perceptron,
        digits,
        LoraConfig(r=16, lora_alpha=16, target_modules=["0", "2", "4"]),
        epochs=20,
        base_epochs=20,
    ),
    Setting(
        "topics",
        bert,
        topics,
        LoraConfig(
            r=8,
            lora_alpha=8,
            target_modules=["query", "key", "value", "dense", "classifier"],
        ),
        epochs=10,
        base_epochs=15,
    ),
)


def runs(say: Say) -> Iterator[tuple[str, str, list[float]]]:
    """Every setting and recipe with its accuracies, means of the seeds."""
    for setting in SETTINGS:
        for recipe in RECIPES:
            say(f"lora: {setting.name}, {recipe}")
            found = map(partial(accuracies, setting, recipe), SEEDS)
            yield setting.name, recipe, [statistics.mean(of) for of in zip(*found, strict=True)]


def measure(say: Say) -> Figure:
    torch.set_num_threads(1)
    found = {(setting, recipe): reached for setting, recipe, reached in runs(say)}
    rows = [
        (f"{setting}, `{recipe}`", *(f"{reached[number - 1]:.3f}" for number in SHOWN))
        for (setting, recipe), reached in found.items()
    ]
    third = {key: reached[2] for key, reached in found.items()}
    goals = [
        Goal(
            f"`lora` reaches {GOAL} on the digits in round 3",
            f"{third['digits', 'lora']:.3f}; factors {third['digits', 'lora-factors']:.3f}",
            third["digits", "lora"] >= GOAL,
        ),
        *(
            Goal(
                f"`lora-gram` is ahead of `lora` in round 3, {setting.name}",
                f"{third[setting.name, 'lora-gram'] - third[setting.name, 'lora']:+.3f}",
                third[setting.name, "lora-gram"] > third[setting.name, "lora"],
            )
            for setting in SETTINGS
        ),
    ]
    columns = ("", *(f"round {number}" for number in SHOWN))
    return Figure("Adapters of low rank", HOW, columns, rows, goals)
