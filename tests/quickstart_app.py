"""The quickstart of `tests/quickstart` as a Flower app in a folder, with the README's diff applied."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "tests" / "quickstart"

PYPROJECT = """
[project]
name = "quickstart"
version = "1.0.0"
description = "Flower's PyTorch quickstart with fedbasin"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedbasin"

[tool.flwr.app.components]
serverapp = "quickstart.server_app:app"
clientapp = "quickstart.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 2
fraction-evaluate = 1.0
local-epochs = 1
learning-rate = 0.02
batch-size = 16

[tool.flwr.app.config.fedbasin]
recipe = "fedavg"
folder = "runs"
"""


def hunks_by_file() -> dict[str, list[list[str]]]:
    """Return the hunks of the README's diff; a hunk is consecutive lines, each with its sign."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    files: dict[str, list[list[str]]] = {}
    for line in diff.splitlines():
        if line.startswith("+++ b/"):
            hunks = files[line.removeprefix("+++ b/")] = [[]]
        elif line == "@@":
            hunks.append([])
        elif not line.startswith("--- a/"):
            hunks[-1].append(line)
    return files


def patch(name: str) -> str:
    """Return a file of the quickstart as the README's diff leaves it."""
    text = (QUICKSTART / name).read_text()
    for hunk in hunks_by_file().get(name, []):
        old = "".join(f"{line[1:]}\n" for line in hunk if not line.startswith("+"))
        new = "".join(f"{line[1:]}\n" for line in hunk if not line.startswith("-"))
        assert text.count(old) == 1, f"{name} does not have once:\n{old}"
        text = text.replace(old, new)
    return text


def write_app(folder: Path) -> Path:
    """Write the app and return its folder."""
    package = folder / "quickstart"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    for name in ("client_app.py", "server_app.py", "task.py"):
        # Flower leaves folders named tests out of an app.
        (package / name).write_text(patch(name).replace("tests.quickstart", "quickstart"))
    return folder
