"""The server: `FedBasin`, with each client's accuracy and their ensemble measured on the way."""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.func import functional_call

from digits.partitions import check_partitions
from digits.task import PIXELS, Examples, evaluate, load_split, make_model
from fedbasin.server.strategy import FedBasin

app = ServerApp()


class Accuracies:
    """Accuracy on the test images of the global model, of each client alone, and of their ensemble."""

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        """Measure with `model`, whose weights are replaced."""
        self._model = model
        self._images, self._labels = examples
        self._probabilities = torch.zeros(len(self._labels), 10)

    def measure_client(self, _: int, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Measure one client alone, and add its probabilities to the ensemble's; its model is let go."""
        with torch.no_grad():
            logits = functional_call(self._model, dict(state), (self._images,))
        self._probabilities += logits.softmax(1)
        return {"test-accuracy": self._accuracy(logits)}

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Measure the new global model, and the ensemble of the clients that it was made of."""
        self._model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = evaluate(self._model, (self._images, self._labels))
        metrics = {"test-loss": loss, "test-accuracy": accuracy}
        if server_round:
            metrics["ensemble-accuracy"] = self._accuracy(self._probabilities)
            self._probabilities.zero_()
        return MetricRecord(dict(metrics))

    def _accuracy(self, scores: Tensor) -> float:
        return float((scores.argmax(1) == self._labels).float().mean())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    torch.set_num_threads(1)
    width, rounds = (int(context.run_config[key]) for key in ("width", "num-server-rounds"))
    model = make_model(width, seed=0)
    images = Accuracies(make_model(width, seed=0), load_split()[1])
    strategy = FedBasin(
        model=model, example=torch.zeros(2, PIXELS), context=context, client_metrics_fn=images.measure_client
    )
    if context.run_config["check-partitions"]:
        check_partitions(grid, int(context.run_config["fedbasin.min-available-nodes"]))
    strategy.start(grid, ArrayRecord(model.state_dict()), rounds, evaluate_fn=images.evaluate)
