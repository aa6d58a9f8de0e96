"""The error of a stage that too few clients answered well, with the reasons grouped."""

from collections import defaultdict

from fedbasin.proto.report import ClientReport, StageReport
from fedbasin.server.printable import printable
from fedbasin.strategies.judging.outcomes import Outcome

_SHOWN = 3  # nodes of a group that are named


class QuorumLostError(RuntimeError):
    """Too few clients' replies were accepted, in every attempt.

    Attributes:
        report: the report of the last attempt.
    """

    def __init__(self, report: StageReport, needed: int, attempts: int, *, by_rule: bool = False) -> None:
        """Say who was refused and what to do.

        Args:
            report: the report of the last attempt.
            needed: number of clients that had to be accepted.
            attempts: number of attempts.
            by_rule: whether the recipe's rule needs as many, which no quorum changes.
        """
        accepted = len(report.accepted)
        remedy = (
            "let more nodes take part than the rule needs (fedbasin.min-train-nodes), or choose a rule that needs fewer"
            if by_rule
            else "lower fedbasin.quorum"
        )
        super().__init__(
            f"stage {report.stage}: {accepted} of {len(report.clients)} clients accepted, {needed} needed"
            f"{' by the rule' if by_rule else ''}, after {attempts} attempts ({grouped_reasons(report)}); fix the clients, "
            f"or {remedy}, and resume"
        )
        self.report = report


class StageFailedError(RuntimeError):
    """A stage whose accepted replies give no model, and too few of them to leave any out.

    Attributes:
        report: the report of the stage.
    """

    def __init__(self, report: StageReport, error: Exception) -> None:
        super().__init__(f"stage {report.stage}: {type(error).__name__}: {error}")
        self.report = report


def grouped_reasons(report: StageReport) -> str:
    """Return the reasons of all refusals of a stage, equal ones once with their nodes."""
    groups: dict[tuple[str, str], list[ClientReport]] = defaultdict(list)
    for client in report.clients:
        if not client.is_accepted:
            groups[client.outcome, client.detail].append(client)
    return "; ".join(_reason(*key, clients) for key, clients in groups.items())


def _reason(outcome: str, detail: str, clients: list[ClientReport]) -> str:
    named = ", ".join(str(client.node_id) for client in clients[:_SHOWN])
    rest = f" and {len(clients) - _SHOWN} more" if len(clients) > _SHOWN else ""
    nodes = f"node {named}" if len(clients) == 1 else f"nodes {named}{rest}"
    advice = Outcome[outcome].value if outcome in Outcome.__members__ else ""
    reason = f"{nodes}: {printable(outcome)}, {printable(detail)}"
    return f"{reason}; {advice}" if advice else reason
