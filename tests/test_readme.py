import re
import types
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from tests.federation import Federation

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "tests" / "quickstart"


def diff_of_the_readme() -> dict[str, list[list[str]]]:
    """Hunks by file; a hunk is consecutive lines, each with its sign."""
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


def patched(name: str) -> str:
    text = (QUICKSTART / name).read_text()
    for hunk in diff_of_the_readme()[name]:
        old = "".join(f"{line[1:]}\n" for line in hunk if not line.startswith("+"))
        new = "".join(f"{line[1:]}\n" for line in hunk if not line.startswith("-"))
        assert text.count(old) == 1, f"{name} does not have once:\n{old}"
        text = text.replace(old, new)
    return text


def module(name: str) -> types.ModuleType:
    made = types.ModuleType(name.removesuffix(".py"))
    exec(compile(patched(name), name, "exec"), made.__dict__)
    return made


def test_the_diff_has_at_most_ten_lines() -> None:
    lines = [line for hunks in diff_of_the_readme().values() for hunk in hunks for line in hunk]
    written = [line for line in lines if line.startswith("+") and line[1:].strip()]
    assert 0 < len(written) <= 10


def test_the_diff_turns_the_quickstart_into_a_run_of_fedbasin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "batch-size": 16,
        "local-epochs": 2,
        "learning-rate": 0.02,
        "num-server-rounds": 2,
        "fraction-evaluate": 1.0,
        "fedbasin.recipe": "regmean",
        "fedbasin.folder": str(tmp_path / "runs"),
    }
    federation = Federation(module("client_app.py").app, config, clients=2)
    server = module("server_app.py").app
    server(federation.grid(), Context(1, 1, {}, RecordDict(), config))
    assert (tmp_path / "final_model.pt").is_file()
    (reports,) = tmp_path.glob("runs/*/rounds.jsonl")
    assert len(reports.read_text().splitlines()) == 2


# Its example needs an observer and is run beside one, in tests/server/test_observer_models.py.
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "observing-api.md"]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path) -> None:
    for source in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(source, page.name, "exec"), {})


def test_the_settings_page_is_what_the_code_says() -> None:
    from fedbasin.server.run.settings import described

    page = (ROOT / "docs" / "settings.md").read_text()
    for key, default, text in described():
        assert f"| `{key}` | `{default}` | {text} |\n" in page


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
