"""What some tests need and not every machine has. Where it is missing they skip, and say how to have it."""

import shutil

import pytest

HAD_BY = {
    "prometheus": "Prometheus on PATH (Debian and Ubuntu: apt-get install prometheus)",
    "promtool": "Prometheus on PATH (Debian and Ubuntu: apt-get install prometheus)",
    "nginx": "nginx on PATH (Debian and Ubuntu: apt-get install nginx-light)",
    "chromium": "Chromium on PATH (Debian and Ubuntu: apt-get install chromium)",
}


def needed(program, *names):
    """Where a program lies, under the first of its names that is on PATH; skips where none is."""
    for name in (program, *names):
        if found := shutil.which(name):
            return found
    pytest.skip(f"needs {HAD_BY[program]}")
