"""What a recipe of many stages costs on deployed clients, and what it costs to fit whole blocks of layers at once."""

import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from fedbasin.deploy.local import ConfigValue, deployment
from tests.benchmarks.bench_own_features import Clients, drawn
from tests.benchmarks.figures import Figure, Goal, Say
from tests.protocol.models import transformer
from tests.protocol.splits import dirichlet
from tests.protocol.tabular import digits
from tests.protocol.task import Task
from tests.protocol.training import Training, fit

APP = Path(__file__).parent / "deep"
NODES = 2
LEVELS = 19
BLOCKS = 12
CLIENTS = ((4, 3), (5, 4), (4, 5))  # number of clients and seed
EPOCHS = 20

HOW = f"""Deployed: a SuperLink and {NODES} SuperNodes as processes on loopback, one round of `features` on a model of {LEVELS} levels,
which is one stage of training and {LEVELS} of fitting. Seconds of a stage, medians (and extremes), by what the time goes to: the server's own work; the
slowest client's answer; the start of the slowest process with the import of PyTorch, which Flower does anew for every message;
and the rest, which is polling and transport. Whatever else runs on the machine shares its cores, so the start is also given as
the processor's seconds, which wait for nobody. Blocks: a pre-norm transformer of {BLOCKS} blocks and width 32 on the rows of
digits, shared initialisation, {len(CLIENTS)} draws of 4 or 5 clients with Dirichlet(0.3), {EPOCHS} local epochs, one round in this process; test
accuracy. How layers are grouped was chosen on other draws, of seeds 0 to 2."""


def measure(say: Say) -> Figure:
    stages = deployed(say)
    parts = {
        key: statistics.median(s[key] for s in stages) for key in ("seconds", "server", "work", "start", "start-cpu")
    }
    rest = statistics.median(s["seconds"] - s["server"] - s["work"] - s["start"] for s in stages)
    quickest, *_, slowest = sorted(s["seconds"] for s in stages)
    say(f"stages: {len(stages)} deployed, {parts['seconds']:.1f} s each")
    found = [fitted(clients, seed, say) for clients, seed in CLIENTS]
    layer, block = ([draw[how] for draw in found] for how in ("layer", "block"))
    lost = statistics.mean(a[0] - b[0] for a, b in zip(layer, block, strict=True))
    most = max(count for _, count in block)
    rows: list[tuple[str, ...]] = [
        ("deployed: stages", str(len(stages))),
        ("deployed: seconds per stage", f"{parts['seconds']:.1f} ({quickest:.1f} to {slowest:.1f})"),
        ("of these the server's work", f"{parts['server']:.2f}"),
        ("of these the slowest client's work", f"{parts['work']:.2f}"),
        ("of these the start of its process", f"{parts['start']:.1f}"),
        ("this start in seconds of the processor", f"{parts['start-cpu']:.1f}"),
        ("of these polling and transport", f"{rest:.1f} ({rest / parts['seconds']:.0%})"),
        *(_row(name, draws) for name, draws in (("layer", layer), ("block", block))),
    ]
    goals = [
        Goal(f"{BLOCKS} blocks in at most 14 stages", f"{most}, with training", most <= 14),
        Goal("at most one point lost to it", f"{100 * lost:.1f}", lost <= 0.01),
    ]
    return Figure("Recipes of many stages", HOW, ("", "measured"), rows, goals)


def _row(name: str, draws: list[tuple[float, int]]) -> tuple[str, str]:
    each = ", ".join(f"{accuracy:.3f}" for accuracy, _ in draws)
    mean = statistics.mean(accuracy for accuracy, _ in draws)
    return f'fit = "{name}": accuracy in {draws[0][1]} stages', f"{mean:.3f} ({each})"


def deployed(say: Say) -> list[dict[str, float]]:
    """What each stage of a round took."""

    def progress(line: str) -> None:
        if " clients accepted in " in line:
            say(f"stages: {line.partition(':')[2].strip()}")

    with tempfile.TemporaryDirectory() as folder, deployment(NODES, node_config, Path(folder)) as flower:
        runs = str(flower.folder / "runs")
        config: dict[str, ConfigValue] = {
            "levels": LEVELS,
            "fedbasin.min-available-nodes": NODES,
            "fedbasin.folder": runs,
        }
        run = flower.run(APP, config, progress, timeout_seconds=1800)
    (line,) = (line for line in run.log if line.startswith("measured "))
    stages: list[dict[str, float]] = json.loads(line.removeprefix("measured "))
    return stages


def node_config(index: int) -> str:
    return f"partition-id={index} num-partitions={NODES}"


def fitted(clients: int, seed: int, say: Say) -> dict[str, tuple[float, int]]:
    """Accuracy and number of stages, layer by layer and block by block, of the same trained clients."""
    task = digits()
    make = partial(drawn, transformer(blocks=BLOCKS), task)
    shares = dirichlet(0.3)(task, clients, seed)
    models = [own_model(task, share, make(seed), node, seed) for node, share in enumerate(shares)]
    trained = Clients(task, shares, models, make)
    found = {how: trained.served("features", align="off", fit=how) for how in ("layer", "block")}
    say(f"stages: {clients} clients, seed {seed}: {found}")
    return found


def own_model(task: Task, share: Tensor, model: nn.Module, node: int, seed: int) -> dict[str, Tensor]:
    inputs, labels = task.train
    fit(model, (inputs[share], labels[share]), Training(EPOCHS), 1000 * node + seed)
    return model.state_dict()
