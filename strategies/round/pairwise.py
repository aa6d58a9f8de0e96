"""A round that merges models in pairs: all clients train at once, then one after the other aligns to a merge.

The order of the pairs, a chain or a tree, is that of `strategies.alignment.pairwise_merging`.
"""

from collections.abc import Generator
from dataclasses import replace
from functools import partial

from torch import Tensor

from fedbasin.proto.request import Request
from fedbasin.strategies.alignment.pairwise_merging import LINKS, Link, Links, Merge, MergedModel
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.checks import check_update
from fedbasin.strategies.round.stage import Checked, StagePlan, StageResult
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State, floating


class LinkModels:
    """A stage in which one client aligns its model, or a merge that contains it, to another merge."""

    stage = "link"
    layer_graph = None
    average = None
    notes: tuple[str, ...] = ()

    def __init__(self, template: State, link: Link, request: Request, symmetry: Symmetry | None) -> None:
        """Compose the stage.

        Args:
            template: names and shapes of the model.
            link: the client, and the two models that are linked.
            request: what is asked apart from the link itself.
            symmetry: the symmetry of the model.
        """
        self.request = replace(request, stage=self.stage, keep=True)
        if link.anchor is None:
            self.request = replace(self.request, path_points=0)
        else:
            self.request = replace(
                self.request, symmetry=str(symmetry) if symmetry else "", merged_examples=link.anchor.examples
            )
        if link.moving is not None:
            self.request = replace(self.request, moving=link.moving.model, moving_examples=link.moving.examples)
        self._symmetry = symmetry
        self._model = dict(template)

    def check(self, update: Update) -> Checked:
        return Checked(update, check_update(update, self._model, ()))

    def add(self, node: int, update: Update) -> None:  # noqa: ARG002 - one client was asked
        # The reply's tensors are views of its bytes.
        copies = {name: tensor.clone() for name, tensor in update.parameters.items()}
        self._model = {**self._model, **copies}

    def finish(self) -> dict[str, Tensor]:
        """Return the client's model, in the parametrisation in which models are merged."""
        return self._model if self._symmetry is None else self._symmetry.fold(self._model)


def merge_in_pairs(
    nodes: list[int],
    template: State,
    merge: Merge,
    request: Request,
    symmetry: Symmetry | None,
    *,
    products: bool = False,
) -> Generator[StagePlan, StageResult, dict[str, Tensor] | None]:
    """Link the clients' models one after the other.

    Args:
        nodes: the clients that have trained and kept their models.
        template: names and shapes of the model.
        merge: chain or tree.
        request: what a link asks apart from the link itself.
        symmetry: the symmetry of the model.
        products: whether heads of attention are merged by their products.

    Returns:
        The merged model; None where no client could reply.
    """
    merged = yield from _follow(LINKS[merge](nodes), template, request, symmetry, products=products)
    return None if merged is None else {**template, **merged.model}


def _follow(
    links: Links, template: State, request: Request, symmetry: Symmetry | None, *, products: bool
) -> Generator[StagePlan, StageResult, MergedModel | None]:
    try:
        link = next(links)
        while True:
            carries = {**template, **link.anchor.model} if link.anchor else template
            make = partial(LinkModels, template, link, request, symmetry)
            result = yield StagePlan(make, carries, [link.node], may_fail=True)
            link = links.send(_merged_model(link, result, symmetry if products else None))
    except StopIteration as end:
        merged: MergedModel | None = end.value
        return merged


def _merged_model(link: Link, result: StageResult, products_of: Symmetry | None) -> MergedModel | None:
    if not result.nodes:
        return None
    model = floating(result.model)
    if link.moving is not None:
        return replace(link.moving, model=model)
    return MergedModel(model, result.examples, (link.node,), products_of)
