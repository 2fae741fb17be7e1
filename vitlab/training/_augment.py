"""Draw training images anew: shifts, flips, crops and erased rectangles, each image by itself.

Public: augmentation, prepare.
"""

import numpy as np
import torch
import torch.nn.functional as F

from vitlab import names

# Whole batches are drawn on the device, one draw an image. The draws come from a numpy generator,
# so that every device sees the same ones.


def augmentation(augment, side, window):
    """Return all options of augment, checked, or None without augmentation.

    augment: what `data.Split.batches` accepts
    side, window: of a stored image and of what a batch shows of it, in pixels

    Raises ValueError for an unknown option and for a value out of range.
    """
    if augment in (False, None):
        return None
    chosen = {} if augment is True else augment
    crop = window // 8 if side == window else 0
    options = {"crop": crop, "flip": True, "scale": None, "erase": 0.0}
    names.known(chosen, options, "augmentation")
    options |= chosen
    scale = options["scale"] or [1, 1]
    rules = {
        "crop or scale, not both": not (options["scale"] and chosen.get("crop")),
        f"as crop a border of 0 to {side - 1} pixels": 0 <= options["crop"] < side,
        "as erase a share of the images in [0, 1]": 0 <= options["erase"] <= 1,
        "as scale [low, high] with 0 < low <= high <= 1": (
            np.shape(scale) == (2,) and 0 < scale[0] <= scale[1] <= 1
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"augment takes {rule}; got {chosen}")
    return options


def prepare(raw, split, options, rng):
    """Return images as a model sees them: float32 [B, 3, S, S], in channels_last memory.

    raw: uint8 [B, H, H, 3], as they are stored, on the device
    split: data.Split, which says their window, size S and moments
    options: those of `augmentation`; None shows the centre
    rng: numpy's generator of all draws
    """
    size = split.image_size
    window = split.window
    if options is None:
        options = {"scale": None, "erase": 0}
        edge = (raw.shape[1] - window) // 2
        raw = raw[:, edge : edge + window, edge : edge + window]
    elif not options["scale"]:
        raw = _shifted(raw, window, options, rng)
    x = _normalised(raw, split.mean, split.std)
    if options["scale"]:
        x = _resized_crops(x, size, options, rng)
    elif window != size:
        x = F.interpolate(x, size, mode="bilinear", antialias=window > size)
    if options["erase"]:
        erased = _rectangles(len(x), size, options["erase"], rng)
        x = x.masked_fill(erased.to(x.device), 0)  # 0 is the mean
    return x.contiguous(memory_format=torch.channels_last)


def _shifted(raw, window, options, rng):
    """Return a window at a random offset of each image [B, H, H, 3].

    It reaches up to `crop` pixels over the border, which is reflected.
    """
    count, side = raw.shape[:2]
    border = options["crop"]
    offsets = rng.integers(-border, side - window + border, size=(2, count, 1), endpoint=True)
    mirrored = options["flip"] & (rng.random((count, 1)) < 0.5)
    # Pixels beyond a border are those as far before it.
    places = np.abs(offsets + np.arange(window))
    rows, columns = side - 1 - np.abs(side - 1 - places)
    columns = np.where(mirrored, columns[:, ::-1], columns)
    # One index over all pixels of the batch is quicker than an index for each dimension.
    first_rows = np.arange(count)[:, None] * side
    first_pixels = (first_rows + rows) * side
    pixels = first_pixels[:, :, None] + columns[:, None]
    pixels = torch.from_numpy(pixels.ravel())
    chosen = raw.reshape(-1, 3).index_select(0, pixels.to(raw.device))
    return chosen.view(count, window, window, 3)


def _normalised(raw, mean, std):
    """Return uint8 [B, H, W, 3] as float32 [B, 3, H, W] of zero mean and unit deviation."""
    mean, std = np.array([mean, std])
    scale_and_shift = np.stack([1 / (255 * std), -mean / std])
    # Long rows [B, H, W * 3] are quicker than rows of three.
    tiled = np.tile(scale_and_shift, raw.shape[2])
    tiled = torch.tensor(tiled, dtype=torch.float32)
    scale, shift = tiled.to(raw.device)
    rows = raw.flatten(2).float()
    rows = rows.mul_(scale).add_(shift)
    return rows.view(raw.shape).permute(0, 3, 1, 2)


def _extents(count, areas, ratios, rng):
    """Return width and height [count, 1] of random rectangles in a square of side 1.

    areas, ratios: (lowest, highest); the ratio is uniform in its logarithm
    """
    area = rng.uniform(*areas, (count, 1))
    log_ratio = rng.uniform(*np.log(ratios), (count, 1))
    ratio = np.exp(log_ratio)
    squares = np.stack([area * ratio, area / ratio])
    return np.sqrt(squares).clip(max=1)


def _resized_crops(x, size, options, rng):
    """Return a random part of each image, resized to [B, 3, size, size].

    The option `scale` is the (lowest, highest) share of the area.
    """
    count = len(x)
    width, height = _extents(count, options["scale"], (3 / 4, 4 / 3), rng)
    right = rng.uniform(-1, 1, (count, 1)) * (1 - width)
    down = rng.uniform(-1, 1, (count, 1)) * (1 - height)
    mirrored = options["flip"] & (rng.random((count, 1)) < 0.5)
    width = np.where(mirrored, -width, width)
    # Each output point (u, v, 1) is read at theta @ (u, v, 1), with both sides in [-1, 1].
    nothing = np.zeros_like(width)
    theta = np.hstack([width, nothing, right, nothing, height, down])
    theta = torch.from_numpy(theta)
    theta = theta.float().view(count, 2, 3)
    grid = F.affine_grid(theta.to(x.device), [count, 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _rectangles(count, size, share, rng):
    """Return bool [count, 1, size, size], True in a rectangle of a share of images.

    This is random erasing of Zhong et al. 2020.
    """
    pixels = np.arange(size)
    inside = []
    for extent in _extents(count, (0.02, 0.33), (0.3, 3.3), rng):
        length = extent * size
        first = rng.random((count, 1)) * (size - length)
        after = pixels >= first
        before = pixels < first + length
        inside.append(after & before)
    rows, columns = inside
    mask = rows[:, None, :, None] & columns[:, None, None]
    mask[rng.random(count) >= share] = False
    return torch.from_numpy(mask)
