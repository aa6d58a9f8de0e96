"""The demo: five clients with independent initialisations, fused with and without alignment, by real processes.

It makes three runs of the digits app on one local Flower deployment, and leaves one table, one folder, one picture.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedbasin.deploy.local import Deployment, deployment
from fedbasin.deploy.picture import draw_paths
from fedbasin.deploy.processes import DeploymentError
from fedbasin.proto.report import PathSums, RoundReport
from fedbasin.server.observe.metrics.gauges import barrier_height
from fedbasin.server.run.resumption.checkpoint import read_reports
from fedbasin.strategies.diagnostics.barrier import linear_barrier

CLIENTS = 5
APP = Path(__file__).parent / "digits"

Config = dict[str, str | int | float]

RUNS: dict[str, Config] = {
    "plain FedAvg": {"fedbasin.recipe": "fedavg", "fedbasin.align": "off", "fedbasin.barrier-points": 0},
    "aligned FedAvg": {"fedbasin.recipe": "fedavg"},
    "aligned RegMean": {"fedbasin.recipe": "regmean"},
}


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a column does not apply.

    Attributes:
        name: name of the run or of the models.
        accuracy: accuracy on the test images.
        barrier_before: linear barrier of the loss from the anchor to the clients as trained, nats.
        barrier_after: linear barrier of the loss from the anchor to the clients as aligned, nats.
        sent_bytes: bytes of tensors down and up, all clients.
        seconds: duration of the round, processes included.
    """

    name: str
    accuracy: float
    barrier_before: float | None = None
    barrier_after: float | None = None
    sent_bytes: int | None = None
    seconds: float | None = None


def main(
    folder: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Fuse five clients with independent initialisations: plain FedAvg, aligned FedAvg, aligned RegMean."""
    console = Console(stderr=as_json, highlight=False)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    target = (folder or Path("runs") / f"demo-{stamp}").resolve()
    try:
        reports = _run_all(target, console)
    except DeploymentError as error:
        console.print(f"[red]The demo failed.[/red] {error}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print(f"Interrupted; every process is ended. Finished results are in {target}.")
        raise typer.Exit(130) from None
    rows = table_rows(reports)
    _write_results(target, rows, reports)
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")
    else:
        console.print(_draw_table(rows))
        console.print(f"Models, reports and the picture of the barriers: {target}", soft_wrap=True)


def _run_all(target: Path, console: Console) -> dict[str, RoundReport]:
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/dim]  {text}", soft_wrap=True)

    say(f"starting a SuperLink and {CLIENTS} SuperNodes on loopback")
    with (
        console.status("working: Ctrl-C ends every process"),
        deployment(CLIENTS, _node_config, target / "processes") as flower,
    ):
        say(f"{CLIENTS} SuperNodes are online at {flower.address}")
        return {name: _run(flower, name, target, say) for name in RUNS}


def _node_config(index: int) -> str:
    return f"partition-id={index} num-partitions={CLIENTS}"


def _run(flower: Deployment, name: str, target: Path, say: Callable[[str], None]) -> RoundReport:
    folder = target / name.replace(" ", "-").lower()
    say(f"[bold]{name}[/bold]: every client trains from its own random weights")
    flower.run(APP, {**RUNS[name], "fedbasin.folder": str(folder)}, lambda line: _show_progress(line, say))
    (run_folder,) = (path.parent for path in folder.glob("*/rounds.jsonl"))
    return read_reports(run_folder)[-1]


def _show_progress(line: str, say: Callable[[str], None]) -> None:
    _, _, rest = line.partition("round ")
    if "clients in" in rest:
        say(f"  {rest}")


def table_rows(reports: dict[str, RoundReport]) -> list[Row]:
    """Return the rows of the demo's table from the last round of each run."""
    rows = [_row(name, report) for name, report in reports.items()]
    last = next(reversed(reports.values()))
    # Clients report how good they are alone when they send what they have trained.
    accuracies = [c.metrics["test-accuracy"] for s in last.stages for c in s.clients if "test-accuracy" in c.metrics]
    return [
        *rows,
        Row("clients alone, mean", sum(accuracies) / len(accuracies)),
        Row("clients alone, best", max(accuracies)),
        Row("ensemble of the five", last.metrics["ensemble-accuracy"]),
    ]


def _row(name: str, report: RoundReport) -> Row:
    clients = [client for stage in report.stages for client in stage.clients]
    path = report.path or PathSums()
    return Row(
        name,
        report.metrics["test-accuracy"],
        barrier_height(linear_barrier, path, path.loss_before) if path.points else None,
        barrier_height(linear_barrier, path, path.loss_after) if path.points else None,
        sum(client.bytes_up + client.bytes_down for client in clients),
        report.seconds,
    )


def _draw_table(rows: list[Row]) -> Table:
    table = Table(title="Digits, five clients, independent initialisations, one round")
    table.add_column("", no_wrap=True)
    for column in ("accuracy", "barrier\nbefore", "barrier\nafter", "MB\nsent", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, empty where a column does not apply."""
    return (
        row.name,
        f"{row.accuracy:.3f}",
        "" if row.barrier_before is None else f"{row.barrier_before:.3f}",
        "" if row.barrier_after is None else f"{row.barrier_after:.3f}",
        "" if row.sent_bytes is None else f"{row.sent_bytes / 1e6:.1f}",
        "" if row.seconds is None else f"{row.seconds:.1f}",
    )


def _write_results(target: Path, rows: list[Row], reports: dict[str, RoundReport]) -> None:
    head = "| | accuracy | barrier before | barrier after | MB sent | seconds |\n|---|---|---|---|---|---|\n"
    lines = "".join("| " + " | ".join(cells(row)) + " |\n" for row in rows)
    (target / "report.md").write_text(
        f"# Digits, five clients, independent initialisations, one round\n\n{head}{lines}"
    )
    (target / "report.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    draw_paths(target / "barriers.png", reports["aligned RegMean"].path)


if __name__ == "__main__":
    typer.run(main)
