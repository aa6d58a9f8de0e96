"""Layouts that are found by loading numbers, for any rule of loading that moves entries."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedbasin.server.files.library.tensor_layout import (
    ModuleState,
    StoredState,
    find_layout,
    identity_layout,
    with_copies,
)

State = dict[str, Tensor]


@st.composite
def rules(draw: st.DrawFn) -> tuple[State, list[str]]:
    """Draw stored tensors, and the rule by which each becomes a tensor of a module."""
    sizes = [draw(st.integers(1, 4)) for _ in range(3)]
    kinds = draw(
        st.lists(st.sampled_from(["name", "transpose", "stack", "concatenate", "chunk", "interleave"]), min_size=1)
    )
    state = {}
    for number, kind in enumerate(kinds):
        shape = (2 * sizes[0], 2 * sizes[1]) if kind in ("chunk", "interleave") else (sizes[0], sizes[1])
        for part in range(sizes[2] + 1 if kind in ("stack", "concatenate") else 1):
            state[f"{number}.{part}"] = torch.randn(shape)
    return state, kinds


def load(state: State, kinds: list[str]) -> State:
    module = {}
    for number, kind in enumerate(kinds):
        parts = [tensor for name, tensor in state.items() if name.split(".")[0] == str(number)]
        if kind == "name":
            module[f"{number}.weight"] = parts[0]
        elif kind == "transpose":
            module[f"{number}.weight"] = parts[0].mT
        elif kind == "stack":
            module[f"{number}.weight"] = torch.stack([part.mT for part in parts])
        elif kind == "concatenate":
            module[f"{number}.weight"] = torch.cat(parts, dim=1)
        elif kind == "chunk":
            module |= {f"{number}.{name}": half for name, half in zip("kv", parts[0].chunk(2), strict=True)}
        else:
            module[f"{number}.weight"] = torch.cat([parts[0][::2], parts[0][1::2].flip(1)])
    return module


@given(rules())
def test_a_module_is_read_and_written_as_its_library_loads_it(case: tuple[State, list[str]]) -> None:
    stored, kinds = case
    layout = find_layout(stored, lambda numbers: (load(dict(numbers), kinds), set()))
    module = ModuleState(layout, stored)
    expected = load(stored, kinds)
    assert module.keys() == expected.keys()
    assert all(torch.equal(module[name], expected[name]) for name in expected)
    changed = {name: 2 * tensor + 1 for name, tensor in module.items()}
    written = StoredState(layout, stored, changed)
    assert all(torch.equal(written[name], 2 * tensor + 1) for name, tensor in stored.items())
    assert not layout.unread


def test_what_is_not_loaded_stays_and_what_is_missing_is_known() -> None:
    stored = {"a": torch.randn(2, 3), "rest": torch.randn(4), "steps": torch.tensor(3)}
    layout = find_layout(stored, lambda numbers: ({"x": numbers["a"], "new": torch.ones(2)}, {"new"}))
    assert layout.unread == ("rest", "steps")
    assert layout.missing == ("new",)
    written = StoredState(layout, stored, {"x": stored["a"] + 1})
    assert torch.equal(written["a"], stored["a"] + 1)
    assert written["rest"] is stored["rest"]


def test_computed_entries_are_not_stored_ones() -> None:
    layout = find_layout({"a": torch.randn(3)}, lambda numbers: ({"x": numbers["a"] * 0.5, "y": numbers["a"]}, set()))
    assert layout.missing == ("x",)
    assert [*layout.pieces] == ["y"]


def test_a_copy_of_a_tied_tensor_moves_with_it() -> None:
    table = torch.randn(4, 2)
    stored = {"table": table, "head": table.clone(), "other": table + 1}
    layout = find_layout(
        stored,
        lambda numbers: ({"table": numbers["table"], "head": numbers["table"], "other": numbers["table"]}, set()),
    )
    layout = with_copies(layout, stored)
    assert layout.copies == {"head": "table"}
    assert layout.unread == ("other",)
    written = StoredState(layout, stored, {"table": table * 2, "head": table * 2, "other": table * 2})
    assert torch.equal(written["head"], table * 2)
    assert torch.equal(written["other"], table + 1)


def test_an_identity_reads_and_writes_the_same_objects() -> None:
    stored = {"a": torch.randn(2, 3), "b": torch.randn(2)}
    layout = identity_layout(stored)
    assert ModuleState(layout, stored)["a"] is stored["a"]
    assert StoredState(layout, stored, stored)["b"] is stored["b"]
