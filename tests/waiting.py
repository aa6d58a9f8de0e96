"""How long a test waits for what must come: so long that only a failure takes it, on the most loaded machine too."""

import time

LONG = 300.0  # seconds


def wait_until(holds, what):
    """Looks again and again until this holds."""
    end = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < end, f"after {LONG:g} s: {what}"
        time.sleep(0.05)
