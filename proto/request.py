"""The request of a stage: what the server asks of its clients, and the message that carries it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal, TypeAlias

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain
from fedbasin.proto.convert import ConversionError, from_protobuf, to_protobuf
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.header import MOVING, WireError, array_record, read_header, write_header
from fedbasin.proto.layer_graph import BatchNorm, Block

State: TypeAlias = Mapping[str, Tensor]
Config: TypeAlias = Mapping[str, object]

# Keys of the app's own config: the number of the round, and the factor of low-rank adapters that stays frozen.
ROUND_KEY = "server-round"
FROZEN_KEY = "frozen-factor"

# The stage before the first round: the mod alone answers, that it is there and can read its data.
CHECK = "check"

# The stage in which clients take their first local steps from two models, and send losses alone.
TRIAL = "trial"
STEPS = "steps"


class Start(Enum):
    """The point where a client's training begins."""

    shared = "from the anchor"
    own = "from the client's own initial weights; the anchor is only aligned to"


@dataclass(frozen=True)
class PathSpec:
    """A path among the models of one round: the global model at its start, the fused and the refitted model.

    Attributes:
        mix: share of the refitted model in a point of the line from the fused to the refitted model.
        extrapolate: 0 for that line itself, up to the point at `mix`; otherwise the path runs from the global model
            through the point at `mix`, to this multiple of its distance.
        scaled: tensors of the last layer, where the path ends in that end and these tensors are zero at its start: the
            model whose outputs are multiplied by 0 to 1. None for a path between models.
    """

    mix: float = 1.0
    extrapolate: float = 0.0
    scaled: Block | None = None


@dataclass(frozen=True)
class Refit:
    """Layers to fit on the features of the model so far, in place of training.

    The tensors of that model travel in pieces: those of sequence 0 are all, those of a later sequence replace what
    the client kept of the one before.

    Attributes:
        blocks: the layers; none where a model is only to be evaluated.
        target: what they are fitted to: `features`, `weights` or `labels`; empty where there are none.
        sequence: number of the piece of the model that the request carries.
        path: the path to evaluate; None where none is requested.
        norms: BatchNorm layers whose running statistics are to be measured on the model so far.
    """

    blocks: tuple[Block, ...] = ()
    target: str = ""
    sequence: int = 0
    path: PathSpec | None = None
    norms: tuple[BatchNorm, ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """One request of the server to its clients.

    Attributes:
        stage: name of the stage.
        kind: the app's function that answers.
        round: number of the round, from 1.
        anchor: the global model of this round.
        anchor_digest: SHA-256 of the anchor, which the reply repeats.
        start: where training begins.
        symmetry: notation of the symmetry by which the client aligns its model to the anchor; empty for no
            alignment.
        matcher: name of the matcher; `auto` leaves it to the client.
        learned_steps: steps of learned matching.
        learned_smoothing: its label smoothing; None for its own choice.
        identity_bounds: by space, the distances within which the anchor's units have moved too little to change
            places, so that a client near the anchor has nothing to search.
        statistic: what the client collects on the aligned model: `none`, `fisher`, `gram` or `kronecker`.
        shrink: factor on the off-diagonal of Gram matrices.
        blocks: the layers that statistics are collected of; none for all.
        encodings: how Gram matrices and cross-moments are sent, by layer; exactly where a layer is not named.
        path_points: points of the path from the sent model to the client's at which the client evaluates the loss.
        probe_bound: largest draw of this round with which a client still evaluates the path; None for all clients.
        layer_graph: whether the client reports the layers of the model in the order of use.
        optional: whether a client that cannot report the layers trains and replies without them; the reply's detail
            then has the reason.
        keep: whether another stage of this round follows, for which the client keeps its model; of a fit, the examples
            on which the fitted model will be judged.
        refit: layers to fit; nothing is trained then.
        merged_examples: examples behind the anchor, with which the model will be merged; 0 where unknown.
        moving: a merged model that the client aligns in place of its own; empty for none.
        moving_examples: examples behind that model.
        frozen_factor: the factor of low-rank adapters that clients do not train; empty for none.
        config: the app's own settings for its clients.
        weight_key: metric whose value is the weight of a client.
        arrays_key: name of the record of arrays.
        config_key: name of the record of the app's settings.
        array_names: by the model's names, the names of arrays that are called otherwise, as 0, 1, 2.
        seed: seed of what the client draws in this round; set by the client that reads the request.
        packed: whether the anchor came as one flat array per dtype, so that the reply goes the same way.
    """

    stage: str
    kind: Literal["train", "evaluate"] = field(default="train", metadata={"local": True})
    round: int = 0
    anchor: State = field(default_factory=dict, metadata={"record": "arrays"})
    anchor_digest: bytes = b""
    start: Start = Start.shared
    symmetry: str = ""
    matcher: str = "weights"
    learned_steps: int = 400
    learned_smoothing: float | None = None
    identity_bounds: State = field(default_factory=dict, metadata={"record": "header"})
    statistic: str = "none"
    shrink: float = 1.0
    blocks: tuple[Block, ...] = ()
    encodings: Mapping[Block, Encoding] = field(default_factory=dict)
    path_points: int = 0
    probe_bound: int | None = None
    layer_graph: bool = False
    optional: bool = False
    keep: bool = False
    refit: Refit | None = None
    merged_examples: float = 0.0
    moving: State = field(default_factory=dict, metadata={"record": MOVING})
    moving_examples: float = 0.0
    frozen_factor: str = field(default="", metadata={"local": True})
    config: Config = field(default_factory=dict, metadata={"local": True})
    weight_key: str = "num-examples"
    arrays_key: str = "arrays"
    config_key: str = field(default="config", metadata={"local": True})
    array_names: Mapping[str, str] = field(default_factory=dict)
    seed: int = field(default=0, metadata={"local": True})
    packed: bool = field(default=False, metadata={"local": True})

    def to_content(self, *, packed: bool = False, arrays: ArrayRecord | None = None) -> RecordDict:
        """Return the content of a message that carries the request.

        Args:
            packed: whether the anchor travels as one flat array per dtype. A deployed round takes seconds for every
                array; Flower's wrappers and mods compare messages tensor by tensor and need them plain.
            arrays: the anchor as ordinary arrays, if it exists already; it is then sent as it is.

        Raises:
            PackingError: a tensor has a dtype that cannot be sent.
        """
        header = to_protobuf(self, pb.Request())
        told = {FROZEN_KEY: self.frozen_factor} if self.frozen_factor else {}
        config = ConfigRecord({**self.config, ROUND_KEY: self.round, **told})  # type: ignore[dict-item]
        content = RecordDict({self.config_key: config})
        if packed:
            content[self.arrays_key], specs = packing.pack(self.anchor)
            header.anchor.extend(specs)
        else:
            content[self.arrays_key] = plain.write_arrays(self.for_app(self.anchor)) if arrays is None else arrays
        if self.moving:
            content[MOVING], specs = packing.pack(self.moving)
            header.moving.extend(specs)
        for space, bound in self.identity_bounds.items():
            value = bound.detach().cpu().double().numpy().astype("<f8").tobytes()
            header.identity_bounds.add(key=space, value=value)
        write_header(content, header, self.config_key)
        return content

    def to_messages(self, content: RecordDict, nodes: Iterable[int]) -> list[Message]:
        """Return one message for every node, all with the same content, which Flower uploads once."""
        # The mod itself answers refits, and an app need not have a function that evaluates.
        kind = "train" if self.refit else self.kind
        return [
            Message(content=content, dst_node_id=node, message_type=kind, group_id=str(self.round)) for node in nodes
        ]

    @classmethod
    def from_message(cls, content: RecordDict) -> "Request":
        """Read a request from the content of a message, as `to_content` makes it.

        Raises:
            WireError: the content is not a request, or is of another version.
            PackingError: the tensors do not parse.
        """
        header = read_header(content, pb.Request())
        try:
            request = from_protobuf(cls, header)
        except ConversionError as error:
            raise WireError(str(error)) from error
        arrays, packed = array_record(content, request.arrays_key), bool(header.anchor)
        moving = {}
        if header.moving:
            moving = packing.unpack(array_record(content, MOVING), header.moving)
        return replace(
            request,
            anchor=packing.unpack(arrays, header.anchor) if packed else request.from_app(plain.read_arrays(arrays)),
            moving=moving,
            identity_bounds={entry.key: _vector(entry.value) for entry in header.identity_bounds},
            packed=packed,
            frozen_factor=_frozen_factor(content),
        )

    @property
    def aligns(self) -> bool:
        """True if the client aligns its model to the anchor."""
        return bool(self.symmetry)

    def for_app(self, state: State) -> dict[str, Tensor]:
        """Return a state under the names that the app uses for its arrays."""
        return {self.array_names.get(name, name): tensor for name, tensor in state.items()}

    def from_app(self, state: State) -> dict[str, Tensor]:
        """Return a state of the app's arrays under the model's names."""
        names = {array: name for name, array in self.array_names.items()}
        return {names.get(array, array): tensor for array, tensor in state.items()}


def _frozen_factor(content: RecordDict) -> str:
    """Return the frozen factor that the app is told in its config."""
    return next((str(config[FROZEN_KEY]) for config in content.config_records.values() if FROZEN_KEY in config), "")


def _vector(data: bytes) -> Tensor:
    if len(data) % 8:
        raise WireError(f"an identity bound of {len(data)} bytes is not a vector of float64")
    return torch.from_numpy(np.frombuffer(data, "<f8").astype("f8"))
