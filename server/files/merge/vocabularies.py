"""Tokenizers of merged models, and embeddings by token.

Models with the same tokens at the same places are merged row by row. Otherwise a row of the result belongs to a token
of the chosen vocabulary and is read from each model at that model's own place. A model that lacks the token takes part
with the row of the base model or, if that lacks it too, with the mean of the models that have it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedbasin.server.files.merge.merging import States
from fedbasin.server.files.merge.recipe import TokenizerChoice
from fedbasin.server.files.reading import ModelError, few, read_json
from fedbasin.strategies.tensors.pieces import working_dtype

TOKENIZER = "tokenizer.json"

# Files of a tokenizer in older formats, which a new vocabulary would contradict.
OLD_FORMATS = ("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model", "spiece.model")

Vocabulary = Mapping[str, int]

_TABLE = re.compile(
    r"(.*\.)?((embed_tokens|wte|word_embeddings|shared|embed_in|embed_out|lm_head|decoder|output)\.(weight|bias)"
    r"|predictions\.bias)"
)


@dataclass(frozen=True)
class TokenPlan:
    """The vocabulary of the result, and the places of its tokens in each model.

    Attributes:
        model: the model whose tokenizer the result has.
        added: tokens that this tokenizer lacks, in the order of their places.
        size: number of rows of the result's tables.
        rows: for each model the row of each token, -1 for a token that it lacks.
    """

    model: Path
    added: tuple[str, ...]
    size: int
    rows: Mapping[Path, Tensor]

    def shared(self) -> "TokenPlan":
        """Return the plan of the tokens that every model has."""
        everywhere = torch.stack(list(self.rows.values())).ge(0).all(0)
        rows = {path: rows[everywhere] for path, rows in self.rows.items()}
        return replace(self, size=int(everywhere.sum()), rows=rows)


def read_vocabulary(model: Path) -> Vocabulary | None:
    """Return the place of each token of the tokenizer in a model's folder; None without one.

    Raises:
        ModelError: the tokenizer's file has another form.
    """
    if (model / TOKENIZER).is_file():
        content = read_json(model / TOKENIZER)
        try:
            entries = content.get("model", {}).get("vocab", {})
            # Unigram models list their tokens with scores.
            places = dict(entries) if isinstance(entries, dict) else {entry[0]: i for i, entry in enumerate(entries)}
            places |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
            return _checked(places, model / TOKENIZER)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ModelError(
                f"{model / TOKENIZER}: its vocabulary cannot be read ({error!r}); save it again"
            ) from error
    if (model / "vocab.json").is_file():
        added = model / "added_tokens.json"
        places = read_json(model / "vocab.json") | (read_json(added) if added.is_file() else {})
        return _checked(places, model / "vocab.json")
    if (model / "vocab.txt").is_file():
        lines = (model / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return _checked({token: number for number, token in enumerate(lines)}, model / "vocab.txt")
    return None


def _checked(places: Mapping[str, Any], path: Path) -> Vocabulary:
    """Return the places of tokens, once there are some and all are numbers of rows."""
    if not places:
        raise ModelError(f"{path}: has no tokens; save the tokenizer again")
    if wrong := [token for token, place in places.items() if type(place) is not int or place < 0]:
        raise ModelError(f"{path}: the place of {few(wrong)} is no number of a row; save the tokenizer again")
    return places


def plan_tokens(paths: Sequence[Path], choice: TokenizerChoice | None, sizes: Mapping[Path, int]) -> TokenPlan | None:
    """Choose the vocabulary of a merge; None where all models have the same, or none has one.

    Args:
        paths: the models, the base model or the first one first.
        choice: the recipe's tokenizer; None takes one that holds the tokens of all.
        sizes: number of rows of each model's tables.

    Raises:
        ModelError: the tokenizers differ and nothing chooses between them, or a chosen one is missing.
    """
    vocabularies = {path: words for path in paths if (words := read_vocabulary(path)) is not None}
    if choice is None and (lacking := [path for path in paths if path not in vocabularies]):
        if not _all_equal(vocabularies, {}):
            raise ModelError(
                f"{lacking[0]}: has no {TOKENIZER}, and those of the other models differ, so that its rows are of unknown "
                "tokens; save its tokenizer beside it, or merge the others without it"
            )
        return None
    if choice is None and _all_equal(vocabularies, sizes):
        return None
    if missing := [str(path) for path in paths if path not in vocabularies or path not in sizes]:
        raise ModelError(f"{missing[0]}: has no tokenizer and vocab_size, which a choice of a tokenizer needs")
    if choice is not None and choice.source == "union":
        model, added = paths[0], _missing_tokens(vocabularies, paths[0])
    else:
        model, added = _tokenizer_model(paths, choice, vocabularies), ()
    if not added and choice is not None and choice.pad_to_multiple_of is None and _all_equal(vocabularies, sizes):
        return None
    step = 1 if choice is None else choice.pad_to_multiple_of or 1
    needed = max(vocabularies[model].values()) + 1 + len(added) if added else sizes[model]
    size = -(-needed // step) * step
    words = {
        **vocabularies[model],
        **{token: max(vocabularies[model].values()) + 1 + i for i, token in enumerate(added)},
    }
    return TokenPlan(model, added, size, {path: _rows(words, vocabularies[path], size, sizes[path]) for path in paths})


def is_table(name: str, shape: Sequence[int], size: int) -> bool:
    """Return True if a tensor has a row for each of a model's `size` tokens."""
    return bool(shape) and shape[0] == size and _TABLE.fullmatch(name) is not None


class TokenState(Mapping[str, Tensor]):
    """A model's state with the rows of its tables in the order of the result's vocabulary, computed when they are read.

    Args:
        path: the model.
        states: all models, the base model or the first one first.
        tokens: the vocabulary of the result.
        tables: names of the tables.
    """

    def __init__(self, path: Path, states: States, tokens: TokenPlan, tables: frozenset[str]) -> None:
        self._path, self._states, self._tokens, self._tables = path, states, tokens, tables

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._states[self._path][name]
        if name not in self._tables:
            return tensor
        table = self._take(self._path, name)
        lacking = self._tokens.rows[self._path] < 0
        if lacking.any():
            table[lacking] = self._substitutes(name, lacking).to(table.dtype)
        return table

    def __iter__(self) -> Iterator[str]:
        return iter(self._states[self._path])

    def __len__(self) -> int:
        return len(self._states[self._path])

    def _take(self, path: Path, name: str) -> Tensor:
        tensor = self._states[path][name]
        # On the meta device, where a plan needs shapes alone, nothing is read.
        return tensor.index_select(0, self._tokens.rows[path].clamp(min=0).to(tensor.device))

    def _substitutes(self, name: str, lacking: Tensor) -> Tensor:
        """Return rows for the tokens that the model lacks: the base's, or the mean of those that have them."""
        base = next(iter(self._tokens.rows))
        total: Any = 0.0
        count = torch.zeros(int(lacking.sum()))
        for path, rows in self._tokens.rows.items():
            has = (rows[lacking] >= 0).float()
            if path != base:
                has *= self._tokens.rows[base][lacking] < 0
            part = self._take(path, name)[lacking]
            total = total + part.to(working_dtype(part)) * has.reshape(-1, *[1] * (part.dim() - 1))
            count += has
        return total / count.clamp(min=1).reshape(-1, *[1] * (total.dim() - 1))


def order_tables(states: States, tokens: TokenPlan, tables: frozenset[str]) -> States:
    """Return all models' states with the rows of their tables in the order of a vocabulary."""
    return {path: TokenState(path, states, tokens, tables) for path in states}


def write_tokenizer(tokens: TokenPlan, folder: Path) -> None:
    """Add the tokens that the tokenizer in a folder lacks; tokenizers of older formats are removed.

    Raises:
        ModelError: the tokenizer is of an older format alone.
    """
    if not tokens.added:
        return
    path = folder / TOKENIZER
    content = read_json(path)
    places = read_vocabulary(folder) or {}
    start = max(places.values()) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content.setdefault("added_tokens", []).extend(
        {"id": start + number, "content": token, **flags} for number, token in enumerate(tokens.added)
    )
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    for name in OLD_FORMATS:
        (folder / name).unlink(missing_ok=True)


def _all_equal(vocabularies: Mapping[Path, Vocabulary], sizes: Mapping[Path, int]) -> bool:
    (reference, *rest) = vocabularies.values() if vocabularies else ({},)
    return len({sizes.get(path) for path in vocabularies}) < 2 and all(words == reference for words in rest)


def _missing_tokens(vocabularies: Mapping[Path, Vocabulary], base: Path) -> tuple[str, ...]:
    tokens = (token for words in vocabularies.values() for token in sorted(words, key=words.__getitem__))
    added = tuple(dict.fromkeys(token for token in tokens if token not in vocabularies[base]))
    if added and not (base / TOKENIZER).is_file():
        raise ModelError(f"{base}: has no {TOKENIZER}, to which tokens could be added; save its tokenizer again")
    return added


def _tokenizer_model(
    paths: Sequence[Path], choice: TokenizerChoice | None, vocabularies: Mapping[Path, Vocabulary]
) -> Path:
    """Return the model whose tokenizer the result has."""
    if choice is not None:
        if choice.source == "base":
            return paths[0]
        for path in vocabularies:
            if path.resolve() == Path(choice.source).resolve():
                return path
        raise ModelError(f"tokenizer_source: {choice.source} is not a model of this merge; give union, base or one")
    largest = max(paths, key=lambda path: len(vocabularies[path]))
    for path in paths:
        if lacking := [token for token in vocabularies[path] if token not in vocabularies[largest]]:
            raise ModelError(
                f"{path}: its tokenizer has {few(lacking)}, which that of {largest} lacks; set tokenizer_source to "
                "union, base or a model"
            )
    return largest


def _rows(words: Vocabulary, own_words: Vocabulary, size: int, own_size: int) -> Tensor:
    """Return the row of each token of `words` in a model's own tables; rows behind both vocabularies are the same."""
    rows = torch.full((size,), -1)
    for token, place in words.items():
        own_place = own_words.get(token, -1)
        rows[place] = own_place if own_place < own_size else -1
    used = max(max(words.values()), max(own_words.values())) + 1
    rows[used:own_size] = torch.arange(used, max(used, min(size, own_size)))
    return rows
