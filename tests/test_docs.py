import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"
PAGES = sorted(DOCS.rglob("*.md"))
REFERENCE = DOCS / "reference"
# The README is also shown by PyPI, where links must be absolute.
REPOSITORY = "https://github.com/fedbasin/fedbasin/blob/main/"


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def targets(page: Path) -> list[Path]:
    """Return the files of the repository that a page links to."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)$", text, re.MULTILINE)
    local = [
        ROOT / link.removeprefix(REPOSITORY) if link.startswith(REPOSITORY) else page.parent / link
        for link in links
        if link.startswith(REPOSITORY) or not re.match(r"https?://|#", link)
    ]
    return [Path(str(path).partition("#")[0]).resolve() for path in local]


# The example of observing-api.md needs an observer: tests/server/test_published_models.py runs it beside one.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "observing-api.md"], ids=page_id)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(source, page.name, "exec"), {})


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "deploy" / "README.md", *PAGES], ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in targets(page) if not target.exists()] == []


@pytest.mark.parametrize(
    "page", [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "deploy/README.md")), *PAGES], ids=page_id
)
def test_lines_of_prose_are_at_most_120_characters(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    prose = [line for line in text.splitlines() if not re.match(r"\s*\||!\[|\[\w+\]: ", line)]
    assert [line for line in prose if len(line) > 120] == []


def test_the_index_links_every_page() -> None:
    assert {page.resolve() for page in PAGES} - {INDEX.resolve()} <= set(targets(INDEX))


def test_the_readme_links_the_index() -> None:
    assert INDEX.resolve() in targets(ROOT / "README.md")


def test_the_page_of_settings_is_what_the_code_says() -> None:
    from fedbasin.server.run.settings import described

    rows = [f"| `{key}` | `{default}` | {text} |" for key, default, text in described()]
    assert table(REFERENCE / "settings.md", "| `fedbasin.") == rows


def test_the_page_of_outcomes_is_what_the_code_says() -> None:
    from fedbasin.strategies.judging.outcomes import Outcome

    rows = [f"| `{outcome.name}` | {outcome.value} |" for outcome in Outcome]
    assert table(REFERENCE / "outcomes.md", "| `") == rows


def test_the_page_of_recipes_lists_every_recipe() -> None:
    from fedbasin.strategies.recipes import RECIPES

    text = (REFERENCE / "recipes.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in text] == []


def test_the_page_of_commands_is_what_help_says() -> None:
    from typer.main import get_group

    from fedbasin.server.cli import app

    rows = [
        f"| `fedbasin {name}` | {(command.help or '').splitlines()[0]} |"
        for name, command in get_group(app).commands.items()
    ]
    assert table(REFERENCE / "commands.md", "| `fedbasin ") == rows


def table(page: Path, start: str) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith(start)]


def test_the_types_of_a_round_are_where_the_architecture_says_and_few() -> None:
    text = (DOCS / "explanation" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| `([\w.]+)` \|$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    for _, name, module in rows:
        home = importlib.import_module(f"fedbasin.{module}")
        assert getattr(home, name).__module__ == home.__name__
    assert 20 < len(rows) <= 40
