"""Two nodes that hold one partition are refused by name, before anybody trains."""

import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from tests.server.fake_grid import FakeGrid

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "digits"))
from digits.partitions import DuplicatePartitionError, check_partitions, tell_partition


class AskingGrid(FakeGrid):
    """One that asks and waits in one call, as an app does."""

    def send_and_receive(self, messages, *, timeout=None):
        ids = self.push_messages(messages)
        return [reply for _ in range(len(ids)) for reply in self.pull_messages(ids)]


def grid_of(*partitions):
    contexts = {
        100 + index: Context(1, 100 + index, {"partition-id": partition}, RecordDict(), {})
        for index, partition in enumerate(partitions)
    }
    return AskingGrid(contexts, lambda message: tell_partition(message, contexts[message.metadata.dst_node_id]))


def test_nodes_with_partitions_of_their_own_pass():
    check_partitions(grid_of(0, 1, 2), 3)


def test_nodes_with_one_partition_are_named():
    with pytest.raises(DuplicatePartitionError, match=r"^partition 1: nodes 101, 103; give every node"):
        check_partitions(grid_of(0, 1, 2, 1), 4)
