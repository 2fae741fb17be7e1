"""Shapes: the embedded default images, drawn by vitlab itself into an ImageFolder, without a download.

Ten classes are drawn from signed distances (negative inside) in a frame that is moved, turned and stretched
image by image. u, v: [N, S, S] in that frame, the figure fills the unit disc; w: [N, 1, 1], angular frequency
of the textures.
"""

import os
import shutil
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = 1  # of the pictures that `make` draws by default


def _triangle(u, v):
    return np.maximum(np.maximum(0.866 * u + 0.5 * v, 0.5 * v - 0.866 * u), -v) - 0.48


def _cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.27, v - 0.95), np.maximum(v - 0.27, u - 0.95))


FIGURES = {
    "checker": lambda u, v, w: np.maximum(np.hypot(u, v) - 1, np.sin(w * u) * np.sin(w * v) / w),
    "circle": lambda u, v, w: np.hypot(u, v) - 0.85,
    "cross": lambda u, v, w: _cross(u, v),
    "dots": lambda u, v, w: np.maximum(np.hypot(u, v) - 1, (0.5 - np.cos(w * u) - np.cos(w * v)) / w),
    "ring": lambda u, v, w: np.abs(np.hypot(u, v) - 0.7) - 0.22,
    "square": lambda u, v, w: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "star": lambda u, v, w: np.hypot(u, v) - 0.68 - 0.3 * np.cos(5 * np.arctan2(v, u)),
    "stripes": lambda u, v, w: np.maximum(np.hypot(u, v) - 1, np.sin(w * u) / w),
    "target": lambda u, v, w: np.maximum(np.hypot(u, v) - 1, np.cos(w * np.hypot(u, v)) / w),
    "triangle": lambda u, v, w: _triangle(u, v),
}


def make(
    folder: str | Path,
    *,
    per_class: tuple[int, int, int] = (400, 50, 100),
    image_size: int = 32,
    seed: int = 0,
) -> Path:
    """Write an ImageFolder of drawn RGB pictures (PNG), a function of the arguments; returns folder.

    Ten classes, six shapes and four textures, at a random place, size, angle and stretch, in random
    colours over a gradient, among clutter and under noise. per_class: images of train, val, test.
    Raises FileExistsError if folder is there: it is written under another name and renamed when whole.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: delete it or choose another folder")
    if len(per_class) != 3 or min(per_class) < 1 or image_size < 8:
        raise ValueError(
            f"per_class is three counts of at least 1 and image_size at least 8 pixels; "
            f"got {per_class} and {image_size}"
        )
    work = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    try:
        for number, (part, count) in enumerate(zip(("train", "val", "test"), per_class, strict=True)):
            for label, name in enumerate(FIGURES):
                images = _draw_figures(name, count, image_size, np.random.default_rng([seed, number, label]))
                (work / part / name).mkdir(parents=True)
                for i, image in enumerate(images):
                    Image.fromarray(image).save(work / part / name / f"{i:04d}.png", compress_level=1)
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _draw_figures(name: str, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [count, size, size, 3]: count pictures of one class."""
    ahead, behind = rng.integers(0, 3, size=count), rng.integers(2, 6, size=count)
    canvas = _gradient(count, size, rng)
    for i in range(behind.max()):
        canvas = _blob(canvas, i < behind, rng)
    # lighter than the ground: a figure that may be either takes a tiny transformer hours to see
    colour = canvas.mean(axis=(1, 2)) + rng.uniform(0.1, 0.6, (count, 3))
    u, v, radius = _frame(count, size, rng, radius=(0.45, 0.75), spread=0.25, turn=0.6)
    w = np.pi * rng.uniform(2.0, 2.8, (count, 1, 1))
    canvas = _paint(canvas, FIGURES[name](u, v, w) * radius, colour)
    for i in range(ahead.max()):
        canvas = _blob(canvas, i < ahead, rng)
    noise = rng.uniform(0.02, 0.12, (count, 1, 1, 1))
    canvas = canvas + noise * rng.standard_normal(canvas.shape)
    return (255 * canvas.clip(0, 1)).round().astype(np.uint8)


def _gradient(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """float [count, size, size, 3] in [0, 1]: from one colour to a near one, in any direction."""
    u, _, _ = _frame(count, size, rng, radius=(1, 1), spread=0)
    start = rng.uniform(0.1, 0.6, (count, 1, 1, 3))
    return (start + u[..., None] * rng.uniform(-0.2, 0.2, (count, 1, 1, 3))).clip(0, 1)


def _blob(canvas: np.ndarray, there: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small ellipse or streak of any colour onto those images where there is True."""
    count, size = canvas.shape[:2]
    u, v, radius = _frame(count, size, rng, radius=(0.08, 0.22), spread=1)
    distance = (np.hypot(u / rng.uniform(0.5, 3, (count, 1, 1)), v) - 0.6) * radius
    distance[~there] = np.inf
    return _paint(canvas, distance, rng.uniform(0, 1, (count, 3)))


def _frame(count: int, size: int, rng: np.random.Generator, *, radius, spread, turn=np.pi):
    """u, v [count, size, size] of a random frame, and its radius [count, 1, 1] in pixels.

    radius: (low, high) and spread, how far the centre may lie from the middle: in half sides. turn: radians.
    """
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    centre = rng.uniform(-spread, spread, (2, count, 1, 1))
    angle, radius, stretch = (
        rng.uniform(low, high, (count, 1, 1)) for low, high in ((-turn, turn), radius, (0.85, 1.18))
    )
    x, y = axis - centre[0], axis[:, None] - centre[1]
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return u / (radius * stretch), v * stretch / radius, radius * size / 2


def _paint(canvas: np.ndarray, distance: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Colour where distance (pixels, [N, S, S]) is negative, with an edge of one pixel."""
    opacity = (0.5 - distance).clip(0, 1)[..., None]
    return canvas + opacity * (colour[:, None, None] - canvas)
