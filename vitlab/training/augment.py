"""Draw training images anew: shifts, flips, crops and erased rectangles, each image by itself.

Public: augmentation, normalised, rectangles, resized_crops, shifted.
"""

import numpy as np
import torch
import torch.nn.functional as F

from vitlab import names

# Augmentation: whole batches on the device, one draw an image. The draws come from a numpy
# generator, so that every device sees the same ones.


def augmentation(augment, side, window):
    """Return all options of augment, checked, or None without augmentation.

    side, window: of a stored image and of what a batch shows of it, in pixels
    """
    if augment is False or augment is None:
        return None
    chosen = {} if augment is True else augment
    crop = window // 8 if side == window else 0
    options = {"crop": crop, "flip": True, "scale": None, "erase": 0.0}
    for key in chosen.keys() - options.keys():
        raise ValueError(names.unknown("augmentation", key, options))
    options |= chosen
    if options["scale"] and chosen.get("crop"):
        raise ValueError("augment takes crop or scale, not both")
    if not 0 <= options["crop"] < side:
        raise ValueError(
            f"augment's crop is a border of 0 to {side - 1} pixels, got {options['crop']}"
        )
    if not 0 <= options["erase"] <= 1:
        raise ValueError(
            f"augment's erase is a share of the images in [0, 1], got {options['erase']}"
        )
    scale = options["scale"] or [1, 1]
    if np.shape(scale) != (2,) or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"augment's scale is [low, high] with 0 < low <= high <= 1, got {scale}")
    return options


def shifted(raw, window, pad, flip, rng):
    """Return a window at a random offset of each image [B, H, H, 3].

    It reaches up to pad pixels over the border, which is reflected.
    """
    count, side = raw.shape[:2]
    offsets = rng.integers(-pad, side - window + pad, size=(2, count, 1), endpoint=True)
    mirrored = flip & (rng.random((count, 1)) < 0.5)
    # Pixels beyond a border are those as far before it.
    places = np.abs(offsets + np.arange(window))
    rows, columns = side - 1 - np.abs(side - 1 - places)
    columns = np.where(mirrored, columns[:, ::-1], columns)
    # One index over all pixels of the batch is quicker than an index for each dimension.
    first_pixels = np.arange(count)[:, None] * side
    pixels = ((first_pixels + rows) * side)[:, :, None] + columns[:, None, :]
    pixels = torch.from_numpy(pixels.ravel()).to(raw.device)
    return raw.reshape(-1, 3).index_select(0, pixels).view(count, window, window, 3)


def normalised(raw, mean, std):
    """Return uint8 [B, H, W, 3] as float32 [B, 3, H, W] of zero mean and unit deviation.

    The result lies in channels_last memory.
    """
    scale_and_shift = np.stack([1 / (255 * np.array(std)), -np.array(mean) / np.array(std)])
    tiled = torch.tensor(np.tile(scale_and_shift, raw.shape[2]), dtype=torch.float32)
    scale, shift = tiled.to(raw.device)
    rows = raw.flatten(2).float()  # [B, H, W * 3], as long rows are quicker than rows of three
    rows = rows.mul_(scale).add_(shift)
    return rows.view(raw.shape).permute(0, 3, 1, 2)


def _extents(count, areas, ratios, rng):
    """Return width and height [count] of random rectangles in a square of side 1.

    areas, ratios: (lowest, highest); the ratio is uniform in its logarithm
    """
    area = rng.uniform(*areas, count)
    ratio = np.exp(rng.uniform(*np.log(ratios), count))
    return np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)


def resized_crops(x, size, scale, flip, rng):
    """Return a random part of each image, resized to [B, 3, size, size].

    scale: (lowest, highest) share of the area
    """
    count = len(x)
    width, height = _extents(count, scale, (3 / 4, 4 / 3), rng)
    theta = np.zeros((count, 2, 3), dtype=np.float32)
    theta[:, 0, 2] = rng.uniform(-1, 1, count) * (1 - width)
    theta[:, 1, 2] = rng.uniform(-1, 1, count) * (1 - height)
    theta[:, 0, 0] = np.where(flip & (rng.random(count) < 0.5), -1, 1) * width
    theta[:, 1, 1] = height
    theta = torch.from_numpy(theta).to(x.device)
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def rectangles(x, share, rng):
    """Return bool [B, 1, S, S], True in a rectangle of a share of images (Zhong et al. 2020)."""
    count, size = len(x), x.shape[-1]
    inside = []
    for extent in _extents(count, (0.02, 0.33), (0.3, 3.3), rng):
        length = extent * size
        first = rng.random(count) * (size - length)
        pixels = np.arange(size)
        inside.append((pixels >= first[:, None]) & (pixels < (first + length)[:, None]))
    rows, columns = inside
    erased = rng.random(count) < share
    mask = rows[:, :, None] & columns[:, None, :] & erased[:, None, None]
    return torch.from_numpy(mask[:, None]).to(x.device)
