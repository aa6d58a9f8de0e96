"""The command line: `fedbasin observe`, `rounds`, `watch`, `report`, `settings` and `version`.

The commands on model files, `inspect`, `align`, `apply` and `check`, are in `modelfiles`.

What a command needs is imported in the command, so that help comes at once.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbasin.server.files import commands

if TYPE_CHECKING:
    from rich.console import Console

    from fedbasin.proto.fedbasin_pb2 import RoundReport, RoundsRequest
    from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
    from fedbasin.server.observe.observer import Addresses

_HERE = "127.0.0.1:9470"

app = typer.Typer(
    help="Federated aggregation in one basin: keep and read what was measured in every round.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(commands.app)

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for programs.")]

TokenFile = Annotated[
    Path | None, typer.Option(help="File with the observer's token; every call then carries it.")
]
Ca = Annotated[
    Path | None, typer.Option(help="Authority of the observer's certificate, PEM; with it, TLS.")
]


@app.command()
def observe(
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Without --token-file, whoever reaches it can read and push."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the gRPC service; 0 picks a free one.")
    ] = 9470,
    metrics_port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Port of the page and of /metrics; 0 picks a free one."
        ),
    ] = 9471,
    store: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for the reports. With it, history and counters survive a restart.",
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder with run folders, whose global models may be downloaded."
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain, PEM; with it both ports speak TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(help="Authorities, PEM; only callers with a certificate of theirs come in."),
    ] = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Collect the round reports of all runs, until Ctrl-C or SIGTERM.

    ServerApps push their reports here (the setting `observer` of a run), Prometheus scrapes /metrics here, and a
    browser shows the runs, live. A ServerApp ends with its run; this process stays, so the last round can still
    be scraped and read.

    Prints the addresses when all listen. Ends with 0 when told to stop, with 1 where it cannot listen, cannot
    open the store or cannot use a certificate or the token.
    """
    import asyncio

    from fedbasin.server.observe import observer
    from fedbasin.server.observe.access import AccessError, Guard

    def announce(addresses: "Addresses") -> None:
        lines = asdict(addresses)
        text = json.dumps(lines) if as_json else "\n".join(f"{k:9} {v}" for k, v in lines.items())
        typer.echo(text)

    guard = Guard(tls_cert, tls_key, client_ca, token_file)
    wanted = observer.Settings(host, port, metrics_port, store, models, guard)
    try:
        asyncio.run(observer.observe(wanted, announce))
    except AccessError as error:
        raise _failure(str(error)) from error
    except OSError as error:
        raise _failure(f"{error}; see --port, --metrics-port and --store") from error


Address = Annotated[str, typer.Argument(metavar="[HOST:PORT]", help="Of `fedbasin observe`.")]
RunId = Annotated[str, typer.Option(help="Id of the run; the newest where left out.")]


@app.command()
def rounds(
    address: Address = _HERE,
    run: RunId = "",
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Show the rounds of a run: replies, bytes, loss barrier before → after alignment, the new model's metrics.

    A loss barrier is how far the loss rises above the straight line between the global model and the clients'
    models; 0 means that they lie in one basin and can be averaged.

    Ends with 0, with 1 where the observer cannot be reached, and with 2 where it has no such run.
    """
    from rich.console import Console

    from fedbasin.server.observe.rounds_table import table
    from fedbasin.server.observe.store import to_line

    with _asking(address, ca, token_file) as observer:
        found = observer.GetRounds(_request(run), timeout=30).reports
    if as_json:
        typer.echo("".join(f"{to_line(one)}\n" for one in found), nl=False)
    else:
        Console().print(table(found))


@app.command()
def watch(
    address: Address = _HERE,
    run: RunId = "",
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Watch a run: the rounds so far and then each as it ends, until the run's last.

    A run that has not reported yet is waited for. In a terminal the screen is drawn anew for each round;
    elsewhere each round is a line.

    Ends with 0 after the last round, with 1 where the observer cannot be reached or the run failed, and with 130
    on Ctrl-C.
    """
    from rich.console import Console

    from fedbasin.server.observe.live import show_live

    console = Console()
    try:
        with _asking(address, ca, token_file) as observer:
            reports = observer.WatchRounds(_request(run))
            live = console.is_terminal and not as_json
            shown = show_live(console, reports) if live else _lines(console, reports, as_json)
            problem = [one.problem for one in shown][-1:]
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if any(problem):
        raise _failure(f"the run ended early: {problem[0]}")


@app.command()
def download(
    run: Annotated[str, typer.Argument(help="Name of the run's folder.")],
    address: Address = _HERE,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write; replaced in one step.")
    ] = Path("global.safetensors"),
    ca: Ca = None,
    token_file: TokenFile = None,
) -> None:
    """Fetch a run's newest global model from an observer that was started with --models.

    Prints the round. Ends with 0, and with 1 where there is no such model or it did not arrive whole.
    """
    from fedbasin.server.observe.access import AccessError, Pass
    from fedbasin.server.observe.download import DownloadError
    from fedbasin.server.observe.download import download as fetch

    try:
        found = fetch(address, run, output, own=Pass(ca, token_file))
    except (AccessError, DownloadError, OSError) as error:
        raise _failure(str(error)) from error
    typer.echo(f"{output}: round {found}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write; RUN/report.html where left out."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A summary to paste.")] = False,
    as_json: Json = False,
) -> None:
    """Make the report of a run from its folder: one HTML file that needs nothing else.

    Markdown and JSON are printed, unless --output names a file.

    Ends with 0, and with 1 where the folder has no report or the file cannot be written.
    """
    from fedbasin.server.report import report_file as file

    if as_markdown and as_json:
        raise typer.BadParameter("choose one form", param_hint="--markdown and --json")
    form = file.text if as_markdown else file.lines if as_json else file.html
    try:
        if output is None and form is not file.html:
            typer.echo(form(folder), nl=False)
            return
        target = output or folder / "report.html"
        file.write(folder, target, form)
    except (file.NoRunError, OSError) as error:
        raise _failure(str(error)) from error
    typer.echo(target)


@app.command()
def settings(as_json: Json = False) -> None:
    """Show every setting of a run, with its default and what it does, as a Markdown table.

    Settings stand in the app's pyproject.toml, or in `flwr run --run-config`.
    """
    from fedbasin.server.run.settings import described

    if not as_json:
        typer.echo("| setting | default | what it does |\n|---|---|---|")
    for key, default, text in described():
        line = {"setting": key, "default": default, "help": text}
        typer.echo(json.dumps(line) if as_json else f"| `{key}` | `{default}` | {text} |")


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(metadata.version("fedbasin"))


@contextmanager
def _asking(address: str, ca: Path | None, token_file: Path | None) -> "Iterator[ObserverStub]":
    """An observer to be asked; what goes wrong becomes one line."""
    import grpc

    from fedbasin.proto.fedbasin_pb2_grpc import ObserverStub
    from fedbasin.server.observe.access import AccessError, Pass
    from fedbasin.server.observe.push import connect

    try:
        with connect(address, Pass(ca, token_file)) as channel:
            yield ObserverStub(channel)
    except AccessError as error:
        raise _failure(str(error)) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise _failure(f"{error.details()}; see --token-file") from error
        if error.code() == grpc.StatusCode.NOT_FOUND:
            raise typer.BadParameter(error.details(), param_hint="--run") from error
        raise _failure(
            f"no observer answers at {address} ({error.code().name}); start one with `fedbasin observe`, "
            "or name yours: HOST:PORT"
        ) from error


def _request(run: str) -> "RoundsRequest":
    from fedbasin.proto.fedbasin_pb2 import RoundsRequest

    return RoundsRequest(run_id=run)


def _lines(
    console: "Console", reports: "Iterable[RoundReport]", as_json: bool
) -> "Iterator[RoundReport]":
    from fedbasin.server.observe.rounds_table import table
    from fedbasin.server.observe.store import to_line

    if not as_json:
        console.print(table([]))
    for one in reports:
        if as_json:
            typer.echo(to_line(one))
        else:
            console.print(table([one], heading=False))
        yield one


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
