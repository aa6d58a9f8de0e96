"""What a client's data may be: batches as a `DataLoader` yields them, or `Batch`."""

from fedbasin.strategies.tensors.batches import Batch as Batch
from fedbasin.strategies.tensors.batches import Batches as Batches
from fedbasin.strategies.tensors.batches import Inputs as Inputs
from fedbasin.strategies.tensors.batches import evaluating as evaluating
from fedbasin.strategies.tensors.batches import forward as forward
from fedbasin.strategies.tensors.batches import read as read
