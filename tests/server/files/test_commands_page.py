import re
import shlex
from pathlib import Path

import pytest

from tests.server.files.stored import fedbasin

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "model-files.md").read_text()


def words(text: str) -> list[list[str]]:
    """Lines without the errors and distances, whose digits are not the same on every machine."""
    return [re.sub(r"\S*\d\.\d\S*|\S*e-\d+| [01](?= |$)", "", line).split() for line in text.splitlines()]


def test_the_page_shows_what_the_commands_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(source, "commands.md", "exec"), {})
    shown = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))
    examples = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", shown, re.MULTILINE)
    assert len(examples) == 6
    for command, output in examples:
        name, *arguments = shlex.split(command)
        assert name == "fedbasin"
        done = fedbasin(*arguments)
        assert done.exit_code == 0, done.output
        if arguments[0] == "inspect":
            assert done.stdout == output
        else:
            assert words(done.stdout) == words(output)
