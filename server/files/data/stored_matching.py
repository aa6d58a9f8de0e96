"""The matchers of a run for stored models: by their weights, or on data that a user gives."""

from dataclasses import dataclass, replace
from functools import partial

from fedbasin.server.files.data.given_data import read_data, read_task
from fedbasin.server.files.data.model_on_data import require_executable, run, runnable_state
from fedbasin.server.files.reading import ModelError, few
from fedbasin.server.files.stored_symmetry import SymmetricModel
from fedbasin.strategies.alignment.identity_bound import IdentityBounds
from fedbasin.strategies.alignment.learned_matching import Search
from fedbasin.strategies.alignment.matchers import Matcher, MatchingData, prepare_match
from fedbasin.strategies.alignment.weight_matching import MatchResult, find_by_weights
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batches
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class StoredMatching:
    """A matcher for models of one architecture, with the data that it reads.

    Attributes:
        matcher: the matcher.
        model: one of the models, which names the symmetry and the module.
        data: the batches; None without.
        name: the user's name for the data.
        task: the task of learned matching; None takes the one that the first batch shows.
        search: settings of its search; None for the defaults.
    """

    matcher: Matcher
    model: SymmetricModel
    data: Batches | None = None
    name: str = ""
    task: Task | None = None
    search: Search | None = None

    def match(
        self, symmetry: Symmetry, anchor: State, moving: State, place: float = 0.5, bounds: IdentityBounds | None = None
    ) -> MatchResult:
        """Return the transform that takes a model to an anchor.

        Args:
            symmetry: the spaces that may move.
            anchor: the model that stays, folded, in the names of the symmetry.
            moving: the model that moves, in the same form.
            place: its weight in the merge, 0 to 1, at which learned matching lowers the loss.
            bounds: the anchor's identity bounds, which matchers that read data do not use.

        Raises:
            ModelError: the data do not fit the models, or these cannot be matched.
        """
        if self.matcher is Matcher.weights:
            # Without a copy of the models, which may be larger than the memory.
            return find_by_weights(symmetry, anchor, moving, bounds)
        if self.data is None or not self.matcher.reads_data:
            alignment = prepare_match(self.matcher, symmetry, dict(anchor), dict(moving), bounds)()
            return MatchResult(alignment.transform, alignment.report)
        module = require_executable(self.model).module
        data = MatchingData(module, self.data, place, self.task, self.search)
        start, end = (runnable_state(self.model, state) for state in (anchor, moving))
        prepare = partial(prepare_match, self.matcher, symmetry, start, end, data=data)
        alignment = run(module, self.name, lambda: prepare()())
        return MatchResult(alignment.transform, alignment.report)


def matching_by_weights(model: SymmetricModel) -> StoredMatching:
    """Return the matcher that reads no data and holds no copies of models."""
    return StoredMatching(Matcher.weights, model)


def read_matching(
    name: str,
    model: SymmetricModel,
    data: str | None,
    task: str | None,
    option: str,
    steps: int | None = None,
    smoothing: float | None = None,
) -> StoredMatching:
    """Return the matcher of a name with the data that a user gives.

    Args:
        name: name of the matcher.
        model: one of the models.
        data: function that returns the batches, `package.module:function`; None without.
        task: name of the task; None takes the one that the first batch shows.
        option: the option that names the data, for errors.
        steps: steps of learned matching, 1 or more; None for the default.
        smoothing: label smoothing of learned matching, 0 or above and below 1; None for its own choice.

    Raises:
        ModelError: the matcher is unknown, has no search, or reads data and has none, the model cannot be run, or the
            function fails.
    """
    if name not in Matcher.__members__:
        raise ModelError(f"--matcher {name}: is unknown; give one of {', '.join(Matcher.__members__)}")
    matcher = Matcher[name]
    if matcher.reads_data and data is None:
        raise ModelError(f"--matcher {name}: reads data; give {option} package.module:function")
    search = _read_search(matcher, steps, smoothing)
    if matcher.reads_data:
        _refuse_other_names(matcher, model)
    module = None if model.executable is None else model.executable.module
    batches = None if data is None else read_data(data, module, option)
    chosen = None if task is None else read_task(task)
    return StoredMatching(matcher, model, batches, data or "", chosen, search)


def _read_search(matcher: Matcher, steps: int | None, smoothing: float | None) -> Search:
    """Return the settings of learned matching that a user gives."""
    learns = matcher is Matcher.learned
    if steps is not None and not (learns and steps >= 1):
        raise ModelError(f"--steps {steps}: are 1 or more, and read by the matcher learned alone")
    if smoothing is not None and not (learns and 0 <= smoothing < 1):
        raise ModelError(f"--smoothing {smoothing:g}: is from 0 to below 1, and read by the matcher learned alone")
    search = Search(smoothing=smoothing)
    return search if steps is None else replace(search, steps=steps)


def refuse_idle_options(
    matching: StoredMatching, option: str, task: str | None = None, *, certify: bool = False
) -> None:
    """Refuse options that the matcher does not read.

    Args:
        matching: the matcher with what was given.
        option: the option that names its data.
        task: name of a task that nothing else reads.
        certify: whether spaces are to be certified.

    Raises:
        ModelError: names the option.
    """
    name = matching.matcher.name
    if matching.data is not None and not matching.matcher.reads_data:
        raise ModelError(
            f"{option}: the matcher {name} reads no data; leave it out, or choose the matcher activations or learned"
        )
    if task is not None and matching.matcher is not Matcher.learned:
        raise ModelError(f"--task: is read by the matcher learned alone, not by {name}; leave it out")
    if certify and matching.matcher.reads_data:
        raise ModelError(
            f"--certify: is a proof about weights, which the matcher {name} does not compare; leave it out"
        )


def _refuse_other_names(matcher: Matcher, model: SymmetricModel) -> None:
    """Refuse a symmetry in the names of a file that are not those of the module."""
    executable = require_executable(model)
    moved = {axis.tensor for space in model.symmetry.spaces for axis in space.axes} if model.by_hand else set()
    if renamed := sorted(name for name in moved if executable.layout.whole.get(name) != name):
        raise ModelError(
            f"{model.stored.path}: its symmetry names {few(renamed)}, which {executable.kind} has under other names, so the "
            f"matcher {matcher.name} cannot run it; choose a matcher by weights"
        )
