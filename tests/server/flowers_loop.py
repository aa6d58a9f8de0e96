"""FedBasin under Flower's own loop, which its differential-privacy wrappers have too, and what comes of it."""

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg, Strategy

from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.judging.outcomes import Outcome
from tests import tiny
from tests.server.fake_grid import FakeGrid

BAD = 101


class ListGrid(FakeGrid):
    """Gives all replies as one list, as Flower's own grid does."""

    def send_and_receive(self, messages, *, timeout=None):
        keys = self.push_messages(list(messages))
        return self.pull_messages([key for key in keys if key])


def grid_of(federation):
    return ListGrid(federation.contexts, federation.answer)


def arrays_of(model):
    return ArrayRecord(model.state_dict())


def start(strategy, federation, rounds=1, model=None):
    """Run Flower's own loop: a wrapper has it, and FedBasin's methods run under it too."""
    arrays = arrays_of(model or tiny.net())
    return Strategy.start(strategy, grid_of(federation), arrays, rounds)


def sampling(nodes=3):
    return {"min_available_nodes": nodes, "min_train_nodes": nodes, "min_evaluate_nodes": nodes}


def fed_basin(recipe="fedavg", symmetry=None, nodes=3, **settings):
    return FedBasin(recipe, symmetry, **{**sampling(nodes), **settings})


def flowers_fedavg():
    return FedAvg(**sampling())


def refused(strategy):
    return {node: Outcome[report.outcome] for node, report in strategy.refusals.items()}


def state_of(result):
    return result.arrays.to_torch_state_dict()


def is_finite(result):
    return all(bool(t.isfinite().all()) for t in state_of(result).values())


def nan(reply):
    state = reply.content["arrays"].to_torch_state_dict()
    state["0.weight"][0, 0] = float("nan")
    reply.content["arrays"] = ArrayRecord(state)
    return reply


def nan_in_training(reply):
    return nan(reply) if reply.has_content() and "arrays" in reply.content else reply
