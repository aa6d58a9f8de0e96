"""The server: prints the seconds of each round and its own peak memory as JSON."""

import json
import resource
import time
from itertools import pairwise

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


def fedbasin_rounds(grid: Grid, context: Context, sizes: dict[str, int], rounds: int) -> list[float]:
    import torch

    from fedbasin.server.strategy import FedBasin

    start = ArrayRecord({name: torch.zeros(size) for name, size in sizes.items()})
    return [r.seconds for r in FedBasin(context=context).start(grid, start, rounds).reports]


def fedavg_rounds(grid: Grid, context: Context, sizes: dict[str, int], rounds: int) -> list[float]:
    nodes = int(context.run_config["nodes"])
    ends = []
    start = {name: Array(np.zeros(size, np.float32)) for name, size in sizes.items()}
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.start(
        grid,
        ArrayRecord(start),
        num_rounds=rounds,
        # Called before the first round and after each.
        evaluate_fn=lambda server_round, arrays: ends.append(time.perf_counter()),
    )
    return [end - begin for begin, end in pairwise(ends)]


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    tensors = int(config["tensors"])
    elements = int(config["megabytes"]) * 250_000 // tensors
    sizes = {f"tensor{index}": elements for index in range(tensors)}
    run = {"fedbasin": fedbasin_rounds, "FedAvg": fedavg_rounds}[str(config["strategy"])]
    seconds = run(grid, context, sizes, int(config["num-server-rounds"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("measured " + json.dumps({"seconds": seconds, "peak_rss_bytes": peak}), flush=True)
