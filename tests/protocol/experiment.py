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
        held_out: share of what a client trains on by which the mod compares models; None for the examples that the
            client does not train on.
    """

    task: Task
    slices: list[Tensor]
    make_model: Callable[[int], nn.Module]
    training: Training
    seed: int
    record: Record
    meter: Meter = field(default_factory=Meter)
    held_out: float | None = None

    def examples(self, client: int) -> Examples:
        """Those that one client trains on."""
        return self._parted(client)[1]

    def others(self, client: int) -> Examples:
        """Those that it keeps for evaluation, as the apps of Flower's quickstarts do."""
        return self._parted(client)[0]

    def own_model(self, client: int) -> nn.Module:
        """A client's model with an initialisation of its own."""
        return self.make_model(1000 + 77 * self.seed + client)

    def order(self, client: int, server_round: int) -> int:
        """The seed of the order in which a client reads its examples in a round."""
        return 1000 * (server_round - 1) + client + 77 * self.seed

    def _parted(self, client: int) -> tuple[Examples, Examples]:
        inputs, labels = self.task.train
        own = self.slices[client]
        # Splits list examples label by label.
        draw = torch.Generator().manual_seed(1000 * self.seed + client)
        drawn = torch.randperm(len(own), generator=draw)[: self._held_of(len(own))]
        held = torch.zeros(len(own), dtype=torch.bool).index_fill_(0, drawn, True)
        return (inputs[own[held]], labels[own[held]]), (inputs[own[~held]], labels[own[~held]])

    def _held_of(self, own: int) -> int:
        held = self.training.held
        return max(1, round(held * own)) if held else 0

    def federation(self, run_config: dict[str, Any]) -> MeteredFederation:
        """All clients, with Flower's run config."""
        return MeteredFederation(make_app(self), run_config, len(self.slices), meter=self.meter)

    def measure(self, server_round: int, predict: Predict) -> None:
        """Record what the server has after a round."""
        meter = self.meter
        with meter.nobody():
            accuracy, loss = evaluate(predict, self.task.test, self.task.kind)
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

    # What does not fit is refused here.
    setting.training.make_optimizer(make_model(setting.seed))
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
        return experiment.own_model(_index(context))

    def batches(context: Context) -> list[Examples]:
        return _batches(experiment.examples(_index(context)))

    def others(context: Context) -> list[Examples]:
        return _batches(experiment.others(_index(context)))

    kind, share = experiment.task.kind, experiment.held_out
    app = ClientApp(mods=[basin(own_model, batches, others if share is None else share, task=kind)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, config = _index(context), message.content.config_records["config"]
        model = _loaded(experiment, message)
        freeze(model, str(config.get("frozen-factor", "")))
        examples = experiment.examples(client)
        seed = experiment.order(client, int(str(config["server-round"])))
        pull = float(str(config.get("proximal-mu", 0.0)))
        loss = fit(model, examples, experiment.training, seed, pull, kind)
        metrics = MetricRecord({"train-loss": loss, "num-examples": len(examples[1])})
        arrays = ArrayRecord(state_of(model))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def test(message: Message, context: Context) -> Message:
        examples = experiment.others(_index(context))
        accuracy, loss = evaluate(_loaded(experiment, message).eval(), examples, kind)
        metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(examples[1])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _index(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _loaded(experiment: Experiment, message: Message) -> nn.Module:
    model = experiment.make_model(experiment.seed)
    receive(model, message.content.array_records["arrays"].to_torch_state_dict())
    return model
