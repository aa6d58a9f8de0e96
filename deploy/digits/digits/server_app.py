"""The server: fedbasin's rounds, with each client's accuracy and their ensemble measured on the way."""

from collections.abc import Mapping

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.func import functional_call

from digits.task import PIXELS, Examples, evaluate, load_split, make_model
from fedbasin.server.run.serve import Hooks, serve
from fedbasin.strategies.symmetry.discover.tracing import trace

app = ServerApp()


class Probe:
    """What the test images say of the global model, of each client alone, and of their ensemble."""

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        self._model = model
        self._images, self._labels = examples
        self._probabilities = torch.zeros(len(self._labels), 10)

    def client(self, _: int, state: Mapping[str, Tensor]) -> dict[str, float]:
        """One client alone; its probabilities are added to the ensemble's, and its model is let go."""
        with torch.no_grad():
            logits = functional_call(self._model, dict(state), (self._images,))
        self._probabilities += logits.softmax(1)
        return {"test-accuracy": self._accuracy(logits)}

    def global_model(self, server_round: int, state: Mapping[str, Tensor]) -> dict[str, float]:
        """The new global model, and the ensemble of the clients that it was made of."""
        self._model.load_state_dict(dict(state))
        loss, accuracy = evaluate(self._model, (self._images, self._labels))
        metrics = {"test-loss": loss, "test-accuracy": accuracy}
        if server_round:
            metrics["ensemble-accuracy"] = self._accuracy(self._probabilities)
            self._probabilities.zero_()
        return metrics

    def _accuracy(self, scores: Tensor) -> float:
        return float((scores.argmax(1) == self._labels).float().mean())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    torch.set_num_threads(1)
    model = make_model(int(context.run_config["width"]), seed=0)
    example = torch.zeros(2, PIXELS)
    probe = Probe(make_model(int(context.run_config["width"]), seed=0), load_split()[1])
    serve(
        grid,
        context,
        model,
        rounds=int(context.run_config["num-server-rounds"]),
        symmetry=trace(model, example),
        example=example,
        hooks=Hooks(evaluate=probe.global_model, observe=probe.client),
    )
