"""The notation of groups: `str(group)` writes it and `parse_group` reads it.

group    =  S(n)  |  O(d)  |  C(n)  |  O(d)^h  |  product " wr " S(n)
product  =  factor { "*" factor }
factor   =  part { "+" part }  |  "(" product " wr " S(n) ")"  |  "(" product ")xS(g)"
part     =  S(n)  |  O(d)  |  C(n)  |  R(n,s)  |  Z(n,s)  |  P(d)  |  CO(d)  |  GL(d)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from fedbasin.strategies.symmetry.groups.block_groups import DirectSum, Inner, PairSigns, Rotary
from fedbasin.strategies.symmetry.groups.centred import Centred
from fedbasin.strategies.symmetry.groups.general_linear import Conformal, General, Positive
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.groups.shared_heads import SharedHeads
from fedbasin.strategies.symmetry.symmetry_error import SymmetryError

_TOKEN = re.compile(r"(?:GL|CO|[SOCPRZ])\(\d+(?:,\d+)?\)|\^\d+| wr |[*+()x]")
_ATOM = re.compile(r"(GL|CO|[SOCPRZ])\((\d+)(?:,(\d+))?\)")

# Groups that can act on a space by themselves; the others act inside a block.
_GROUPS: dict[str, Callable[[int], Group]] = {"S": Permutation, "O": Orthogonal, "C": Centred}
_INNERS: dict[str, Callable[[int], Inner]] = {**_GROUPS, "P": Positive, "CO": Conformal, "GL": General}
_STRIDED: dict[str, Callable[[int, int], Inner]] = {"R": Rotary, "Z": PairSigns}


def parse_group(text: str) -> Group:
    """Return the group that `text` denotes.

    Raises:
        SymmetryError: the text is not in the notation; the message says where.
    """
    try:
        return _parse(text)
    except ValueError as error:
        raise (error if isinstance(error, SymmetryError) else SymmetryError(f"{text!r}: {error}")) from error


def _parse(text: str) -> Group:
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        raise SymmetryError(f"{text!r} is not a group; write for example S(8), O(8)^4 or O(8) wr S(4)")
    if re.search(r"(?<!\d)0", text):
        raise SymmetryError(f"{text!r} is a group of 0 units; every number must be at least 1")
    parser = _Parser(text, tokens)
    # An outermost product always has blocks, so ` wr ` tells the two rules apart without looking ahead.
    group = parser.wreath() if " wr " in tokens else parser.plain()
    if parser.tokens:
        raise SymmetryError(f"{text!r} should end before {''.join(parser.tokens)!r}")
    return group


@dataclass
class _Parser:
    """A recursive descent over the tokens of a group that are not parsed yet."""

    text: str
    tokens: list[str]

    def plain(self) -> Group:
        letter, size, _ = self._atom()
        if self.tokens and self.tokens[0].startswith("^"):
            count = int(self.tokens.pop(0)[1:])
            if letter != "O" or count == 1:
                raise SymmetryError(f"{self.text!r}: only rotations repeat; permutations in blocks need a space each")
            return Orthogonal(size, count)
        if self.tokens[:1] == ["*"]:
            raise SymmetryError(f"{self.text!r} has several roles but no blocks; write two spaces, or add ` wr S(1)`")
        if letter not in _GROUPS:
            raise SymmetryError(f"{self.text!r} is a group inside a block; write `{self.text} wr S(1)`")
        return _GROUPS[letter](size)

    def wreath(self) -> Wreath:
        inners = self._separated("*", self._factor)
        self._expect(" wr ")
        return Wreath(inners, self._permutation())

    def _factor(self) -> Inner:
        if self.tokens[:1] != ["("]:
            parts = self._separated("+", self._part)
            return parts[0] if len(parts) == 1 else DirectSum(parts)
        self.tokens.pop(0)
        inners = self._separated("*", self._factor)
        if self.tokens[:1] == [" wr "]:
            self.tokens.pop(0)
            nested = Wreath(inners, self._permutation())
            self._expect(")")
            return nested
        self._expect(")")
        self._expect("x")
        return SharedHeads(inners, self._permutation())

    def _separated(self, sign: str, parse: Callable[[], Inner]) -> tuple[Inner, ...]:
        result = [parse()]
        while self.tokens[:1] == [sign]:
            self.tokens.pop(0)
            result.append(parse())
        return tuple(result)

    def _permutation(self) -> int:
        """Parse S(n) and return n."""
        letter, size, _ = self._atom()
        if letter != "S":
            raise SymmetryError(f"{self.text!r}: blocks change places by S(n), not by {letter}")
        return size

    def _part(self) -> Inner:
        letter, size, stride = self._atom()
        return _INNERS[letter](size) if stride is None else _STRIDED[letter](size, stride)

    def _atom(self) -> tuple[str, int, int | None]:
        """Parse the letter of a group and its one or two numbers."""
        match = _ATOM.fullmatch(self.tokens.pop(0)) if self.tokens else None
        if match is None:
            raise SymmetryError(f"{self.text!r}: a group is missing, or a sign is not needed")
        letter, size, stride = match.groups()
        if (letter in _STRIDED) != (stride is not None):
            raise SymmetryError(f"{match[0]} in {self.text!r}: write S(n), O(n), C(n), R(n,s) or Z(n,s)")
        return letter, int(size), int(stride) if stride else None

    def _expect(self, token: str) -> None:
        if self.tokens[:1] != [token]:
            raise SymmetryError(f"{self.text!r} needs {token!r} before {''.join(self.tokens)!r}")
        self.tokens.pop(0)
