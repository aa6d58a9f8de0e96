"""Which of a round's models is served, and which one the next round trains on.

    served       the evaluated point with the lowest loss among those whose loss is below that of the mean of the clients'
                 models by more than chance, and whose accuracy is no lower; otherwise the mean
    trained on   the search's own point, where the mean is not getting there by itself and the clients' first local
                 steps from the point lose less than it is ahead of the mean; otherwise the mean

A closed-form head on features that are nearly untrained is accurate and so large that training from it diverges. The
mean below it trains as ever, so the two roles are kept apart. Everything is decided by sums over the clients' examples.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import hypot, inf, log, sqrt

from fedbasin.proto.report import Choice, Origin, PathSums, RoundReport, StageReport
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.round.refit import ProbePath

# Rounds without a comparison after one in which closed forms did not pay; doubled each time, up to the second number.
_PAUSE, _LONGEST_PAUSE = 1, 16

# Closed forms pay where they lower the loss by this part of it. They cost as much as a round of training on a small
# model, and the choice of the best of ten points alone lowers it a little.
_GAIN = 0.02

# Averaging is slow where a round leaves more than this part of what the mean's loss was above the served model's: three
# quarters, or all of it where rounds go beyond the mean, which arrive later and end lower. Training on fitted layers
# memorises more, and is worth that only where averaging does not arrive.
SLOW, SLOW_WITH_STEPS = 0.75, 1.0

# Rounds whose comparison is followed by others as long as closed forms pay, and the number of rounds of averaging after
# each later one that pays; the model that was served stays meanwhile. Only where rounds sample clients.
_FIRST_ROUNDS, _REST = 10, 6

# Standard errors by which a difference is more than chance, between models that the same examples have judged. The error
# is estimated as if others had, and is rather smaller.
_DEVIATIONS = 1.0

# A loss that is this multiple of another is higher, whoever has measured the two, where the accuracy is lower by this
# number of standard errors.
_MULTIPLE, _DEVIATIONS_APART = 2.0, 2.0


@dataclass(frozen=True)
class Candidate:
    """A model on a line between the models of a round, as the clients' examples judge it.

    Attributes:
        point: place on the line.
        loss: mean loss.
        accuracy: mean accuracy; None where the task has no right and wrong.
        origin: origin of the line's models.
        is_extended: whether the line is the second one, from the global model on.
    """

    point: float
    loss: float
    accuracy: float | None = None
    origin: Origin = Origin.fitted
    is_extended: bool = False

    def matches(self, other: "Candidate | Choice") -> bool:
        """Return whether this model is as good as another one in loss and in accuracy."""
        return self.loss <= other.loss and (
            self.accuracy is None or other.accuracy is None or self.accuracy >= other.accuracy
        )

    def is_below(self, other: "Candidate | Choice", examples: float) -> bool:
        """Return whether the loss is lower than another one by more than chance.

        Only sums are known, so the variance of an example's loss is taken from its mean: the mean itself for a loss in
        nats, most of which comes from few examples, and the mean's square for losses without right and wrong, whose
        unit is the targets'.

        Args:
            other: the other model.
            examples: number of examples that have judged both.
        """
        losses = self.loss, other.loss
        deviation = hypot(*losses) if self.accuracy is None else sqrt(max(0.0, sum(losses)))
        return other.loss - self.loss > _DEVIATIONS * deviation / sqrt(max(examples, 1.0))


def candidates(path: Path | None, origin: Origin = Origin.fitted, *, is_extended: bool = False) -> list[Candidate]:
    """Return the evaluated points of a line; none where no client has evaluated it."""
    if path is None or not path.examples:
        return []
    accuracies: Iterable[float | None] = path.accuracy or (None,) * len(path.points)
    return [
        Candidate(point, loss, accuracy, origin, is_extended)
        for point, loss, accuracy in zip(path.points, path.mean_loss, accuracies, strict=True)
    ]


def best_candidate(average: Candidate, models: Iterable[Candidate], examples: float) -> Candidate:
    """Return the model with the lowest loss among those that are better than the average; the average where none is.

    A model beyond those of the round must be better than all between them by more than chance too: it is more confident
    on examples that clients have learned, and no more right.

    Args:
        average: the mean of the clients' models.
        models: the other models.
        examples: number of examples that have judged them.
    """
    better = [model for model in models if model.matches(average) and model.is_below(average, examples)]
    best = min((m for m in better if not m.is_extended), key=lambda m: m.loss, default=average)
    beyond = (m for m in better if m.is_extended and m.is_below(best, examples))
    return min(beyond, key=lambda m: m.loss, default=best)


def best_scaled(models: list[Candidate], examples: float) -> Candidate | None:
    """Return the model with scaled outputs whose loss is lowest; None where that gains no more than a fit by chance.

    A model that has learned its examples by heart is surer than it is right. Its outputs times one number, found on
    examples that it has not learned, are as accurate and have a lower loss (Guo et al. 2017, arXiv 1706.04599).

    Args:
        models: the model with its outputs scaled by 0 to 1, in that order.
        examples: number of examples that have judged them.
    """
    whole = models[-1]
    # Outputs of zero are no model.
    lower = [m for m in models[1:-1] if is_more_than_chance(m.loss, whole.loss, examples, in_nats=True)]
    return min(lower, key=lambda model: model.loss, default=None)


def is_more_than_chance(loss: float, reference: float, examples: float, *, in_nats: bool) -> bool:
    """Return whether one number that was fitted to some examples has lowered their loss by more than chance.

    A number that is worth nothing lowers the sum of the losses by a half, and raises that of other examples by as much,
    so it has to lower the sum by one (Akaike 1974, IEEE Transactions on Automatic Control 19(6)).

    Args:
        loss: mean loss with the number.
        reference: mean loss without it.
        examples: number of examples.
        in_nats: whether the loss is in nats; of a squared error, which is in the targets' units, half the logarithm is.
    """
    if not loss < reference:
        return False
    gain = reference - loss if in_nats else log(reference / loss) / 2 if loss > 0 else inf
    return gain * examples > 1


def best_point(path: Path | None) -> float:
    """Return the evaluated point of a path at which the clients' loss is lowest.

    Nothing is read into the gaps between points: away from the fitted model the loss need not be convex. Without any
    client's word the start of the path is returned.
    """
    if not (path and path.examples):
        return 0.0
    return min(zip(path.loss, path.points, strict=True))[1]


def best_ahead(path: Path | None, otherwise: float) -> float:
    """Return the best evaluated point of a path apart from its start.

    A round that stayed at its start would only be followed by another like it.

    Args:
        path: a path from the model that the round began with.
        otherwise: the point to take if no client evaluated the path.
    """
    if not (path and path.examples):
        return otherwise
    return min(zip(path.loss[1:], path.points[1:], strict=True))[1]


def choice_of(served: Candidate, average: Candidate, trained_on: Origin, examples: float) -> Choice:
    """Return the choice of a round, whose number the loop knows."""
    return Choice(
        served=served.origin.name,
        served_round=0,
        trained_on=trained_on.name,
        loss=served.loss,
        accuracy=served.accuracy,
        average_loss=average.loss,
        average_accuracy=average.accuracy,
        examples=examples,
    )


def is_trainable(trial: PathSums | None, gain: float) -> bool:
    """Return whether a model loses less by clients' first local steps from it than it is ahead of the mean.

    Some loss is to be expected. A new head is worse after Adam's first steps, and small clients soon know their own
    examples by heart, which averaging takes back. A head that is too large for the learning rate loses everything.

    Args:
        trial: losses before the steps and after them; None where no client has taken any.
        gain: loss of the mean above that of the round's best model.
    """
    if trial is None or not trial.examples:
        return False
    before, after = trial.loss_after
    # Equal where no client could take a step.
    return after != before and (after - before) / trial.examples < gain


def is_slow(
    average: Candidate,
    served: Candidate,
    shortfall: float,
    start: Candidate | None = None,
    examples: float = 0.0,
    slow: float = SLOW,
) -> bool:
    """Return whether the mean of the clients' models hardly comes closer to the served model.

    Args:
        average: the mean.
        served: the best of the round's models.
        shortfall: difference of their losses when they were last compared; infinite where they were not.
        start: the model that the round began with, which the mean is compared with where there was no comparison.
        examples: number of examples that have judged the mean and the start.
        slow: the part of the shortfall above which averaging is slow.
    """
    if shortfall == inf:
        return start is not None and not average.is_below(start, examples)
    return average.loss - served.loss > slow * shortfall


def kept(choice: Choice, earlier: Choice | None, *, same_clients: bool) -> Choice:
    """Return a choice that keeps the model served so far, where none of this round's is as good within chance.

    Args:
        choice: the choice among this round's models.
        earlier: the choice of the round before; None where its model was not compared.
        same_clients: whether the same clients judged both, or some of them. Losses on the examples of others say
            nothing, unless one is a multiple of the other and the accuracies differ by more than chance.
    """
    if earlier is None:
        return choice
    model = Candidate(0.0, choice.loss, choice.accuracy)
    was = Candidate(0.0, earlier.loss, earlier.accuracy)
    examples = min(choice.examples, earlier.examples)
    better = was.is_below(model, examples) if same_clients else _is_far_better(earlier, choice)
    if not was.matches(model) or not better:
        return choice
    return replace(
        choice,
        served=Origin.kept.name,
        served_round=earlier.served_round,
        loss=earlier.loss,
        accuracy=earlier.accuracy,
        scale=earlier.scale,
        scale_gain=earlier.scale_gain,
    )


def _is_far_better(earlier: Choice, choice: Choice) -> bool:
    """Return whether a model is so much better than another one that it does not matter who has judged them."""
    if _MULTIPLE * earlier.loss >= choice.loss:
        return False
    if earlier.accuracy is None or choice.accuracy is None:
        return True
    pairs = ((earlier.accuracy, earlier.examples), (choice.accuracy, choice.examples))
    # One example more of each kind: no accuracy on a few examples is certain.
    shares = [((share * examples + 1) / (examples + 2), examples + 2) for share, examples in pairs]
    error = sqrt(sum(share * (1 - share) / examples for share, examples in shares))
    return earlier.accuracy - choice.accuracy > _DEVIATIONS_APART * error


def gains(choice: Choice) -> bool:
    """Return whether the served model is better than the mean by more than the choice of a best point gains by itself."""
    return choice.loss < (1 - _GAIN) * choice.average_loss


def pays(choice: Choice) -> bool:
    """Return whether closed forms are worth another comparison: for the model that is served, or for training."""
    return gains(choice) or choice.trained_on in (Origin.fitted.name, Origin.weighted.name, Origin.products.name)


def with_pause(choice: Choice, pause: int) -> Choice:
    """Return a choice with the rounds of plain averaging that follow where closed forms have not paid.

    Args:
        choice: the choice.
        pause: the pause before it; 0 for none.
    """
    return replace(choice, pause=0 if pays(choice) else longer(pause))


def longer(pause: int) -> int:
    """Return the number of rounds of a pause after one that was in vain."""
    return min(max(_PAUSE, 2 * pause), _LONGEST_PAUSE)


@dataclass(frozen=True)
class Standing:
    """The state of the comparison between rounds.

    Attributes:
        choice: the choice that the served model comes from; None where that model was not compared.
        judges: the clients that judged it.
        pause: number of rounds of the last pause; 0 where closed forms have paid since.
        resumes: number of the first round that compares again.
    """

    choice: Choice | None = None
    judges: frozenset[int] = frozenset()
    pause: int = 0
    resumes: int = 1

    @property
    def shortfall(self) -> float:
        """The loss of the mean above that of the served model, for a round of averaging to lower.

        Zero where the last round trained on fitted layers: what such a round gains says nothing of averaging. Infinite
        where the two were not compared. What a scale has gained is left out, because averaging cannot.
        """
        if self.choice is None:
            return inf
        if self.choice.trained_on == Origin.fitted.name:
            return 0.0
        return self.choice.average_loss - self.choice.loss - self.choice.scale_gain

    def after(self, report: RoundReport) -> "Standing":
        """Return the standing after a round whose model was taken."""
        choice = report.choice
        if report.round < self.resumes:
            return self if choice else replace(self, choice=None, judges=frozenset())
        if choice is None:  # a comparison that failed, or nothing that could be compared
            pause = longer(self.pause)
            return Standing(pause=pause, resumes=report.round + 1 + pause)
        # A choice between two means of products is the fusion itself, and every round makes it.
        rests = pays(choice) and choice.trained_on != Origin.products.name and report.round >= _FIRST_ROUNDS
        # The next mean is no worse for having its outputs as they are, and is likely to be ahead by then.
        rests = rests and choice.served != Origin.average.name
        # Where the same clients judge every round, averaging would overtake the served model unseen.
        rests = rests and self.choice is not None and judges(report.stages) != self.judges
        rest = _REST if rests else choice.pause
        return Standing(choice, judges(report.stages), choice.pause, report.round + 1 + rest)

    def settled(self, choice: Choice, number: int, stages: Iterable[StageReport]) -> Choice:
        """Return a round's choice with the number of its round, in view of the model served so far, and with its pause.

        Args:
            choice: the choice among the round's models.
            number: number of the round.
            stages: its stages.
        """
        here, now = replace(choice, served_round=number), judges(stages)
        # A client that has failed since takes its examples from one of the two judgements alone.
        same = now <= self.judges or self.judges <= now
        return with_pause(kept(here, self.choice, same_clients=same), self.pause)

    def resting(self, number: int) -> Choice | None:
        """Return the choice of a round that compares nothing because closed forms pay: the served model stays.

        None for a round that compares, or that has only the mean.
        """
        if self.choice is None or number >= self.resumes or not gains(self.choice):
            return None
        return replace(self.choice, served=Origin.kept.name, trained_on=Origin.average.name)

    def goes_back(self, choice: Choice) -> bool:
        """Return whether a round that trained on fitted layers has left the mean worse than the mean before it."""
        earlier = self.choice
        return (
            earlier is not None
            and earlier.trained_on == Origin.fitted.name
            and choice.served == Origin.kept.name
            and choice.average_loss > earlier.average_loss
        )


def judges(stages: Iterable[StageReport]) -> frozenset[int]:
    """Return the clients that have evaluated the models of a round."""
    return frozenset(client.node_id for stage in stages if stage.stage == ProbePath.stage for client in stage.accepted)
