"""The command `fedbasin statistics`, with the exit codes of the other commands on model files."""

from typing import Annotated, Literal

import typer

from fedbasin.server.files.commands import (
    Config,
    Force,
    Json,
    Model,
    Module,
    Output,
    Threads,
    exit_on_failure,
    print_results,
    progress_bar,
)
from fedbasin.server.files.data.barrier_command import Data, TaskName

app = typer.Typer()


@app.command()
def statistics(
    model: Model,
    data: Data,
    output: Output,
    kind: Annotated[
        Literal["gram", "fisher"], typer.Option(help="What is collected: gram for regmean, fisher for fisher.")
    ] = "gram",
    task: TaskName = None,
    config: Config = None,
    module: Module = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Collect a model's statistics on data into a file, from which `merge --statistics` reads them.

    Gram matrices of the inputs of each layer, or the Fisher information of each parameter. They hold for this model
    alone, as it is: a merge refuses them for another one, and beside --align.

    Exits with 0, with 2 if a file cannot be read, does not fit or cannot be written, and with 130 on Ctrl-C.
    """
    with exit_on_failure():
        import torch
        from rich.console import Group

        from fedbasin.server.files import writing
        from fedbasin.server.files.data.stored_statistics import write_statistics
        from fedbasin.server.files.reading import ModelError, open_model
        from fedbasin.server.files.stored_symmetry import Source, executable_of
        from fedbasin.server.report.charts.text import size

        if threads is not None:
            torch.set_num_threads(threads)
        if output.suffix != ".safetensors" or output.is_dir():
            raise ModelError(f"{output}: is no name of a file of statistics; end it with .safetensors")
        if task is not None and kind == "gram":
            raise ModelError("--task: Gram matrices do not depend on it; leave it out, or give --kind fisher")
        stored = open_model(model)
        writing.refuse_overlap(model, output)
        writing.refuse_existing(output, force=force)
        with progress_bar() as progress:
            progress.add_task("collecting", total=None)
            executable = executable_of(stored, Source(config=config, module=module))
            collected = write_statistics(stored, executable, kind, data, task, output)
        nbytes = output.stat().st_size
    record = {
        "model": str(model),
        "output": str(output),
        "kind": kind,
        "layers": len(collected.layers),
        "bytes": nbytes,
    }
    what = {"gram": "layers", "fisher": "parameters"}[kind]
    print_results([record], Group(f"{kind} of {len(collected.layers)} {what}, {size(nbytes)}"), as_json=as_json)
