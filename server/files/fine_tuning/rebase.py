"""A fine-tuning carried to another base: the task vector in the frame of the new base.

    theta = new + s kept * (g(fine) - g(old))        g aligns old to new

Aligned task vectors: Rinaldi et al. 2025 (Update Your Transformer to the Latest Release), arXiv 2505.22697; the mask
`kept` by the signs of gradients at the new base: arXiv 2510.09658.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbasin.proto.report import AlignmentReport
from fedbasin.server.files.align_file import align, apply_transform, prove_if_possible
from fedbasin.server.files.data.given_data import read_data
from fedbasin.server.files.data.model_on_data import require_parameters, run
from fedbasin.server.files.data.stored_matching import matching_by_weights
from fedbasin.server.files.fine_tuning.gradient_signs import descent_votes
from fedbasin.server.files.library.executable_model import ExecutableModel
from fedbasin.server.files.library.tensor_layout import ModuleState, StoredState
from fedbasin.server.files.reading import ModelError, StoredModel, refuse_not_finite
from fedbasin.server.files.shared_tensors import require_equal_shapes
from fedbasin.server.files.stored_symmetry import SymmetricModel
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.parallel import is_finite
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class Rebasing:
    """A fine-tuning in the frame of a new base, not yet written.

    Attributes:
        state: tensors of the result, computed when they are read.
        report: how far the old base was moved; None if it was not aligned.
        change: largest relative change of the old base's outputs under the alignment; None if nothing was proven.
    """

    state: "RebasedState"
    report: AlignmentReport | None
    change: float | None


def rebase(
    old: SymmetricModel,
    fine: StoredModel,
    new: StoredModel,
    strength: float,
    votes: State | None,
    on_read: Callable[[str], None],
    *,
    aligned: bool,
    prove: bool,
) -> Rebasing:
    """Carry the change from `old` to `fine` over to `new`.

    Args:
        old: the base that was fine-tuned, with its symmetry.
        fine: the fine-tuned model.
        new: another base of the same shape.
        strength: factor on the change.
        votes: signs by which entries are kept, in the names of the files; None keeps all.
        on_read: called with the name of each tensor that the search reads.
        aligned: whether the old base is aligned to the new one first.
        prove: whether the old base is executed before and after.

    Raises:
        ModelError: the models differ in their tensors, or cannot be aligned.
    """
    for model in (fine, new):
        require_equal_shapes(model, old.stored)
    for model in (fine,) if aligned else (old.stored, fine, new):
        refuse_not_finite(model, model.path)
    if not aligned:
        return Rebasing(RebasedState(new, old.stored, fine, strength, votes), None, None)
    alignment = align(new, old, old.symmetry, matching_by_weights(old), on_read, certify=False)
    change = prove_if_possible(alignment.transform, old, wanted=prove)
    start, end = (apply_transform(alignment.transform, replace(old, stored=model)) for model in (old.stored, fine))
    return Rebasing(RebasedState(new, start, end, strength, votes), alignment.report, change)


def votes_of(new: StoredModel, executable: ExecutableModel, data: str, task: Task | None) -> State:
    """Return the votes of labelled examples at a base, in the names of its files.

    Args:
        new: the base.
        executable: its module.
        data: function that returns the batches, `package.module:function`.
        task: the task; None takes the one that the first batch shows.

    Raises:
        ModelError: the base cannot be executed, or the data do not fit it.
    """
    require_parameters(new, executable)
    batches = read_data(data, executable.module)
    votes = run(executable.module, data, lambda: descent_votes(executable.module, batches, task))
    # Buffers, and tensors that the module does not read, have no votes: they are NaN, at which every change is kept.
    missing = {
        name: torch.full_like(tensor, torch.nan)
        for name, tensor in ModuleState(executable.layout, new).items()
        if name not in votes
    }
    unread = {name: torch.full(shape.shape, torch.nan) for name, shape in new.shapes().items()}
    return StoredState(executable.layout, unread, {**missing, **votes})


class RebasedState(Mapping[str, Tensor]):
    """The tensors of a new base with the change from an old base to a fine-tuned one, computed when they are read.

    Attributes:
        changed: number of entries read so far at which the fine-tuning changes the old base.
        kept: number of those whose change is carried over.
    """

    def __init__(self, new: State, old: State, fine: State, strength: float, votes: State | None) -> None:
        self._new, self._old, self._fine = new, old, fine
        self._strength, self._votes = strength, votes
        self.changed = self.kept = 0

    def __getitem__(self, name: str) -> Tensor:
        base = self._new[name]
        if not base.is_floating_point():
            return base
        change = self._fine[name].double() - self._old[name].double()
        self.changed += int(change.count_nonzero())
        if self._votes is not None:
            # Kept also where there are no votes, which are NaN.
            change = change.masked_fill(change * self._votes[name] <= 0, 0.0)
        self.kept += int(change.count_nonzero())
        result = (base.double() + self._strength * change).to(base.dtype)
        if not is_finite(result):
            raise ModelError(f"{name}: is not finite after the change in {base.dtype}; choose a smaller --strength")
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._new)

    def __len__(self) -> int:
        return len(self._new)
