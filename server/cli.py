"""The command line `fedbasin`: `report`, `run`, `settings`, `version`, and the commands of other rooms.

`fedbasin.server.observe.observer_commands` has `observe` and the commands that read from an observer,
`fedbasin.server.files.commands` those on model files.

A command imports what it needs when it runs, so that help comes at once.
"""

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from fedbasin.server.extras import ExtrasGroup
from fedbasin.server.files import commands, merge_command
from fedbasin.server.files.data import barrier_command, statistics_command
from fedbasin.server.files.fine_tuning import fine_tuning_commands
from fedbasin.server.observe import observer_commands
from fedbasin.server.observe.observer_commands import Json, failure
from fedbasin.server.printable import printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    cls=ExtrasGroup,
)
app.add_typer(observer_commands.app)
app.add_typer(commands.app)
app.add_typer(merge_command.app)
app.add_typer(barrier_command.app)
app.add_typer(statistics_command.app)
app.add_typer(fine_tuning_commands.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(metadata.version("fedbasin"))
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the installed version and exit."),
    ] = False,
) -> None:
    """Federated aggregation of models in one loss basin: observe runs, report on them, align model files."""


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. Default: RUN/report.html. `-` is standard output."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a summary in Markdown instead.")] = False,
    as_json: Json = False,
) -> None:
    """Write the report of a run from its folder: one HTML file that needs nothing else.

    Markdown and JSON are printed, unless --output names a file.

    Exits with 0, and with 1 if the folder has no report or the file cannot be written.
    """
    from fedbasin.server.report import report_file

    if as_markdown and as_json:
        raise typer.BadParameter("choose one form", param_hint="--markdown and --json")
    render = report_file.folder_to_html
    if as_markdown:
        render = report_file.folder_to_markdown
    elif as_json:
        render = report_file.folder_to_json_lines
    try:
        text = render(folder)
        if damage := report_file.find_damage(folder):
            typer.echo(f"fedbasin: {printable(damage)}", err=True)
        if output == Path("-") or (output is None and (as_markdown or as_json)):
            typer.echo(text, nl=False)
            return
        target = output or folder / "report.html"
        target.write_text(text, encoding="utf-8")
    except report_file.NoRunError as error:
        raise failure(str(error)) from error
    except OSError as error:
        raise failure(f"{output or folder / 'report.html'} cannot be written: {error.strerror or error}") from error
    typer.echo(target)


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="APP", help="Folder of the app.")],
    superlink: Annotated[str, typer.Argument(help="Name of the SuperLink's connection. Default: Flower's.")] = "",
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="As of `flwr run`; repeatable.")
    ] = None,
    federation_config: Annotated[
        list[str] | None, typer.Option("--federation-config", help="As of `flwr run`, for a simulation; repeatable.")
    ] = None,
    resumes: Annotated[int, typer.Option(min=0, help="How often a run whose process was lost is started again.")] = 3,
) -> None:
    """Run an app with `flwr run`, stream its log, and tell how it ended.

    Where the stream breaks off, because the SuperLink was restarted, this waits for the end of the run. A run whose
    process was lost is started again, and the app goes on after the last finished round.

    Exits with 0 where the run is completed, and otherwise with 1 and the reason.
    """
    from fedbasin.server import flower_run

    options = {"--run-config": run_config or [], "--federation-config": federation_config or []}
    words = [word for option, values in options.items() for value in values for word in (option, value)]
    try:
        flower_run.run(folder, superlink, words, resumes, typer.echo)
    except flower_run.FlowerRunError as error:
        raise failure(str(error)) from error


@app.command()
def settings(as_json: Json = False) -> None:
    """Show every setting of a run with its default and its effect, as a Markdown table.

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


def main() -> None:
    """Run the script `fedbasin`."""
    # gRPC would print its own messages above our one line; a user who wants them sets the variable.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()


if __name__ == "__main__":
    main()
