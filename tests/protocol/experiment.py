"""A setting made real: examples of every client, the first model, the app that they all run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedbasin.client import basin
from fedbasin.strategies.tensors.state import State
from tests.protocol import tasks
from tests.protocol.meter import Meter, MeteredFederation
from tests.protocol.models import MODELS
from tests.protocol.setting import Point, Setting
from tests.protocol.spec import made, parse
from tests.protocol.splits import SPLITS
from tests.protocol.task import Examples, Task
from tests.protocol.training import Training, evaluate, fit, warm_up
from tests.protocol.travelling import freeze, receive, state_of

Predict: TypeAlias = Callable[[Tensor], Tensor]
Record: TypeAlias = Callable[[Point], None]

_DATA_BATCH = 256


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that a rule needs.

    Attributes:
        task: the examples.
        slices: indices of each client's training examples.
        make_model: the model with the initial weights of a seed.
        training: what clients do.
        seed: of the whole.
        record: takes each point.
        meter: of what it costs.
        held: share of its examples that a client does not train on, but compares models on.
    """

    task: Task
    slices: list[Tensor]
    make_model: Callable[[int], nn.Module]
    training: Training
    seed: int
    record: Record
    meter: Meter = field(default_factory=Meter)
    held: float = 0.0

    def examples(self, client: int) -> Examples:
        """Those that one client trains on."""
        return self._parted(client)[1]

    def held_out(self, client: int) -> Examples:
        """Those that it does not."""
        return self._parted(client)[0]

    def _parted(self, client: int) -> tuple[Examples, Examples]:
        inputs, labels = self.task.train
        own = self.slices[client]
        # Splits list examples label by label.
        draw = torch.Generator().manual_seed(1000 * self.seed + client)
        drawn = torch.randperm(len(own), generator=draw)[: self._held_of(len(own))]
        held = torch.zeros(len(own), dtype=torch.bool).index_fill_(0, drawn, True)
        return (inputs[own[held]], labels[own[held]]), (inputs[own[~held]], labels[own[~held]])

    def _held_of(self, own: int) -> int:
        return max(1, round(self.held * own)) if self.held else 0

    def federation(self, run_config: dict[str, Any]) -> MeteredFederation:
        """All clients, with Flower's run config."""
        return MeteredFederation(make_app(self), run_config, len(self.slices), meter=self.meter)

    def measure(self, server_round: int, predict: Predict) -> None:
        """Record what the server has after a round."""
        meter = self.meter
        with meter.nobody():
            accuracy, loss = evaluate(predict, self.task.test)
            costs = meter.bytes_up, meter.bytes_down, meter.client_seconds, meter.server_seconds
            self.record(Point(server_round, accuracy, loss, *costs))

    def measure_state(self, server_round: int, state: State) -> None:
        """The same of a global model."""
        with self.meter.nobody():
            model = self.make_model(self.seed).eval()
            receive(model, state)  # of float32 again, where a strategy has made float64
        self.measure(server_round, model)


def prepare(setting: Setting, cache_folder: Path, record: Record) -> Experiment:
    """Load, split and make what a setting names.

    Raises:
        SpecError: it names something that does not exist, or that does not fit the task.
    """
    task = tasks.load(setting.task, cache_folder)
    split = made("split", parse(setting.split), SPLITS)
    make = made("model", parse(setting.model), MODELS)

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return _fast(make(task))

    make_model(setting.seed)  # what does not fit is refused here
    warm_up()
    slices = split(task, setting.clients, setting.seed)
    return Experiment(task, slices, make_model, setting.training, setting.seed, record)


def _batches(examples: Examples) -> list[Examples]:
    inputs, labels = examples
    return list(zip(inputs.split(_DATA_BATCH), labels.split(_DATA_BATCH), strict=True))


def _fast(model: nn.Module) -> nn.Module:
    """In the layout that convolutions on a processor are fastest in; the numbers are the same."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def make_app(experiment: Experiment) -> ClientApp:
    """An ordinary Flower app with fedbasin's mod, which other servers' messages pass untouched."""

    def own_model(context: Context) -> nn.Module:
        return experiment.make_model(1000 + 77 * experiment.seed + _index(context))

    def batches(context: Context) -> list[Examples]:
        return _batches(experiment.examples(_index(context)))

    def held_out(context: Context) -> list[Examples]:
        return _batches(experiment.held_out(_index(context)))

    app = ClientApp(mods=[basin(own_model, batches, held_out if experiment.held else 0.1)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, config = _index(context), message.content.config_records["config"]
        model = _loaded(experiment, message)
        freeze(model, str(config.get("frozen-factor", "")))
        examples = experiment.examples(client)
        seed = 1000 * (int(str(config["server-round"])) - 1) + client + 77 * experiment.seed
        pull = float(str(config.get("proximal-mu", 0.0)))
        loss = fit(model, examples, experiment.training, seed, pull)
        metrics = MetricRecord({"train-loss": loss, "num-examples": len(examples[1])})
        arrays = ArrayRecord(state_of(model))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def test(message: Message, context: Context) -> Message:
        examples = experiment.examples(_index(context))
        accuracy, loss = evaluate(_loaded(experiment, message).eval(), examples)
        metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(examples[1])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _index(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _loaded(experiment: Experiment, message: Message) -> nn.Module:
    model = experiment.make_model(experiment.seed)
    receive(model, message.content.array_records["arrays"].to_torch_state_dict())
    return model
