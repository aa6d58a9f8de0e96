"""Model files to run the commands on, and the commands themselves."""

import json
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from fedbasin.server.cli import app
from fedbasin.strategies.symmetry.transform import Transform, random
from tests.strategies.symmetry.tiny_transformers import MODELS, hf, symmetry_of

hf.logging.disable_progress_bar()
hf.logging.set_verbosity_error()


def fedbasin(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> list[Any]:
    """Return the JSON output of a command that succeeds, line by line."""
    done = fedbasin(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def refusal(*arguments: object) -> str:
    """Return the line that a command prints when it refuses, without its prefix."""
    done = fedbasin(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line.removeprefix("fedbasin: ")


def saved(name: str, folder: Path, shard: str = "1GB", dtype: torch.dtype | None = None) -> Path:
    """Save a tiny model of the `transformers` library in a folder and return the folder."""
    _write(_plain(name).to(dtype), folder, shard)
    return folder


def planted(name: str, folder: Path, shard: str = "1GB", dtype: torch.dtype | None = None) -> Transform:
    """Save the model of `saved` with a random transform applied, and return the transform."""
    model = _plain(name)
    transform = random(symmetry_of(model), torch.Generator().manual_seed(1))
    model.load_state_dict(transform.act(model.state_dict()))
    _write(model.to(dtype), folder, shard)
    return transform


def outputs(name: str, folder: Path) -> Tensor:
    """Return the outputs of the model in a folder, in float64, after the library loaded it."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(hf, config["architectures"][0])
    with torch.no_grad():
        result = MODELS[name].output(kind.from_pretrained(folder).double().eval()(**_doubled(name)))
    return result[0] if isinstance(result, tuple) else result


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder or a file."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


MLP = "hidden  S(6)  0.weight[0] 0.bias[0] 2.weight[1]\n"


def perceptron(path: Path, seed: int = 0, metadata: dict[str, str] | None = None) -> Path:
    """Save two layers with 6 hidden units in one file and return its path."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(state, path, metadata)
    return path


def _plain(name: str) -> nn.Module:
    model = MODELS[name].model()
    del model.forward
    return model


def _write(model: Any, folder: Path, shard: str) -> None:
    model.save_pretrained(folder, max_shard_size=shard)


def _doubled(name: str) -> dict[str, Tensor]:
    inputs = MODELS[name].inputs
    return {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
