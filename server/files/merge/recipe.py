"""Recipes of merges: YAML files with mergekit's keys and some of our own, or options of the command.

merge_method: ties          base_model: BASE          models: [{model: A, parameters: {weight: 0.5}}, ...]
slices: [{sources: [{model: A, layer_range: [0, 8]}]}]          parameters, dtype, out_dtype, tokenizer_source
align: star | chain | tree | universe, or {links, matcher, data, steps, smoothing, rotate_residual, prove}   seed: 0
statistics: package.module:function          task: classification
"""

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedbasin.server.files.reading import ModelError
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.fusion.rules.merging_rules import RULES, Rule

Links = Literal["star", "chain", "tree", "universe"]
MatcherName = Literal["weights", "sinkhorn", "graph", "activations", "learned"]
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Parameters = dict[str, Any]

# Keys of mergekit that choose how it computes, not what.
_STRICT = ConfigDict(extra="forbid", frozen=True)


def _read_path(value: Any) -> Any:
    """Return a model's path, which mergekit also writes as `{model: {path: BASE}, lora: {path: ADAPTER}}`."""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, dict):
        if isinstance(value, Path):
            return value
        raise ValueError(f"{value!r} is no text; write the path in quotes")
    parts: list[Any] = []
    for key in ("model", "lora"):
        part = value.get(key)
        content = part if isinstance(part, dict) else {"path": part}
        others = {f"{key}.{name}": entry for name, entry in content.items() if name != "path"}
        if chosen := [name for name, entry in others.items() if entry is not None]:
            raise ValueError(f"{chosen[0]} is unknown here; models are local paths, as they lie there")
        parts += [content["path"]] if content.get("path") else []
    if chosen := [name for name, entry in value.items() if name not in ("model", "lora") and entry is not None]:
        raise ValueError(f"{chosen[0]} is unknown here; write {{model: {{path: BASE}}, lora: {{path: ADAPTER}}}}")
    if not (parts and all(isinstance(part, str) for part in parts)):
        raise ValueError("has no path; write {model: {path: BASE}}, or the path alone")
    return "+".join(parts)


_Path = Annotated[Path, BeforeValidator(_read_path)]

# A key of which only the name or comments are written.
_Parameters = Annotated[Parameters, BeforeValidator(lambda value: {} if value is None else value)]


class MergeSource(BaseModel):
    """One model, or some of its layers, with its own parameters."""

    model_config = _STRICT
    model: _Path
    statistics: str | None = None
    layer_range: tuple[int, int] | None = None
    parameters: _Parameters = Field(default_factory=dict)


class Slice(BaseModel):
    """A run of layers of the result, merged from equally many layers of each source."""

    model_config = _STRICT
    sources: tuple[MergeSource, ...] = Field(min_length=1)
    base_model: _Path | None = None
    parameters: _Parameters = Field(default_factory=dict)


class TokenizerChoice(BaseModel):
    """The tokenizer of the result."""

    model_config = _STRICT
    source: Annotated[str, BeforeValidator(lambda value: _read_path(value) if isinstance(value, dict) else value)] = (
        "union"
    )
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


class Distil(BaseModel):
    """Distillation of the models into the merged one, on inputs that need no labels."""

    model_config = _STRICT
    data: str
    passes: int = Field(default=10, ge=1)
    rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)


class ModelAlignment(BaseModel):
    """Alignment of the models before they are merged: which to which, by what, and whether it is proven."""

    model_config = _STRICT
    links: Links = "star"
    matcher: MatcherName = "weights"
    data: str | None = None
    steps: int | None = None
    smoothing: float | None = None
    rotate_residual: bool = False
    prove: bool = True

    @model_validator(mode="after")
    def check_data(self) -> "ModelAlignment":
        """Refuse a matcher that reads data without any."""
        if Matcher[self.matcher].reads_data and not self.data:
            raise ValueError(f"data: the matcher {self.matcher} reads data; give package.module:function")
        return self


def _read_links(value: Any) -> Any:
    """Return the keys of an alignment that is given by its links alone; `off`, which YAML reads as False, is none."""
    return None if value in ("off", False) else {"links": value} if isinstance(value, str) else value


class MergeRecipe(BaseModel):
    """A merge: a rule, its models, and its parameters by model, slice and tensor."""

    model_config = _STRICT
    merge_method: str
    models: tuple[MergeSource, ...] | None = Field(default=None, min_length=1)
    slices: tuple[Slice, ...] | None = Field(default=None, min_length=1)
    base_model: _Path | None = None
    parameters: _Parameters = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerChoice | None = None
    align: Annotated[ModelAlignment | None, BeforeValidator(_read_links)] = None
    statistics: str | None = None
    task: str | None = None
    module: str | None = None
    score: str | None = None
    distill: Distil | None = None
    seed: int = 0
    rank: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def check_keys(self) -> "MergeRecipe":
        """Refuse a recipe without a known rule, or with two answers to one question."""
        if self.merge_method not in RULES:
            raise ValueError(f"merge_method: {self.merge_method!r} is unknown; there are {', '.join(RULES)}")
        if (self.models is None) == (self.slices is None):
            raise ValueError("models, slices: give one of the two")
        if self.tokenizer and self.tokenizer_source:
            raise ValueError("tokenizer, tokenizer_source: give one of the two")
        if self.slices and self.align:
            raise ValueError("align: only whole models can be aligned; leave slices or align out")
        self._check_statistics()
        if self.rule.scored and not self.score:
            raise ValueError(f"score: {self.merge_method} chooses models by their scores; give package.module:function")
        if self.distill and (self.slices or self.rule.scored):
            raise ValueError("distill: follows a merge of whole models by one rule; leave slices and greedy_soup out")
        self._check_parameters()
        return self

    @property
    def rule(self) -> Rule:
        """The rule of the catalogue."""
        return RULES[self.merge_method]

    @property
    def parts(self) -> tuple[Slice, ...]:
        """The slices; one for a recipe of whole models."""
        return self.slices or (Slice(sources=self.models or ()),)

    @property
    def vocabulary(self) -> TokenizerChoice | None:
        """The choice of a tokenizer, if the recipe makes one."""
        return TokenizerChoice(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    def paths(self) -> list[Path]:
        """Return the paths of all models, the anchor first, each once."""
        bases = (self.base_model, *(part.base_model for part in self.parts))
        sources = (source.model for part in self.parts for source in part.sources)
        return list(dict.fromkeys(path for path in (*bases, *sources) if path is not None))

    def data_of(self, source: MergeSource) -> str | None:
        """Return the function that gives a model's data."""
        return source.statistics or self.statistics

    def _check_statistics(self) -> None:
        data = [self.data_of(source) for part in self.parts for source in part.sources]
        if not self.rule.statistic and any(data):
            raise ValueError(f"statistics: {self.merge_method} reads no data; leave statistics out")
        if self.module and not (self.rule.statistic or self.distill or self.align):
            raise ValueError("module: is run only by rules with data, --align and --distill; leave module out")
        if self.rule.statistic and self.slices:
            raise ValueError(f"slices: {self.merge_method} runs whole models; write models in place of slices")
        if self.rule.statistic and not all(data):
            raise ValueError(
                f"statistics: {self.merge_method} needs data of every model; give package.module:function, here or in "
                "each model"
            )
        files = [name for name in data if name and name.endswith(".safetensors")]
        if files and self.rule.statistic == "features":
            raise ValueError(
                f"statistics: {self.merge_method} runs the merged layers on data, which {files[0]} does not hold; give "
                "package.module:function"
            )
        if files and self.align:
            raise ValueError(
                f"statistics: {files[0]} is of the model as it was before it is aligned; leave align out, or give "
                "package.module:function"
            )
        collects = self.rule.statistic == "fisher" and len(files) < len(data)
        learns = self.align is not None and self.align.matcher == "learned"
        if self.task and not (self.distill or collects or learns):
            raise ValueError(
                "task: is read only where Fisher information is collected on data, by the matcher learned and by "
                "--distill; leave it out"
            )

    def _check_parameters(self) -> None:
        sources = [source.parameters for part in self.parts for source in part.sources]
        for parameters in (self.parameters, *(part.parameters for part in self.parts), *sources):
            if unknown := sorted(parameters.keys() - self.rule.parameters):
                choices = ", ".join(sorted(self.rule.parameters - self.rule.ignored)) or "none"
                raise ValueError(f"parameters: {self.merge_method} has no parameter {unknown[0]!r}; it has {choices}")


class _RecipeLoader(yaml.SafeLoader):
    """YAML without a second entry of one key, which would replace the first unseen."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, (_, name) in enumerate(keys):
            if keys[number] in keys[:number]:
                line = node.value[number][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {name!r} is there twice; leave one out")
        return node


def read_recipe(path: Path) -> MergeRecipe:
    """Read a recipe from a YAML file; paths of models are relative to the working directory.

    Raises:
        ModelError: the file is not YAML, or a key is unknown, missing or has a wrong value.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds no keys; a recipe has merge_method, and models or slices")
    return make_recipe(content, str(path))


def make_recipe(content: dict[str, Any], name: str) -> MergeRecipe:
    """Make a recipe from its keys; `name` stands in the message of an error.

    Raises:
        ModelError: a key is unknown, missing or has a wrong value.
    """
    try:
        return _with_one_spelling(MergeRecipe.model_validate(content))
    except ValidationError as error:
        raise ModelError(f"{name}: {'; '.join(_describe(error.errors()))}") from error


def _with_one_spelling(recipe: MergeRecipe) -> MergeRecipe:
    """Return a recipe that names each model by one path: a link to the base model is the base model."""
    spellings: dict[Path, Path] = {}
    for path in recipe.paths():
        spellings.setdefault(path.resolve(), path)
    if len(spellings) == len(recipe.paths()):
        return recipe

    def respelt(part: Any) -> Any:
        names = [name for name in ("base_model", "model") if getattr(part, name, None) is not None]
        paths = {name: spellings[getattr(part, name).resolve()] for name in names}
        lists = [name for name in ("models", "slices", "sources") if getattr(part, name, None) is not None]
        return part.model_copy(
            update={**paths, **{name: tuple(respelt(entry) for entry in getattr(part, name)) for name in lists}}
        )

    changed: MergeRecipe = respelt(recipe)
    return changed


def _shared(error: Any, other: Any) -> int:
    """Return how many keys the places of two faults have in common, from the first on."""
    pairs = zip(error["loc"], other["loc"], strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _describe(errors: Iterable[Any]) -> list[str]:
    """Return each fault with the key where it is."""
    words = {
        "extra_forbidden": "is unknown here; leave it out",
        "missing": "is missing; give it",
        "tuple_type": "must be a list",
        "dict_type": "must have keys and values",
        "model_type": "must have keys and values",
    }
    lines = []
    faults = list(errors)
    for error in faults:
        # A list whose entries are at fault counts as too short for them.
        if error["type"] == "too_short" and any(len(e["loc"]) > len(error["loc"]) == _shared(e, error) for e in faults):
            continue
        place = ".".join(map(str, error["loc"]))
        text = words.get(error["type"], error["msg"].removeprefix("Value error, "))
        lines.append(f"{place}: {text}" if place and error["type"] not in words else f"{place} {text}".strip())
    return lines
