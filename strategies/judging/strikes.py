"""Strikes: a client whose replies are refused for what is in them is not asked for some rounds."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedbasin.proto.report import StageReport
from fedbasin.strategies.judging.outcomes import Outcome

# Refusals for the numbers in a reply: not for a node that is away, a reply that is late, or an app of another version.
_STRIKING = {
    outcome.name
    for outcome in (
        Outcome.malformed,
        Outcome.non_finite,
        Outcome.out_of_line,
        Outcome.overflow,
        Outcome.not_handled,
        Outcome.bad_weight,
        Outcome.not_symmetric,
        Outcome.not_positive,
        Outcome.inconsistent,
        Outcome.frozen_changed,
    )
}


@dataclass(eq=False)
class Strikes:
    """The rounds in which each client was refused for what it sent.

    Attributes:
        most: strikes that put a client in quarantine; 0 for no quarantine.
        rounds: length of a quarantine.
        strikes: by node, the rounds with a strike since its last quarantine began.
        until: by node, the last round of its quarantine.
    """

    most: int
    rounds: int
    strikes: dict[int, set[int]] = field(default_factory=dict)
    until: dict[int, int] = field(default_factory=dict)

    def record(self, number: int, stage: StageReport) -> None:
        """Count the refusals of a stage; several in one round are one strike, and an accepted update takes all away."""
        for client in stage.clients:
            if client.outcome in _STRIKING:
                self.strikes.setdefault(client.node_id, set()).add(number)
            elif client.is_accepted and stage.stage == "fuse":
                self.strikes.pop(client.node_id, None)
        for node in [node for node, rounds in self.strikes.items() if self.most and len(rounds) >= self.most]:
            del self.strikes[node]
            self.until[node] = number + self.rounds

    def quarantined(self, number: int) -> dict[int, int]:
        """Return the clients that are in quarantine in a round, with the last round of it."""
        return {node: until for node, until in self.until.items() if number <= until}

    def admitted(self, nodes: Iterable[int], number: int, fewest: int) -> list[int]:
        """Return the nodes that may be asked in a round; all of them where too few would be left."""
        nodes = list(nodes)
        free = [node for node in nodes if node not in self.quarantined(number)]
        return free if len(free) >= fewest else nodes
