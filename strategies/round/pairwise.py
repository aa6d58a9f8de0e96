"""A round that merges in pairs: clients train all at once, then one after the other is asked for a link.

What each link is, `alignment/pairs.py` says; here it becomes a stage, and a chain or a tree of them a plan.
"""

from collections.abc import Generator
from dataclasses import replace
from functools import partial

from torch import Tensor

from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.strategies.alignment.pairwise_merging import LINKS, Link, Links, Merge, Merged
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.round.checks import check_update
from fedbasin.strategies.round.round import Answer, Next, Plan, Planned
from fedbasin.strategies.round.stages import Ask, Kind
from fedbasin.strategies.tensors.state import State, floating


class Linked:
    """Ask one client to align its model, or a merge that it is in, to another merge."""

    name = "link"
    kind: Kind = "train"
    layer_graph: LayerGraph | None = None

    def __init__(self, template: State, link: Link, ask: Ask) -> None:
        """Compose the stage.

        Args:
            template: names and shapes of the model.
            link: what is asked for.
            ask: with the symmetry and the matcher.
        """
        self.ask = replace(ask, link=link)
        if link.anchor is None:
            self.ask = replace(self.ask, symmetry=None, path_points=0)
        self._symmetry = ask.symmetry
        self._model = dict(template)

    def accept(self, node: int, update: Update) -> None:  # noqa: ARG002 - one client was asked
        check_update(update, self._model, ())
        # The reply's tensors are views of its bytes.
        own = {name: tensor.clone() for name, tensor in floating(update.parameters).items()}
        self._model = {**self._model, **own}

    def finish(self) -> dict[str, Tensor]:
        """The client's model, in the parametrisation in which models are merged."""
        return self._model if self._symmetry is None else self._symmetry.fold(self._model)


def linked_plan(first: Next, template: State, merge: Merge, ask: Ask) -> Plan:
    """The stages of a round: train, then link by link.

    Args:
        first: the stage in which clients train; they keep their models.
        template: names and shapes of the model.
        merge: chain or tree.
        ask: what a link asks for, but for the link itself.
    """
    answer = yield first
    merged = yield from _followed(LINKS[merge](answer.nodes), template, ask)
    return Planned(answer.model if merged is None else {**template, **merged.model})


def _followed(links: Links, template: State, ask: Ask) -> Generator[Next, Answer, Merged | None]:
    try:
        link = next(links)
        while True:
            carries = {**template, **link.anchor.model} if link.anchor else None
            make = partial(Linked, template, link, ask)
            answer = yield Next(make, carries, [link.node], may_fail=True)
            link = links.send(_merged(link, answer))
    except StopIteration as end:
        found: Merged | None = end.value
        return found


def _merged(link: Link, answer: Answer) -> Merged | None:
    if not answer.nodes:
        return None
    model = floating(answer.model)
    if link.moving is not None:
        return replace(link.moving, model=model)
    return Merged(model, answer.examples, (link.node,))
