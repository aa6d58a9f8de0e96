"""The page on merging: its commands run and say what it shows, and its tables are those of the code."""

import re
import shlex
from pathlib import Path

import pytest

from fedbasin.server.files.merge.recipe import MergeRecipe
from fedbasin.strategies.fusion.rules.merging_rules import RULES
from tests.server.files.stored import fedbasin
from tests.server.files.test_commands_page import words

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "merging.md").read_text()


def test_the_page_shows_what_the_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, data = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(source, "merging.md", "exec"), {})
    Path("examples.py").write_text(data)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("recipe.yaml").write_text(recipe)
    shown = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))
    examples = re.findall(r"^\$ fedbasin (.*)\n((?:(?!\$ ).*\n)*)", shown, re.MULTILINE)
    assert len(examples) == 7
    for command, output in examples:
        done = fedbasin(*shlex.split(command))
        assert done.exit_code == 0, done.output
        assert words(done.stdout) == words(output)


def test_the_page_has_every_rule_with_its_parameters_and_every_key() -> None:
    rows = dict(re.findall(r"^\| ((?:`[\w+]+`,? ?)+) \|(.*)\|$", PAGE, re.MULTILINE))
    named = {rule: row for names, row in rows.items() for rule in re.findall(r"`([\w+]+)`", names)}
    assert RULES.keys() <= named.keys()
    assert MergeRecipe.model_fields.keys() <= named.keys()
    for name, rule in RULES.items():
        anchor, models, *_ = (cell.strip() for cell in named[name].split("|"))
        assert anchor == {"none": "", "optional": "optional", "required": "yes"}[rule.anchor]
        assert models.startswith(
            {None: "any" if rule.least < 2 else f"{rule.least} or more"}.get(rule.most, str(rule.most))
        )
        text = named[name]
        for parameter in rule.parameters - rule.ignored if "as " not in text else ():
            assert f"`{parameter}`" in text, (name, parameter)
