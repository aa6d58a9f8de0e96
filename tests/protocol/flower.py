"""Flower's own strategies: the real objects, asked round by round over the same federation."""

from collections.abc import Callable, Mapping

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx, Strategy

from tests.protocol.experiment import Experiment
from tests.protocol.spec import Spec, made
from tests.protocol.travelling import state_of

STRATEGIES: Mapping[str, Callable[..., Strategy]] = {
    kind.__name__: kind for kind in (FedAvg, FedAvgM, FedAdam, FedProx)
}


def run(experiment: Experiment, rule: Spec, rounds: int) -> None:
    """Run a strategy; the rule's settings are the arguments of its class.

    Raises:
        SpecError: its class has no such argument.
    """
    strategy = made("strategy", rule, STRATEGIES)
    grid = experiment.federation({}).grid()
    arrays = ArrayRecord(state_of(experiment.make_model(experiment.seed)))
    experiment.measure_state(0, arrays.to_torch_state_dict())
    for server_round in range(1, rounds + 1):
        config = ConfigRecord({"server-round": server_round})
        asked = list(strategy.configure_train(server_round, arrays, config, grid))
        # Flower shuffles the nodes; sums in one order are the same every time.
        asked.sort(key=lambda message: message.metadata.dst_node_id)
        replies = grid.pull_messages(grid.push_messages(asked))
        fused, _ = strategy.aggregate_train(server_round, replies)
        if fused is None:
            raise RuntimeError(f"{rule} made no model of round {server_round}")
        arrays = fused
        experiment.measure_state(server_round, arrays.to_torch_state_dict())
