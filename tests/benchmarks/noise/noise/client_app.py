"""The client: noise of its own on every array."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


def basin(message: Message, context: Context, call_next):
    """fedbasin's mod, imported where a message is for it: FedAvg's clients do without torch."""
    if "fedbasin" not in message.content["config"]:
        return call_next(message, context)
    import torch

    from fedbasin.client import basin

    torch.set_num_threads(1)
    return basin(lambda context: torch.nn.Module())(message, context, call_next)


app = ClientApp(mods=[basin])


@app.train()
def train(message: Message, context: Context) -> Message:
    draw = np.random.default_rng(int(context.node_config["partition-id"]))
    arrays = {
        name: Array(array.numpy() + draw.random(array.shape, np.float32))
        for name, array in message.content["arrays"].items()
    }
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 10})}
    return Message(RecordDict(content), reply_to=message)
