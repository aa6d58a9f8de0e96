import re
from pathlib import Path

from fedbasin.strategies.symmetry.families.dispatch import FAMILIES
from fedbasin.strategies.symmetry.sites import Symmetry

PAGE = Path(__file__).parents[3] / "docs" / "symmetries.md"


def test_the_example_prints_the_sites_that_the_page_shows() -> None:
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {"print": lambda found: None}
    exec(code, names)
    symmetry = names["symmetry"]
    assert isinstance(symmetry, Symmetry)
    lines = str(symmetry).splitlines()
    for line, full in zip(shown.splitlines(), lines, strict=True):
        assert full.startswith(line.removesuffix(" ..."))


def test_the_page_has_a_row_for_every_family() -> None:
    rows = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("| `"))
    assert set(FAMILIES) <= set(re.findall(r"`([\w-]+)`", rows))
