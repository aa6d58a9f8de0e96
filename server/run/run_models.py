"""The models of a run between its rounds: the one that is trained on, the one that is served, and the mean below them.

They are one model, unless a recipe serves a closed form, a step or an earlier model and trains on another.
"""

from collections.abc import Sequence
from dataclasses import replace

from flwr.app import ArrayRecord

from fedbasin.proto.report import Choice, Origin, StageReport
from fedbasin.server.run.resumption.checkpoint import Checkpoint
from fedbasin.server.run.run_state import RunState
from fedbasin.strategies.round.choice import Standing
from fedbasin.strategies.round.round_stages import RoundResult
from fedbasin.strategies.tensors.state import State


class RunModels:
    """The models of one run.

    Attributes:
        arrays: the model that the next round trains on.
        state: the same model, as tensors that share its bytes.
        digest: its SHA-256.
        served: the model that is evaluated, saved and handed to the user.
        served_digest: its SHA-256.
        average: the mean of the last round; None where it is the model that is trained on.
        before: the model that the last round began with; empty where the next round is not to go on from there.
    """

    arrays: ArrayRecord
    state: State
    digest: bytes
    served: ArrayRecord
    served_digest: bytes
    average: State | None
    before: State

    def __init__(self, run: RunState, arrays: ArrayRecord) -> None:
        """Begin with a model that is trained on and served.

        Args:
            run: reads arrays as tensors, and writes them.
            arrays: the model.
        """
        self._run = run
        self.before = {}
        self._take(arrays)

    def take_round(
        self,
        number: int,
        outcome: RoundResult,
        trained: ArrayRecord,
        anchor: State,
        standing: Standing,
        stages: Sequence[StageReport],
    ) -> Choice | None:
        """Take the models that a round ended in, and return how they were chosen; None where none were compared.

        Args:
            number: number of the round.
            outcome: the end of the round.
            trained: its model, after the server optimizer.
            anchor: the model that the round began with.
            standing: the state of the comparison before the round.
            stages: the stages of the round.
        """
        choice = standing.resting(number)
        if outcome.choice is not None:
            choice = self._take_compared(outcome, trained, standing, standing.settled(outcome.choice, number, stages))
        elif choice is not None:
            self._train_on(trained)
            self.average = None
        else:
            self._take(trained)
            if outcome.served is not None:
                self.serve(self._run.composition.untied(outcome.served))
        # Training on fitted layers is a jump, and going back is one too.
        follows = self.arrays is trained and (choice is None or choice.trained_on == Origin.average.name)
        self.before = anchor if follows and outcome.step is not None else {}
        return choice

    def _take_compared(self, outcome: RoundResult, trained: ArrayRecord, standing: Standing, choice: Choice) -> Choice:
        """Take the models of a round in which clients have compared some."""
        average_before = self.average
        self._train_on(trained)
        self.average = None if outcome.average is None else self._run.composition.untied(outcome.average)
        if standing.goes_back(choice) and average_before is not None:
            self.average = average_before
            self.go_back()
            choice = replace(choice, trained_on=Origin.average.name)
        if choice.served == Origin.kept.name:
            return choice
        if outcome.served is None:
            self._serve(trained)
        else:
            self.serve(self._run.composition.untied(outcome.served))
        return choice

    def go_back(self) -> None:
        """Train on the mean again, after fitted layers that could not be trained on; what is served stays."""
        if self.average is not None:
            self._train_on(self._run.arrays(dict(self.average)))
            self.average, self.before = None, {}

    def serve(self, model: State) -> None:
        """Serve another model than the last round's; what is trained on stays."""
        self._serve(self._run.arrays(model))

    def restore(self, saved: Checkpoint) -> None:
        """Take the models of a checkpoint."""
        self._take(self._ordered_arrays(saved.model))
        if saved.trained:
            self._train_on(self._ordered_arrays(saved.trained))
        self.average, self.before = saved.average or None, saved.before

    def _take(self, arrays: ArrayRecord) -> None:
        """Take a new global model, to be trained on and to be served."""
        self._train_on(arrays)
        self._serve(arrays)
        self.average = None

    def _serve(self, arrays: ArrayRecord) -> None:
        self.served, self.served_digest = arrays, self._run.digest(arrays)

    def _train_on(self, arrays: ArrayRecord) -> None:
        self.arrays, self.state, self.digest = arrays, self._run.state(arrays), self._run.digest(arrays)

    def _ordered_arrays(self, model: State) -> ArrayRecord:
        """Return a model's arrays in the order of the app's, which a file does not keep."""
        return self._run.arrays({name: model[name] for name in self.state})
