"""`python -m tests.protocol`: run rules over tasks, splits, models and seeds, and write down what came out."""

import sys

from rich.console import Console

from fedbasin.server.run.settings import SettingsError
from tests.protocol.cli import app
from tests.protocol.results import ResultsError
from tests.protocol.spec import SpecError

if __name__ == "__main__":
    try:
        app(prog_name="python -m tests.protocol")
    except (ResultsError, SettingsError, SpecError) as error:
        Console(stderr=True).print(f"[red]error[/red]: {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
