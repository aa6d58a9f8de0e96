"""What a client's data may be: batches as a `DataLoader` yields them, or `Batch`."""

from fedbasin.strategies.batches import Batch as Batch
from fedbasin.strategies.batches import Batches as Batches
from fedbasin.strategies.batches import Inputs as Inputs
from fedbasin.strategies.batches import evaluating as evaluating
from fedbasin.strategies.batches import forward as forward
from fedbasin.strategies.batches import read as read
