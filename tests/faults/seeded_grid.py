"""A grid whose nodes answer by round and node alone, so that a run that was disturbed can be compared with one that was not."""

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from tests.benchmarks.grid import PulledGrid


class SeededGrid(PulledGrid):
    """Nodes without the mod: what they send depends on nothing but the number of the round and the node."""

    def _answer(self, message: Message) -> Message:
        number = message.content["config"]["server-round"]
        draw = np.random.default_rng((number, message.metadata.dst_node_id))
        arrays = {
            name: Array(array.numpy() + draw.standard_normal(array.shape, np.float32))
            for name, array in message.content["arrays"].items()
        }
        metrics = MetricRecord({"loss": 1.0, "num-examples": 10})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)
