r"""Unrelated GPT-2s and ViTs, merged by each rule after each alignment: one JSON line for each result.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.unrelated train FOLDER gpt2 0 1 2 3
    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.unrelated alone FOLDER gpt2 4
    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.unrelated merge FOLDER gpt2 4 none weights learned
    PYTHONPATH=. .venv/bin/fedbasin barrier FOLDER/gpt2/0 FOLDER/gpt2/1 --data tests.benchmarks.unrelated:gpt2_test \
        --rotate-residual --matcher learned --align-data tests.benchmarks.unrelated:gpt2

GPT-2s read the characters of Python's standard library, ViTs scikit-learn's digits; each is trained from an
initialisation and in an order of its own. Data of an alignment and of statistics are training examples.
"""

import json
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from fedbasin.server.files.merge.merge_models import align_merge, prepare_merge, with_recipe, write_merge
from fedbasin.server.files.merge.recipe import MergeRecipe, make_recipe
from fedbasin.strategies.fusion.rules.merging_rules import RULES

Batch = dict[str, Tensor]

CONTEXT, CHARACTERS, HELD_OUT = 64, 128, {"gpt2": 512, "vit": 360}
SIZE, STEPS = {"gpt2": 16, "vit": 64}, {"gpt2": 500, "vit": 1380}

ALIGNMENTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "weights": {"links": "star"},
    "activations": {"links": "star", "matcher": "activations"},
    "rotated": {"links": "chain", "rotate_residual": True},
    "activations rotated": {"links": "chain", "matcher": "activations", "rotate_residual": True},
    "learned": {"links": "chain", "matcher": "learned", "rotate_residual": True},
    "learned, smoothed": {"links": "chain", "matcher": "learned", "rotate_residual": True, "smoothing": 0.1},
    "learned star": {"links": "star", "matcher": "learned", "rotate_residual": True},
}
# Parameters by rule; those with an anchor take the first model.
PARAMETERS: dict[str, dict[str, float]] = {
    "linear": {},
    "karcher": {},
    "slerp": {"t": 0.5},
    "model_stock": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "sce": {},
    "iso_c": {},
    "tsv_m": {},
    "wudi": {},
    "fisher": {},
    "regmean": {},
}


@cache
def examples(family: str) -> tuple[list[Batch], Batch]:
    """Return training examples, in batches of one order, and test examples."""
    if family == "gpt2":
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::4]
        text = b"".join(path.read_bytes() for path in paths)
        ids = torch.tensor([byte if byte < CHARACTERS else ord("?") for byte in text])
        rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        data = {"input_ids": rows, "labels": rows}
    else:
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
        data = {"pixel_values": images, "labels": torch.tensor(digits.target)}
    order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
    test, train = order[: HELD_OUT[family]], order[HELD_OUT[family] :]
    return [take(data, part) for part in train.split(SIZE[family])], take(data, test)


def take(data: Batch, rows: Tensor) -> Batch:
    return {name: tensor[rows] for name, tensor in data.items()}


def gpt2() -> list[Batch]:
    return examples("gpt2")[0][16:]


def vit() -> list[Batch]:
    return examples("vit")[0]


def gpt2_statistics() -> list[Batch]:
    return examples("gpt2")[0][:16]


def vit_statistics() -> list[Batch]:
    return examples("vit")[0][:8]


def gpt2_test() -> list[Batch]:
    return [examples("gpt2")[1]]


def vit_test() -> list[Batch]:
    return [examples("vit")[1]]


def new_model(family: str) -> Any:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        return ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes, **still)
        )
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # A stream that rotates folds the last norm into the head, which a tied one does not bear.
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=CHARACTERS, n_positions=CONTEXT, **sizes, **still, **ends))


def train(folder: Path, family: str, seed: int) -> None:
    """Train a model by AdamW, with batches drawn at random."""
    torch.manual_seed(seed)
    model, batches, steps = new_model(family), examples(family)[0], STEPS[family]
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for _ in range(steps):
        rows = torch.randint(len(whole["labels"]), (SIZE[family],))
        optimiser.zero_grad()
        model(**take(whole, rows)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.save_pretrained(folder / family / str(seed))


def logits(family: str, path: Path) -> Tensor:
    kind = {"gpt2": GPT2LMHeadModel, "vit": ViTForImageClassification}[family]
    batch = {name: tensor for name, tensor in examples(family)[1].items() if name != "labels"}
    with torch.no_grad():
        return kind.from_pretrained(path).eval()(**batch).logits


def score(family: str, predicted: Tensor) -> dict[str, float]:
    """Return mean loss and accuracy on the test examples, of logits or logarithms of probabilities."""
    labels = examples(family)[1]["labels"]
    if family == "gpt2":
        predicted, labels = predicted[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    right = (predicted.argmax(-1) == labels).float().mean()
    return {"loss": float(cross_entropy(predicted, labels)), "accuracy": float(right)}


def alone(folder: Path, family: str, count: int) -> None:
    """Print the models' scores alone, and that of their ensemble."""
    outputs = [logits(family, folder / family / str(seed)) for seed in range(count)]
    for number, predicted in enumerate(outputs):
        print(json.dumps({"family": family, "model": number, **score(family, predicted)}), flush=True)
    ensemble = torch.stack([predicted.softmax(-1) for predicted in outputs]).mean(0).log()
    print(json.dumps({"family": family, "ensemble": count, **score(family, ensemble)}), flush=True)


def recipe(folder: Path, family: str, count: int, rule: str, alignment: str) -> MergeRecipe:
    models = [{"model": str(folder / family / str(seed))} for seed in range(count)]
    content: dict[str, Any] = {"merge_method": rule, "models": models, "parameters": dict(PARAMETERS[rule])}
    if RULES[rule].anchor == "required":
        content |= {"base_model": models[0]["model"], "models": models[1:]}
    if rule in ("ties", "dare_linear"):
        # A share of each task vector that makes the sum of all the mean.
        content["parameters"]["weight"] = 1 / count
    if RULES[rule].statistic:
        content["statistics"] = f"{__spec__.name}:{family}_statistics"
    keys = ALIGNMENTS[alignment]
    if keys is not None:
        reads = keys.get("matcher") in ("activations", "learned")
        content["align"] = keys | ({"data": f"{__spec__.name}:{family}"} if reads else {})
    return make_recipe(content, rule)


def merge(folder: Path, family: str, count: int, alignment: str) -> None:
    """Align once and print the score of each rule."""
    merged = align_merge(prepare_merge(recipe(folder, family, count, "linear", alignment)), lambda _: None)
    for rule in PARAMETERS:
        if RULES[rule].most not in (None, count - 1) or RULES[rule].least > count - (RULES[rule].anchor == "required"):
            continue
        with tempfile.TemporaryDirectory() as place:
            chosen = recipe(folder, family, count, rule, alignment)
            write_merge(with_recipe(merged, chosen), Path(place) / "out", 2**40, lambda _: None, lambda _: None)
            result = score(family, logits(family, Path(place) / "out"))
        record = {"family": family, "count": count, "align": alignment, "rule": rule, **result}
        print(json.dumps(record), flush=True)


def main(what: str, folder: str, family: str, *rest: str) -> None:
    torch.set_num_threads(1)
    each: dict[str, Callable[[], object]] = {
        "train": lambda: [train(Path(folder), family, int(seed)) for seed in rest],
        "alone": lambda: alone(Path(folder), family, int(rest[0])),
        "merge": lambda: [merge(Path(folder), family, int(rest[0]), name) for name in rest[1:]],
    }
    each[what]()


if __name__ == "__main__":
    main(*sys.argv[1:])
