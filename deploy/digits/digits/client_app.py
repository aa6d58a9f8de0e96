"""The client: an ordinary Flower app; the one line of fedbasin is the mod."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from digits.partitions import tell_partition
from digits.task import Examples, evaluate, load_partition, load_split, make_model, train
from fedbasin.client import basin


def own_model(context: Context) -> nn.Module:
    """The model with weights that no other client has."""
    partition = int(context.node_config["partition-id"])
    return make_model(int(context.run_config["width"]), 10 + partition)


def own_examples(context: Context) -> Examples:
    """The client's slice of the training images."""
    return load_partition(
        int(context.node_config["partition-id"]),
        int(context.node_config["num-partitions"]),
        float(context.run_config["alpha"]),
        int(context.run_config["seed"]),
    )


app = ClientApp(mods=[basin(model=own_model, data=lambda context: [own_examples(context)])])

app.query()(tell_partition)


@app.train()
def train_app(message: Message, context: Context) -> Message:
    """Train on the client's slice."""
    torch.set_num_threads(1)
    model = own_model(context)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    examples = own_examples(context)
    config = context.run_config
    server_round = int(str(message.content.config_records["config"]["server-round"]))
    seed = 1000 * server_round + int(context.node_config["partition-id"])
    loss = train(model, examples, int(config["epochs"]), int(config["batch-size"]), seed)
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(examples[0])})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate_app(message: Message, context: Context) -> Message:
    """Evaluate the global model on the test images."""
    model = own_model(context)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    loss, accuracy = evaluate(model, load_split()[1])
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(load_split()[1][0])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
