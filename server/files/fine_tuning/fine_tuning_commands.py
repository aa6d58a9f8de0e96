"""The commands `fedbasin rebase` and `fedbasin extract`, with the exit codes of the other commands on model files."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbasin.server.files.commands import (
    Config,
    Force,
    Json,
    Model,
    Module,
    NoProof,
    Notation,
    Output,
    Threads,
    exit_on_failure,
    finite,
    matching_progress,
    print_results,
    progress_of_discovery,
    write_model,
)
from fedbasin.server.files.data.barrier_command import TaskName

if TYPE_CHECKING:
    from fedbasin.server.files.fine_tuning.rebase import Rebasing

app = typer.Typer()


@app.command()
def rebase(
    old: Annotated[Path, typer.Argument(help="The base that was fine-tuned.")],
    fine: Annotated[Path, typer.Argument(help="The fine-tuned model.")],
    new: Annotated[Path, typer.Argument(help="Another base of the same shape.")],
    output: Output,
    strength: Annotated[float, typer.Option(callback=finite, help="Factor on the change from OLD to FINE.")] = 1.0,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE:FUNCTION",
            help="Function that returns a few labelled batches; what would raise their loss at NEW is left out.",
        ),
    ] = None,
    task: TaskName = None,
    no_align: Annotated[bool, typer.Option("--no-align", help="Add the change as it is, without aligning.")] = False,
    symmetry: Notation = None,
    config: Config = None,
    module: Module = None,
    no_prove: NoProof = False,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Carry a fine-tuning to another base: NEW with the change from OLD to FINE, in the frame of NEW.

    OLD is aligned to NEW by weights, and FINE moves with it. The output has the layout, the dtypes and the other files
    of NEW.

    Exits with 0, with 2 if a file cannot be read, does not fit or cannot be written, and with 130 on Ctrl-C, which
    leaves nothing behind.
    """
    with exit_on_failure():
        import torch

        from fedbasin.server.files import writing
        from fedbasin.server.files.data.given_data import read_task
        from fedbasin.server.files.fine_tuning.rebase import rebase, votes_of
        from fedbasin.server.files.reading import ModelError, open_model
        from fedbasin.server.files.stored_symmetry import Source, executable_of, symmetric_model

        if threads is not None:
            torch.set_num_threads(threads)
        if task is not None and data is None:
            raise ModelError("--task: belongs to --data; give both, or leave it out")
        kind = None if task is None else read_task(task)
        stored_old, stored_fine, stored_new = map(open_model, (old, fine, new))
        for path in (old, fine, new):
            writing.refuse_overlap(path, output)
        writing.refuse_target(stored_new, output, force=force)
        source = Source(symmetry, config, module)
        with progress_of_discovery() as progress:
            base = symmetric_model(stored_old, source, progress)
        votes = None if data is None else votes_of(stored_new, executable_of(stored_new, source), data, kind)
        with matching_progress() as on_read:
            rebasing = rebase(
                base, stored_fine, stored_new, strength, votes, on_read, aligned=not no_align, prove=not no_prove
            )
        write_model(stored_new, output, rebasing.state)
    print_results([_record(rebasing, output)], _render(rebasing), as_json=as_json)


@app.command()
def extract(
    base: Model,
    fine: Annotated[Path, typer.Argument(help="The model that was fine-tuned from it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the adapter; it appears when complete.")],
    rank: Annotated[int, typer.Option(min=1, help="Largest rank of the product in a layer.")] = 16,
    module: Module = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the change from a base to a fine-tuned model as a low-rank adapter that `peft` loads.

    Every changed layer gets the closest product of the rank; biases and other modules travel whole.

    Exits with 0, with 2 if a file cannot be read, does not fit or cannot be written, and with 130 on Ctrl-C, which
    leaves nothing behind.
    """
    with exit_on_failure():
        import torch

        from fedbasin.server.files.adapters.merged_adapters import refuse_adapter_target, write_adapter
        from fedbasin.server.files.fine_tuning.extraction import extract_adapter
        from fedbasin.server.files.reading import few, open_model
        from fedbasin.server.files.stored_symmetry import Source, executable_of

        if threads is not None:
            torch.set_num_threads(threads)
        refuse_adapter_target((base, fine), output, force=force)
        stored, stored_fine = open_model(base), open_model(fine)
        extraction = extract_adapter(stored, executable_of(stored, Source(module=module)), stored_fine, rank)
        write_adapter(extraction.adapter, output, torch.float32)
    modules = extraction.adapter.modules
    record = {
        "output": str(output),
        "layers": {name: adapter.rank for name, adapter in modules.items()},
        "kept": extraction.kept,
        "saved": extraction.saved,
    }
    lines = [f"{len(modules)} layers, rank at most {rank}: keeps {extraction.kept:.1%} of the squared change"]
    if extraction.saved:
        lines.append(f"held whole: {few(extraction.saved)}")
    print_results([record], _lines(lines), as_json=as_json)


def _record(rebasing: "Rebasing", output: Path) -> dict[str, Any]:
    report = None if rebasing.report is None else asdict(rebasing.report)
    state = rebasing.state
    return {
        "output": str(output),
        "changed": state.changed,
        "kept": state.kept,
        "alignment": report,
        "change": rebasing.change,
    }


def _render(rebasing: "Rebasing") -> Any:
    state, report = rebasing.state, rebasing.report
    lines = [f"{state.changed:,} entries changed by the fine-tuning, {state.kept:,} of them carried over"]
    if report is not None:
        lines.append(f"distance of the bases {report.distance_before:.6g} → {report.distance_after:.6g}")
    if rebasing.change is not None:
        lines.append(f"alignment proven by execution: outputs change by {rebasing.change:.1e} in float64")
    return _lines(lines)


def _lines(lines: list[str]) -> Any:
    from rich.console import Group

    return Group(*lines)
