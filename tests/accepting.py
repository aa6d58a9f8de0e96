"""One client's update through a stage: checked, and added where it passes."""

from fedbasin.proto.report import AlignmentReport
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.round.stage import Stage


def accept(stage: Stage, node: int, update: Update) -> AlignmentReport | None:
    """Check an update and add it; return the report of the server's own alignment."""
    checked = stage.check(update)
    stage.add(node, checked.update)
    return checked.alignment
