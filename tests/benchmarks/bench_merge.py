"""`fedbasin merge` of two large folders of random tensors: seconds, memory, and the disk's own bandwidth, by rule.

`FEDBASIN_MERGEKIT` names a `mergekit-yaml` to measure beside it, from an environment of its own:

    python -m venv mergekit-env && mergekit-env/bin/pip install mergekit==0.1.5
    FEDBASIN_MERGEKIT=mergekit-env/bin/mergekit-yaml PYTHONPATH=. .venv/bin/python -m tests.benchmarks merge

`FEDBASIN_MERGE_GB` is the size of each folder, 7 by default; the disk needs room for four and a half of them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from tests.benchmarks.figures import Figure, Goal, Say

GB = float(os.environ.get("FEDBASIN_MERGE_GB", "7"))
PEER = "FEDBASIN_MERGEKIT"
WIDTH, INNER, WORDS = 4096, 11008, 32000
LAYER_GB = 2e-9 * (4 * WIDTH**2 + 3 * WIDTH * INNER)
LAYERS = max(1, round((GB - 4e-9 * WORDS * WIDTH) / LAYER_GB))
# Peak of resident memory, in GB; the first two rules are sums of pieces.
MEMORY = {"linear": 2.0, "dare_linear": 2.0, "ties": 4.0, "slerp": 4.0}
BLOCK = 2**23

HOW = f"""Two folders and a base of {LAYERS} layers in the shapes of a Llama of 7 billion parameters, bfloat16, random,
two layers to a file. Files are dropped from the page cache before every run, and the result is synchronised to the
disk. The disk's own time is that of reading the same files and of writing as many bytes, one after the other, in blocks of
8 MiB, measured in the same run. Memory is the peak of resident memory, with the pages of mapped files. mergekit 0.1.5
runs in an environment of its own (`{PEER}`, see the script); where it is absent its rows are missing."""


def measure(say: Say) -> Figure:
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("FEDBASIN_MERGE_FOLDER")))
    try:
        say(f"merge: writing three folders with {LAYERS} layers")
        paths = [write_model(folder / name, number) for number, name in enumerate(("base", "a", "b"))]
        rows, goals = [], []
        for rule, limit in MEMORY.items():
            recipe = write_recipe(folder, rule, paths)
            inputs = paths[:2] if rule == "slerp" else paths[1:] if rule == "linear" else paths
            ideal = disk_seconds(inputs, folder / "copy")
            ours = run(our_command(recipe, folder / "out"), inputs, folder / "out")
            rows.append(row(f"{rule}, fedbasin", *ours, ideal))
            say(f"merge: {rows[-1]}")
            goals += [
                Goal(f"{rule}: at most {limit:g} GB", f"{ours[1]:.2f} GB", ours[1] <= limit),
                Goal(f"{rule}: .6 of the disk", f"{ideal / ours[0]:.2f}", ideal / ours[0] >= 0.6),
            ]
            if peer := os.environ.get(PEER):
                theirs = run([peer, str(recipe), str(folder / "out"), "--lazy-unpickle"], inputs, folder / "out")
                rows.append(row(f"{rule}, mergekit 0.1.5", *theirs, ideal))
                say(f"merge: {rows[-1]}")
                goals.append(
                    Goal(
                        f"{rule}: no slower than mergekit",
                        f"{ours[0]:.1f} s against {theirs[0]:.1f} s",
                        ours[0] <= theirs[0],
                    )
                )
        columns = ("", "seconds", "peak GB", "disk's own seconds", "of the disk")
        return Figure(f"Merging two folders of {size(paths[1]) / 1e9:.1f} GB", HOW, columns, rows, goals)
    finally:
        shutil.rmtree(folder)


def row(name: str, seconds: float, memory: float, ideal: float) -> tuple[str, ...]:
    return name, f"{seconds:.1f}", f"{memory:.2f}", f"{ideal:.1f}", f"{ideal / seconds:.2f}"


def our_command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "fedbasin.server.cli", "merge", str(recipe), "-o", str(out)]


def write_model(folder: Path, seed: int) -> Path:
    """Write a model whose tensors are cut from one pool of random numbers, as drawing all would take minutes."""
    folder.mkdir()
    pool = torch.randn(2**26, generator=torch.Generator().manual_seed(0))
    pool = (pool + 0.1 * torch.randn(2**26, generator=torch.Generator().manual_seed(seed)) * bool(seed)).bfloat16()
    shapes = {
        "model.embed_tokens.weight": (WORDS, WIDTH),
        "lm_head.weight": (WORDS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    shards = [shapes]
    for layer in range(LAYERS):
        if layer % 2 == 0:
            shards.append({})
        shards[-1] |= layer_shapes(layer)
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file({key: cut(pool, shape, number) for key, shape in shard.items()}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config()))
    return folder


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    start = f"model.layers.{layer}."
    attention = {f"{start}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    norms = {f"{start}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    outer = {f"{start}mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
    return attention | norms | outer | {f"{start}mlp.down_proj.weight": (WIDTH, INNER)}


def config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def cut(pool: torch.Tensor, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return pool.roll(1000 * offset).repeat(-(-count // len(pool)))[:count].reshape(shape).clone()


def write_recipe(folder: Path, rule: str, paths: list[Path]) -> Path:
    """Write a recipe that both programs read."""
    base, *models = map(str, paths)
    if rule == "slerp":
        models = [base, models[0]]
    entries = [{"model": path, "parameters": {"weight": 0.5, "density": 0.3}} for path in models]
    content = {"merge_method": rule, "models": entries, "dtype": "bfloat16"}
    if rule in ("linear", "slerp"):
        for entry in entries:
            entry["parameters"] = {"weight": 0.5} if rule == "linear" else {}
    if rule == "slerp":
        content["parameters"] = {"t": 0.4}
    if rule != "linear":
        content["base_model"] = base
    recipe = folder / f"{rule}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def run(command: list[str], inputs: list[Path], out: Path) -> tuple[float, float]:
    """Return the seconds of a command, up to its files being on the disk, and its peak of memory in GB."""
    drop(inputs)
    peak, start = 0, time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process:
            while process.poll() is None:
                peak = max(peak, resident_peak(process.pid))
                time.sleep(0.05)
        os.sync()
        seconds = time.perf_counter() - start
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(errors.read().decode()[-4000:])
    shutil.rmtree(out)
    return seconds, peak / 1e9


def resident_peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return max((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), default=0)


def drop(folders: list[Path]) -> None:
    """Drop files from the page cache."""
    os.sync()
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_seconds(inputs: list[Path], target: Path) -> float:
    """Return the seconds in which the disk reads the inputs, and writes a file as large as one of them."""
    drop(inputs)
    start = time.perf_counter()
    buffer = bytearray(BLOCK)
    for folder in inputs:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    with target.open("wb", buffering=0) as file:
        for _ in range(size(inputs[0]) // BLOCK):
            file.write(buffer)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
