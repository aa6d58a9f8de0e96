"""The commands of an observer and its readers: `fedbasin observe`, `rounds`, `watch` and `download`.

A command imports what it needs when it runs, so that help comes at once.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbasin.server.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from fedbasin.proto.observer_service import RemoteObserver
    from fedbasin.proto.report import RoundReport
    from fedbasin.server.observe.observer import Addresses

_DEFAULT_ADDRESS = "127.0.0.1:9470"

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line, for programs.")]

TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="FEDBASIN_TOKEN_FILE", help="File with the token of the observer, which every call then carries."
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure", envvar="FEDBASIN_INSECURE", help="Send the token to another machine without TLS, in plain text."
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        envvar="FEDBASIN_OBSERVER_CA", help="PEM file of the authority of the observer's certificate; turns on TLS."
    ),
]


@app.command()
def observe(
    host: Annotated[
        str, typer.Option(help="Address to listen on. One that other machines reach requires --token-file and TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the gRPC service; 0 picks a free one.")] = 9470,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page and of /metrics; 0 picks a free one.")
    ] = 9471,
    metrics_host: Annotated[
        str, typer.Option(help="Address of the page and of /metrics. Default: that of --host.")
    ] = "",
    store: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder to keep the reports in, so that history and counters survive a restart."
        ),
    ] = None,
    models: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of run folders, whose global models may be downloaded.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of a certificate chain; both ports then speak TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the private key of --tls-cert.")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(help="PEM file of authorities; callers then need a certificate that one of them signed."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the token that every call must carry. Made with a new one if there is no such file."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name under which browsers and scrapers may reach the page, beside localhost; repeatable."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Listen beyond this machine without a token, or without TLS: whoever reaches the ports can then read "
            "and push, or whoever is on the way can read the token.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Collect the round reports of all runs, until Ctrl-C or SIGTERM.

    ServerApps push their reports here (setting `fedbasin.observer` of a run), Prometheus scrapes /metrics, and a
    browser shows the runs, live. A ServerApp ends with its run; this process stays, so that the last round can
    still be scraped and read.

    Prints its addresses when it listens. Exits with 0 when it is told to stop, and with 1 if it cannot listen,
    open the store, or use a certificate or the token.
    """
    import asyncio

    from fedbasin.server.observe import observer
    from fedbasin.server.observe.access import AccessError, Guard, make_token

    def announce(addresses: "Addresses") -> None:
        lines = asdict(addresses)
        text = json.dumps(lines) if as_json else "\n".join(f"{k:9} {v}" for k, v in lines.items())
        typer.echo(text)

    guard = Guard(tls_cert, tls_key, client_ca, token_file, insecure)
    names = tuple(allowed_host or ())
    settings = observer.ObserverSettings(host, port, metrics_port, metrics_host, store, models, guard, names)
    if insecure and (risk := guard.risk(host) or guard.risk(settings.page_host)):
        typer.echo(f"fedbasin: {risk}", err=True)
    try:
        if token_file and make_token(token_file):
            typer.echo(f"fedbasin: made a token in {token_file}", err=True)
        asyncio.run(observer.observe(settings, announce))
    except AccessError as error:
        raise failure(str(error)) from error
    except OSError as error:
        raise failure(f"{error}; see --port, --metrics-port and --store") from error


Address = Annotated[str, typer.Argument(metavar="[HOST:PORT]", help="Address of `fedbasin observe`.")]
RunId = Annotated[str, typer.Option(help="Id of the run. Default: the newest run.")]


@app.command()
def rounds(
    address: Address = _DEFAULT_ADDRESS,
    run: RunId = "",
    ca: Ca = None,
    token_file: TokenFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Show the rounds of a run: replies, bytes, loss barrier before → after alignment, metrics of the new model.

    A loss barrier is the rise of the loss above the straight line between the global model and the clients'
    models; 0 means that they lie in one basin and can be averaged.

    Exits with 0, with 1 if the observer cannot be reached, and with 2 if it has no such run.
    """
    from rich.console import Console

    from fedbasin.server.observe.rounds_table import rounds_table

    with _connect(address, ca, token_file, insecure) as observer:
        reports = observer.get_rounds(run, timeout=30)
    if as_json:
        typer.echo("".join(f"{report.to_json()}\n" for report in reports), nl=False)
    else:
        Console().print(rounds_table(reports))


@app.command()
def watch(
    address: Address = _DEFAULT_ADDRESS,
    run: RunId = "",
    ca: Ca = None,
    token_file: TokenFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Watch a run: the rounds so far and then each as it ends, until the last round of the run.

    Waits for a run that has not reported yet. In a terminal the screen is drawn anew for each round; elsewhere
    each round is a line.

    Exits with 0 after the last round, with 1 if the observer cannot be reached or the run failed, and with 130
    on Ctrl-C.
    """
    from rich.console import Console

    from fedbasin.server.observe.live import show_live

    console = Console()
    try:
        with _connect(address, ca, token_file, insecure) as observer:
            # Without a timeout: there may be days between two rounds.
            reports: Iterable[RoundReport] = observer.watch_rounds(run)
            if console.is_terminal and not as_json:
                reports = show_live(console, reports)
            else:
                reports = _print_lines(console, reports, as_json)
            problem = ""
            for report in reports:
                problem = report.problem
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if problem:
        raise failure(f"the run ended early: {problem}")


@app.command()
def download(
    run: Annotated[str, typer.Argument(help="Id of the run, or name of its folder.")],
    address: Address = _DEFAULT_ADDRESS,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; it is replaced in one step. `-` is standard output.")
    ] = Path("global.safetensors"),
    ca: Ca = None,
    token_file: TokenFile = None,
    insecure: Insecure = False,
) -> None:
    """Fetch the newest global model of a run from an observer that was started with --models.

    Prints the round. Exits with 0, and with 1 if there is no such model or it did not arrive complete.
    """
    import sys
    from tempfile import TemporaryDirectory

    from fedbasin.server.observe.access import AccessError, Pass
    from fedbasin.server.observe.download import DownloadError
    from fedbasin.server.observe.download import download as fetch

    printed = output == Path("-")
    try:
        with TemporaryDirectory() as folder:
            # Whole and checked before the first byte is printed.
            target = Path(folder) / "model" if printed else output
            server_round = fetch(address, run, target, credentials=Pass(ca, token_file, insecure=insecure))
            if printed:
                sys.stdout.buffer.write(target.read_bytes())
    except (AccessError, DownloadError, OSError) as error:
        raise failure(str(error)) from error
    typer.echo(f"{output}: round {server_round}", err=printed)


@contextmanager
def _connect(address: str, ca: Path | None, token_file: Path | None, insecure: bool) -> "Iterator[RemoteObserver]":
    """Connect to an observer, and turn every error of a call into one line."""
    import grpc

    from fedbasin.proto.observer_service import RemoteObserver
    from fedbasin.proto.report import ReportError
    from fedbasin.server.observe.access import AccessError, Pass
    from fedbasin.server.observe.push import connect

    try:
        with connect(address, Pass(ca, token_file, insecure=insecure)) as channel:
            yield RemoteObserver(channel)
    except (AccessError, ReportError) as error:
        raise failure(str(error)) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise failure(f"{error.details()}; see --token-file") from error
        if error.code() == grpc.StatusCode.NOT_FOUND:
            raise typer.BadParameter(printable(error.details()), param_hint="--run") from error
        raise failure(
            f"no observer answers at {address} ({error.code().name}); start one with `fedbasin observe`, "
            "or give the address of yours: HOST:PORT"
        ) from error


def _print_lines(console: "Console", reports: "Iterable[RoundReport]", as_json: bool) -> "Iterator[RoundReport]":
    from fedbasin.server.observe.rounds_table import rounds_table

    if not as_json:
        console.print(rounds_table([]))
    for report in reports:
        if as_json:
            typer.echo(report.to_json())
        else:
            console.print(rounds_table([report], heading=False))
        yield report


def failure(message: str) -> typer.Exit:
    """Print a message for a failed command, and return the exit with status 1."""
    # Some of it comes from observers, runs and files.
    typer.echo(f"fedbasin: {printable(message)}", err=True)
    return typer.Exit(1)
