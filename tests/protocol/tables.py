"""Rows as Markdown."""

from collections.abc import Sequence

from tests.protocol.setting import Point
from tests.protocol.summary import MARKS, Row, Scene
from tests.protocol.training import Training

_ROUNDS = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60)
_MEGA = 1e6


def heading(scene: Scene) -> str:
    """What the rows of a table have in common."""
    training = scene.training
    epochs = "1 local epoch" if training.epochs == 1 else f"{training.epochs} local epochs"
    usual = Training()
    is_usual = (training.optimizer, training.rate) == (usual.optimizer, usual.rate)
    steps = "" if is_usual else f", {training.optimizer} at {training.rate:g}"
    return f"{scene.task}, {scene.split}, {scene.model}, {scene.clients} clients, {epochs}{steps}"


def markdown(rows: Sequence[Row]) -> str:
    """Accuracy by round, then rounds and megabytes up and down until each mark, then seconds a round.

    Where a task has no right and wrong, only the seconds; `losses` has the rest.
    """
    last = max(row.last for row in rows)
    rounds = [number for number in _ROUNDS if number <= last]
    marks = [mark for mark in MARKS if any(row.first(mark) for row in rows)]
    if not rows[0].has_accuracy:
        rounds = []
    head = ["rule", "seeds", *(f"r{number}" for number in rounds), *(["best"] if rounds else [])]
    head += [f"rounds to {mark:.2f}" for mark in marks]
    head += [f"MB to {mark:.2f}" for mark in marks]
    head += ["client s / round", "server s / round"]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    lines += [_cells(row, rounds, marks) for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def losses(rows: Sequence[Row]) -> str:
    """Test loss by round."""
    last = max(row.last for row in rows)
    rounds = [number for number in _ROUNDS if number <= last]
    lines = [["rule", "seeds", *(f"r{number}" for number in rounds)], ["---", *["--:"] * (len(rounds) + 1)]]
    for row in rows:
        measured = (row.at(number) for number in rounds)
        lines.append([f"`{row.rule}`", str(len(row.seeds)), *(f"{p.loss:.3f}" if p else "" for p in measured)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def settings_note(rows: Sequence[Row]) -> str:
    """How settings were chosen, where there was a choice."""
    tuned = [f"{row.rule.split('(')[0]} {row.tried}" for row in rows if row.tried > 1]
    if not tuned:
        return ""
    measure = "the mean test accuracy" if rows[0].has_accuracy else "the mean test loss"
    return f"Best of several settings, by {measure} over rounds: {', '.join(tuned)}."


def _cells(row: Row, rounds: Sequence[int], marks: Sequence[float]) -> list[str]:
    measured = [row.at(number) for number in rounds]
    cells = [f"`{row.rule}`", str(len(row.seeds)), *(_accuracy(point) for point in measured)]
    cells += [_share(row.best)] if rounds else []
    firsts = [row.first(mark) for mark in marks]
    end = row.points[-1]
    cells += [str(point.round) if point else f"not in {row.last}" for point in firsts]
    cells += [f"{megabytes(point):.1f}" if point else "" for point in firsts]
    return [*cells, *(f"{seconds / max(1, end.round):.2f}" for seconds in _seconds(end))]


def megabytes(point: Point) -> float:
    """Up and down, over all clients."""
    return (point.bytes_up + point.bytes_down) / _MEGA


def _seconds(point: Point) -> tuple[float, float]:
    return point.client_seconds, point.server_seconds


def _accuracy(point: Point | None) -> str:
    return "" if point is None else _share(point.accuracy)


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
