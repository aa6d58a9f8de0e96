"""The command line: `fedbasin observe`, `fedbasin rounds`, `fedbasin settings`, `fedbasin version`.

What a command needs is imported in the command, so that help comes at once.
"""

import json
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedbasin.proto.fedbasin_pb2 import RoundReport
    from fedbasin.server.observer import Addresses

_HERE = "127.0.0.1:9470"

app = typer.Typer(
    help="Federated aggregation in one basin: keep and read what was measured in every round.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for programs.")]


@app.command()
def observe(
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. There is no login: open it to trusted networks only."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the gRPC service; 0 picks a free one.")
    ] = 9470,
    metrics_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port of the page for Prometheus; 0 picks a free one."),
    ] = 9471,
    store: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for the reports. With it, history and counters survive a restart.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Collect the round reports of all runs, until Ctrl-C or SIGTERM.

    ServerApps push their reports here (the setting `observer` of a run) and Prometheus scrapes /metrics here. A
    ServerApp ends with its run; this process stays, so the last round can still be scraped and read.

    Prints the two addresses when both listen. Ends with 0 when told to stop, with 1 where it cannot listen or
    cannot open the store.
    """
    import asyncio

    from fedbasin.server import observer

    def announce(addresses: "Addresses") -> None:
        lines = {"observer": addresses.observer, "metrics": addresses.metrics}
        text = json.dumps(lines) if as_json else "\n".join(f"{k:9} {v}" for k, v in lines.items())
        typer.echo(text)

    try:
        asyncio.run(observer.observe(observer.Settings(host, port, metrics_port, store), announce))
    except OSError as error:
        raise _failure(f"{error}; see --port, --metrics-port and --store") from error


@app.command()
def rounds(
    address: Annotated[
        str, typer.Argument(metavar="[HOST:PORT]", help="Of `fedbasin observe`.")
    ] = _HERE,
    run: Annotated[str, typer.Option(help="Id of the run; the newest where left out.")] = "",
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Go on with each round as it ends, until the run's last."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the rounds of a run: replies, bytes, loss barrier before → after alignment, the new model's metrics.

    A loss barrier is how far the loss rises above the straight line between the global model and the clients'
    models; 0 means that they lie in one basin and can be averaged.

    Ends with 0, with 1 where the observer cannot be reached, and with 2 where it has no such run.
    """
    import grpc

    try:
        _show(_reports(address, run, watch=watch), as_json=as_json, live=watch)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            raise typer.BadParameter(error.details(), param_hint="--run") from error
        raise _failure(
            f"no observer answers at {address} ({error.code().name}); start one with `fedbasin observe`, "
            "or name yours: `fedbasin rounds HOST:PORT`"
        ) from error


@app.command()
def settings(as_json: Json = False) -> None:
    """Show every setting of a run, with its default and what it does, as a Markdown table.

    Settings stand in the app's pyproject.toml, or in `flwr run --run-config`.
    """
    from fedbasin.server.settings import described

    if not as_json:
        typer.echo("| setting | default | what it does |\n|---|---|---|")
    for key, default, text in described():
        line = {"setting": key, "default": default, "help": text}
        typer.echo(json.dumps(line) if as_json else f"| `{key}` | `{default}` | {text} |")


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(metadata.version("fedbasin"))


def _reports(address: str, run: str, *, watch: bool) -> "Iterator[RoundReport]":
    from fedbasin.proto.fedbasin_pb2 import RoundsRequest
    from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
    from fedbasin.server.push import connect

    request = RoundsRequest(run_id=run)
    with connect(address) as channel:
        stub = ObserverStub(channel)
        yield from (
            stub.WatchRounds(request) if watch else stub.GetRounds(request, timeout=30).reports
        )


def _show(reports: "Iterable[RoundReport]", *, as_json: bool, live: bool) -> None:
    from rich.console import Console

    from fedbasin.server.store import to_line
    from fedbasin.server.table import table

    if as_json:
        for report in reports:
            typer.echo(to_line(report))
        return
    console = Console()
    if not live:
        console.print(table(reports))
        return
    console.print(table([]))
    for report in reports:
        console.print(table([report], heading=False))


def _failure(message: str) -> typer.Exit:
    typer.echo(f"fedbasin: {message}", err=True)
    return typer.Exit(1)


def main() -> None:
    """The script `fedbasin`."""
    # gRPC would print its own account above our one line; a user who wants it sets the variable.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()


if __name__ == "__main__":
    main()
