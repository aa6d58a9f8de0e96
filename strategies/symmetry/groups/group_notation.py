"""Groups as text: `str(group)` writes them, `read` reads them back.

group    =  S(n)  |  O(d)  |  C(n)  |  O(d)^h  |  product " wr " S(n)
product  =  factor { "*" factor }
factor   =  part { "+" part }  |  "(" product " wr " S(n) ")"  |  "(" product ")xS(g)"
part     =  S(n)  |  O(d)  |  C(n)  |  R(n,s)  |  Z(n,s)  |  P(d)  |  CO(d)  |  GL(d)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from fedbasin.strategies.symmetry.groups.block_groups import (
    DirectSum,
    Inner,
    PairSigns,
    Rotary,
    Shared,
)
from fedbasin.strategies.symmetry.groups.centred import Centred
from fedbasin.strategies.symmetry.groups.general_linear import Conformal, General, Positive
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath

_TOKEN = re.compile(r"(?:GL|CO|[SOCPRZ])\(\d+(?:,\d+)?\)|\^\d+| wr |[*+()x]")
_ATOM = re.compile(r"(GL|CO|[SOCPRZ])\((\d+)(?:,(\d+))?\)")

_ONE = {
    "S": Permutation,
    "O": Orthogonal,
    "C": Centred,
    "P": Positive,
    "CO": Conformal,
    "GL": General,
}
_TWO = {"R": Rotary, "Z": PairSigns}


class NotationError(ValueError):
    """A text that is no group."""


def read(text: str) -> Group:
    """The group that is written `text`.

    Raises:
        NotationError: what is wrong with it.
    """
    try:
        return _read(text)
    except ValueError as error:
        raise error if isinstance(error, NotationError) else NotationError(str(error)) from error


def _read(text: str) -> Group:
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        raise NotationError(f"{text!r} is no group; write for example S(8), O(8)^4 or O(8) wr S(4)")
    if re.search(r"(?<!\d)0", text):
        raise NotationError(f"a group without units: {text!r}")
    reader = _Reader(text, tokens)
    group = reader.wreath() if " wr " in tokens else reader.plain()
    if reader.rest:
        raise NotationError(f"{''.join(reader.rest)!r} is too much in {text!r}")
    return group


@dataclass
class _Reader:
    """What is left of a group's tokens."""

    text: str
    rest: list[str]

    def plain(self) -> Group:
        inner = self._atom()
        if self.rest and self.rest[0].startswith("^"):
            return self._repeated(inner, int(self.rest.pop(0)[1:]))
        if self.rest[:1] == ["*"]:
            raise NotationError(
                f"{self.text!r} has several roles but nothing exchanges them; write two spaces"
            )
        if not isinstance(inner, Permutation | Orthogonal | Centred):
            raise NotationError(
                f"{self.text!r} is a group inside a block; write `{self.text} wr S(1)`"
            )
        return inner

    def wreath(self) -> Wreath:
        inners = self._product()
        self._expect(" wr ")
        return Wreath(inners, self._permutation().count)

    def _product(self) -> tuple[Inner, ...]:
        return self._joined("*", self._factor)

    def _factor(self) -> Inner:
        if self.rest[:1] != ["("]:
            parts = self._joined("+", self._atom)
            return parts[0] if len(parts) == 1 else DirectSum(parts)
        self.rest.pop(0)
        inners = self._product()
        if self.rest[:1] == [" wr "]:
            self.rest.pop(0)
            nested = Wreath(inners, self._permutation().count)
            self._expect(")")
            return nested
        self._expect(")")
        self._expect("x")
        return Shared(inners, self._permutation().count)

    def _joined(self, sign: str, one: Callable[[], Inner]) -> tuple[Inner, ...]:
        found = [one()]
        while self.rest[:1] == [sign]:
            self.rest.pop(0)
            found.append(one())
        return tuple(found)

    def _permutation(self) -> Permutation:
        group = self._atom()
        if not isinstance(group, Permutation):
            raise NotationError(f"blocks of {self.text!r} change places by S(n), not {group}")
        return group

    def _repeated(self, inner: Inner, count: int) -> Group:
        if not isinstance(inner, Orthogonal) or count == 1:
            raise NotationError(
                f"{self.text!r}: only rotations repeat; permutations in blocks need a space each"
            )
        return Orthogonal(inner.size, count)

    def _atom(self) -> Inner:
        match = _ATOM.fullmatch(self.rest.pop(0)) if self.rest else None
        if match is None:
            raise NotationError(f"{self.text!r} is no group; a group is missing or a sign too much")
        letter, size, stride = match.groups()
        if (letter in _TWO) != (stride is not None):
            raise NotationError(
                f"{match[0]} in {self.text!r}: write S(n), O(n), C(n), R(n,s) or Z(n,s)"
            )
        try:
            return _TWO[letter](int(size), int(stride)) if stride else _ONE[letter](int(size))
        except ValueError as error:
            raise NotationError(f"{match[0]} in {self.text!r}: {error}") from error

    def _expect(self, token: str) -> None:
        if self.rest[:1] != [token]:
            raise NotationError(f"{self.text!r} needs {token!r} before {''.join(self.rest)!r}")
        self.rest.pop(0)
