"""What a scrape says after a round, read by Prometheus' own parser."""

import math
import subprocess
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families

from fedbasin.proto.report import (
    AlignmentReport,
    ClientReport,
    LayerVariance,
    PathSums,
    ProbedPath,
    RoundReport,
    ServerProbe,
    SingularVectors,
    SpaceReport,
    StageReport,
    UpdateCosines,
)
from fedbasin.server.observe.metrics import metric_catalogue as catalogue
from fedbasin.server.observe.metrics.telemetry import Telemetry
from fedbasin.strategies.judging.outcomes import Outcome
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.bootstrap import Bootstrap
from fedbasin.strategies.round.evaluate import Evaluate
from fedbasin.strategies.round.fuse import Fuse
from fedbasin.strategies.round.pairwise import LinkModels
from fedbasin.strategies.round.refit import (
    LocalSteps,
    MeasureNorms,
    ProbePath,
    ProbeStep,
    RefitBlock,
    RefitHead,
    RefitLayers,
    ScaleOutputs,
    Trial,
)
from tests.needing import needed


def alignment(certified, gain, before, after, error):
    spaces = [SpaceReport(f"s{i}", c, 0.0, gain, fixed_points=1 if c else gain / 4) for i, c in enumerate(certified)]
    spaces[0] = replace(spaces[0], skew_before=gain / 2, skew_after=gain / 8)
    return AlignmentReport(
        tuple(spaces),
        distance_before=before,
        distance_after=after,
        endpoint_error=error,
        singular_vectors=SingularVectors(gain / 10, gain / 4, 2, 3),
    )


def probe():
    def path(a, b, loss, correct):
        sums = PathSums(points=(0, 0.5, 1), loss_after=loss, correct_after=correct, examples=10)
        return ProbedPath(a, b, sums)

    return ServerProbe(
        nodes=(7, 8),
        accepted=2,
        pairs=(path(7, 8, (10, 40, 20), (8, 4, 6)),),  # 2.5 above the chord, 2 above the higher end
        fused=(path(0, 7, (10, 12, 10), (9, 9, 8)), path(0, 8, (10, 11, 20), (9, 8, 6))),
        ensemble_loss=0.2,
        ensemble_accuracy=0.95,
        seconds=2,
        spooled_bytes=4000,
    )


def report(**changes):
    clients = (
        ClientReport(
            2**60 + 1,
            "accepted",
            bytes_up=1000,
            bytes_down=600,
            seconds=4,
            probe_seconds=1.5,
            probe_bytes=90,
            alignment=alignment([True, False], gain=2.0, before=10, after=4, error=2e-7),
        ),
        ClientReport(
            2**60 + 2,
            "accepted",
            bytes_up=1000,
            bytes_down=600,
            seconds=6,
            probe_seconds=-3,  # a client may say anything
            probe_bytes=90,
            alignment=alignment([False, False], gain=1.0, before=20, after=6, error=3e-7),
        ),
        ClientReport(2**60 + 3, "wrong_shape", bytes_up=10, bytes_down=600),
    )
    path = PathSums(
        points=(0, 0.25, 1),
        loss_before=(20, 80, 40),  # mean 2, 8, 4: above the line 2, 2.5, 4 by 5.5
        loss_after=(20, 21, 40),  # below the line
        correct_before=(9, 2, 5),  # shares 0.9, 0.2, 0.5: below the line 0.9, 0.8, 0.5 by 0.6
        correct_after=(9, 9, 5),
        examples=10,
    )
    fused_path = PathSums(
        points=(0, 0.5, 1),
        loss_after=(20, 60, 40),  # mean 2, 6, 4: above the line 2, 3, 4 by 3
        correct_after=(9, 5, 9),
        examples=10,
    )
    fields = {
        "run_id": "secret-run",
        "round": 3,
        "rounds": 5,
        "recipe": "regmean",
        "finished": datetime(2026, 1, 2, 3, 4, 5, 500_000, tzinfo=UTC),
        "seconds": 7.5,
        "stages": (StageReport("train", 7, 0.5, clients),),
        "path": path,
        "fused_path": fused_path,
        "train_metrics": {"loss": 0.3},
        "evaluate_metrics": {"accuracy": 0.9},
        "peak_rss_bytes": 12345,
        "update_cosines": UpdateCosines(2, 0, 0, norm=3, fused=0.5, previous=-0.25, clients_mean=0.1, seconds=0.5),
        "variance": (LayerVariance("a", 0.4), LayerVariance("b", 1.0)),
        "probe": probe(),
    }
    return RoundReport(**fields | changes)


def filled(*reports):
    registry = CollectorRegistry()
    telemetry = Telemetry(registry)
    for one in reports:
        telemetry.observe(one)
    return registry


def page(*reports):
    return generate_latest(filled(*reports)).decode()


def samples(text):
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text, name, /, **labels):
    return samples(text)[f"fedbasin_{name}", frozenset({"recipe": "regmean", **labels}.items())]


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("rounds_total", {}, 1),
        ("runs_finished_total", {}, 0),
        ("updates_total", {"outcome": "accepted"}, 2),
        ("updates_total", {"outcome": "wrong_shape"}, 1),
        ("updates_total", {"outcome": "timeout"}, 0),
        ("received_bytes_total", {}, 2010),
        ("sent_bytes_total", {}, 1800),
        ("round_duration_seconds_sum", {}, 7.5),
        ("stage_duration_seconds_sum", {"stage": "train"}, 7),
        ("server_duration_seconds_sum", {"stage": "train"}, 0.5),
        ("client_duration_seconds_count", {"stage": "train"}, 2),
        ("client_duration_seconds_sum", {"stage": "train"}, 10),
        ("runs_failed_total", {}, 0),
        ("run_state", {"state": "running"}, 1),
        ("run_state", {"state": "failed"}, 0),
        ("planned_rounds", {}, 5),
        ("last_round_duration_seconds", {}, 7.5),
        ("round", {}, 3),
        ("last_round_timestamp_seconds", {}, 1767323045.5),
        ("server_peak_rss_bytes", {}, 12345),
        ("barrier_loss", {"when": "before"}, 5.5),
        ("barrier_loss", {"when": "after"}, 0),
        ("barrier_accuracy_ratio", {"when": "before"}, 0.6),
        ("barrier_accuracy_ratio", {"when": "after"}, 0),
        ("endpoint_error_ratio", {}, 3e-7),
        ("fused_barrier_loss", {}, 3),
        ("fused_midpoint_gap_loss", {}, 3),
        ("alignment_gain", {}, 3),  # (2 + 2 + 1 + 1) / 2
        ("certified_spaces_ratio", {}, 0.25),
        ("anchor_distance", {"when": "before"}, 15),
        ("anchor_distance", {"when": "after"}, 5),
        ("spectral_alignment_ratio", {"when": "before"}, 0.15),
        ("spectral_alignment_ratio", {"when": "after"}, 0.375),
        ("fixed_points_ratio", {}, 0.5),  # (1 + 1/2 + 1/4 + 1/4) / 4
        ("skew_ratio", {"when": "before"}, 0.75),
        ("skew_ratio", {"when": "after"}, 0.1875),
        ("variance_ratio", {"layers": "lowest"}, 0.4),
        ("variance_ratio", {"layers": "mean"}, 0.7),
        ("update_norm", {}, 3),
        ("update_cosine", {"to": "fused"}, 0.5),
        ("update_cosine", {"to": "previous"}, -0.25),
        ("update_cosine", {"to": "clients"}, 0.1),
        ("probe_barrier_loss", {"between": "clients", "measure": "linear"}, 2.5),
        ("probe_barrier_loss", {"between": "clients", "measure": "above_mean"}, 2.5),
        ("probe_barrier_loss", {"between": "clients", "measure": "midpoint"}, 2.5),
        ("probe_barrier_loss", {"between": "clients", "measure": "area"}, 1.25),
        ("probe_barrier_loss", {"between": "fused", "measure": "linear"}, 0.2),
        ("probe_barrier_loss", {"between": "fused", "measure": "above_mean"}, 0.5),
        ("probe_barrier_accuracy_ratio", {"between": "clients"}, 0.3),
        ("probe_barrier_accuracy_ratio", {"between": "fused"}, 0),
        ("probe_accuracy_ratio", {"model": "fused"}, 0.9),
        ("probe_accuracy_ratio", {"model": "clients"}, 0.7),
        ("probe_accuracy_ratio", {"model": "ensemble"}, 0.95),
        ("probe_seconds_total", {"side": "clients"}, 1.5),
        ("probe_seconds_total", {"side": "server"}, 2.5),
        ("probe_bytes_total", {"side": "clients"}, 90),
        ("probe_bytes_total", {"side": "server"}, 4000),
        ("model_metric", {"name": "accuracy"}, 0.9),
        ("model_metric", {"name": "train_loss"}, 0.3),
    ],
)
def test_a_metric_has_the_value_computed_by_hand(name, labels, expected):
    assert value(page(report()), name, **labels) == pytest.approx(expected)


def test_counters_add_up_and_gauges_follow():
    text = page(report(), report(round=4, evaluate_metrics={"accuracy": 0.95}, last=True))
    assert value(text, "rounds_total") == 2
    assert value(text, "runs_finished_total") == 1
    assert value(text, "updates_total", outcome="accepted") == 4
    assert value(text, "model_metric", name="accuracy") == 0.95


def test_a_run_that_failed_counts_its_replies_and_no_round():
    text = page(report(), report(round=4, problem="QuorumLostError: 1 of 3 accepted"))
    assert value(text, "rounds_total") == 1
    assert value(text, "round") == 3
    assert value(text, "round_duration_seconds_count") == 1
    assert value(text, "runs_failed_total") == 1
    assert value(text, "runs_finished_total") == 0
    assert value(text, "updates_total", outcome="wrong_shape") == 2
    assert value(text, "run_state", state="failed") == 1
    assert value(text, "run_state", state="running") == 0
    assert "QuorumLostError" not in text


@pytest.mark.parametrize(("changes", "state"), [({"last": True}, "finished"), ({"problem": "x"}, "failed")])
def test_a_run_that_follows_takes_the_state_over(changes, state):
    text = page(report(**changes))
    assert value(text, "run_state", state=state) == 1
    text = page(report(**changes), report(run_id="next"))
    assert value(text, "run_state", state=state) == 0
    assert value(text, "run_state", state="running") == 1


def test_the_catalogue_names_every_recipe_and_stage():
    assert set(catalogue.RECIPES) == set(RECIPES)
    fits = (RefitLayers, RefitBlock, RefitHead)
    refits = (LinkModels, MeasureNorms, *fits, ProbePath, ProbeStep, Trial, ScaleOutputs, LocalSteps)
    assert set(catalogue.STAGES) == {cls.stage for cls in (Bootstrap, Fuse, Evaluate, *refits)}


def test_the_counters_of_a_recipe_are_there_once_a_run_begins_and_before_its_first_round():
    registry = CollectorRegistry()
    telemetry = Telemetry(registry)
    refused = {"recipe": "regmean", "outcome": "wrong_shape"}
    assert registry.get_sample_value("fedbasin_updates_total", refused) is None
    telemetry.set_state("regmean", "running")
    assert registry.get_sample_value("fedbasin_updates_total", refused) == 0
    assert registry.get_sample_value("fedbasin_rounds_total", {"recipe": "regmean"}) == 0
    assert registry.get_sample_value("fedbasin_rounds_total", {"recipe": "fedavg"}) is None


def test_histograms_are_there_for_the_recipes_that_run_and_for_no_other():
    there = samples(page(report(recipe="fedavg")))
    for recipe, expected in (("fedavg", 0), ("auto-features", None)):
        stage = frozenset({("recipe", recipe), ("stage", "bootstrap")})
        assert there.get(("fedbasin_client_duration_seconds_count", stage)) == expected


def test_what_is_scraped_is_what_the_catalogue_says_and_all_of_it():
    families = text_string_to_metric_families(page(report()))
    seen = {family.name: family for family in families if not family.name.endswith("_created")}
    entries = (*catalogue.COUNTERS, *catalogue.GAUGES, *catalogue.HISTOGRAMS)
    listed = {catalogue.PREFIX + metric.name.removesuffix("_total"): metric for metric in entries}
    assert seen.keys() == listed.keys()
    for name, metric in listed.items():
        labels = {label for sample in seen[name].samples for label in sample.labels}
        assert seen[name].documentation == metric.text
        assert labels - {"le"} == set(metric.labels)


def test_openmetrics_has_the_run_and_the_round_as_exemplars():
    text = exposition.generate_latest(filled(report(run_id="r" * 300))).decode()
    exemplars = {
        sample.name: sample.exemplar.labels
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar
    }
    expected = {"run": "r" * 100, "round": "3"}  # as long as the format allows
    for name in ("rounds_total", "updates_total", "round_duration_seconds_bucket"):
        assert exemplars[f"fedbasin_{name}"] == expected


def test_a_gauge_keeps_its_value_where_a_round_does_not_measure_it():
    bare = RoundReport("r", 4, recipe="regmean")
    assert value(page(report(), bare), "barrier_loss", when="before") == pytest.approx(5.5)


def test_a_round_that_measured_nothing_is_only_counted():
    text = page(RoundReport("r", 1, recipe="regmean"))
    assert value(text, "rounds_total") == 1
    assert not [name for name, _ in samples(text) if "barrier" in name or "alignment" in name]


def test_a_gap_in_the_middle_keeps_its_sign_and_a_barrier_is_never_below_zero():
    path = PathSums(points=(0, 0.5, 1), loss_after=(20, 10, 40), examples=10)
    bare = RoundReport("", 1, recipe="regmean", fused_path=path)
    assert value(page(bare), "fused_midpoint_gap_loss") == pytest.approx(-2)
    assert value(page(bare), "fused_barrier_loss") == 0


@pytest.mark.parametrize(
    "path",
    [
        PathSums(points=(0, 1), loss_before=(1, math.inf), examples=1),
        PathSums(points=(0, 0.5, 1), loss_before=(1, 2), examples=1),
        PathSums(points=(0.5,), loss_before=(1,), examples=1),
    ],
)
def test_a_path_without_a_barrier_says_so_instead_of_inventing_one(path):
    text = page(RoundReport("r", 1, recipe="regmean", path=path))
    assert math.isnan(value(text, "barrier_loss", when="before"))


def test_no_client_and_no_run_becomes_a_label():
    text = page(report())
    assert "secret-run" not in text
    assert str(2**60 + 1) not in text


def test_every_outcome_has_a_label_from_the_first_round_on():
    outcomes = {dict(labels)["outcome"] for name, labels in samples(page(report())) if name == "fedbasin_updates_total"}
    assert outcomes == set(Outcome.__members__)


def test_words_from_outside_are_bounded():
    reports = [
        RoundReport(
            "run",
            i,
            recipe=f"recipe-{i}",
            evaluate_metrics={f"metric-{i}": 1},
            stages=(StageReport(f"stage-{i}", clients=(ClientReport(i, f"fate-{i}"),)),),
        )
        for i in range(500)
    ]
    labels = [dict(labels) for _, labels in samples(page(*reports))]
    for label, most in (
        ("recipe", 5),
        ("name", 65),
        ("stage", len(catalogue.STAGES) + 5),
        ("outcome", len(Outcome) + 1),
    ):
        words = {pairs[label] for pairs in labels if label in pairs}
        assert "other" in words
        assert len(words) == most or label == "outcome"
        assert len(words) <= most


def test_prometheus_own_lint_has_nothing_to_say():
    done = subprocess.run(
        [needed("promtool"), "check", "metrics"], input=page(report()), text=True, capture_output=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
