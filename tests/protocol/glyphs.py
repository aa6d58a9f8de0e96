"""Glyphs: the 26 letters in the 16 text fonts that matplotlib ships, 20x20, turned, sheared, scaled, shifted, noisy.

A set on which a representation must be learned: ridge regression on raw pixels reads one letter in six, a small
convolutional network trained on all of it four in five. Drawn in seconds, without a download.
"""

import math
import string
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tests.protocol.task import Task

SIDE = 20
LETTERS = string.ascii_uppercase
_CANVAS = 48
_CENTRE = np.array([_CANVAS / 2, _CANVAS / 2])
_NOISE = 0.15  # standard deviation; ink is 1


def glyphs(cache_folder: Path, train: int = 5000, test: int = 2000) -> Task:
    """The task, drawn once and kept in `cache_folder`; groups are fonts."""
    images, labels, font = _kept(cache_folder, train, seed=1)
    test_images, test_labels, _ = _kept(cache_folder, test, seed=2)
    return Task((images, labels), (test_images, test_labels), len(LETTERS), groups=font)


def _kept(folder: Path, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    file = folder / f"glyphs-{count}-{seed}.pt"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Under a name of its own first: several processes may draw at once.
        part = file.with_suffix(f".{np.random.default_rng().integers(2**32)}")
        torch.save(draw(count, seed), part)
        part.replace(file)
    images, labels, font = torch.load(file)
    return images, labels, font


def draw(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images `[count, 1, 20, 20]`, which letter each shows, and in which font."""
    rng = np.random.default_rng(seed)
    labels, font = rng.integers(len(LETTERS), size=count), rng.integers(len(fonts()), size=count)
    images = np.stack([_image(rng, *pair) for pair in zip(labels, font, strict=True)])
    return torch.tensor(images)[:, None], torch.tensor(labels), torch.tensor(font)


@cache
def fonts() -> tuple[Path, ...]:
    """Files of the fonts that have letters; matplotlib's others are symbols and display sizes."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    found = [*folder.glob("DejaVu*.ttf"), *folder.glob("STIXGeneral*.ttf")]
    return tuple(sorted(file for file in found if "Display" not in file.name))


@cache
def _font(index: int, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(fonts()[index]), points)


def _image(rng: np.random.Generator, letter: int, font: int) -> np.ndarray:
    canvas = _letter(LETTERS[letter], _font(int(font), int(rng.integers(22, 34))))
    bent = canvas.transform(canvas.size, Image.Transform.AFFINE, _distortion(rng), Image.Resampling.BILINEAR)
    small = np.asarray(bent.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / 255
    return small + rng.normal(0, _NOISE, small.shape).astype(np.float32)


def _letter(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    pen = ImageDraw.Draw(canvas)
    left, top, right, bottom = pen.textbbox((0, 0), letter, font=font)
    x, y = _CENTRE - np.array([left + right, top + bottom]) / 2
    pen.text((x, y), letter, fill=255, font=font)
    return canvas


def _distortion(rng: np.random.Generator) -> tuple[float, ...]:
    """Where each pixel of the new image comes from, as the six numbers of an affine map."""
    angle, shear, scale = rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.3), rng.uniform(0.8, 1.3)
    turn = np.array([[math.cos(angle), -math.sin(angle) + shear], [math.sin(angle), math.cos(angle)]])
    linear = scale * turn
    shift = _CENTRE - linear @ (_CENTRE + rng.uniform(-4, 4, 2))
    return tuple(np.column_stack([linear, shift]).ravel().tolist())
