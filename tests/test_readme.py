import ast
import re
import subprocess
import types
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from tests.federation import Federation
from tests.quickstart_app import QUICKSTART, hunks_by_file, patch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def load_patched(name: str) -> types.ModuleType:
    module = types.ModuleType(name.removesuffix(".py"))
    exec(compile(patch(name), name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(("name", "limit"), [("server_app.py", 3), ("client_app.py", 5)])
def test_the_diff_is_short(name: str, limit: int) -> None:
    lines = [line for hunk in hunks_by_file()[name] for line in hunk]
    assert 0 < sum(line.startswith("+") and line[1:].strip() != "" for line in lines) <= limit


def test_the_statistics_of_the_diff_are_those_of_git(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.autocrlf=false", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init", "--quiet")
    for name in hunks_by_file():
        (tmp_path / name).write_text((QUICKSTART / name).read_text())
    git("add", ".")
    for name in hunks_by_file():
        (tmp_path / name).write_text(patch(name))
    (shown,) = (block for block in code_blocks("console") if "git diff --stat" in block)
    assert shown == "$ git diff --stat\n" + git("diff", "--no-color", "--stat=80")


def test_the_tutorial_shows_the_same_diff() -> None:
    tutorial = (ROOT / "docs" / "tutorial" / "quickstart.md").read_text()
    shown = "".join(re.findall(r"```diff\n(.*?)```", tutorial, re.DOTALL))
    lines = [line for hunks in hunks_by_file().values() for hunk in hunks for line in hunk]
    changed = [line for line in lines if not line.startswith(" ")]
    assert sorted(line for line in shown.splitlines() if line != "@@") == sorted(changed)


def test_the_diff_turns_the_quickstart_into_a_run_of_fedbasin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    federation = Federation(load_patched("client_app.py").app, config, clients=2)
    server = load_patched("server_app.py").app
    server(federation.grid(), Context(1, 1, {}, RecordDict(), config))
    assert (tmp_path / "final_model.pt").is_file()
    (reports,) = tmp_path.glob("runs/*/rounds.jsonl")
    assert len(reports.read_text().splitlines()) == 2


def test_the_twelve_lines_align_two_models(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = code_blocks("python")
    assert sum("import" not in line for line in source.splitlines() if line) == 12
    exec(compile(source, "README.md", "exec"), {})
    before, after = ast.literal_eval(capsys.readouterr().out)
    assert 0 <= after < before
