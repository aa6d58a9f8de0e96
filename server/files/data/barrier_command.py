"""The command `fedbasin barrier`, with the exit codes of the other commands on model files."""

from pathlib import Path
from typing import Annotated

import typer

from fedbasin.server.files.commands import (
    Config,
    Force,
    Json,
    MatcherName,
    Model,
    Module,
    Notation,
    RotateResidual,
    Smoothing,
    Steps,
    Threads,
    exit_on_failure,
    print_results,
    progress_bar,
    progress_of_discovery,
)

app = typer.Typer()

Data = Annotated[
    str, typer.Option(metavar="PACKAGE:FUNCTION", help="Function that returns the batches, (inputs, targets).")
]
TaskName = Annotated[
    str | None, typer.Option("--task", help="Task of the data, as regression. Default: what the first batch shows.")
]
AlignData = Annotated[
    str | None,
    typer.Option("--align-data", metavar="PACKAGE:FUNCTION", help="Function that returns the batches of the matcher."),
]


@app.command()
def barrier(
    anchor: Model,
    model: Model,
    data: Data,
    task: TaskName = None,
    points: Annotated[int, typer.Option(min=2, help="Number of points on each line.")] = 11,
    picture: Annotated[
        Path | None, typer.Option(help="HTML file for the charts of both lines; it needs nothing else.")
    ] = None,
    matcher: MatcherName = "weights",
    align_data: AlignData = None,
    steps: Steps = None,
    smoothing: Smoothing = None,
    symmetry: Notation = None,
    config: Config = None,
    module: Module = None,
    rotate_residual: RotateResidual = False,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure the loss on the line between two models, before and after the second is aligned to the first.

    The barrier is the largest rise of the loss above the straight line between the losses of both models. Where it is
    small, the models can be merged.

    Exits with 0, with 2 if a file cannot be read, does not fit or cannot be written, and with 130 on Ctrl-C.
    """
    with exit_on_failure():
        import torch

        from fedbasin.server.files import writing
        from fedbasin.server.files.data.barrier_page import render_page
        from fedbasin.server.files.data.file_barrier import measure_barrier, render_barrier
        from fedbasin.server.files.data.stored_matching import read_matching, refuse_idle_options
        from fedbasin.server.files.reading import ModelError, open_model
        from fedbasin.server.files.stored_symmetry import Source, symmetric_model

        if threads is not None:
            torch.set_num_threads(threads)
        stored_anchor, stored = open_model(anchor), open_model(model)
        if picture is not None:
            for path in (anchor, model):
                writing.refuse_overlap(path, picture)
            writing.refuse_existing(picture, force=force)
            if picture.is_dir():
                raise ModelError(f"{picture}: is a folder; give the name of a file")
        with progress_of_discovery() as progress:
            source = symmetric_model(stored, Source(symmetry, config, module, rotate_residual), progress)
        matching = read_matching(matcher, source, align_data, task, "--align-data", steps, smoothing)
        refuse_idle_options(matching, "--align-data")
        with progress_bar() as bar:
            task_bar = bar.add_task("matching", total=None)
            result = measure_barrier(
                stored_anchor, source, data, points, task, matching, lambda step: bar.update(task_bar, description=step)
            )
        if picture is not None:
            with writing.replacing(picture) as part:
                part.write_text(render_page(result), encoding="utf-8")
    print_results([result.to_json()], render_barrier(result), as_json=as_json)
