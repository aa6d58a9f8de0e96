"""What is written on the command line and in the results: `name(argument, key=value)`, as `dirichlet(0.3)`."""

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Value: TypeAlias = bool | int | float | str

_SHAPE = re.compile(r"(?P<name>[A-Za-z][\w+-]*)\s*(?P<inside>\(.*\))?", re.DOTALL)


class SpecError(ValueError):
    """Text that names nothing known; the message says what is."""


@dataclass(frozen=True)
class Spec:
    """A name of a catalogue with arguments; its text is canonical."""

    name: str
    arguments: tuple[Value, ...] = ()
    settings: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        inside = [*map(repr, self.arguments), *(f"{key}={value!r}" for key, value in self.settings)]
        return f"{self.name}({', '.join(inside)})" if inside else self.name


def parse(text: str) -> Spec:
    """One spec.

    Raises:
        SpecError: the text is no name with plain arguments, or stands for several specs.
    """
    specs = expand(text)
    if len(specs) > 1:
        raise SpecError(f"{text!r} stands for {len(specs)} choices where one is needed")
    return specs[0]


def expand(text: str) -> list[Spec]:
    """All specs that a text with lists stands for: `FedAvgM(server_momentum=[0.5, 0.9])` is two.

    Raises:
        SpecError: the text is no name with plain arguments.
    """
    try:
        name, arguments, keywords = _taken_apart(text)
        choices = [_choices(value) for value in (*arguments, *keywords.values())]
    except (SyntaxError, ValueError) as error:
        raise SpecError(f"{text!r}: write a name, or name(argument, key=value)") from error
    count = len(arguments)
    return [
        Spec(name, chosen[:count], tuple(sorted(zip(keywords, chosen[count:], strict=True))))
        for chosen in product(*choices)
    ]


def _taken_apart(text: str) -> tuple[str, list[ast.expr], dict[str, ast.expr]]:
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise ValueError(text)
    # The name may be no name of Python's, as `regmean++`; what is in parentheses is Python's.
    match ast.parse(f"_{found['inside'] or '()'}", mode="eval").body:
        case ast.Call(ast.Name(), args, words) if all(word.arg for word in words):
            return found["name"], args, {str(word.arg): word.value for word in words}
    raise ValueError(text)


def _choices(node: ast.expr) -> list[Any]:
    value = ast.literal_eval(node)
    return value if isinstance(value, list) else [value]


def made(what: str, spec: Spec, catalogue: Mapping[str, Callable[..., T]]) -> T:
    """What a catalogue's function makes of a spec's arguments.

    Raises:
        SpecError: the catalogue has no such name, or its function no such argument.
    """
    if spec.name not in catalogue:
        raise SpecError(f"no {what} is called {spec.name!r}; there are {listed(catalogue)}")
    try:
        return catalogue[spec.name](*spec.arguments, **dict(spec.settings))
    except TypeError as error:
        raise SpecError(f"{what} {spec}: {error}") from error


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(names)
