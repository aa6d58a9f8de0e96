"""The early end of a run whose served model no longer gets better."""

import math
from dataclasses import dataclass, replace

from fedbasin.proto.report import RoundReport
from fedbasin.server.run.settings import SettingsError
from fedbasin.strategies.round.divergence import global_losses


@dataclass(frozen=True)
class Patience:
    """The best round so far, and how long a run goes on without a better one.

    Attributes:
        rounds: rounds without a lower loss after which the run ends; 0 for no early end.
        best_round: number of the round with the lowest loss.
        best_loss: that loss, of the model that was served after it.
        name: name of the loss: the server's own where it evaluates, otherwise the median of the clients'.
    """

    rounds: int
    best_round: int = 0
    best_loss: float = math.inf
    name: str = ""

    def check(self, *, evaluates: bool) -> None:
        """Check that there will be a loss; raises a SettingsError where nobody evaluates."""
        if self.rounds and not evaluates:
            raise SettingsError(
                f"patience = {self.rounds}: nobody evaluates the served model; set fraction-evaluate above 0, pass "
                "evaluate_fn, or set patience = 0"
            )

    def after(self, report: RoundReport) -> "Patience":
        """Return the patience after a round whose model was taken.

        Raises:
            SettingsError: the round has no loss.
        """
        if not self.rounds:
            return self
        losses = global_losses(report)
        if not losses:
            raise SettingsError(
                f"patience = {self.rounds}: round {report.round} has no metric with 'loss' in its name; return one from "
                "@app.evaluate() or evaluate_fn, or set patience = 0"
            )
        # The server's own loss stands last, and is of the same examples in every round.
        name = self.name if self.name in losses else list(losses)[-1]
        if self.best_round and not losses[name] < self.best_loss:
            return self
        return replace(self, best_round=report.round, best_loss=losses[name], name=name)

    def is_over(self, number: int) -> bool:
        """Return whether a run ends after a round."""
        return 0 < self.rounds <= number - self.best_round
