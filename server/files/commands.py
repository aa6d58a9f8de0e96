"""The commands on model files: `fedbasin inspect`, `align`, `apply` and `check`.

A command exits with 0; with 1 if it found a fault (a check that failed); with 2 if a model cannot be read, does not
fit or cannot be written; and with 130 on Ctrl-C. It imports what it needs when it runs, so that help comes at once.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Group
    from rich.progress import Progress, ProgressColumn
    from torch import Tensor

    from fedbasin.server.files.reading import StoredModel

app = typer.Typer()


def finite(value: float | None) -> float | None:
    """Refuse `nan` and `inf`, which pass the bounds of an option."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Model = Annotated[Path, typer.Argument(help="A .safetensors file, or a folder with config.json and model.safetensors.")]
Notation = Annotated[
    Path | None,
    typer.Option("--symmetry", help="File with the symmetry in the notation of docs/reference/notation.md."),
]
Config = Annotated[
    Path | None, typer.Option(help="A config.json that names the architecture. Default: the one in the folder.")
]
Module = Annotated[
    str | None,
    typer.Option(
        "--module",
        metavar="PACKAGE:FUNCTION",
        help="Function that returns the torch module of the model and an example of its inputs.",
    ),
]
NoProof = Annotated[
    bool, typer.Option("--no-prove", help="Write without executing the model before and after; needs less memory.")
]
MatcherName = Annotated[str, typer.Option("--matcher", help="weights, sinkhorn, graph, activations or learned.")]
Steps = Annotated[int | None, typer.Option(help="Steps of --matcher learned, one batch each. Default: 400.")]
Smoothing = Annotated[
    float | None,
    typer.Option(
        callback=finite,
        help="Label smoothing of --matcher learned. Default: 0.1 where the model has memorised the data, else 0.",
    ),
]
RotateResidual = Annotated[
    bool,
    typer.Option(
        "--rotate-residual", help="Let the residual stream rotate, with its norms folded into the layers that read it."
    ),
]
Spaces = Annotated[
    list[str] | None,
    typer.Option("--spaces", "--layers", metavar="GLOB", help="Only spaces with such names; may be repeated."),
]
First = Annotated[int | None, typer.Option(min=1, help="Only spaces of the first N blocks.")]
Last = Annotated[int | None, typer.Option(min=1, help="Only spaces of the last N blocks.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="File or folder to write; it appears when it is complete.")
]
Force = Annotated[bool, typer.Option(help="Replace an existing model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line, for programs.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of threads. Default: as many as torch uses.")]


@app.command()
def inspect(
    model: Model,
    symmetry: Notation = None,
    config: Config = None,
    module: Module = None,
    rotate_residual: RotateResidual = False,
    spaces: Spaces = None,
    first: First = None,
    last: Last = None,
    notation: Annotated[bool, typer.Option("--notation", help="Print the symmetry as a file for --symmetry.")] = False,
    as_json: Json = False,
) -> None:
    """Show a model's symmetry: its spaces, their groups and widths, and their share of the parameters.

    The symmetry comes from --symmetry, --config, the metadata of the file or the config of the folder. A config names
    an architecture, which is executed: spaces are what execution proves. What does not move is listed, with what keeps
    it in its place.

    Exits with 0, and with 2 if the model cannot be read or its symmetry is unknown.
    """
    with exit_on_failure():
        from fedbasin.server.files import inspection
        from fedbasin.server.files.reading import open_model
        from fedbasin.server.files.stored_symmetry import Source, choose_spaces, in_stored_names, symmetric_model

        with progress_of_discovery() as progress:
            whole = symmetric_model(open_model(model), Source(symmetry, config, module, rotate_residual), progress)
        part = whole.symmetry
        # Where nothing moves, the reasons are shown.
        if part.spaces or whole.by_hand:
            part = choose_spaces(part, spaces or (), first, last)
        result = inspection.inspect_model(whole, part)
    if notation:
        typer.echo(str(in_stored_names(part, whole.layout) or part), nl=False)
    else:
        print_results([asdict(result)], inspection.render_inspection(result), as_json=as_json)


@app.command()
def align(
    model: Model,
    anchor: Annotated[Path, typer.Option(help="The model to align to; it stays as it is.")],
    output: Output,
    matcher: MatcherName = "weights",
    data: Annotated[
        str | None, typer.Option(metavar="PACKAGE:FUNCTION", help="Function that returns the batches of the matcher.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task of the data, for --matcher learned. Default: what the first batch shows.")
    ] = None,
    steps: Steps = None,
    smoothing: Smoothing = None,
    symmetry: Notation = None,
    config: Config = None,
    module: Module = None,
    rotate_residual: RotateResidual = False,
    spaces: Spaces = None,
    first: First = None,
    last: Last = None,
    no_prove: NoProof = False,
    certify: Annotated[
        bool, typer.Option("--certify", help="Skip spaces that are proven to be optimal already; needs more memory.")
    ] = False,
    transform: Annotated[
        Path | None, typer.Option(help="File for the transform that was applied, for `fedbasin apply`.")
    ] = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Move a model into the basin of another without changing its function.

    Units and heads are permuted and rotated so that they come closest to the anchor's, or agree with it on data. The
    output has the layout, the dtypes and the other files of MODEL. The anchor is read as MODEL's architecture, and the
    two are compared on what they share. Before anything is written the model is executed with its old and its new
    tensors.

    Prints for each space the distance that it moved (0 to 1), its gain in agreement and whether the identity was
    certified as optimal.

    Exits with 0, with 2 if a file cannot be read, does not fit or cannot be written, or the function would change, and
    with 130 on Ctrl-C, which leaves nothing behind.
    """
    with exit_on_failure():
        import torch

        from fedbasin.server.files import align_file, transform_file, writing
        from fedbasin.server.files.data.stored_matching import read_matching, refuse_idle_options
        from fedbasin.server.files.reading import open_model
        from fedbasin.server.files.stored_symmetry import Source, choose_spaces, symmetric_model

        if threads is not None:
            torch.set_num_threads(threads)
        stored, stored_anchor = open_model(model), open_model(anchor)
        # Every refusal comes before the search, which may take long.
        for path in (model, anchor):
            writing.refuse_overlap(path, output)
        writing.refuse_target(stored, output, force=force)
        if transform is not None:
            for path in (model, anchor, output):
                writing.refuse_overlap(path, transform)
            writing.refuse_existing(transform, force=force)
        with progress_of_discovery() as progress:
            source = symmetric_model(stored, Source(symmetry, config, module, rotate_residual), progress)
        part = choose_spaces(source.symmetry, spaces or (), first, last)
        matching = read_matching(matcher, source, data, task, "--data", steps, smoothing)
        refuse_idle_options(matching, "--data", task, certify=certify)
        with matching_progress() as on_read:
            alignment = align_file.align(stored_anchor, source, part, matching, on_read, certify=certify)
        change = align_file.prove_if_possible(alignment.transform, source, wanted=not no_prove)
        write_model(stored, output, align_file.apply_transform(alignment.transform, source))
        if transform is not None:
            transform_file.save(alignment.transform, source, transform)
    lines = [*align_file.describe_rest(source, alignment.apart), align_file.describe_proof(change, source)]
    record = {**asdict(alignment.report), "apart": alignment.apart, "change": change}
    print_results([record], align_file.render_alignment(alignment.report, lines), as_json=as_json)


@app.command()
def apply(
    transform: Annotated[Path, typer.Argument(help="File that `fedbasin align --transform` wrote.")],
    model: Model,
    output: Output,
    inverse: Annotated[bool, typer.Option("--inverse", help="Undo the transform instead.")] = False,
    config: Config = None,
    module: Module = None,
    no_prove: NoProof = False,
    force: Force = False,
) -> None:
    """Apply a saved transform to a model, such as one that was trained further.

    Before anything is written the model is executed with its old and its new tensors.

    Exits with 0, with 2 if a file cannot be read, does not fit or cannot be written, and with 130 on Ctrl-C.
    """
    with exit_on_failure():
        from fedbasin.server.files import align_file, transform_file, writing
        from fedbasin.server.files.reading import open_model
        from fedbasin.server.files.stored_symmetry import Source

        stored = open_model(model)
        for source in (model, transform):
            writing.refuse_overlap(source, output)
        writing.refuse_target(stored, output, force=force)
        element, target = transform_file.load(transform, stored, Source(config=config, module=module))
        if inverse:
            element = element.inverse()
        tensors = align_file.apply_transform(element, target)
        change = align_file.prove_if_possible(element, target, wanted=not no_prove)
        write_model(stored, output, tensors)
    for line in (*align_file.describe_rest(target), align_file.describe_proof(change, target)):
        typer.echo(line)


@app.command()
def check(
    model: Model,
    symmetry: Notation = None,
    config: Config = None,
    rotate_residual: RotateResidual = False,
    spaces: Spaces = None,
    first: First = None,
    last: Last = None,
    module: Module = None,
    trials: Annotated[int, typer.Option(min=1, help="Number of random elements for each kind of space.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of elements, inputs and parameters.")] = 0,
    as_json: Json = False,
) -> None:
    """Check a symmetry by execution: outputs before and after random elements, in float64 and float32.

    The model of a folder is built by the `transformers` library, any other by --module. Its parameters are replaced
    by random ones first, because equal units would hide a tensor that was left out.

    Exits with 0, with 1 if an element changed the function, and with 2 if the model cannot be built.
    """
    with exit_on_failure():
        from fedbasin.server.files import checking
        from fedbasin.server.files.reading import open_model
        from fedbasin.server.files.stored_symmetry import Source, choose_spaces, symmetric_model

        with progress_of_discovery() as progress:
            source = symmetric_model(open_model(model), Source(symmetry, config, module, rotate_residual), progress)
        part = choose_spaces(source.symmetry, spaces or (), first, last)
        verdicts = checking.check_kinds(source, part, trials=trials, seed=seed)
    print_results([asdict(verdict) for verdict in verdicts], checking.render_verdicts(verdicts), as_json=as_json)
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


@contextmanager
def exit_on_failure() -> Iterator[None]:
    """Turn an expected failure into one line on stderr and an exit code."""
    try:
        from fedbasin.server.files.reading import ModelError
        from fedbasin.strategies.symmetry.symmetry import SymmetryError

        try:
            yield
        except (ModelError, SymmetryError, OSError) as error:
            typer.echo(f"fedbasin: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error
    except KeyboardInterrupt:
        # Also during the imports above, which take seconds.
        raise typer.Exit(130) from None


def print_results(records: Sequence[dict[str, Any]], table: "Group", *, as_json: bool) -> None:
    """Print records as JSON lines, or the table of them."""
    from rich.console import Console

    if as_json:
        typer.echo("\n".join(json.dumps(record) for record in records))
    else:
        Console(highlight=False, markup=False).print(table)


def progress_bar(*columns: "ProgressColumn") -> "Progress":
    """Return a progress bar on stderr that is shown only in a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def progress_of_discovery() -> "Iterator[Callable[[str, float], None]]":
    """Show what discovery does; yields the function to call with it and the fraction that is done."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

    with progress_bar(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task("executing the model", total=1.0)
        yield lambda what, done: progress.update(task, description=what, completed=done)


@contextmanager
def matching_progress() -> "Iterator[Callable[[str], None]]":
    """Show the tensor that the search reads; yields the function to call with its name."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    # Without a percentage, because the number of sweeps is not known in advance.
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with progress_bar(*columns) as progress:
        task = progress.add_task("matching", total=None)
        yield lambda name: progress.update(task, description=f"matching {name}")


def write_model(model: "StoredModel", output: Path, state: "Mapping[str, Tensor]") -> None:
    """Write a state in a model's layout with a progress bar, and name the weights that were left out."""
    from fedbasin.server.files import writing

    with progress_bar() as progress:
        task = progress.add_task("writing", total=sum(t.nbytes for t in model.values()))
        writing.write(model, output, state, lambda size: progress.advance(task, size))
    for name in writing.skipped_weights(model):
        typer.echo(f"fedbasin: {name} holds other weights and was left out", err=True)
