"""A model of 24 layers: where the time and the gain of matching are, and what a part of the layers brings."""

import time

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from fedbasin.strategies.alignment.layer_subset import choose_layers
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State
from tests.benchmarks.figures import Figure, Goal, Say
from tests.strategies.symmetry.by_hand.families import family

LAYERS, WIDTH, HEADS, HIDDEN = 24, 256, 4, 1024
SUBSETS = ("first:6", "last:6", "mlp.*", "heads.*")

HOW = f"""A BERT of {LAYERS} layers ({WIDTH} wide, {HEADS} heads, feed-forward {HIDDEN}) with random weights and an unrelated client; the
residual stream is left as it is, so layers are independent and each is matched alone (`layers = "*.N"`). Gain
is the fall of the squared distance to the anchor. Random weights gain alike in all layers: the table says what a layer
costs and that subsets add up; where a trained model gains is for its own report to say, which names every space."""


def measure(say: Say) -> Figure:
    say(f"layers: {LAYERS} layers, one at a time")
    symmetry, anchor, client = models()
    whole = _matched(symmetry, anchor, client)
    parts = {f"layer {n}": f"*.{n}" for n in range(LAYERS)} | {name: name for name in SUBSETS}
    found = {n: _matched(choose_layers(symmetry, each), anchor, client) for n, each in parts.items()}
    rows = [_row("all", whole, whole), *(_row(n, each, whole) for n, each in found.items())]
    summed = sum(found[f"layer {n}"][1] for n in range(LAYERS)) / whole[1]
    goal = Goal("the layers' gains add up to that of the whole", f"{summed:.1%}", abs(summed - 1) < 1e-3)
    return Figure("Time and gain by layer", HOW, ("", "ms", "of time", "of gain"), rows, [goal])


def _row(name: str, found: tuple[float, float], whole: tuple[float, float]) -> tuple[str, ...]:
    (seconds, gain), (all_seconds, all_gain) = found, whole
    return name, f"{1e3 * seconds:.0f}", f"{seconds / all_seconds:.0%}", f"{gain / all_gain:.1%}"


def models() -> tuple[Symmetry, dict[str, Tensor], dict[str, Tensor]]:
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=HIDDEN, vocab_size=64
    )
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(dict(BertModel(config).state_dict()))
    return family("bert", config, states[0], residual=False), states[0], states[1]


def _matched(symmetry: Symmetry, anchor: State, client: State) -> tuple[float, float]:
    """Seconds and the fall of the squared distance."""
    started = time.perf_counter()
    report = match_weights(symmetry, anchor, client).report
    seconds = time.perf_counter() - started
    return seconds, report.distance_before**2 - report.distance_after**2
