"""The command line of the protocol."""

import json
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.protocol import jobs as processes
from tests.protocol import page, results, rules, summary, tables, tasks
from tests.protocol.models import MODELS
from tests.protocol.setting import Setting, as_row
from tests.protocol.spec import expand, listed, parse
from tests.protocol.splits import SPLITS
from tests.protocol.training import Training

ROOT = Path(__file__).parents[2]

app = typer.Typer(
    help="""Compare rules of federated averaging under one protocol.

Every rule gets the same examples in the same slices, the same first model and the same local training; bytes are
those of the real messages, seconds are processor time. Results are lines of JSON that are only added to, so a run
that was interrupted goes on where it stopped.

Names take arguments, and a list of values stands for all of them:

`run --task digits --split 'dirichlet([0.1, 0.3])' --rule FedAvg --rule 'FedAvgM(server_momentum=[0.5, 0.9])'`

`run --task glyphs --split groups --model cnn --rule 'regmean(ridge=0.01)' --rounds 30 --jobs 2`
""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Results = Annotated[Path, typer.Option("--results", help="File of results, JSON lines; only added to.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for programs.")]
_RESULTS = ROOT / "build" / "protocol" / "results.jsonl"
_SCRATCH = ROOT / "build" / "protocol"


@app.command()
def run(
    task: Annotated[list[str], typer.Option(help="Examples; see `names`.")],
    rule: Annotated[list[str], typer.Option(help="A recipe of fedbasin with its settings, or a peer.")],
    split: Annotated[list[str], typer.Option(help="How clients share them.")] = ["dirichlet(0.3)"],  # noqa: B006 - typer copies it
    model: Annotated[list[str], typer.Option(help="What they train.")] = ["mlp"],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 20,
    clients: Annotated[int, typer.Option(min=1, help="How many clients.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Local epochs in a round.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a local step.")] = 32,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate of the local optimizer.")] = 1e-3,
    optimizer: Annotated[str, typer.Option(help="`adamw`, or `sgd` with momentum .9.")] = "adamw",
    held: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of its examples that a client keeps for evaluation.")
    ] = 0.1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 1,
    file: Results = _RESULTS,
    cache: Annotated[Path, typer.Option(help="Where drawn examples are kept.")] = _SCRATCH,
    again: Annotated[
        bool, typer.Option("--again", help="Measure also what is there, as after a change of code.")
    ] = False,
    json_lines: Json = False,
) -> None:
    """Measure what the file does not have yet."""
    training = Training(epochs, batch, rate, optimizer=optimizer, held=held)
    settings = [
        Setting(*names, seed, clients, training)
        for names in product(_texts(task), _texts(split), _texts(model), _texts(rule))
        for seed in range(seeds)
    ]
    for text in _texts(rule):
        rules.check(parse(text))
    known = {} if again else results.read(file)
    left = [s for s in settings if rules.rounds_of(s.rule, rounds) not in known.get(s, {})]
    work = processes.Work(left, rounds, cache)
    found = processes.alone(work) if jobs == 1 else processes.in_parallel(work, jobs)
    for setting, point in _watched(found, work, len(settings), Console(stderr=True)):
        if point.round not in known.get(setting, {}):
            results.add(file, setting, [point])
        if json_lines:
            typer.echo(json.dumps(as_row(setting, point)))


@app.command()
def table(
    file: Results = _RESULTS,
    every: Annotated[bool, typer.Option("--all", help="Every setting, not each rule's best.")] = False,
) -> None:
    """Print tables in Markdown: means over seeds."""
    for scene, rows in summary.scenes(results.read(file)).items():
        shown = rows if every else summary.best_of_each(rows)
        typer.echo(f"\n{tables.heading(scene)}\n\n{tables.markdown(shown)}")
        if note := tables.settings_note(shown):
            typer.echo(f"\n{note}")


@app.command()
def report(
    file: Results = _RESULTS,
    to: Annotated[Path, typer.Option(help="The page; pictures go beside it.")] = ROOT
    / "docs"
    / "records"
    / "protocol.md",
) -> None:
    """Write tables and curves into docs/records/protocol.md."""
    page.write(to, results.read(file))
    typer.echo(f"written to {to}")


@app.command()
def names() -> None:
    """List tasks, splits, models and rules."""
    listing: dict[str, Iterable[str]] = {
        "task": tasks.catalogue(_SCRATCH),
        "split": SPLITS,
        "model": MODELS,
        "rule": rules.names(),
    }
    for kind, known in listing.items():
        typer.echo(f"{kind}: {listed(known)}")


def _texts(given: list[str]) -> list[str]:
    """Every spec that the texts stand for, in its canonical form."""
    return [str(spec) for text in given for spec in expand(text)]


def _watched(
    found: Iterator[processes.Finding], work: processes.Work, settings: int, console: Console
) -> Iterator[processes.Finding]:
    """The findings, with a bar that counts rounds."""
    total = sum(rules.rounds_of(setting.rule, work.rounds) for setting in work.settings)
    console.print(f"{len(work.settings)} of {settings} curves to measure, {total} rounds")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("rounds", total=total)
        for setting, point in found:
            text = f"{setting.rule} {setting.split} seed {setting.seed}: {point.accuracy:.3f}, loss {point.loss:.3f}"
            progress.update(bar, advance=point.round > 0, description=text)
            yield setting, point
