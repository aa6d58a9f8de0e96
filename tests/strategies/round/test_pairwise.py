"""The stage that links two models, and the round that merges clients' models by links."""

import pytest
import torch

from fedbasin.proto.report import ClientReport, StageReport
from fedbasin.proto.request import Request, Start
from fedbasin.strategies.alignment.pairwise_merging import Link, MergedModel
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.round.pairwise import LinkModels, merge_in_pairs
from fedbasin.strategies.round.stage import StageResult
from fedbasin.strategies.tensors.state import floating
from tests.accepting import accept
from tests.strategies.round.two_layers import BLOCKS, SYMMETRY, assert_same, gram_update, plain_update, state
from tests.strategies.symmetry.by_hand.residual_rotation import rotating_residual_transformer
from tests.strategies.symmetry.families import Transformer

ASKED = Request("", start=Start.own, matcher="learned", path_points=5)
ANCHOR = MergedModel(floating(state(1)), 41.0, (1, 2))
MOVING = MergedModel(floating(state(2)), 22.0, (3,))


def link_request(link, symmetry=SYMMETRY):
    return LinkModels(state(0), link, ASKED, symmetry).request


class TestRequest:
    def test_the_first_client_sends_its_model_as_it_is(self):
        request = link_request(Link(7))
        assert (request.stage, request.kind, request.keep) == ("link", "train", True)
        assert (request.aligns, request.merged_examples, request.path_points) == (False, 0.0, 0)
        assert (request.moving, request.moving_examples) == ({}, 0.0)
        assert (request.start, request.matcher) == (Start.own, "learned")

    def test_a_client_aligns_its_model_to_a_merge(self):
        request = link_request(Link(7, ANCHOR))
        assert (request.symmetry, request.merged_examples) == (str(SYMMETRY), 41.0)
        assert (request.moving, request.path_points) == ({}, 5)

    def test_a_client_aligns_the_merge_that_it_is_in(self):
        request = link_request(Link(7, ANCHOR, MOVING))
        assert request.moving is MOVING.model
        assert (request.moving_examples, request.merged_examples) == (22.0, 41.0)

    def test_without_a_symmetry_nothing_is_aligned(self):
        assert not link_request(Link(7, ANCHOR), None).aligns


class TestLink:
    def test_it_ends_in_the_clients_model(self):
        stage = LinkModels(state(0), Link(7), ASKED, SYMMETRY)
        assert accept(stage, 7, plain_update(7)) is None
        assert_same(stage.finish(), state(7))
        assert stage.layer_graph is None

    def test_it_keeps_no_view_of_a_reply(self):
        stage, model = LinkModels(state(0), Link(7), ASKED, SYMMETRY), state(7)
        accept(stage, 7, Update(model, 5.0))
        model["first.weight"].zero_()
        assert stage.finish()["first.weight"].any()

    def test_statistics_and_bad_models_are_refused_and_nothing_gives_the_template(self):
        stage = LinkModels(state(0), Link(7), ASKED, SYMMETRY)
        with pytest.raises(Refusal) as refused:
            accept(stage, 7, gram_update(7))
        assert refused.value.outcome is Outcome.unexpected_statistic
        assert set(gram_update(7).precisions) == set(BLOCKS)
        with pytest.raises(Refusal) as refused:
            accept(stage, 7, Update({"first.weight": torch.zeros(1)}, 1.0))
        assert refused.value.outcome is Outcome.missing_tensor
        assert_same(stage.finish(), state(0))

    def test_a_linked_model_is_folded(self):
        template = Transformer(width=8, heads=2).state_dict()
        symmetry = rotating_residual_transformer(template, heads=2)
        stage = LinkModels(template, Link(7), ASKED, symmetry)
        accept(stage, 7, Update({name: 1.5 * tensor for name, tensor in template.items()}, 1.0))
        assert torch.equal(stage.finish()["final_norm.weight"], torch.ones(8))


def run(merge, nodes=(1, 2, 3, 4), fails=()):
    """A merge whose clients reply with their own model, numbered, or with the merge that they were sent."""
    template = {"w": torch.zeros(1), "count": torch.tensor(9)}
    plans, merging = [], merge_in_pairs(list(nodes), template, merge, ASKED, None)
    try:
        plan = next(merging)
        while True:
            plans.append(plan)
            (node,) = plan.nodes
            request = plan.make().request
            examples = request.moving_examples or 10.0 * node
            model = {**template, **(request.moving or {"w": torch.tensor([float(node)])})}
            client = ClientReport(node, "accepted", examples=examples)
            clients = () if node in fails else (client,)
            plan = merging.send(StageResult(model, StageReport("link", clients=clients)))
    except StopIteration as end:
        return plans, end.value


def mean(*nodes):
    """The mean of clients' numbers, weighted by their examples."""
    return sum(10.0 * node * node for node in nodes) / sum(10.0 * node for node in nodes)


@pytest.mark.parametrize("merge", ["chain", "tree"])
def test_a_merge_is_the_mean_weighted_by_examples(merge):
    plans, merged = run(merge)
    assert float(merged["w"]) == pytest.approx(mean(1, 2, 3, 4))
    assert int(merged["count"]) == 9
    assert all(plan.may_fail and not plan.trains for plan in plans)


def test_a_chain_sends_each_client_the_merge_of_those_before():
    plans, _ = run("chain")
    assert [plan.nodes for plan in plans] == [[1], [2], [3], [4]]
    sent = [float(plan.carries["w"]) for plan in plans]
    assert sent == pytest.approx([0.0, 1.0, mean(1, 2), mean(1, 2, 3)])
    requests = [plan.make().request for plan in plans]
    assert [request.merged_examples for request in requests] == [0, 10, 30, 60]
    assert not any(request.moving for request in requests)


def test_a_tree_lets_a_client_align_the_merge_that_it_is_in():
    plans, _ = run("tree")
    assert [plan.nodes for plan in plans] == [[1], [2], [3], [4], [3]]
    request = plans[-1].make().request
    assert float(request.moving["w"]) == pytest.approx(mean(3, 4))
    assert (request.moving_examples, request.merged_examples) == (70.0, 30.0)
    assert float(plans[-1].carries["w"]) == pytest.approx(mean(1, 2))


@pytest.mark.parametrize("merge", ["chain", "tree"])
@pytest.mark.parametrize("lost", [1, 2, 3, 4])
def test_a_client_that_fails_is_left_out(merge, lost):
    _, merged = run(merge, fails=[lost])
    rest = [node for node in (1, 2, 3, 4) if node != lost]
    assert float(merged["w"]) == pytest.approx(mean(*rest))


@pytest.mark.parametrize("merge", ["chain", "tree"])
def test_where_nobody_can_link_there_is_no_merge(merge):
    _, merged = run(merge, fails=[1, 2, 3, 4])
    assert merged is None
    assert run(merge, nodes=()) == ([], None)
