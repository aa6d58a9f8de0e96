import re
from pathlib import Path

import pytest

from fedbasin.strategies.symmetry.symmetry import Symmetry
from tests.strategies.symmetry.by_hand.families import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "symmetries.md"


BLOCKS = re.findall(r"```(?:python)?\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(0, len(BLOCKS), 2))
def test_an_example_prints_the_spaces_that_the_page_shows(number: int) -> None:
    code, shown = BLOCKS[number : number + 2]
    printed: list[object] = []
    exec(code, {"print": printed.append})
    (symmetry,) = printed
    assert isinstance(symmetry, Symmetry)
    for line, full in zip(shown.splitlines(), str(symmetry).splitlines(), strict=True):
        assert full.startswith(line.removesuffix(" ..."))


def test_the_page_has_a_row_for_every_family() -> None:
    rows = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("| `"))
    assert set(FAMILIES) <= set(re.findall(r"`([\w-]+)`", rows))
