"""Every module imports on a Python without POSIX's own modules, as on Windows."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Other packages come first: how they do without these modules is their own matter.
CODE = """
import importlib, pkgutil, sys
import filelock, flwr, flwr.clientapp, flwr.serverapp, flwr.superlink.grid, grpc, torch, torch.export, uvicorn, rich
import scipy.optimize, typer, httpx, starlette.applications, prometheus_client
for module in ("fcntl", "resource", "pwd", "grp", "termios", "posix"):
    sys.modules[module] = None
import fedbasin
for room in ("client", "server", "strategies", "proto"):
    package = importlib.import_module(f"fedbasin.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name != "fedbasin.proto.generate":
            importlib.import_module(module.name)
print("imported", sum(name.startswith("fedbasin.") for name in sys.modules))
"""


def test_no_module_needs_what_windows_lacks():
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 150
