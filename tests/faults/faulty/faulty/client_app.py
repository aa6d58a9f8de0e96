import time

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedbasin.client import basin

app = ClientApp(mods=[basin(model=lambda context: torch.nn.Linear(2, 2))])


@app.train()
def train(message, context):
    own, config = context.node_config["partition-id"], context.run_config
    if own == config["raises"]:
        raise RuntimeError("told to raise")
    if own == config["hangs"]:
        time.sleep(600)
    step = np.float32("nan" if own == config["sends-nan"] else 1 + own)
    arrays = {name: Array(a.numpy() + step) for name, a in message.content["arrays"].items()}
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)
