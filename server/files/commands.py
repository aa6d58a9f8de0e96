"""The commands on model files: `fedbasin inspect`, `align`, `apply` and `check`.

Each ends with 0, with 1 where it found something (a check that failed), with 2 where it was asked for what cannot
be done or got what cannot be read, and with 130 on Ctrl-C. What a command needs is imported in the command, so
that help comes at once.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from fedbasin.server.files.reading import StoredModel

app = typer.Typer()

Model = Annotated[
    Path,
    typer.Argument(help="A .safetensors file, or a folder with config.json and model.safetensors."),
]
Notation = Annotated[
    Path | None,
    typer.Option("--symmetry", help="File with the symmetry in the notation, docs/notation.md."),
]
Config = Annotated[
    Path | None,
    typer.Option(help="A config.json that names a known family; a folder's own needs no option."),
]
Spaces = Annotated[
    list[str] | None,
    typer.Option(
        "--spaces", "--layers", metavar="GLOB", help="Only spaces with such names; again for more."
    ),
]
First = Annotated[int | None, typer.Option(min=1, help="Only spaces of the first N blocks.")]
Last = Annotated[int | None, typer.Option(min=1, help="Only spaces of the last N blocks.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Where to write; appears when it is whole.")
]
Force = Annotated[bool, typer.Option(help="Replace a model that is there.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for programs.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads to compute with; torch's number where left out.")
]


@app.command()
def inspect(
    model: Model,
    symmetry: Notation = None,
    config: Config = None,
    spaces: Spaces = None,
    first: First = None,
    last: Last = None,
    notation: Annotated[
        bool, typer.Option("--notation", help="Print the notation, to be kept for --symmetry.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a model's symmetry: its spaces, their groups and widths, and their share of the parameters.

    The symmetry comes from --symmetry, --config, the metadata of the file or the config of the folder. Values are
    not read.

    Ends with 0, and with 2 where the model cannot be read or its symmetry is unknown.
    """
    from rich.console import Console

    with _ended():
        from fedbasin.server.files import inspection
        from fedbasin.server.files.reading import open_model
        from fedbasin.server.files.stored_symmetry import chosen, symmetry_of

        stored = open_model(model)
        whole = symmetry_of(stored, symmetry, config)
        meant = chosen(whole, spaces or (), first, last)
        found = inspection.inspected(stored, whole, meant)
    if notation:
        typer.echo(str(meant), nl=False)
    elif as_json:
        typer.echo(json.dumps(found.as_json()))
    else:
        Console(highlight=False, markup=False).print(inspection.shown(found))


@app.command()
def align(
    model: Model,
    anchor: Annotated[Path, typer.Option(help="The model that stays.")],
    output: Output,
    symmetry: Notation = None,
    config: Config = None,
    spaces: Spaces = None,
    first: First = None,
    last: Last = None,
    certify: Annotated[
        bool,
        typer.Option(
            "--certify", help="Prove first where a space lies best already; needs memory for it."
        ),
    ] = False,
    transform: Annotated[
        Path | None, typer.Option(help="Also write what was applied, for `fedbasin apply`.")
    ] = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Move a model into the basin of another, with its function as it was.

    Units, heads and streams are put in the order, and turned, so that they come closest to the anchor's. What is
    written has the layout, the dtypes and the other files of MODEL.

    Prints for each space how far it moved (0 to 1), its gain in agreement and whether the identity was certified.

    Ends with 0, with 2 where something cannot be read, does not fit or cannot be written, and with 130 on Ctrl-C,
    which leaves nothing behind.
    """
    from rich.console import Console

    with _ended():
        from fedbasin.server.files import align_file as alignment
        from fedbasin.server.files import transform_file as transforms
        from fedbasin.server.files import writing
        from fedbasin.server.files.reading import open_model
        from fedbasin.server.files.stored_symmetry import chosen, symmetry_of

        _use(threads)
        stored, other = open_model(model), open_model(anchor)
        for source in (model, anchor):
            writing.refuse_overlap(source, output)
        writing.refuse_target(stored, output, force=force)
        if transform is not None:
            for taken in (model, anchor, output):
                writing.refuse_overlap(taken, transform)
            writing.refuse_existing(transform, force=force)
        whole = symmetry_of(stored, symmetry, config)
        alignment.refuse_other(other, stored)
        if stored.config and other.config and not (symmetry or config):
            alignment.refuse_other_config(other, stored, symmetry_of(other), whole)
        with _matching() as asked:
            found = alignment.align(
                other, stored, chosen(whole, spaces or (), first, last), asked, certify=certify
            )
        _write(stored, output, alignment.applied(found.transform, stored))
        if transform is not None:
            transforms.save(found.transform, transform)
    if as_json:
        typer.echo(json.dumps(alignment.as_json(found.report)))
    else:
        Console(highlight=False, markup=False).print(alignment.shown(found.report))


@app.command()
def apply(
    transform: Annotated[Path, typer.Argument(help="Of `fedbasin align --transform`.")],
    model: Model,
    output: Output,
    inverse: Annotated[bool, typer.Option("--inverse", help="Undo it instead.")] = False,
    force: Force = False,
) -> None:
    """Apply a saved transform to a model, such as one that was trained further.

    Ends with 0, with 2 where something cannot be read, does not fit or cannot be written, and with 130 on Ctrl-C.
    """
    with _ended():
        from fedbasin.server.files import align_file as alignment
        from fedbasin.server.files import transform_file as transforms
        from fedbasin.server.files import writing
        from fedbasin.server.files.reading import open_model

        found, stored = transforms.load(transform), open_model(model)
        for source in (model, transform):
            writing.refuse_overlap(source, output)
        writing.refuse_target(stored, output, force=force)
        chosen = found.inverse() if inverse else found
        _write(stored, output, alignment.applied(chosen, stored))


@app.command()
def check(
    model: Model,
    symmetry: Notation = None,
    config: Config = None,
    spaces: Spaces = None,
    first: First = None,
    last: Last = None,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE:FUNCTION",
            help="Function that returns the torch module of a file, and an example of its inputs.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Random elements for each kind of space.")] = 3,
    seed: Annotated[int, typer.Option(help="Of elements, inputs and noise.")] = 0,
    as_json: Json = False,
) -> None:
    """Prove a symmetry by execution: outputs before and after random elements, in float64 and float32.

    A folder's model is built by the `transformers` library, anything else by --module. Parameters are shaken
    first, because equal units would hide a tensor that was left behind.

    Ends with 0, with 1 where an element changed the function, and with 2 where the model cannot be built.
    """
    from rich.console import Console

    with _ended():
        from fedbasin.server.files import building, checking
        from fedbasin.server.files.reading import ModelError, open_model
        from fedbasin.server.files.stored_symmetry import chosen, symmetry_of

        stored = open_model(model)
        if module is None and not stored.is_folder:
            raise ModelError(f"{model}: a file says nothing of its module; give --module")
        symmetry_of(stored, symmetry, config)  # refused before a model is built
        made = (
            building.from_folder(stored)
            if module is None
            else building.from_factory(stored, module)
        )
        whole = symmetry_of(stored, symmetry, config, made.module.state_dict())
        found = checking.verdicts(
            made, chosen(whole, spaces or (), first, last), trials=trials, seed=seed
        )
    if as_json:
        typer.echo("".join(f"{json.dumps(one.as_json())}\n" for one in found), nl=False)
    else:
        Console(highlight=False, markup=False).print(checking.shown(found))
    if not all(one.passed for one in found):
        raise typer.Exit(1)


@contextmanager
def _ended() -> Iterator[None]:
    """What goes wrong becomes one line and an exit code."""
    try:
        from fedbasin.server.files.reading import ModelError
        from fedbasin.strategies.symmetry.symmetry import SymmetryError

        try:
            yield
        except (ModelError, SymmetryError, OSError) as error:
            typer.echo(f"fedbasin: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _use(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def _matching() -> "Iterator[Callable[[str], None]]":
    """On stderr, if that is a terminal, the tensor that the search is at; yields what is told its name."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("matching", total=None)
        yield lambda name: progress.update(task, description=f"matching {name}")


def _write(model: "StoredModel", output: Path, state: "Mapping[str, Tensor]") -> None:
    from rich.console import Console
    from rich.progress import Progress

    from fedbasin.server.files import writing

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=sum(t.nbytes for t in model.values()))
        writing.write(model, output, state, lambda size: progress.advance(task, size))
    for name in writing.left_out(model):
        typer.echo(f"fedbasin: {name} holds other weights and was left out", err=True)
