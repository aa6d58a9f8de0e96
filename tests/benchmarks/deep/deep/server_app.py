"""The server: prints what each stage took as JSON."""

import json

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from deep import make_model
from fedbasin.server.strategy import FedBasin

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    model = make_model(int(context.run_config["levels"]))
    strategy = FedBasin(model=model, context=context)
    (report,) = strategy.start(grid, ArrayRecord(model.state_dict()), 1).reports
    stages = [
        {
            "stage": stage.stage,
            "seconds": stage.seconds,
            "server": stage.server_seconds,
            "start": max(client.metrics["start-seconds"] for client in stage.clients),
            "start-cpu": max(client.metrics["start-cpu-seconds"] for client in stage.clients),
            "work": max(client.metrics["work-seconds"] for client in stage.clients),
        }
        for stage in report.stages
    ]
    print("measured " + json.dumps(stages), flush=True)
