"""One round of the real digits app, with all clients and the server in this process.

Clients train once for all recipes: the same model from the same start on the same examples is remembered.
"""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedbasin.client import basin
from fedbasin.server.run.result import RunResult
from tests import running
from tests.federation import Federation

sys.path.append(str(Path(__file__).parents[1] / "deploy/digits"))

from digits import client_app, server_app, task

CLIENTS = 5
Train = Callable[[Message, Context], Message]
Value = str | int | float | bool


def _once(train: Train) -> Train:
    answers: dict[tuple[object, ...], RecordDict] = {}

    def remembering(message: Message, context: Context) -> Message:
        config = {k: v for k, v in context.run_config.items() if not k.startswith("fedbasin.")}
        start = message.content.array_records["arrays"].values()
        key = (context.node_id, *config.values(), *(array.data for array in start))
        if key not in answers:
            answers[key] = train(message, context).content
        return Message(RecordDict({**answers[key]}), reply_to=message)

    return remembering


@cache
def _app() -> ClientApp:
    """Return the app's own functions behind its own mod, with a memory."""
    app = ClientApp(mods=[basin(client_app.own_model, lambda context: [client_app.own_examples(context)])])
    app.train()(_once(client_app.train_app))
    return app


def one_round(recipe: str, align: str, start: str, seed: int, **app: Value) -> RunResult:
    """Return the round's model, and its report with accuracies on 540 test images.

    Args:
        recipe: name of the recipe.
        align: the side that aligns.
        start: `shared` or `own`, where clients begin.
        seed: seed of the shares of examples.
        app: the app's own settings: `width`, `epochs`, `batch-size` and `alpha`, with underscores.
    """
    own: Mapping[str, Value] = {key.replace("_", "-"): value for key, value in app.items()}
    width = int(own["width"])
    images = server_app.Accuracies(task.make_model(width, seed=0), task.load_split()[1])
    with TemporaryDirectory() as folder:
        config = {
            "fedbasin.recipe": recipe,
            "fedbasin.align": align,
            "fedbasin.start": start,
            "fedbasin.min-available-nodes": CLIENTS,
            "fedbasin.fraction-evaluate": 0.0,
            "fedbasin.folder": folder,
            "fedbasin.poll-seconds": 0.001,
            "seed": seed,
            **own,
        }
        return running.run(
            Federation(_app(), config, CLIENTS),
            task.make_model(width, seed=0),
            example=torch.zeros(2, task.PIXELS),
            client_metrics_fn=images.measure_client,
            evaluate_fn=images.evaluate,
        )
