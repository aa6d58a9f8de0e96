"""A request and a reply with every field set, and strategies that draw others, for tests of the wire."""

import base64
import dataclasses

import torch
from flwr.app import ConfigRecord
from hypothesis import strategies as st

from fedbasin.proto.encoding import Encoding, GramForm, GramKind, MomentKind
from fedbasin.proto.header import HEADER
from fedbasin.proto.layer_graph import BatchNorm, LayerGraph
from fedbasin.proto.reply import LayerStatistic, Reply
from fedbasin.proto.report import AlignmentReport, LayerVariance, PathSums, SingularVectors, SpaceReport
from fedbasin.proto.request import PathSpec, Refit, Request, Start

LINEAR, HEAD = ("0.weight", "0.bias"), ("2.weight",)
ANCHOR = {
    "0.weight": torch.arange(6.0).view(2, 3) / 4,
    "0.bias": torch.tensor([-1.0, 0.5]),
    "2.weight": torch.tensor([[1.5, -2.0]], dtype=torch.float64),
    "steps": torch.tensor(7),
}
NUMBERED = {name: str(number) for number, name in enumerate(ANCHOR)}

REQUEST = Request(
    "fuse",
    round=3,
    anchor=ANCHOR,
    anchor_digest=bytes(range(32)),
    start=Start.own,
    symmetry="hidden  S(2)  0.weight[0] 0.bias[0] 2.weight[1]",
    matcher="sinkhorn",
    learned_steps=1200,
    learned_smoothing=0.25,
    identity_bounds={"hidden": torch.tensor([0.25, 0.5], dtype=torch.float64)},
    statistic="gram",
    shrink=0.75,
    blocks=(LINEAR, HEAD),
    encodings={
        LINEAR: Encoding(GramForm(GramKind.sketch, 2), MomentKind.float16, 4, 1),
        HEAD: Encoding(GramForm(GramKind.half), MomentKind.byte, 2, 2),
    },
    path_points=5,
    probe_bound=2**63 + 1,
    layer_graph=True,
    optional=True,
    keep=True,
    refit=Refit((LINEAR,), "features", 2, PathSpec(0.5, 2.0, LINEAR), (BatchNorm("1", 1e-5),)),
    merged_examples=41.0,
    moving={"0.bias": torch.tensor([3.0, 4.0])},
    moving_examples=22.0,
    frozen_factor="lora_A",
    config={"lr": 0.5, "name": "app"},
    weight_key="examples",
    arrays_key="model",
    config_key="settings",
    array_names=NUMBERED,
)

REPLY = Reply(
    round=3,
    stage="fuse",
    anchor_digest=bytes(range(32)),
    symmetry_digest=bytes(range(32, 64)),
    parameters={name: 2 * tensor for name, tensor in ANCHOR.items()},
    statistics=(
        LayerStatistic(LINEAR, "gram", (torch.ones(3), torch.zeros(2, 2)), (torch.ones(2, 4),)),
        LayerStatistic(HEAD, "gram", (), (torch.ones(1, 2).half(), torch.ones(1)), same=0),
    ),
    alignment=AlignmentReport(
        (SpaceReport("hidden", True, 0.5, 0.25, 0.75, 1.5, 0.125, 0.0625), SpaceReport("other", False, 0.0, 0.0)),
        4,
        2.0,
        1.0,
        0.5,
        1e-7,
        SingularVectors(0.25, 0.75, 2, 3),
    ),
    path=PathSums((0.0, 1.0), (4.0, 3.0), (4.0, 2.0), (1.0, 2.0), (1.0, 3.0), 5.0, 1),
    train_seconds=1.5,
    function_changed=True,
    probe_seconds=0.25,
    variance=(LayerVariance("0.weight", 0.875),),
    layer_graph=LayerGraph(((LINEAR,), (HEAD,)), HEAD, (BatchNorm("1", 1e-5),)),
    lost=True,
    outcome="non_finite",
    detail="0.weight",
    judges=True,
    metrics={"loss": 0.5, "curve": [1.0, 2.0]},
    examples=20.0,
)

names = st.text(max_size=6)
counts = st.integers(0, 2**32 - 1)
numbers = st.floats(allow_nan=False)
blocks = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3).map(tuple)
tensors = st.sampled_from(
    [
        torch.ones(2),
        torch.zeros(0, 3),
        torch.tensor(4),
        torch.tensor([[True, False]]),
        torch.arange(6.0, dtype=torch.float64).view(2, 3).mT,
        torch.tensor([1, -2], dtype=torch.int8),
    ]
)
half = st.just(torch.ones(3, dtype=torch.bfloat16))
encodings = st.builds(
    Encoding, st.builds(GramForm, st.sampled_from(GramKind), counts), st.sampled_from(MomentKind), counts, counts
)
norms = st.lists(st.builds(BatchNorm, names, numbers), max_size=2).map(tuple)
refits = st.builds(
    Refit,
    st.lists(blocks, max_size=3).map(tuple),
    names,
    counts,
    st.none() | st.builds(PathSpec, numbers, numbers, st.none() | blocks),
    norms,
)
paths = st.builds(PathSums, *5 * [st.lists(numbers, max_size=3).map(tuple)], numbers, counts)
spaces = st.builds(SpaceReport, names, st.booleans(), *3 * [numbers], *3 * [st.none() | numbers])
alignments = st.builds(
    AlignmentReport,
    st.lists(spaces, max_size=2).map(tuple),
    counts,
    *3 * [numbers],
    st.none() | numbers,
    st.none() | st.builds(SingularVectors, numbers, numbers, counts, counts),
)
graphs = st.builds(
    LayerGraph, st.lists(st.lists(blocks, max_size=2).map(tuple), max_size=3).map(tuple), st.none() | blocks, norms
)
statistics = st.builds(
    LayerStatistic,
    blocks,
    st.sampled_from(["fisher", "gram", "kronecker"]),
    st.lists(tensors, max_size=3).map(tuple),
    st.lists(tensors, max_size=2).map(tuple),
    st.none() | counts,
)
metrics = st.dictionaries(
    st.text(min_size=1, max_size=5),
    st.floats(allow_nan=False) | st.lists(st.floats(allow_nan=False), max_size=3),
    max_size=3,
)


@st.composite
def states(draw, *, packed=False, at_least=0):
    """States of a few tensors; plain arrays have no bfloat16."""
    kinds = tensors | half if packed else tensors
    return draw(st.dictionaries(st.text(min_size=1, max_size=6), kinds, min_size=at_least, max_size=4))


@st.composite
def requests(draw, *, packed):
    """Requests with any of the optional fields, and names of arrays as they are or as numbers."""
    anchor = draw(states(packed=packed, at_least=1))
    renamed = {name: str(number) for number, name in enumerate(anchor)}
    keys = draw(st.sampled_from([("num-examples", "arrays", "config"), ("n", "model", "told")]))
    return Request(
        draw(names),
        draw(st.sampled_from(["train", "evaluate"])),
        round=draw(counts),
        anchor=anchor,
        anchor_digest=draw(st.binary(max_size=8)),
        start=draw(st.sampled_from(Start)),
        symmetry=draw(names),
        matcher=draw(names),
        learned_steps=draw(counts),
        learned_smoothing=draw(st.none() | numbers),
        identity_bounds=draw(
            st.dictionaries(
                names, st.lists(numbers, max_size=3).map(lambda v: torch.tensor(v, dtype=torch.float64)), max_size=2
            )
        ),
        statistic=draw(names),
        shrink=draw(numbers),
        blocks=draw(st.lists(blocks, max_size=3).map(tuple)),
        encodings=draw(st.dictionaries(blocks, encodings, max_size=3)),
        path_points=draw(counts),
        probe_bound=draw(st.none() | st.integers(0, 2**64 - 1)),
        layer_graph=draw(st.booleans()),
        keep=draw(st.booleans()),
        refit=draw(st.none() | refits),
        merged_examples=draw(numbers),
        moving=draw(states(packed=True)),
        moving_examples=draw(numbers),
        weight_key=keys[0],
        arrays_key=keys[1],
        config_key=keys[2],
        array_names=draw(st.sampled_from([{}, renamed])),
    )


@st.composite
def replies(draw, *, packed):
    """Replies with any of the optional fields."""
    return Reply(
        round=draw(counts),
        stage=draw(names),
        anchor_digest=draw(st.binary(max_size=8)),
        symmetry_digest=draw(st.binary(max_size=8)),
        parameters=draw(st.none() | states(packed=packed, at_least=1)),
        statistics=draw(st.lists(statistics, max_size=3).map(tuple)),
        alignment=draw(st.none() | alignments),
        path=draw(st.none() | paths),
        train_seconds=draw(numbers),
        function_changed=draw(st.booleans()),
        probe_seconds=draw(numbers),
        variance=draw(st.lists(st.builds(LayerVariance, names, numbers), max_size=2).map(tuple)),
        layer_graph=draw(st.none() | graphs),
        lost=draw(st.booleans()),
        outcome=draw(names),
        detail=draw(names),
        metrics=draw(metrics),
        examples=draw(st.floats(allow_nan=False)),
    )


def is_equal(a, b):
    """Return whether two values are equal, tensors by dtype, shape and entries."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return not different_fields(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return bool(a == b)


def different_fields(a, b):
    """Return the names of the fields in which two messages differ."""
    fields = [field.name for field in dataclasses.fields(a)]
    return [name for name in fields if not is_equal(getattr(a, name), getattr(b, name))]


def header_bytes(content, record=HEADER):
    """The serialised header in a message's content."""
    return base64.b64decode(content[record][HEADER])


def header_record(data):
    """A record with these bytes in place of a header."""
    return ConfigRecord({HEADER: base64.b64encode(data).decode()})
