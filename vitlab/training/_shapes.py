"""Draw the default images of vitlab into an ImageFolder, without a download.

Each of the ten classes is drawn from signed distances, which are negative inside. Its frame is
moved, turned and stretched image by image. The figure fills the unit disc of its frame.

Public: VERSION, make.
"""

from pathlib import Path

import numpy as np
from PIL import Image

VERSION = 1  # of the pictures that `make` draws by default
_CLASSES = (
    "checker",
    "circle",
    "cross",
    "dots",
    "ring",
    "square",
    "star",
    "stripes",
    "target",
    "triangle",
)


def make(folder, *, per_class=(400, 50, 100), image_size=32):
    """Write an ImageFolder of drawn RGB pictures (PNG) and return the folder.

    The pictures are a function of the arguments. There are ten classes, six shapes and four
    textures, at a random place, size, angle and stretch. Each picture has random colours over a
    gradient, among clutter and under noise.

    per_class: images of train, val, test, each at least 1
    image_size: side in pixels, at least 8

    Raises FileExistsError if the folder is there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    parts = zip(("train", "val", "test"), per_class, strict=True)
    for number, (part, count) in enumerate(parts):
        for label, name in enumerate(_CLASSES):
            inside = folder / part / name
            inside.mkdir(parents=True)
            rng = np.random.default_rng([0, number, label])
            images = _draw_figures(name, count, image_size, rng)
            for i, image in enumerate(images):
                path = inside / f"{i:04d}.png"
                Image.fromarray(image).save(path, compress_level=1)
    return folder


def _draw_figures(name, count, size, rng):
    """Return count pictures of one class, uint8 [count, size, size, 3]."""
    blobs_ahead = rng.integers(0, 3, size=count)
    blobs_behind = rng.integers(2, 6, size=count)
    # The ground changes from one colour to a near one.
    u, _, _ = _frame(count, size, rng, radius=(1, 1), spread=0)
    start = rng.uniform(0.1, 0.6, (count, 1, 1, 3))
    change = rng.uniform(-0.2, 0.2, (count, 1, 1, 3))
    canvas = (start + u[..., None] * change).clip(0, 1)
    canvas = _blobs(canvas, blobs_behind, rng)
    # A figure is lighter than its ground: one that may be either takes a tiny transformer hours to
    # see.
    ground = canvas.mean(axis=(1, 2))
    colour = ground + rng.uniform(0.1, 0.6, (count, 3))
    u, v, radius = _frame(count, size, rng, radius=(0.45, 0.75), spread=0.25, turn=0.6)
    frequency = np.pi * rng.uniform(2.0, 2.8, (count, 1, 1))
    distance = _distance(name, u, v, frequency)
    canvas = _paint(canvas, distance * radius, colour)
    canvas = _blobs(canvas, blobs_ahead, rng)
    noise = rng.uniform(0.02, 0.12, (count, 1, 1, 1))
    canvas = canvas + noise * rng.standard_normal(canvas.shape)
    return (255 * canvas.clip(0, 1)).round().astype(np.uint8)


def _distance(name, u, v, frequency):
    """Return the signed distance of a class' figure in its frame, float [N, S, S].

    u, v: [N, S, S], coordinates in the frame
    frequency: [N, 1, 1], angular frequency of the textures
    """
    radius = np.hypot(u, v)
    right, up = np.abs([u, v])
    match name:
        case "circle":
            return radius - 0.85
        case "ring":
            return np.abs(radius - 0.7) - 0.22
        case "star":
            return radius - 0.68 - 0.3 * np.cos(5 * np.arctan2(v, u))
        case "square":
            return np.maximum(right, up) - 0.75
        case "cross":
            upright = np.maximum(right - 0.27, up - 0.95)
            across = np.maximum(up - 0.27, right - 0.95)
            return np.minimum(upright, across)
        case "triangle":
            side = 0.5 * v + 0.866 * right  # the left one mirrors it
            return np.maximum(side, -v) - 0.48
        # Textures fill the disc.
        case "checker":
            texture = np.sin(frequency * u) * np.sin(frequency * v)
        case "dots":
            texture = 0.5 - np.cos(frequency * u) - np.cos(frequency * v)
        case "stripes":
            texture = np.sin(frequency * u)
        case "target":
            texture = np.cos(frequency * radius)
    return np.maximum(radius - 1, texture / frequency)


def _blobs(canvas, counts, rng):
    """Paint small ellipses or streaks of any colour, as many on an image as counts [N] says."""
    count, size = canvas.shape[:2]
    for i in range(counts.max()):
        u, v, radius = _frame(count, size, rng, radius=(0.08, 0.22), spread=1)
        u = u / rng.uniform(0.5, 3, (count, 1, 1))
        distance = (np.hypot(u, v) - 0.6) * radius
        distance[counts <= i] = np.inf
        colour = rng.uniform(0, 1, (count, 3))
        canvas = _paint(canvas, distance, colour)
    return canvas


def _frame(count, size, rng, *, radius, spread, turn=np.pi):
    """Return u, v [count, size, size] of a random frame, and its radius [count, 1, 1] in pixels.

    radius: (low, high), in half sides
    spread: how far the centre may lie from the middle, in half sides
    turn: largest angle, in radians
    """

    def draw(low, high):
        return rng.uniform(low, high, (count, 1, 1))

    axis = (np.arange(size) + 0.5) * 2 / size - 1
    x = axis - draw(-spread, spread)
    y = axis[:, None] - draw(-spread, spread)
    angle = draw(-turn, turn)
    radius = draw(*radius)
    stretch = draw(0.85, 1.18)
    cos = np.cos(angle)
    sin = np.sin(angle)
    u = (cos * x + sin * y) / (radius * stretch)
    v = (cos * y - sin * x) * stretch / radius
    return u, v, radius * size / 2


def _paint(canvas, distance, colour):
    """Return canvas with colour where distance (pixels, [N, S, S]) is negative.

    The edge is one pixel wide.
    """
    opacity = (0.5 - distance).clip(0, 1)[..., None]
    change = colour[:, None, None] - canvas
    return canvas + opacity * change
