"""Configuration: the keys `fedbasin.*` of Flower's run config, checked before the first message.

[tool.flwr.app.config.fedbasin]
recipe = "regmean"
align = "client"
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedbasin.server.observe.access import Pass
from fedbasin.strategies.recipes import RECIPES, Recipe
from fedbasin.strategies.server_optimizers import STEPS

PREFIX = "fedbasin."

_DECISIVE = {
    "recipe",
    "fit",
    "step",
    "ridge",
    "shrink",
    "align",
    "matcher",
    "layers",
    "start",
    "bootstrap",
    "merge",
    "sum",
    "probe_share",
    "fraction_train",
    "statistics_budget_bytes",
    "seed",
}

Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


class SettingsError(ValueError):
    """A configuration that cannot be run; the message names key, value and remedy."""


class Settings(BaseModel):
    """One run's settings. Every key may stand in pyproject.toml or in `flwr run --run-config`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
    )

    recipe: str = Field(
        "fedavg",
        description=f"how updates are fused: {', '.join(list(RECIPES)[:-1])} or {list(RECIPES)[-1]}",
    )
    fit: Literal["layer", "block"] = Field(
        "layer",
        description="layers that a recipe fits one after the other, or all those of a block in one stage",
    )
    step: str = Field(
        "",
        description="what the fused model does to the global one: "
        f"{', '.join(list(STEPS)[:-1])} or {list(STEPS)[-1]}; empty for the recipe's own, and that of the one that "
        "takes over from it",
    )
    ridge: float = Field(
        0.0,
        ge=0,
        description="strength of the regulariser, relative; 0 for the recipe's own. A head to labels keeps its own where a recipe "
        "fits other layers too",
    )
    shrink: float = Field(
        1.0, ge=0, le=1, description="factor on the off-diagonal of Gram matrices (RegMean's alpha)"
    )
    align: Literal["client", "server", "off"] = Field(
        "client", description="who moves a client's model into the anchor's basin"
    )
    matcher: Literal["weights", "sinkhorn", "activations", "learned"] = Field(
        "weights",
        description="what decides how a client is aligned: its weights, the same with all spaces deciding together, "
        "its features on its own data, or what it learns on that data",
    )
    merge: Literal["star", "chain", "tree"] = Field(
        "star",
        description="how models from own starts are merged: all aligned to one anchor, or in pairs, one after the "
        "other (chain) or half by half (tree)",
    )
    layers: str = Field(
        "",
        description="which spaces of the symmetry are aligned: patterns of names, first:N and last:N, separated by "
        "commas; empty for all",
    )
    start: Literal["shared", "own"] = Field(
        "shared", description="own: clients begin from weights of their own in round 1"
    )
    bootstrap: Literal["first", "largest", "medoid", "best"] = Field(
        "first", description="whose model becomes the first anchor where starts are own"
    )
    sum: Literal["reproducible", "fast"] = Field(
        "reproducible",
        description="float64 sums, or float32 sums that depend on the order of arrival",
    )
    barrier_points: int = Field(
        0,
        ge=0,
        le=101,
        description="points of the path to the anchor that clients evaluate; 0 for none",
    )
    fused_points: int = Field(
        0,
        ge=0,
        le=101,
        description="points of the path from the new global model to the clients' own that they evaluate with it; "
        "0 for none",
    )
    probe_share: Share = Field(
        1.0,
        description="share of the asked clients that evaluate these paths; other ones each round",
    )
    probe_clients: int = Field(
        4,
        ge=2,
        le=100,
        description="accepted clients whose models the server keeps on disk for its own probe set, if the app gives one",
    )
    probe_points: int = Field(
        5, ge=3, le=101, description="points of every path on the server's probe set; odd"
    )
    nodes: int = Field(2, ge=1, description="nodes to wait for before a round")
    fraction_train: Share = Field(1.0, description="share of the nodes that a round asks")
    fraction_evaluate: float = Field(
        1.0, ge=0, le=1, description="share of the nodes that evaluate the new model"
    )
    quorum: Share = Field(0.5, description="share of the asked that must be accepted")
    grace_seconds: float | None = Field(
        None,
        ge=0,
        description="wait for the rest once a quorum has answered; the deadline if unset",
    )
    attempts: int = Field(2, ge=1, description="how often a stage without a quorum is asked anew")
    round_timeout_seconds: Seconds = Field(3600.0, description="deadline of one stage")
    wait_timeout_seconds: Seconds = Field(300.0, description="how long to wait for nodes")
    poll_seconds: Seconds = Field(0.2, description="shortest time between two looks for replies")
    max_update_bytes: int = Field(2**31, gt=0, description="larger replies are refused")
    statistics_budget_bytes: int = Field(
        0,
        ge=0,
        description="what a client may send in Gram matrices and moments in a round; layers are then sent in cheaper "
        "forms, the largest first; 0 for no bound",
    )
    seed: int = Field(0, ge=0, description="of the sampling of nodes")
    folder: Path = Field(Path("runs"), description="where the run's folder is made")
    resume: str = Field("", description="a run's folder: go on after its last finished round")
    observer: str = Field("", description="host:port of `fedbasin observe`; empty for none")
    observer_ca: str = Field(
        "", description="file with the authority of the observer's certificate; with it, TLS"
    )
    observer_token_file: str = Field("", description="file with the observer's token")
    observer_cert: str = Field(
        "", description="file with this run's own certificate, where the observer asks for one"
    )
    observer_key: str = Field("", description="file with its key")

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe = {self.recipe!r}: choose one of {', '.join(RECIPES)}")
        if self.step and self.step not in STEPS:
            raise ValueError(f"step = {self.step!r}: choose one of {', '.join(STEPS)}")
        RECIPES[self.recipe].check_align(self.align)
        self._check_ridge()
        self._check_shrink()
        if self.matcher in ("activations", "learned") and self.align == "server":
            raise ValueError(
                f"matcher = {self.matcher!r} with align = 'server': only clients have the data; set align = "
                "'client', or another matcher"
            )
        self._check_merge()
        if self.barrier_points == 1:
            raise ValueError(
                "barrier-points = 1: a path has two ends; set 0 for none, or at least 2"
            )
        if self.probe_points % 2 == 0:
            raise ValueError(
                f"probe-points = {self.probe_points}: the middle of the path is one of them; set an odd number from 3 on"
            )
        self._check_fused_points()
        return self

    def _check_ridge(self) -> None:
        if self.ridge and not RECIPES[self.recipe].regularises:
            solving = ", ".join(name for name, recipe in RECIPES.items() if recipe.regularises)
            raise ValueError(
                f"ridge = {self.ridge} with recipe = {self.recipe!r}: it solves for nothing that could be regularised; "
                f"set ridge = 0, or choose one of {solving}"
            )

    def _check_shrink(self) -> None:
        if self.shrink < 1 and not RECIPES[self.recipe].shrinks:
            shrinking = ", ".join(name for name, recipe in RECIPES.items() if recipe.shrinks)
            raise ValueError(
                f"shrink = {self.shrink} with recipe = {self.recipe!r}: it weighs with no Gram matrix that has an "
                f"off-diagonal; set shrink = 1, or choose one of {shrinking}"
            )

    def _check_merge(self) -> None:
        if self.merge == "star":
            return
        if self.start != "own" or self.align != "client":
            raise ValueError(
                f"merge = {self.merge!r} with start = {self.start!r} and align = {self.align!r}: pairs are for models "
                "from own starts, which clients align; set start = 'own' and align = 'client', or merge = 'star'"
            )
        if self.recipe != "fedavg":
            raise ValueError(
                f"merge = {self.merge!r} with recipe = {self.recipe!r}: a merge of models has no statistics; set "
                "recipe = 'fedavg', or merge = 'star'"
            )
        if self.fused_points:
            raise ValueError(
                f"merge = {self.merge!r} with fused-points = {self.fused_points}: models are sent in frames that the "
                "merge leaves again; set fused-points = 0, or merge = 'star'"
            )

    def _check_fused_points(self) -> None:
        points = self.fused_points
        if not points:
            return
        if points < 3 or points % 2 == 0:
            raise ValueError(
                f"fused-points = {points}: the middle of the path is one of them; set 0 for none, or an odd "
                "number from 3 on"
            )
        if self.align == "server":
            raise ValueError(
                f"fused-points = {points} with align = 'server': a client then never sees its own aligned model; "
                "set align = 'client', or fused-points = 0"
            )
        if not self.fraction_evaluate:
            raise ValueError(
                f"fused-points = {points} with fraction-evaluate = 0: nobody evaluates the new model; "
                "set a fraction above 0, or fused-points = 0"
            )

    @property
    def decisive(self) -> str:
        """Those that decide what a run computes; a run can only be resumed with the same."""
        return self.model_dump_json(include=_DECISIVE)

    @property
    def observer_pass(self) -> Pass:
        """What the run shows its observer."""
        files = (self.observer_ca, self.observer_token_file, self.observer_cert, self.observer_key)
        return Pass(*(Path(file) if file else None for file in files))

    @property
    def composed(self) -> Recipe:
        """The recipe with this run's step and regulariser, as is the one that takes over from it."""
        return self._composed(RECIPES[self.recipe])

    def _composed(self, recipe: Recipe) -> Recipe:
        if self.step:
            recipe = replace(recipe, step=STEPS[self.step])
        if self.ridge:
            recipe = recipe.regularised(self.ridge)
        then = None if recipe.then is None else self._composed(recipe.then)
        return replace(recipe, shrink=self.shrink, then=then)


def read_settings(run_config: Mapping[str, bool | float | int | str]) -> Settings:
    """The settings among the keys of a Flower run config; keys without the prefix are the app's own.

    Raises:
        SettingsError: a key is unknown or a value cannot be used.
    """
    own = {key.removeprefix(PREFIX): v for key, v in run_config.items() if key.startswith(PREFIX)}
    try:
        return Settings.model_validate(own, by_name=False, by_alias=True)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    known = ", ".join(sorted(field.alias or name for name, field in Settings.model_fields.items()))
    lines = []
    for problem in error.errors():
        key = PREFIX + ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"{key} = {problem['input']!r}: there is no such setting; known are {known}"
            )
        elif problem["loc"]:
            lines.append(f"{key} = {problem['input']!r}: {problem['msg']}")
        else:
            lines.append(PREFIX + problem["msg"].removeprefix("Value error, "))
    return "; ".join(lines)


def described() -> list[tuple[str, str, str]]:
    """Every setting: its key in the run config, its default as TOML has it, and what it does."""
    return [
        (PREFIX + str(field.alias), _toml(field.default), str(field.description))
        for field in Settings.model_fields.values()
    ]


def _toml(default: object) -> str:
    if default is None:
        return "unset"
    return json.dumps(str(default) if isinstance(default, Path) else default)
