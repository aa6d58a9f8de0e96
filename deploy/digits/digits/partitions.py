"""The check that every partition of the data has one node: a second one would count its examples twice."""

import time
from collections import defaultdict

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid

_ANSWER_SECONDS = 120.0


class DuplicatePartitionError(ValueError):
    """Several nodes hold the same partition."""


def tell_partition(message: Message, context: Context) -> Message:
    """Reply with the partition of this node."""
    content = RecordDict({"partition": ConfigRecord({"id": int(context.node_config["partition-id"])})})
    return Message(content=content, reply_to=message)


def check_partitions(grid: Grid, clients: int) -> None:
    """Ask every node for its partition, once so many are online.

    Raises:
        DuplicatePartitionError: several nodes hold the same partition; it names them.
    """
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(1)
    questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    holders: defaultdict[int, list[int]] = defaultdict(list)
    for reply in grid.send_and_receive(questions, timeout=_ANSWER_SECONDS):
        if reply.has_content():  # a node that has gone is the run's concern
            partition = int(str(reply.content.config_records["partition"]["id"]))
            holders[partition].append(reply.metadata.src_node_id)
    shared = [f"partition {i}: nodes {', '.join(map(str, ids))}" for i, ids in sorted(holders.items()) if len(ids) > 1]
    if shared:
        raise DuplicatePartitionError(f"{'; '.join(shared)}; give every node a partition-id of its own")
