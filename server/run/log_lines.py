"""Lines of the log of a run, in the terms of Flower's users."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import ArrayRecord

from fedbasin.proto.report import Choice, Incident, IncidentKind, Origin, PathSums, RoundReport, StageReport, Step
from fedbasin.server.exchange.quorum import grouped_reasons
from fedbasin.server.printable import printable
from fedbasin.server.run.settings import Settings

_MEGABYTE = 1e6


def settings_lines(settings: Settings) -> Iterator[str]:
    """Give the settings that differ from their defaults, and the sampling."""
    changed = {k: v for k, v in settings.changed.items() if k != "recipe"}
    listed = ", ".join(f"{key} = {value!r}" for key, value in changed.items())
    yield f"\t├──> fedbasin: recipe {settings.recipe}; {listed or 'all other settings at their defaults'}"
    yield (
        f"\t└──> Sampling: train {settings.fraction_train:.2f} (at least {settings.min_train_nodes}), evaluate "
        f"{settings.fraction_evaluate:.2f} (at least {settings.min_evaluate_nodes}), of at least "
        f"{settings.min_available_nodes} nodes"
    )


def start_lines(settings: Settings, arrays: ArrayRecord, rounds: int, folder: Path) -> Iterator[str]:
    """Give the lines at the start of a run."""
    size = sum(len(array.data) for array in arrays.values()) / _MEGABYTE
    yield f"Starting FedBasin: {rounds} rounds, {len(arrays)} arrays of {size:.2f} MB, folder {folder}"
    yield from settings_lines(settings)
    if len(arrays) > 50 and not settings.packed:
        yield (
            f"\t└──> {len(arrays)} arrays travel one by one; packed = true sends a few, which is several times faster "
            "between machines where every client has the mod"
        )


def stage_line(report: StageReport) -> str:
    """Return one line about a stage."""
    up = sum(client.bytes_up for client in report.clients) / _MEGABYTE
    down = sum(client.bytes_down for client in report.clients) / _MEGABYTE
    line = (
        f"{report.stage}: {len(report.accepted)} of {len(report.clients)} clients accepted in {report.seconds:.1f} s, "
        f"{up:.2f} MB up, {down:.2f} MB down"
    )
    forms = Counter(str(encoding.gram) for encoding in report.encodings.values())
    if forms:
        line += "; Gram matrices: " + ", ".join(f"{n} as {form}" for form, n in forms.items())
    unaligned = sum("not aligned" in client.detail for client in report.accepted)
    if unaligned:
        line += f"; {unaligned} not aligned, because their apps lack the mod"
    reasons = grouped_reasons(report)
    return f"{line}; refused: {reasons}" if reasons else line


def incident_line(incident: Incident) -> str:
    """Return one line about what the guard has seen, with the remedy."""
    return f"{incident.kind}: {incident.detail}; {IncidentKind[incident.kind].value}"


def round_lines(report: RoundReport, previous: RoundReport | None) -> Iterator[str]:
    """Give the lines about a round that is finished: metrics with their change, barrier, time."""
    for title, now, earlier in (
        ("train", report.train_metrics, previous and previous.train_metrics),
        ("evaluate (clients)", report.evaluate_metrics, previous and previous.evaluate_metrics),
        ("evaluate (server)", report.server_metrics, previous and previous.server_metrics),
    ):
        if now:
            yield f"{title}: {_metrics(now, earlier or {})}"
    if report.step is not None:
        yield step_line(report.step)
    if report.choice is not None:
        yield choice_line(report.choice)
    barrier = _barrier(report.path)
    yield f"round finished in {report.seconds:.1f} s{barrier}"


def step_line(step: Step) -> str:
    """Return one line about how far a round has gone beyond the mean of the clients' models."""
    judged = f"on {step.examples:.0f} examples that nobody trains on"
    if step.length == 1 and not step.momentum:
        return f"steps to the mean of the clients' models: loss {step.mean_loss:.4g} {judged}, and no longer step is better"
    move = f" with {step.momentum:.2g} of the last round's move" if step.momentum else ""
    return (
        f"steps {step.length:.2g} times as far{move}: loss {step.loss:.4g} {judged}; the mean has {step.mean_loss:.4g}"
    )


def choice_line(choice: Choice) -> str:
    """Return one line about the models that a round serves and trains on."""
    origin = Origin[choice.served]
    when = f" (round {choice.served_round})" if origin is Origin.kept else ""
    when += f", its outputs times {choice.scale:.2g}" if choice.scale is not None else ""
    line = (
        f"serves {origin.value}{when}: {_judged(choice.loss, choice.accuracy)} on {choice.examples:.0f} examples that no "
        f"layer was fitted to; the mean of the clients' models has {_judged(choice.average_loss, choice.average_accuracy)}; "
        f"trains on {Origin[choice.trained_on].value}"
    )
    rounds = "1 round" if choice.pause == 1 else f"{choice.pause} rounds"
    return f"{line}; averages for {rounds}" if choice.pause else line


def _judged(loss: float, accuracy: float | None) -> str:
    return f"loss {loss:.4g}" + ("" if accuracy is None else f", accuracy {accuracy:.3g}")


def end_lines(
    reports: Sequence[RoundReport], seconds: float, folder: Path, observer: str, served_round: int = 0
) -> Iterator[str]:
    """Give the lines at the end of a run: its result, its refusals, its folder, and where it can be seen.

    Args:
        reports: reports of all rounds.
        seconds: duration of the run.
        folder: folder of the run.
        observer: `host:port` of the observer; empty for none.
        served_round: number of the round that the served model is of; 0 for the last one.
    """
    if not reports:
        yield f"Finished without a round; folder {folder}"
        return
    newest = reports[-1]
    result = _metrics(newest.server_metrics or newest.evaluate_metrics or newest.train_metrics, {})
    early = f" of {newest.rounds}" if newest.round < newest.rounds else ""
    yield f"Finished {newest.round}{early} rounds in {seconds:.1f} s: {result or 'no metric was measured'}"
    measured = [report for report in reports if _heights(report.path)]
    if measured:
        yield f"\t├──> Barrier as trained -> aligned: {_heights(measured[-1].path)}, in round {measured[-1].round}"
    else:
        yield "\t├──> Barrier: not measured; set barrier-points to measure it"
    yield f"\t├──> Refused replies: {_refused(reports)}"
    if served_round and served_round != newest.round:
        yield f"\t├──> Served: the model of round {served_round}, which the rounds after it have not bettered"
    yield f"\t├──> Model: {folder / 'global.safetensors'}, to be read by safetensors.torch.load_file"
    seen = f", or the observer's page, or fedbasin watch {observer} --run {newest.run_id}" if observer else ""
    yield f"\t└──> See it: fedbasin report {folder}{seen}"


def _refused(reports: Sequence[RoundReport]) -> str:
    clients = [client for report in reports for stage in report.stages for client in stage.clients]
    refused = [client for client in clients if not client.is_accepted]
    kinds = Counter(client.outcome for client in refused).most_common()
    listed = ", ".join(f"{number} {printable(outcome)}" for outcome, number in kinds)
    return f"{len(refused)} of {len(clients)}" + (f" ({listed}), by node in the report" if listed else "")


def _metrics(now: Mapping[str, float], earlier: Mapping[str, float]) -> str:
    return ", ".join(
        f"{printable(name)} {value:.4g}" + (f" ({value - earlier[name]:+.2g})" if name in earlier else "")
        for name, value in now.items()
        if isinstance(value, int | float)
    )


def _barrier(path: PathSums | None) -> str:
    heights = _heights(path)
    return f", barrier {heights}" if heights else ""


def _heights(path: PathSums | None) -> str:
    """Return the barrier as trained and as aligned; empty where it was not measured."""
    if path is None or not path.examples or not path.loss_before:
        return ""
    trained, aligned = (_height(path.points, loss) for loss in (path.loss_before, path.loss_after))
    return f"{trained / path.examples:.3g} -> {aligned / path.examples:.3g}"


def _height(points: tuple[float, ...], loss: tuple[float, ...]) -> float:
    """Return the largest rise of a curve above the chord of its ends."""
    start, end = loss[0], loss[-1]
    return max(value - ((1 - t) * start + t * end) for t, value in zip(points, loss, strict=True))
