import urllib.error
import urllib.request

import pytest

from tests.observing import observer
from tests.waiting import LONG


@pytest.mark.parametrize("leave", [pytest.skip, pytest.fail])
def test_an_observer_is_closed_however_its_test_ends(leave):
    with pytest.raises(leave.Exception), observer() as addresses:  # noqa: PT012 - it ends in its midst
        urllib.request.urlopen(addresses.metrics, timeout=LONG).close()
        leave("as where a tool is missing")
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(addresses.metrics, timeout=LONG)
