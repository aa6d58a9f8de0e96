"""Discover the symmetry of a model: what one execution shows, proven by others.

The model runs once in each mode while its features are followed. What it shows is a proposal: which cells may move,
and which of them depend on which. For every kind of bundle the groups are then tried from the largest down, and the
largest that execution leaves unchanged is kept. Of bundles that are alike, such as the heads of all layers, the first
is tried alone and stands for the others; all of them are then proven together, and where that fails one by one.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, nn

from fedbasin.strategies.symmetry.coverage import Coverage, coverage
from fedbasin.strategies.symmetry.discover.bundles import Bundle, Cell, Kind, bundles
from fedbasin.strategies.symmetry.discover.digest import digest
from fedbasin.strategies.symmetry.discover.follow import follow
from fedbasin.strategies.symmetry.discover.proof import Prover, proving
from fedbasin.strategies.symmetry.discover.units import leaves
from fedbasin.strategies.symmetry.discover.walk import OUTPUT, Record
from fedbasin.strategies.symmetry.example_inputs import Example, positional_inputs
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.translation import Shift
from fedbasin.strategies.tensors.state import State

_T = TypeVar("_T")

Progress = Callable[[str, float], None]
"""Told what is being done, and the fraction of the work that is done, 0 to 1."""


# Up to this many units the elements of a discrete group are few.
_FEW = 8


@dataclass(frozen=True)
class Stop:
    """A part of a model that does not move.

    Attributes:
        part: name of the layer that writes the units, or of the tensor.
        operation: what keeps them in place, such as "aten.cumsum" or "output".
        source: file and line of the model that calls the operation, or "".
    """

    part: str
    operation: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.operation} fixes the units of {self.part!r}" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True)
class Discovery:
    """The symmetry of a model, how much of the model it moves, and what keeps the rest in place.

    Attributes:
        symmetry: the spaces in forward order, named after the module that writes each, and the shifts.
        coverage: the share of the parameters that move, in all and by kind of group.
        stops: the parts that do not move; inputs and labels are fixed by nature and are not named.
    """

    symmetry: Symmetry
    coverage: Coverage
    stops: tuple[Stop, ...]


def discover(
    model: nn.Module,
    *example: Example | None,
    cache: MutableMapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Discovery:
    """Return the symmetry of a model, proven by execution, with what keeps the rest of the model in place.

    Args:
        model: any module that runs on the example; it is not changed.
        example: arguments of its forward method, or one mapping of them by name, in a batch of at least two.
        cache: notations of symmetries that were discovered before, by the digest of the model.
        progress: called while the work goes on.

    Raises:
        SymmetryError: the model does not run on the example, or decides by data.
    """
    inputs = positional_inputs(model, *example)
    key = digest(model, inputs) if cache is not None else ""
    text = None if cache is None else cache.get(key)
    if text is None:
        text = _notation(*_discovered(model, inputs, progress or (lambda *_: None)))
        if cache is not None:
            cache[key] = text
    symmetry = parse(text)
    stops = (line.removeprefix(_STOP).split("|") for line in text.splitlines() if line.startswith(_STOP))
    return Discovery(
        symmetry, coverage(symmetry, dict(model.named_parameters())), tuple(Stop(*words) for words in stops)
    )


_STOP = "# stop "

# The operation of a stop for a tensor that the example leaves out.
NOT_READ = "not being read by the forward pass"


def _notation(symmetry: Symmetry, stops: Iterable[Stop]) -> str:
    """Return a symmetry and what stopped it as one text, which `parse` reads too."""
    return str(symmetry) + "".join(f"{_STOP}{stop.part}|{stop.operation}|{stop.source}\n" for stop in stops)


def _discovered(
    model: nn.Module, example: tuple[Tensor | None, ...], tell: Progress
) -> tuple[Symmetry, Iterable[Stop]]:
    tell("copy the model", 0.0)
    with proving(model, *example) as prover:
        tell("follow the model", 0.05)
        state = prover.model.state_dict(keep_vars=True)
        identities = {id(state[name]): name for name in prover.names}
        record = follow(prover.model, prover.inputs, identities)
        if record.decides and (idle := record.unread & {name for name, _ in prover.model.named_parameters()}):
            raise SymmetryError(
                f"{type(model).__name__} chooses by data what it runs, and {min(idle)!r} was not among it; give an example "
                "in which every part is used"
            )
        search = _Search(prover, bundles(record, prover.names), record, tell)
        symmetry = search.run()
        # Pairs of a head that turn move, though the angles keep their order.
        moved = {space.name for space in symmetry.spaces}
        return symmetry, [stop for stop in _stops(record, search) if stop.part not in moved]


@dataclass(eq=False)
class _Search:
    """The search for the largest group of each bundle.

    Attributes:
        prover: the model.
        bundles: what may move.
        record: what following the model showed.
        tell: told of progress.
        kinds: the kinds of groups that are proven so far.
        broken: bundles that do not keep the function.
        shifts: biases that are proven to be free.
        unproven: bundles without an effect on the outputs.
    """

    prover: Prover
    bundles: list[Bundle]
    record: Record
    tell: Progress
    kinds: dict[Cell, Kind] = field(default_factory=dict)
    broken: list[Bundle] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    unproven: list[Bundle] = field(default_factory=list)

    def run(self) -> Symmetry:
        """Return the symmetry with the largest groups that were proven."""
        self.tell("prove what may move", 0.1)
        reached = self.prover.reached()
        # What has no effect on the outputs cannot be proven by them.
        self.unproven = [b for b in self.bundles if not any(place.tensor in reached for place in b.places())]
        self.bundles = [bundle for bundle in self.bundles if bundle not in self.unproven]
        kept = compatible(self._keeps, self.bundles)
        self.broken = [bundle for bundle in self.bundles if bundle not in kept]
        classes = self._classes()
        for number, members in enumerate(classes):
            self.tell(f"enlarge {members[0].name}", 0.2 + 0.7 * number / max(len(classes), 1))
            self._enlarge(members)
            self._add_shifts(members)
        self.tell("prove the whole", 0.9)
        self._settle()
        return self._symmetry(self.bundles)

    def _symmetry(self, members: Iterable[Bundle], kinds: Mapping[Cell, Kind] | None = None) -> Symmetry:
        chosen = self.kinds if kinds is None else kinds
        counts: Counter[str] = Counter()
        spaces: list[Space] = []
        for bundle in members:
            if bundle in self.broken:
                continue
            counts[bundle.name] += 1
            number = counts[bundle.name]
            name = bundle.name if number == 1 else f"{bundle.name}.{number}"
            spaces.append(bundle.space(name, chosen, self.shifts))
        return Symmetry(tuple(spaces), shifts=tuple(self.shifts))

    def _keeps(self, members: Sequence[Bundle], kinds: Mapping[Cell, Kind] | None = None) -> bool:
        return self.prover.keeps(replace(self._symmetry(members, kinds), shifts=()))

    def _classes(self) -> list[list[Bundle]]:
        """Return the bundles by their form, which is alike for corresponding parts of all layers."""
        classes: dict[str, list[Bundle]] = defaultdict(list)
        for bundle in self.bundles:
            if bundle not in self.broken:
                classes[_form(bundle)].append(bundle)
        return list(classes.values())

    def _enlarge(self, members: Sequence[Bundle]) -> None:
        """Choose the largest kind of each leaf for bundles of one form: that of the first, which is tried alone."""
        for number in range(len(members[0].leaves())):
            cells = [bundle.leaves()[number] for bundle in members]
            for place in range(len(cells[0].kinds()) - 1):
                proposed = {**self.kinds, **{cell: cell.kinds()[place] for cell in cells}}
                if self._keeps(members[:1], proposed):
                    self.kinds = proposed
                    break

    def _add_shifts(self, members: list[Bundle]) -> None:
        """Find the biases of attention to which any vector may be added."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.prover.model.state_dict().items()}
        for shifts in zip(*(bundle.shifts(shapes) for bundle in members), strict=False):
            fits = all(_fits(shift, self.prover.model.state_dict()) for shift in shifts)
            if fits and self.prover.keeps(Symmetry((), shifts=shifts)):
                self.shifts += shifts

    def _settle(self) -> None:
        """Prove everything together, with other elements and in training mode too."""
        # Twice the batch, where the model runs on it, shows what it does with another length too.
        prover = self.prover.enlarged() or self.prover
        self._settle_by(lambda symmetry: prover.keeps(symmetry, (1,)), self.bundles)
        # One element of a group that has few may be the identity where the group is wrong.
        few = [bundle for bundle in self.bundles if any(map(self._has_few, bundle.root.all()))]
        self._settle_by(lambda symmetry: self.prover.keeps(symmetry, range(2, 8)), few)
        if self.record.trains_apart and prover.repeats(training=True):
            self._settle_by(lambda symmetry: prover.keeps(symmetry, (1,), training=True), self.bundles)

    def _has_few(self, cell: Cell) -> bool:
        letter, stride = self.kinds.get(cell, cell.kinds()[-1])
        return letter in "SBZ" and 1 < cell.units.size // max(stride, 1) <= _FEW

    def _settle_by(self, keeps: Callable[[Symmetry], bool], members: Sequence[Bundle]) -> None:
        """Reduce what fails in a last proof, first to its smallest group and then to nothing."""
        members = [bundle for bundle in members if bundle not in self.broken]
        if not members or keeps(self._symmetry(members)):
            return
        shifts, self.shifts = self.shifts, []

        def together(some: Sequence[Bundle]) -> bool:
            return keeps(self._symmetry(some))

        kept = compatible(together, members)
        for bundle in members:
            if bundle not in kept and self._fits_reduced(bundle, kept, together):
                kept.append(bundle)
        self.broken += [bundle for bundle in members if bundle not in kept]
        self.shifts = shifts
        if not together(kept):
            self.shifts = []

    def _fits_reduced(self, bundle: Bundle, kept: Sequence[Bundle], keeps: Callable[[Sequence[Bundle]], bool]) -> bool:
        """Give a bundle the groups that it keeps alone, or its smallest; return whether it then fits the others."""
        smallest = {cell: kind for cell, kind in self.kinds.items() if cell not in bundle.leaves()}
        self.kinds = smallest
        self._enlarge([bundle])
        if keeps([*kept, bundle]):
            return True
        self.kinds = smallest
        return keeps([*kept, bundle])


def compatible(keeps: Callable[[list[_T]], bool], members: Sequence[_T], base: Sequence[_T] = ()) -> list[_T]:
    """Return members that keep the function together and with those of the base, by bisection.

    Law: what is returned keeps it, and with any other of the members it does not, if all parts of what keeps it keep it.
    """
    if not members or keeps([*base, *members]):
        return list(members)
    if len(members) == 1:
        return []
    middle = len(members) // 2
    kept = compatible(keeps, members[:middle], base)
    return kept + compatible(keeps, members[middle:], [*base, *kept])


def _fits(shift: Shift, state: State) -> bool:
    try:
        shift.check(state)
    except SymmetryError:
        return False
    return True


def _form(bundle: Bundle) -> str:
    space = bundle.space("space", {})
    kinds = [cell.kinds() for cell in bundle.leaves()]
    return re.sub(r"\d+", "#", " ".join(axis.tensor for axis in space.axes)) + f"{space.group} {kinds}"


def _stops(record: Record, search: _Search) -> Iterable[Stop]:
    stops: dict[Stop, None] = {}
    # What a model returns and reads too is its states; labels are only returned.
    read = {leaf for value in record.parameters.values() for axis in value.axes[1:] for leaf in leaves(axis)}
    for value in record.parameters.values():
        for axis in value.axes:
            for leaf in leaves(axis):
                if leaf.fixed and leaf.reason[0] and (leaf.reason[0] != OUTPUT or leaf in read):
                    stops[Stop(leaf.name, leaf.reason[0], leaf.reason[1])] = None
    for bundle in search.broken:
        stops[Stop(bundle.name, "a proof by execution", "")] = None
    for bundle in search.unproven:
        stops[Stop(bundle.name, "having no effect on the outputs", "")] = None
    for name in sorted(record.unread):
        stops[Stop(name, NOT_READ, "")] = None
    return stops
