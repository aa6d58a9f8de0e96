"""Settings of a run: arguments of `FedBasin`, or the keys `fedbasin.*` of Flower's run config.

FedBasin(recipe="regmean", align="client")

[tool.flwr.app.config.fedbasin]
recipe = "regmean"
align = "client"
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedbasin.server.observe.access import Pass
from fedbasin.strategies.fusion.rules.federated_rule import FEDERATED_RULES, FederatedRule, federated_rule
from fedbasin.strategies.fusion.rules.robust.robust_rules import COUNTED, ROBUST_RULES, RobustRule, robust_rule
from fedbasin.strategies.recipes import RECIPES, Recipe
from fedbasin.strategies.server_optimizers import SERVER_OPTIMIZERS

_LOG = logging.getLogger("flwr.fedbasin")

PREFIX = "fedbasin."

# Former names of recipes, so that apps that were written for them run.
_FORMER_NAMES = {"auto-head": "auto"}

# The value of `resume` that leaves an unfinished run alone.
NEW_RUN = "new"

# The settings that decide what a run computes; a run can only be resumed with the same.
_DECISIVE = {
    "recipe",
    "fit",
    "server_optimizer",
    "ridge",
    "shrink",
    "robust",
    "hostile_clients",
    "rule",
    "align",
    "matcher",
    "learned_steps",
    "learned_smoothing",
    "layers",
    "start",
    "bootstrap",
    "merge",
    "merge_heads",
    "sum",
    "probe_share",
    "fraction_train",
    "min_train_nodes",
    "weighted_by_key",
    "statistics_budget_bytes",
    "late_rounds",
    "seed",
    "bounds",
    "guard",
    "loss_rise",
    "strikes",
    "quarantine_rounds",
    "patience",
    "remembered_bytes",
}

Fraction = Annotated[float, Field(gt=0, le=1)]
FractionOrZero = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


class SettingsError(ValueError):
    """A configuration that cannot be run; the message names key, value and remedy."""


class Settings(BaseModel):
    """The settings of one run."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
    )

    recipe: str = Field(
        "auto", description=f"how updates are fused: {', '.join(list(RECIPES)[:-1])} or {list(RECIPES)[-1]}"
    )
    fit: Literal["layer", "block"] = Field(
        "layer", description="whether a recipe fits layers one after the other, or all layers of a block in one stage"
    )
    server_optimizer: str = Field(
        "",
        description="how the global model follows the fused one: "
        f"{', '.join(list(SERVER_OPTIMIZERS)[:-1])} or {list(SERVER_OPTIMIZERS)[-1]}; empty for the recipe's own",
    )
    ridge: float = Field(
        0.0,
        ge=0,
        description="strength of the regulariser, relative; 0 for the recipe's own. A head keeps its own where a "
        "recipe fits other layers too",
    )
    shrink: float = Field(1.0, ge=0, le=1, description="factor on the off-diagonal of Gram matrices (RegMean's alpha)")
    robust: str = Field(
        "",
        description="the robust rule that combines clients where some may be hostile: "
        f"{', '.join(ROBUST_RULES[:-1])} or {ROBUST_RULES[-1]}; empty sums them",
    )
    hostile_clients: int = Field(
        0,
        ge=0,
        description="number of hostile clients in a round that the robust rule withstands; "
        f"for {', '.join(list(COUNTED)[:-1])} and {list(COUNTED)[-1]}",
    )
    rule: str = Field(
        "",
        description="the merging rule that takes the place of the mean of models, with its parameters, as in "
        f"ties density=0.3: {', '.join(FEDERATED_RULES[:-1])} or {FEDERATED_RULES[-1]}; empty takes the mean",
    )
    align: Literal["auto", "client", "server", "off"] = Field(
        "auto",
        description="who aligns a client's model to the global one; auto: the client where the model's symmetry is "
        "known, else nobody",
    )
    matcher: Literal["auto", "weights", "sinkhorn", "graph", "activations", "learned"] = Field(
        "auto",
        description="what a client is aligned by: its weights, its weights with all spaces deciding together by "
        "annealing or as one graph, its features on its own data, or a transform that it learns on that data; auto: "
        "weights, and features in the round after start = own where the recipe fits layers and the client's data show "
        "every space",
    )
    learned_steps: int = Field(400, ge=1, description="steps of the matcher learned, one batch each")
    learned_smoothing: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="label smoothing of the matcher learned; unset takes 0.1 where a client has memorised its examples, and "
        "0 elsewhere",
    )
    merge: Literal["star", "chain", "tree"] = Field(
        "star",
        description="how models from independent initialisations are merged: all aligned to one anchor, or in pairs, "
        "one after the other (chain) or half by half (tree)",
    )
    merge_heads: Literal["weights", "products"] = Field(
        "weights",
        description="how heads of attention are merged in pairs: weight by weight, or by the products of queries and "
        "keys, and of values and outputs, cut back to the rank of the head",
    )
    layers: str = Field(
        "",
        description="the spaces of the symmetry that are aligned: patterns of names, first:N and last:N, separated by "
        "commas; empty for all",
    )
    start: Literal["shared", "own"] = Field(
        "shared", description="where clients begin in round 1: from the global model, or from their own initial weights"
    )
    bootstrap: Literal["first", "largest", "medoid", "best"] = Field(
        "first", description="the client whose model becomes the first anchor with start = own"
    )
    sum: Literal["reproducible", "fast"] = Field(
        "reproducible", description="float64 sums, or float32 sums that depend on the order of arrival"
    )
    packed: bool = Field(
        False,
        description="send models as a few flat arrays: several times faster where a model has many tensors; needs the "
        "mod on every client, and no other mod or wrapper that reads the arrays",
    )
    barrier_points: int = Field(
        0, ge=0, le=101, description="points of the path to the anchor that clients evaluate; 0 for none"
    )
    fused_points: int = Field(
        0,
        ge=0,
        le=101,
        description="points of the path from the new global model to the clients' own that they evaluate; 0 for none",
    )
    probe_share: Fraction = Field(
        1.0, description="share of the asked clients that evaluate these paths; other clients each round"
    )
    probe_clients: int = Field(
        4,
        ge=2,
        le=100,
        description="accepted clients whose models the server keeps on disk for its own probe set, if there is one",
    )
    probe_points: int = Field(5, ge=3, le=101, description="points of every path on the server's probe set; odd")
    fraction_train: FractionOrZero = Field(
        1.0, description="share of the nodes that train in a round; 0 skips training"
    )
    fraction_evaluate: FractionOrZero = Field(
        1.0, description="share of the nodes that evaluate the new model; 0 skips evaluation"
    )
    min_train_nodes: int = Field(2, ge=1, description="smallest number of nodes that train")
    min_evaluate_nodes: int = Field(2, ge=1, description="smallest number of nodes that evaluate")
    min_available_nodes: int = Field(2, ge=1, description="number of nodes to wait for before a round")
    weighted_by_key: str = Field("num-examples", min_length=1, description="metric that is the weight of a client")
    arrayrecord_key: str = Field("arrays", min_length=1, description="name of the record of arrays in messages")
    configrecord_key: str = Field(
        "config", min_length=1, description="name of the record of the app's settings in messages"
    )
    quorum: Fraction = Field(0.5, description="share of the asked clients that must be accepted")
    grace_seconds: float | None = Field(
        None, ge=0, description="time to wait for the rest once a quorum has replied; the deadline if unset"
    )
    attempts: int = Field(
        2,
        ge=1,
        description="number of times that a stage without a quorum asks; accepted replies are kept, and whoever is online "
        "then is asked in place of the others",
    )
    late_rounds: int = Field(
        0,
        ge=0,
        description="rounds for which a client that missed the deadline is waited for in place of asked anew; its reply "
        "then has less weight. 0 drops late replies by name",
    )
    round_timeout_seconds: Seconds = Field(3600.0, description="deadline of one stage")
    wait_timeout_seconds: Seconds = Field(300.0, description="time to wait for nodes")
    poll_seconds: Seconds = Field(0.2, description="shortest time between two looks for replies")
    max_update_bytes: int = Field(2**31, gt=0, description="larger replies are refused")
    statistics_budget_bytes: int = Field(
        0,
        ge=0,
        description="bytes of Gram matrices and cross-moments that a client may send in a round; layers are then sent "
        "in cheaper forms, the largest first; 0 for no bound",
    )
    bounds: bool = Field(
        True,
        description="bounds on the influence of one client: examples, norm and direction of its update, statistics, and "
        "the losses by which clients choose between models are held against the other clients', and cut back or left "
        "out; with a robust rule only the losses, unless this is set",
    )
    guard: Literal["roll back", "warn", "off"] = Field(
        "roll back",
        description="what follows a round whose model is not finite or is worse than the one before: the last good model "
        "stays; the report names it; or neither. A model that is not finite is never used",
    )
    loss_rise: float = Field(
        3.0, gt=1, description="multiple of the global loss of the round before from which a round counts as diverged"
    )
    strikes: int = Field(
        3,
        ge=0,
        description="rounds with a refused reply, one after the other, that put a client in quarantine; 0 for none",
    )
    quarantine_rounds: int = Field(5, ge=1, description="rounds in which a client in quarantine is not asked")
    patience: int = Field(
        0,
        ge=0,
        description="rounds without a lower loss of the served model after which the run ends; the model of the best round "
        "is then served. 0 for no early end",
    )
    remembered_bytes: int = Field(
        2**27,
        ge=0,
        description="bytes of a head's sums of earlier rounds that the server keeps, by client, where a round asks only "
        "a part of the clients; the oldest are forgotten first. 0 keeps none",
    )
    checkpoints: int = Field(3, ge=1, description="number of the last rounds whose global models are kept")
    seed: int = Field(0, ge=0, description="seed of the sampling of nodes")
    folder: Path = Field(
        Path("runs"),
        description="folder in which the run's folder is made, and in which replies wait on disk for the others",
    )
    resume: str = Field(
        "",
        description="empty: an unfinished run of this app in `folder` goes on after its last finished round, and where "
        "there is none a new run starts; new: a new run starts; otherwise the folder of the run that goes on",
    )
    observer: str = Field("", description="host:port of `fedbasin observe`; empty for none")
    observer_ca: str = Field("", description="file with the authority of the observer's certificate; turns TLS on")
    observer_token_file: str = Field("", description="file with the observer's token")
    observer_cert: str = Field("", description="file with this run's own certificate, where the observer asks for one")
    observer_key: str = Field("", description="file with the key of that certificate")
    observer_insecure: bool = Field(False, description="send the token to the observer without TLS, in plain text")

    @field_validator("recipe")
    @classmethod
    def _present_name(cls, recipe: str) -> str:
        name = _FORMER_NAMES.get(recipe, recipe)
        if name != recipe:
            _LOG.warning("the recipe %s is now called %s; write recipe = %r", recipe, name, name)
        return name

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe = {self.recipe!r}: choose one of {', '.join(RECIPES)}")
        if self.server_optimizer and self.server_optimizer not in SERVER_OPTIMIZERS:
            raise ValueError(
                f"server-optimizer = {self.server_optimizer!r}: choose one of {', '.join(SERVER_OPTIMIZERS)}"
            )
        if self.align != "auto":
            RECIPES[self.recipe].check_align(self.align)
        self._check_paths()
        self._check_keys()
        self._check_ridge()
        self._check_shrink()
        self._check_robust()
        self._check_rule()
        if self.matcher in ("activations", "learned") and self.align == "server":
            raise ValueError(
                f"matcher = {self.matcher!r} with align = 'server': only clients have the data; set align = "
                "'client', or another matcher"
            )
        if self.matcher != "learned" and (idle := {"learned-steps", "learned-smoothing"} & self.changed.keys()):
            key = min(idle)
            raise ValueError(f"{key} is read by matcher = 'learned' alone; set that, or leave {key} out")
        self._check_merge()
        if self.barrier_points == 1:
            raise ValueError("barrier-points = 1: a path has two ends; set 0 for none, or at least 2")
        if self.probe_points % 2 == 0:
            raise ValueError(
                f"probe-points = {self.probe_points}: the middle of the path is one of them; set an odd number from 3 on"
            )
        self._check_fused_points()
        return self

    def _check_paths(self) -> None:
        for name, path in (("folder", str(self.folder)), ("resume", self.resume)):
            if not path.isprintable():
                raise ValueError(f"{name} = {path!r}: the path cannot be printed, and no file has it; give another")

    def _check_keys(self) -> None:
        reserved = {"fedbasin", "statistics", "moving"}
        keys = [self.arrayrecord_key, self.configrecord_key]
        if reserved & set(keys) or len(set(keys)) < 2:
            raise ValueError(
                f"arrayrecord-key = {keys[0]!r} and configrecord-key = {keys[1]!r}: records need two different names, "
                f"and {', '.join(sorted(reserved))} are fedbasin's own"
            )

    def _check_ridge(self) -> None:
        if self.ridge and not RECIPES[self.recipe].regularises:
            solving = ", ".join(name for name, recipe in RECIPES.items() if recipe.regularises)
            raise ValueError(
                f"ridge = {self.ridge} with recipe = {self.recipe!r}: the recipe solves for nothing that could be "
                f"regularised; set ridge = 0, or choose one of {solving}"
            )

    def _check_shrink(self) -> None:
        if self.shrink < 1 and not RECIPES[self.recipe].shrinks:
            shrinking = ", ".join(name for name, recipe in RECIPES.items() if recipe.shrinks)
            raise ValueError(
                f"shrink = {self.shrink} with recipe = {self.recipe!r}: the recipe weights with no Gram matrix that has "
                f"an off-diagonal; set shrink = 1, or choose one of {shrinking}"
            )

    def _check_robust(self) -> None:
        rule = self._robust_rule()
        if rule is None:
            return
        replace(RECIPES[self.recipe], robust=rule).check_robust()
        if self.sum != "reproducible":
            raise ValueError(
                f"sum = {self.sum!r} with robust = {self.robust!r}: a robust rule sums no replies as they arrive; set "
                "sum = 'reproducible'"
            )
        if self.merge != "star":
            raise ValueError(
                f"merge = {self.merge!r} with robust = {self.robust!r}: a rule compares clients that are all aligned to "
                "one anchor; set merge = 'star'"
            )
        if self.start == "own" and self.align != "off" and self.bootstrap in ("first", "largest"):
            raise ValueError(
                f"bootstrap = {self.bootstrap!r} with robust = {self.robust!r}: a hostile client can be that one, and "
                "its model the anchor; set bootstrap = 'medoid', or 'best'"
            )
        if self.min_train_nodes < rule.least:
            raise ValueError(
                f"min-train-nodes = {self.min_train_nodes} with robust = {self.robust!r}: the rule needs {rule.least} "
                f"clients in every round; set min-train-nodes = {rule.least}, or choose another rule or fewer "
                "hostile-clients"
            )

    def _check_rule(self) -> None:
        rule = self._merging_rule()
        if rule is None:
            return
        replace(RECIPES[self.recipe], robust=self._robust_rule(), rule=rule).check_rule()
        if self.sum != "reproducible":
            raise ValueError(
                f"sum = {self.sum!r} with rule = {self.rule!r}: a rule sums no replies as they arrive; set sum = "
                "'reproducible'"
            )
        if self.merge != "star":
            raise ValueError(
                f"merge = {self.merge!r} with rule = {self.rule!r}: a rule merges all clients at once; set merge = 'star'"
            )
        if self.min_train_nodes < rule.least:
            raise ValueError(
                f"min-train-nodes = {self.min_train_nodes} with rule = {self.rule!r}: the rule needs {rule.least} "
                f"clients in every round; set min-train-nodes = {rule.least}"
            )

    def _merging_rule(self) -> FederatedRule | None:
        return federated_rule(self.rule) if self.rule.strip() else None

    def _robust_rule(self) -> RobustRule | None:
        if not self.robust and self.hostile_clients:
            raise ValueError(
                f"hostile-clients = {self.hostile_clients} without a robust rule: set robust to one of "
                f"{', '.join(COUNTED)}, or hostile-clients = 0"
            )
        return robust_rule(self.robust, self.hostile_clients) if self.robust else None

    def _check_merge(self) -> None:
        if self.merge == "star" and self.merge_heads != "weights":
            raise ValueError(
                f"merge-heads = {self.merge_heads!r} with merge = 'star': a sum of models has no products; set merge = "
                "'chain' or 'tree', or merge-heads = 'weights'"
            )
        if self.merge == "star":
            return
        if self.start != "own" or self.align not in ("auto", "client"):
            raise ValueError(
                f"merge = {self.merge!r} with start = {self.start!r} and align = {self.align!r}: pairs are for models "
                "from independent initialisations, which clients align; set start = 'own' and align = 'client', or "
                "merge = 'star'"
            )
        if self.recipe not in ("auto", "fedavg"):
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
        """The settings that decide what a run computes; a run can only be resumed with the same."""
        return self.model_dump_json(include=_DECISIVE)

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by key."""
        return {
            str(field.alias): getattr(self, name)
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }

    def with_timeout(self, timeout: float) -> "Settings":
        """Return the settings with the deadline that `start` was given; raises a SettingsError if both differ."""
        default = type(self).model_fields["round_timeout_seconds"].default
        if timeout in (default, self.round_timeout_seconds):
            return self
        if self.round_timeout_seconds != default:
            raise SettingsError(
                f"start(timeout={timeout:g}) and round_timeout_seconds = {self.round_timeout_seconds:g}: both are given "
                "and differ; remove one of them"
            )
        return self.model_copy(update={"round_timeout_seconds": timeout})

    @property
    def observer_pass(self) -> Pass:
        """The credentials that the run shows its observer."""
        files = (self.observer_ca, self.observer_token_file, self.observer_cert, self.observer_key)
        ca, token_file, cert, key = (Path(file) if file else None for file in files)
        return Pass(ca, token_file, cert, key, self.observer_insecure)

    @property
    def composed(self) -> Recipe:
        """The recipe with this run's server optimizer and regulariser."""
        return RECIPES[self.recipe].override(
            server_optimizer=SERVER_OPTIMIZERS.get(self.server_optimizer),
            ridge=self.ridge,
            shrink=self.shrink,
            robust=self._robust_rule(),
            rule=self._merging_rule(),
        )


def read_settings(
    run_config: Mapping[str, bool | float | int | str], arguments: Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings of a run.

    Args:
        run_config: Flower's run config; keys without the prefix `fedbasin.` are the app's own.
        arguments: settings that were given to `FedBasin`, by name.

    Raises:
        SettingsError: a key is unknown, a value cannot be used, or both sources give different values.
    """
    config = {key.removeprefix(PREFIX): value for key, value in run_config.items() if key.startswith(PREFIX)}
    passed = {
        # As the run config writes a path, so that equal ones are equal.
        name.replace("_", "-"): str(value) if isinstance(value, Path) else value
        for name, value in (arguments or {}).items()
    }
    for key in config.keys() & passed.keys():
        if config[key] != passed[key]:
            argument = key.replace("-", "_")
            raise SettingsError(
                f"FedBasin({argument}={passed[key]!r}) and the run config's {PREFIX}{key} = {config[key]!r}: both are "
                "given and differ; remove one of them"
            )
    try:
        return Settings.model_validate({**config, **passed}, by_name=False, by_alias=True)
    except ValidationError as error:
        raise SettingsError(_explain(error, passed)) from error


def _explain(error: ValidationError, arguments: Mapping[str, Any]) -> str:
    """Return the problems in one line each, under the names by which the user gave the settings."""
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        name = key.replace("-", "_") if key in arguments else PREFIX + key
        if problem["type"] == "extra_forbidden":
            fields = Settings.model_fields
            names = (f if key in arguments else str(field.alias) for f, field in fields.items())
            lines.append(
                f"{name} = {problem['input']!r}: there is no such setting; known are {', '.join(sorted(names))}"
            )
        elif problem["loc"]:
            lines.append(f"{name} = {problem['input']!r}: {problem['msg']}")
        else:
            lines.append(PREFIX + problem["msg"].removeprefix("Value error, "))
    return "; ".join(lines)


def described() -> list[tuple[str, str, str]]:
    """Return every setting: its key in the run config, its default as TOML has it, and its description."""
    return [
        (PREFIX + str(field.alias), _toml(field.default), str(field.description))
        for field in Settings.model_fields.values()
    ]


def _toml(default: object) -> str:
    if default is None:
        return "unset"
    return json.dumps(str(default) if isinstance(default, Path) else default)
