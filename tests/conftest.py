"""What every test may rely on."""

import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes, or its making, depends on what else the machine does.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _children_hear_ctrl_c() -> Iterator[None]:
    """A process that ignores SIGINT, as one that a script starts in the background, hands that on to its children."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says at the end what was skipped and how to have it, once for each reason."""
    skipped = Counter(one.longrepr[2] for one in terminalreporter.getreports("skipped"))
    if skipped:
        terminalreporter.section("not run here", "-")
    for reason, count in sorted(skipped.items()):
        terminalreporter.line(f"{count:4d}  {reason.removeprefix('Skipped: ')}")
