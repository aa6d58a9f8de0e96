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
from fedbasin.server.run.loop import Result
from fedbasin.server.run.serve import Hooks, serve
from fedbasin.strategies.symmetry.discover.tracing import trace
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
    """The app's own functions behind its own mod, with a memory."""
    made = ClientApp(
        mods=[basin(client_app.own_model, lambda context: [client_app.own_examples(context)])]
    )
    made.train()(_once(client_app.train_app))
    return made


def one_round(recipe: str, align: str, start: str, seed: int, **app: Value) -> Result:
    """The round's model, and its report with accuracies on 540 test images.

    Args:
        recipe: how clients are fused.
        align: by whom they are aligned.
        start: whether clients begin from the server's model or their own.
        seed: of the shares of examples.
        app: the app's own settings: `width`, `epochs`, `batch-size` and `alpha`, with underscores.
    """
    own: Mapping[str, Value] = {key.replace("_", "-"): value for key, value in app.items()}
    width = int(own["width"])
    model, probed = task.make_model(width, seed=0), task.make_model(width, seed=0)
    probe = server_app.Probe(probed, task.load_split()[1])
    with TemporaryDirectory() as folder:
        config = {
            "fedbasin.recipe": recipe,
            "fedbasin.align": align,
            "fedbasin.start": start,
            "fedbasin.nodes": CLIENTS,
            "fedbasin.fraction-evaluate": 0.0,
            "fedbasin.folder": folder,
            "fedbasin.poll-seconds": 0.001,
            "seed": seed,
            **own,
        }
        federation = Federation(_app(), config, CLIENTS)
        return serve(
            federation.grid(),
            federation.server_context(),
            model,
            1,
            symmetry=trace(model, torch.zeros(1, task.PIXELS)),
            hooks=Hooks(evaluate=probe.global_model, observe=probe.client),
        )
