"""Ten clients on the digits, two of them hostile: what they send, and what one run ends in."""

import tempfile
from collections.abc import Callable
from functools import cache

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedbasin.client import basin
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.header import HEADER, STATISTICS, read_header, write_header
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.strategies.judging.finite_model import NonFiniteModelError
from fedbasin.strategies.symmetry.discover.discovery import discover
from tests.federation import Federation
from tests.one_round import task
from tests.running import run

CLIENTS = 10
HOSTILE = (3, 7)
ROUNDS = 3
WIDTH = 64
DIRICHLET = 0.5

Change = Callable[[RecordDict], None]
State = dict[str, Tensor]


def scale_model(factor: float) -> Change:
    def change(content: RecordDict) -> None:
        _change_arrays(content, "arrays", lambda values: factor * values)

    return change


def scale_statistics(factor: float) -> Change:
    def change(content: RecordDict) -> None:
        if STATISTICS in content:
            _change_arrays(content, STATISTICS, lambda values: factor * values)

    return change


def claim_examples(examples: float) -> Change:
    def change(content: RecordDict) -> None:
        for record in content.values():
            if isinstance(record, MetricRecord) and "num-examples" in record:
                record["num-examples"] = examples

    return change


def claim_losses(claimed: float) -> Change:
    """Claim, where clients choose between models, that the first is without a loss and all others have this one."""

    def change(content: RecordDict) -> None:
        header = read_header(content, pb.Reply()) if HEADER in content else pb.Reply()
        path = header.path
        if path.loss_after:
            others = len(path.points) - 1
            path.loss_after[:] = [0.0, *[claimed * path.examples] * others]
            path.correct_after[:] = [path.examples, *[0.0] * others] if path.correct_after else []
            write_header(content, header)

    return change


def _change_arrays(content: RecordDict, name: str, change: Callable[[Tensor], Tensor]) -> None:
    if name not in content:
        return
    tensors = {key: torch.from_numpy(array.numpy().copy()) for key, array in content[name].items()}
    changed = {key: change(t).to(t.dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    content[name] = ArrayRecord({key: Array(tensor.numpy()) for key, tensor in changed.items()})


def _unchanged(labels: Tensor) -> Tensor:
    return labels


def _flipped(labels: Tensor) -> Tensor:
    return 9 - labels


def _honest(sent: State, trained: State) -> State:
    del sent
    return trained


def _turned(sent: State, trained: State) -> State:
    """Return an update of the same size in the opposite direction."""
    return {name: 2 * sent[name] - tensor for name, tensor in trained.items()}


def _noise(sent: State, trained: State) -> State:
    """Return noise of the size of the update, tensor by tensor."""
    draw = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in trained.items()}
    return {n: sent[n] + drawn[n] * (t - sent[n]).norm() / drawn[n].norm() for n, t in trained.items()}


class Attack:
    """What hostile clients do: to their labels, to their update, and to their reply."""

    def __init__(
        self,
        *changes: Change,
        labels: Callable[[Tensor], Tensor] = _unchanged,
        update: Callable[[State, State], State] = _honest,
    ) -> None:
        self.changes = changes
        self.labels = labels
        self.update = update

    def tamper(self, reply: Message) -> Message:
        if not reply.has_error():
            for change in self.changes:
                change(reply.content)
        return reply


ATTACKS = {
    "none": Attack(),
    # Refused at once: what the honest clients reach alone.
    "model of NaN": Attack(scale_model(float("nan"))),
    "flipped labels": Attack(labels=_flipped),
    "model x -10": Attack(scale_model(-10.0)),
    "2^53 examples, sign flip": Attack(scale_model(-1.0), claim_examples(2.0**53)),
    "flipped labels, statistics x 1e6": Attack(scale_statistics(1e6), labels=_flipped),
    # Below the multiple above which statistics are left out.
    "flipped labels, statistics x 4": Attack(scale_statistics(4.0), labels=_flipped),
    "update turned round": Attack(update=_turned),
    "noise of the update's size": Attack(update=_noise),
    "losses of a million": Attack(claim_losses(1e6)),
}


@cache
def _partition(client: int) -> tuple[Tensor, Tensor]:
    return task.load_partition(client, CLIENTS, DIRICHLET, 0)


def _data(context: Context, attack: Attack) -> tuple[Tensor, Tensor]:
    client = int(context.node_config["partition-id"])
    images, labels = _partition(client)
    return images, attack.labels(labels) if client in HOSTILE else labels


def _app(attack: Attack) -> ClientApp:
    app = ClientApp(
        mods=[basin(model=lambda: task.make_model(WIDTH, 0), data=lambda context: [_data(context, attack)])]
    )

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        model = task.make_model(WIDTH, 0)
        sent = message.content["arrays"].to_torch_state_dict()
        model.load_state_dict(sent)
        examples = _data(context, attack)
        number = message.content["config"]["server-round"]
        loss = task.train(model, examples, 5, 32, 1000 * number + context.node_id)
        metrics = MetricRecord({"loss": loss, "num-examples": len(examples[1])})
        is_hostile = int(context.node_config["partition-id"]) in HOSTILE
        state = attack.update(sent, model.state_dict()) if is_hostile else model.state_dict()
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    return app


def accuracy(recipe: str, attack: Attack, **settings: object) -> float | None:
    """Return the accuracy on the test examples after all rounds; None for a run that failed."""
    model = task.make_model(WIDTH, 0)
    tamper = {} if not attack.changes else {100 + client: attack.tamper for client in HOSTILE}
    with tempfile.TemporaryDirectory() as folder:
        config = {"fedbasin.poll-seconds": 0.001, "fedbasin.fraction-evaluate": 0.0}
        federation = Federation(_app(attack), config, CLIENTS, tamper)
        symmetry = discover(task.make_model(WIDTH, 0), torch.zeros(2, task.PIXELS)).symmetry
        try:
            result = run(
                federation,
                model,
                ROUNDS,
                symmetry=symmetry,
                recipe=recipe,
                min_train_nodes=CLIENTS,
                min_available_nodes=CLIENTS,
                folder=folder,
                **settings,
            )
        except (QuorumLostError, NonFiniteModelError):
            return None
    return _accuracy(model, result.state_dict)


def _accuracy(model: nn.Module, state: dict[str, Tensor]) -> float:
    model.load_state_dict(state)
    return task.evaluate(model, task.load_split()[1])[1]
