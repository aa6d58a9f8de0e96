"""Optional dependencies of the command line: a command that lacks one names the extra to install."""

import click
import typer
from typer.core import TyperGroup

# By the module that is imported; pyproject.toml has the extras by distribution.
EXTRAS = {
    "anyio": "observe",
    "grpc_health": "observe",
    "grpc_reflection": "observe",
    "prometheus_client": "observe",
    "starlette": "observe",
    "uvicorn": "observe",
    "transformers": "files",
}


class ExtrasGroup(TyperGroup):
    """A group of commands in which a missing optional dependency becomes one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            command = f"fedbasin {ctx.invoked_subcommand}"
            typer.echo(f'{command} needs the extra: pip install "fedbasin[{extra}]"', err=True)
            raise typer.Exit(2) from error
