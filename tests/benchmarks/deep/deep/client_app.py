"""The client: noise for training; every reply says how long its process took to get there, and then to answer."""

import os
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from deep import WIDTH, make_model
from fedbasin.client import basin

torch.set_num_threads(1)


def age_seconds() -> float:
    """Of this process."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def timed(message: Message, context: Context, call_next) -> Message:
    seconds = {"start-seconds": age_seconds(), "start-cpu-seconds": time.process_time()}
    begun = time.perf_counter()
    reply = call_next(message, context)
    seconds["work-seconds"] = time.perf_counter() - begun
    reply.content["metrics"] = MetricRecord({**reply.content["metrics"], **seconds})
    return reply


def own_model(context: Context) -> torch.nn.Module:
    return make_model(int(context.run_config["levels"]))


def own_examples(context: Context) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    return [(torch.randn(256, WIDTH, generator=draw), torch.zeros(256, dtype=torch.long))]


app = ClientApp(mods=[timed, basin(own_model, own_examples)])


@app.train()
def train(message: Message, context: Context) -> Message:
    torch.manual_seed(int(context.node_config["partition-id"]))
    state = message.content["arrays"].to_torch_state_dict()
    moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in state.items()}
    metrics = MetricRecord({"num-examples": 256})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)
