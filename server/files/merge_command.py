"""The command `fedbasin merge`, with the exit codes of the other commands on model files."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbasin.server.files.commands import (
    Force,
    Json,
    Module,
    NoProof,
    Output,
    RotateResidual,
    Smoothing,
    Steps,
    Threads,
    exit_on_failure,
    finite,
    print_results,
    progress_bar,
)
from fedbasin.server.files.data.barrier_command import TaskName

if TYPE_CHECKING:
    from fedbasin.server.files.merge.merge_models import MergeReport, PreparedMerge
    from fedbasin.server.files.merge.recipe import MergeRecipe
    from fedbasin.server.files.search.scored_merge import CoefficientSearch, ScoreReport

app = typer.Typer()


@app.command()
def merge(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="RECIPE.yaml | MODEL...", help="A recipe; or, with --rule, the models.")
    ],
    output: Output,
    rule: Annotated[str | None, typer.Option(help="Merging rule, as merge_method in a recipe.")] = None,
    anchor: Annotated[
        Path | None, typer.Option(help="The model that the others were fine-tuned from, as base_model.")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Weight of each MODEL, in their order.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="Parameter of the rule.")
    ] = None,
    align: Annotated[
        str | None, typer.Option(metavar="LINKS", help="Align first: star, chain, tree or universe.")
    ] = None,
    matcher: Annotated[
        str | None,
        typer.Option(help="With --align: weights, sinkhorn, graph, activations or learned. Default: weights."),
    ] = None,
    align_data: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE:FUNCTION",
            help="Function that returns the batches on which models are aligned, and BatchNorm is measured anew.",
        ),
    ] = None,
    steps: Steps = None,
    smoothing: Smoothing = None,
    rotate_residual: RotateResidual = False,
    no_prove: NoProof = False,
    statistics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PACKAGE:FUNCTION | FILE",
            help="Function that returns the batches of every MODEL, or of each in turn; or a file of its statistics.",
        ),
    ] = None,
    task: TaskName = None,
    module: Module = None,
    score: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE:FUNCTION", help="Function that scores the model at a path; higher is better."),
    ] = None,
    search: Annotated[
        int | None, typer.Option(min=1, help="Search weights or t by layer with --score, in so many candidates.")
    ] = None,
    search_points: Annotated[
        int | None, typer.Option(min=1, help="Values from first to last layer that are searched. Default: 3.")
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE:FUNCTION", help="Function that returns inputs, on which the models are distilled into OUT."
        ),
    ] = None,
    distill_passes: Annotated[int | None, typer.Option(min=1, help="Passes over these inputs. Default: 10.")] = None,
    distill_rate: Annotated[float | None, typer.Option(help="Learning rate. Default: 0.001.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the result. Default: that of the first model.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Largest rank of merged adapters. Default: exact.")] = None,
    shard_size: Annotated[
        float | None,
        typer.Option(min=1e-6, callback=finite, help="Largest size of a file of a folder, in GB. Default: 5."),
    ] = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge models of one architecture into one, tensor by tensor.

    BASE+ADAPTER is a model with a low-rank adapter of the peft library; adapters alone are merged into an adapter.

    A recipe has mergekit's keys; docs/how-to/merging.md lists them and the rules. Options that a recipe has as keys
    are refused beside one, apart from --align with --matcher and --align-data, and --dtype, which replace its keys.

    Exits with 0, with 2 if a file cannot be read, does not fit or cannot be written, and with 130 on Ctrl-C, which
    leaves nothing behind.
    """
    with exit_on_failure():
        import torch

        from fedbasin.server.files import writing
        from fedbasin.server.files.adapters.adapter_folder import is_adapter, split_model
        from fedbasin.server.files.merge.merge_models import prepare_merge, refuse_full_disk
        from fedbasin.server.files.reading import ModelError
        from fedbasin.server.files.search.coefficients import with_start

        if threads is not None:
            torch.set_num_threads(threads)
        keys: dict[str, Any] = {
            "align": _alignment(
                align, matcher, align_data, steps, smoothing, rotate_residual=rotate_residual, no_prove=no_prove
            ),
            "dtype": dtype,
            "rank": rank,
            "task": task,
            "module": module,
            "score": score,
        }
        keys["distill"] = _distillation(distill, distill_passes, distill_rate)
        recipe = _recipe(inputs, rule, anchor, {"weight": weight, "statistics": statistics}, parameter or [], keys)
        settings = _search(recipe, search, search_points)
        if all(is_adapter(path) for path in recipe.paths()):
            if shard_size is not None:
                raise ModelError("--shard-size: adapters are one file; leave it out")
            _merge_adapters(recipe, output, force=force, as_json=as_json)
            return
        if recipe.rank is not None:
            raise ModelError("rank: belongs to adapters; leave it out")
        sources = [part for path in recipe.paths() for part in split_model(path)]
        merge = prepare_merge(recipe if settings is None else with_start(recipe))
        for source in (*sources, *inputs[: rule is None]):
            writing.refuse_overlap(source, output)
        writing.refuse_target(merge.reference, output, force=force)
        refuse_full_disk(merge, output)
        report, scores = _write(merge, output, int((shard_size or 5.0) * 1e9), settings)
    record = asdict(report) | ({} if scores is None else {"score": asdict(scores)})
    print_results([record], _render(report, scores, proves=bool(recipe.align and recipe.align.prove)), as_json=as_json)


def _recipe(
    inputs: list[Path],
    rule: str | None,
    anchor: Path | None,
    by_model: dict[str, list[Any] | None],
    parameters: list[str],
    keys: dict[str, Any],
) -> "MergeRecipe":
    from fedbasin.server.files.merge.recipe import make_recipe, read_recipe
    from fedbasin.server.files.reading import ModelError

    options = {key: value for key, value in keys.items() if value is not None}
    if rule is None:
        if anchor or any(by_model.values()) or parameters or len(inputs) > 1:
            raise ModelError("--rule: is missing; without it the only argument is a recipe, which has all else as keys")
        recipe = read_recipe(inputs[0])
        # Without the keys that it leaves out, which `slices` and `models` exclude in turn.
        return make_recipe(recipe.model_dump(exclude_unset=True) | options, str(inputs[0])) if options else recipe
    models: list[dict[str, Any]] = [{"model": path} for path in inputs]
    for name, values in by_model.items():
        # One function may give the data of all models.
        listed = (values or []) * (len(inputs) if name == "statistics" and len(values or []) == 1 else 1)
        if listed and len(listed) != len(inputs):
            raise ModelError(f"--{name}: was given {len(listed)} times for {len(inputs)} models; give one for each")
        for model, value in zip(models, listed, strict=False):
            model |= {"parameters": {name: value}} if name == "weight" else {name: value}
    content = {"merge_method": rule, "models": models, "parameters": _parameters(parameters, by_model), **options}
    return make_recipe(content | ({"base_model": anchor} if anchor else {}), "fedbasin merge")


def _parameters(texts: list[str], by_model: dict[str, list[Any] | None]) -> dict[str, Any]:
    """Return the values of parameters by name, each of which is given once."""
    from fedbasin.server.files.reading import ModelError

    values: dict[str, Any] = {}
    for name, value in map(_parameter, texts):
        if name in values or by_model.get(name):
            raise ModelError(f"--parameter: {name} was given twice; give it once")
        values[name] = value
    return values


def _parameter(text: str) -> tuple[str, Any]:
    import yaml

    from fedbasin.server.files.reading import ModelError

    name, equals, value = text.partition("=")
    if not equals or not value:
        raise ModelError(f"--parameter: {text!r} has no value; write NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        raise ModelError(f"--parameter: the value of {name} cannot be read as YAML: {error}") from error


def _alignment(
    links: str | None,
    matcher: str | None,
    data: str | None,
    steps: int | None,
    smoothing: float | None,
    *,
    rotate_residual: bool,
    no_prove: bool,
) -> dict[str, Any] | str | None:
    """Return the key `align`; None where the options say nothing of it."""
    from fedbasin.server.files.reading import ModelError

    keys = {
        "--matcher": ("matcher", matcher),
        "--align-data": ("data", data),
        "--steps": ("steps", steps),
        "--smoothing": ("smoothing", smoothing),
        "--rotate-residual": ("rotate_residual", rotate_residual or None),
        "--no-prove": ("prove", False if no_prove else None),
    }
    chosen = {option: entry for option, entry in keys.items() if entry[1] is not None}
    if links in (None, "off"):
        if chosen:
            raise ModelError(f"{next(iter(chosen))}: belongs to --align; give both, or leave it out")
        return links
    return {"links": links, **dict(chosen.values())}


def _distillation(data: str | None, passes: int | None, rate: float | None) -> dict[str, Any] | None:
    from fedbasin.server.files.reading import ModelError

    settings = {key: value for key, value in (("passes", passes), ("rate", rate)) if value is not None}
    if data is None and settings:
        raise ModelError(f"--distill-{next(iter(settings))}: belongs to --distill; give both, or leave it out")
    return None if data is None else {"data": data, **settings}


def _search(recipe: "MergeRecipe", trials: int | None, points: int | None) -> "CoefficientSearch | None":
    from fedbasin.server.files.reading import ModelError
    from fedbasin.server.files.search.scored_merge import CoefficientSearch

    if trials is None and points is not None:
        raise ModelError("--search-points: belongs to --search; give both, or leave it out")
    if trials is not None and not recipe.score:
        raise ModelError("--search: chooses coefficients by a score; give --score")
    if trials is not None and recipe.distill:
        raise ModelError("--search: would distil every candidate; search first, and distil the result")
    return None if trials is None else CoefficientSearch(trials, points or 3)


def _write(
    merge: "PreparedMerge", output: Path, shard: int, search: "CoefficientSearch | None"
) -> "tuple[MergeReport, ScoreReport | None]":
    from fedbasin.server.files.merge.merge_models import write_merge
    from fedbasin.server.files.search.scored_merge import write_scored_merge

    with progress_bar() as progress:
        task = progress.add_task("merging", total=merge.nbytes)

        def show(step: str) -> None:
            progress.update(task, description=step)

        if merge.recipe.score:
            return write_scored_merge(merge, output, shard, search, show)
        return write_merge(merge, output, shard, lambda size: progress.advance(task, size), show), None


def _merge_adapters(recipe: "MergeRecipe", output: Path, *, force: bool, as_json: bool) -> None:
    from rich.console import Group

    from fedbasin.server.files.adapters.merged_adapters import merge_adapter_folders, refuse_adapter_target
    from fedbasin.server.files.reading import few

    refuse_adapter_target(recipe.paths(), output, force=force)
    report = merge_adapter_folders(recipe, output)
    lines = [f"{report.rule} of {len(report.adapters)} adapters: {report.layers} layers, rank at most {report.rank}"]
    if len(report.bases) > 1:
        lines.append(f"the adapters name several bases: {few(report.bases)}; a sum of changes belongs to one")
    print_results([asdict(report)], Group(*lines), as_json=as_json)


def _render(report: "MergeReport", scores: "ScoreReport | None", *, proves: bool) -> Any:
    from rich.console import Group

    from fedbasin.server.files.align_file import describe_change
    from fedbasin.server.report.charts.text import size

    lines = [
        f"{report.rule} of {len(report.models)} models: {report.parameters:,} parameters in {report.tensors} tensors, "
        f"{size(report.bytes)} in {report.seconds:.1f} s"
    ]
    for number, alignment in enumerate(report.alignments, 1):
        lines.append(f"search {number}: distance {alignment.distance_before:.6g} → {alignment.distance_after:.6g}")
    if report.vocabulary is not None:
        proof = ", which no module proves" if report.alignments else ""
        lines.append(f"merged by token, {report.vocabulary} tokens{proof}")
    elif report.alignments:
        lines.append(describe_change(report.change, proves=proves))
    if report.distillation is not None:
        before, after = report.distillation.before, report.distillation.after
        lines.append(f"divergence from the ensemble {before:.4g} → {after:.4g}")
    lines += _describe_files(report)
    lines += [f"without effect: {setting}" for setting in report.unused]
    lines += [f"{path}: the adapter names another base, {named!r}" for path, named in report.bases.items()]
    if scores is not None:
        lines += [f"score {value:.6g} of {model}" for model, value in scores.models.items()]
        candidates = f", the best of {scores.trials} candidates" if scores.trials else ""
        lines.append(f"score {scores.result:.6g} of the result{candidates}")
    return Group(*lines)


def _describe_files(report: "MergeReport") -> list[str]:
    """Return sentences on the files of the first model's folder that were not merged."""
    from fedbasin.server.files.adapters.adapter_folder import split_model
    from fedbasin.server.files.reading import CONFIG, few

    files = report.files
    is_first = split_model(Path(report.models[0]))[0] == Path(report.reference)
    source = "the first model" if is_first else report.reference
    differing = [name for name in files.differing if name != CONFIG]
    return [
        *([f"copied from {source}: {few(files.copied)}"] if files.copied else []),
        *([f"not merged, though the models differ in it: {few(differing)}"] if differing else []),
        *([f"the models differ in these keys of {CONFIG}: {few(report.config)}"] if report.config else []),
        *([f"left out: {few(files.left)}"] if files.left else []),
        *(
            [f"left out, because some models lack it and none needs it: {few(report.dropped)}"]
            if report.dropped
            else []
        ),
    ]
