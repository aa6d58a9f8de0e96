import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from fedbasin.server.strategy import FedBasin

app = ServerApp()


@app.main()
def main(grid, context):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    strategy = FedBasin(model=model, context=context)
    rounds = int(context.run_config["num-server-rounds"])
    strategy.start(grid, ArrayRecord(model.state_dict()), rounds)
