"""Load named datasets and ImageFolders as train / val / test, and augment them in batches.

Every image is decoded once into a memory-mapped uint8 array under `<data root>/cache`, which is
keyed by content. A batch is cut from it and sent to the device as uint8. Only there it is cropped,
flipped, normalised and enlarged. Each image of a batch has its own draw.

Public: Split, Dataset, load, SPLITS, NAMES, WHOLE, NATIVE_SIDE, MARGIN.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import tarfile
import tempfile
import time
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets
from torchvision.transforms import v2
from tqdm.auto import tqdm

from vitlab import parallel, record, shapes

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Some images of a cache with their labels.

    store: uint8 [all, H, H, 3] memory map that the splits share
    indices: int64 array [N], rows of store
    labels: int64 tensor [N]
    image_size: side S of a batch, in pixels
    window: side in stored pixels of what a batch shows; it is enlarged to S where it is smaller
    mean, std: of the three channels, in [0, 1]
    """

    store: np.ndarray
    indices: np.ndarray
    labels: torch.Tensor
    image_size: int
    window: int
    mean: tuple
    std: tuple

    def __len__(self):
        return len(self.indices)

    @property
    def identity(self):
        """Return a hash of what the batches depend on.

        These are the images (by the content key of their cache), the labels, the sizes and the
        moments.
        """
        digest = hashlib.sha256(self.indices.tobytes() + self.labels.numpy().tobytes())
        cache = Path(getattr(self.store, "filename", "")).parent.name
        digest.update(repr((cache, self.image_size, self.window, self.mean, self.std)).encode())
        return digest.hexdigest()

    @property
    def images(self):
        """Return uint8 [N, H, H, 3], a new array; row i belongs to labels[i]."""
        return self.store[self.indices]

    def subset(self, n, *, seed=0):
        """Return a Split of n images with the classes in the proportions of this one.

        n: 1 .. len(self); the images of a larger n contain those of a smaller one

        Raises ValueError unless n lies in 1 .. len(self).
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"a subset has 1 to {len(self)} images here, got n={n}")
        rng = np.random.default_rng(seed)
        place = np.empty(len(self))  # how far down its shuffled class an image stands, in (0, 1)
        for label in self.labels.unique():
            members = rng.permutation(np.flatnonzero(self.labels == label))
            place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        first = np.argsort(place, kind="stable")[:n]
        return self.take(np.sort(first))

    def take(self, places):
        """Return a Split of the images at these places of this one, int64 [n], in that order."""
        labels = self.labels[torch.from_numpy(places)]
        return replace(self, indices=self.indices[places], labels=labels)

    def batches(
        self,
        batch_size,
        *,
        device="cpu",
        augment=False,
        shuffle=False,
        seed=0,
        epoch=0,
        drop_last=False,
        start=0,
    ):
        """Yield the batches (x, y) of one epoch.

        They are a function of (seed, epoch) alone, the same on every device. torch's and numpy's
        own random states are neither read nor moved.

        device: where the batches are made
        augment: False; True for crop and flip; or a dict with any of
          crop   int, pixels of reflected border (of stored pixels) that a random crop may reach
                 into; by default an eighth of the side, or 0 where images are stored larger than
                 the crop
          flip   bool, mirror half of the images; True by default
          scale  [low, high], instead of crop: a random-resized crop of this share of the area, with
                 an aspect ratio of 3/4 to 4/3
          erase  share of the images, in [0, 1], that lose a rectangle of 2 to 33 % of their area
        shuffle: whether the images come in a random order
        drop_last: whether a last batch of fewer images is left out
        start: number of the first batch, as if those before had been drawn

        Yields x, float32 [B, 3, S, S], normalised, in channels_last memory, and y, int64 [B].
        Raises ValueError for another key of augment and for a value out of range.
        """
        if batch_size < 1 or start < 0:
            raise ValueError(
                f"batch_size is at least 1 and start at least 0, got {batch_size} and {start}"
            )
        options = _augmentation(augment, self.store.shape[1], self.window)
        order = np.arange(len(self))
        if shuffle:
            order = np.random.default_rng([seed, epoch, 0]).permutation(order)
        stop = len(self) / batch_size
        stop = math.floor(stop) if drop_last else math.ceil(stop)
        chosen = {i: order[i * batch_size : (i + 1) * batch_size] for i in range(start, stop)}
        return self._draw(chosen, torch.device(device), options, (seed, epoch))

    def _draw(self, places_of_batches, device, options, seeds):
        for number, places in places_of_batches.items():
            raw = torch.from_numpy(self.store[self.indices[places]])
            if device.type == "cuda":
                raw = raw.pin_memory()
            raw = raw.to(device, non_blocking=True)
            rng = np.random.default_rng([*seeds, 1 + number])  # 0 draws the order
            labels = self.labels[torch.from_numpy(places)]
            yield self._prepare(raw, options, rng), labels.to(device)

    def _prepare(self, raw, options, rng):
        """Return raw, uint8 [B, H, H, 3], as float32 [B, 3, S, S] on its device.

        options: of `_augmentation`; None shows the centre
        """
        if options is None:
            edge = (raw.shape[1] - self.window) // 2
            options = {"scale": None, "erase": 0}
            raw = raw[:, edge : edge + self.window, edge : edge + self.window]
        elif options["scale"] is None:
            raw = _shifted(raw, self.window, options["crop"], options["flip"], rng)
        x = _normalised(raw, self.mean, self.std)
        if options["scale"]:
            x = _resized_crops(x, self.image_size, options["scale"], options["flip"], rng)
        elif x.shape[-1] != self.image_size:
            shrinks = x.shape[-1] > self.image_size
            x = F.interpolate(x, self.image_size, mode="bilinear", antialias=shrinks)
        if options["erase"]:
            x = x.masked_fill(_rectangles(x, options["erase"], rng), 0)  # 0 is the mean
        return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Dataset:
    """Train, val and test of one set of images.

    classes: names, in the order of the labels
    image_size: side of a batch, in pixels
    description: what results call the images, such as "CIFAR-10 (JPEG)"
    skipped: the unreadable files that were left out
    """

    name: str
    classes: list
    train: Split
    val: Split
    test: Split
    image_size: int
    description: str
    skipped: list = field(default_factory=list)

    def summary(self):
        """Return a row for each split: images, classes, images of smallest and largest class."""
        counts = {}
        for name in SPLITS:
            labels = getattr(self, name).labels
            counts[name] = torch.bincount(labels, minlength=len(self.classes)).numpy()
        counts = pd.DataFrame(counts)
        columns = {
            "images": counts.sum(),
            "classes": (counts > 0).sum(),
            "smallest_class": counts.min(),
            "largest_class": counts.max(),
        }
        return pd.DataFrame(columns).rename_axis("split")


# Augmentation: whole batches on the device, one draw an image. The draws come from a numpy
# generator, so that every device sees the same ones.


def _augmentation(augment, side, window):
    """Return all options of augment, checked, or None without augmentation.

    side, window: of a stored image and of what a batch shows of it, in pixels
    """
    if augment is False or augment is None:
        return None
    chosen = {} if augment is True else augment
    crop = window // 8 if side == window else 0
    options = {"crop": crop, "flip": True, "scale": None, "erase": 0.0}
    for key in chosen.keys() - options.keys():
        raise ValueError(record.unknown("augmentation", key, options))
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


def _shifted(raw, window, pad, flip, rng):
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


def _normalised(raw, mean, std):
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


def _resized_crops(x, size, scale, flip, rng):
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


def _rectangles(x, share, rng):
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


# Loading


def load(
    name,
    *,
    root=None,
    image_size,
    split_seed=0,
    normalise="train",
    images=None,
    skip_broken=False,
    download=True,
    progress=True,
):
    """Return a Dataset of train / val / test, from its cache or decoded into it.

    Splits are stratified and depend on split_seed alone, never on a run's seed. A split that is not
    there is taken from train (val 10 %, test 20 %). One tree and Caltech-101 become 70 / 10 / 20.
    CIFAR-10 keeps its test set.

    name: "cifar10", "caltech101", "shapes" (drawn at first use), or the path of an ImageFolder:
        `train/` with or without `val/` and `test/`, or one tree of class folders
    root: folder of the images and of the cache; None for the data root, `record.root()`
    image_size: side of a batch in pixels, >= 1
    normalise: "train" for mean and deviation of the train split, "imagenet" for those that
        pretrained weights expect, or (mean, std) of three numbers each
    images: at most so many of each split, stratified, for a trial run; None for all
    skip_broken: leave out files that cannot be decoded and list them in `skipped`
    download: whether CIFAR-10 and Caltech-101 may be downloaded
    progress: whether progress bars are shown

    Raises ValueError for an unknown name, an empty class folder or a file that is no whole image,
    RuntimeError where the images are missing and cannot be downloaded, PermissionError where the
    cache cannot be written.
    """
    if image_size < 1:
        raise ValueError(f"image_size is a side in pixels, at least 1; got {image_size}")
    home = Path(root).expanduser().absolute() if root else record.root()
    source = _find(str(name), home, download)
    store, skipped, cache = _cached(source, home / "cache", image_size, progress)
    if skipped and not skip_broken:
        path, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{len(skipped)} unreadable image file(s), the first is {source.folder / path} "
            f"({reason}): replace or delete it, or go on without by skip_broken=True "
            "(in a study: --set data.skip_broken=true)"
        )
    usable = ~np.isin(source.names, list(skipped))
    parts = _split(source, usable, split_seed)
    memory = cache / f"moments-{split_seed}.json"
    mean, std = _moments(store, parts["train"], normalise, memory)
    window = store.shape[1] if source.side else image_size
    splits = {}
    for part, rows in parts.items():
        labels = torch.from_numpy(source.labels[rows])
        splits[part] = Split(store, rows, labels, image_size, window, mean, std)
        if images is not None:
            splits[part] = splits[part].subset(min(images, len(rows)))
    options = {"description": source.description, "skipped": sorted(skipped)}
    return Dataset(source.name, source.classes, **splits, image_size=image_size, **options)


NAMES = ("caltech101", "cifar10", "shapes")
WHOLE = {"cifar10": 60_000, "caltech101": 8_677}  # images, whatever the layout
NATIVE_SIDE = 96  # equal squares up to this many pixels are stored as they are, all else as squares
MARGIN = 1.15  # those squares are this much larger than the crop


@dataclass
class _Found:
    """What lies on disk, before anything is decoded.

    names: paths of the images in folder; "" for each in the binary layout of CIFAR-10
    splits: array of "train", "val", "test" or "" for each image; "" is not split yet
    pixels: uint8 [N, H, H, 3] of the binary layout, which is no tree of files
    side: of equal small squares, which are stored as they are
    """

    name: str
    description: str
    folder: Path
    classes: list
    names: list
    labels: np.ndarray
    splits: np.ndarray
    pixels: np.ndarray | None = None
    side: int | None = None


def _find(name, home, download):
    """Return the _Found of a named dataset or of the folder that name is the path of."""
    finders = {"caltech101": _find_caltech101, "cifar10": _find_cifar10, "shapes": _find_shapes}
    if name in finders:
        return finders[name](home, download)
    folder = Path(name).expanduser().absolute()
    if folder.is_dir():
        return _find_tree(folder, name=folder.name, description=f"ImageFolder {folder.name}")
    raise ValueError(
        f"{record.unknown('dataset', name, NAMES)} A set of your own has its path as its name: a "
        "folder with train/, val/ and test/ that hold a folder a class, or one tree of them."
    )


def _find_caltech101(home, download):
    folder = home / "caltech101" / "101_ObjectCategories"
    if not folder.is_dir():
        _fetch(
            datasets.Caltech101, home, download, f"the class folders of Caltech-101 into {folder}"
        )
    names = {"name": "caltech101", "description": "Caltech-101"}
    return _whole(_find_tree(folder, **names, leave=("BACKGROUND_Google",)))


def _find_shapes(home, download):
    folder = home / f"shapes-{shapes.VERSION}"
    if not folder.is_dir():
        record.make_folder(home)
        try:
            shapes.make(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same pictures
                raise
    return _find_tree(folder, name="shapes", description="shapes")


def _find_cifar10(home, download):
    """Return CIFAR-10 from its binary layout or, else, from a tree of files in home/cifar10."""
    tree, layout = home / "cifar10", "cifar-10-batches-py"
    holders = [folder for folder in (home, tree) if (folder / layout).is_dir()]
    if not holders and (tree / "train").is_dir():
        source = _whole(_find_tree(tree, name="cifar10", description="CIFAR-10"))
        if source.names[0].lower().endswith((".jpg", ".jpeg")):
            source.description = "CIFAR-10 (JPEG)"  # lossy: accuracies are a little below
        return source
    if not holders:
        remedy = (
            f"the folder {layout} into {home}, "
            f"or train/ and test/ with a folder a class into {tree}"
        )
        _fetch(datasets.CIFAR10, home, download, remedy)
    holder = holders[0] if holders else home
    try:
        train, test = (datasets.CIFAR10(holder, train=train) for train in (True, False))
    except RuntimeError as error:  # its files are not those that were published
        raise RuntimeError(
            f"{holder / layout} is not whole ({error}): "
            "delete it, and it is downloaded or unpacked anew"
        ) from error
    pixels = np.concatenate([train.data, test.data])
    return _Found(
        name="cifar10",
        description="CIFAR-10",
        folder=holder / layout,
        classes=train.classes,
        names=[""] * len(pixels),
        labels=np.array(train.targets + test.targets, dtype=np.int64),
        splits=np.repeat(["train", "test"], [len(train.data), len(test.data)]),
        pixels=pixels,
    )


def _whole(source):
    """Return source if no image is missing.

    Raises ValueError for a set that was downloaded or unpacked half: it has a name that results are
    compared by.
    """
    if len(source.names) != WHOLE[source.name]:
        raise ValueError(
            f"{source.folder} holds {len(source.names)} of the {WHOLE[source.name]} images of "
            f"{source.description}, as after half a download: "
            "unpack the whole archive there again. A set of your own has its path as its name"
        )
    return source


def _fetch(kind, home, download, remedy):
    """Download a dataset of torchvision into home.

    Raises RuntimeError with the remedy, what to put where, if that fails or is not allowed.
    """
    reason = "download=False"
    if download and not hasattr(tarfile, "data_filter"):
        # torchvision would unpack without it, wherever names lead.
        reason = "this Python cannot keep an archive within its folder, 3.11.4 and newer can"
    elif download:
        try:
            kind(home, download=True)
            return
        except (OSError, RuntimeError) as error:
            reason = f"the download failed: {error}"
    raise RuntimeError(
        f"no images of {kind.__name__} under {home} ({reason}). Put {remedy}; "
        f"or set VITLAB_DATA to the folder that holds them"
    )


def _find_tree(folder, *, name, description, leave=()):
    """Return the files of an ImageFolder.

    It has train/ with or without val/ and test/, or it is one tree of class folders.

    leave: class folders that are left out
    """
    tops = _folders(folder)
    parts = [split for split in SPLITS if split in tops] if "train" in tops else [""]
    if "train" in tops and len(tops) > len(parts):
        others = sorted(set(tops) - set(parts))
        raise ValueError(f"{folder}: beside train/ only val/ and test/ are read; found {others}")
    classes = [name for name in _folders(folder / parts[0]) if name not in leave]
    if len(classes) < 2:
        raise ValueError(
            f"{folder / parts[0]}: at least two class folders are needed, found {classes}"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    names, labels, splits = [], [], []
    for part in parts:
        inside = folder / part
        if strange := set(_folders(inside)).difference(leave) ^ set(classes):
            raise ValueError(f"{inside}: class folders differ from train/ in {sorted(strange)}")
        endings = datasets.folder.IMG_EXTENSIONS
        files = datasets.folder.make_dataset(inside, label_of, endings, allow_empty=True)
        for empty in set(label_of.values()).difference(label for _, label in files):
            raise ValueError(f"empty class folder: {inside / classes[empty]} has no image files")
        names += [Path(path).relative_to(folder).as_posix() for path, _ in files]
        labels += [label for _, label in files]
        splits += [part] * len(files)
    arrays = np.array(labels, dtype=np.int64), np.array(splits)
    return _Found(name, description, folder, classes, names, *arrays)


def _folders(folder):
    """Return the names of the folders in folder, sorted, without hidden ones."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in names if not name.startswith("."))


def _split(source, usable, seed):
    """Return {"train", "val", "test": sorted rows}.

    Splits that do not lie on disk are drawn class by class.

    usable: bool [N], False for images that are left out
    """
    splits = source.splits.astype("U8")
    splits[~usable] = "left out"
    shares = {"val": 0.1, "test": 0.2}
    shares = {split: share for split, share in shares.items() if split not in source.splits}
    undivided = "train" if "train" in source.splits else ""
    for label, name in enumerate(source.classes):
        rows = np.flatnonzero((splits == undivided) & (source.labels == label))
        count = len(rows)
        if count <= len(shares):
            raise ValueError(
                f"class {name!r} has {count} image(s) to make {1 + len(shares)} splits of"
            )
        rows = np.random.default_rng([seed, label]).permutation(rows)
        splits[rows] = "train"
        for split, share in shares.items():
            size = max(1, round(share * count))
            splits[rows[:size]] = split
            rows = rows[size:]
    return {split: np.flatnonzero(splits == split) for split in SPLITS}


def _moments(store, rows, normalise, memory):
    """Return mean and standard deviation of the three channels, in [0, 1].

    memory: file that keeps those of train
    """
    if normalise == "imagenet":
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if normalise == "train":
        normalise = _read_json(memory)
        if not normalise:
            normalise = _measured(store, rows)
            _write_json(memory, normalise)
    elif isinstance(normalise, str) or np.shape(normalise) != (2, 3):
        raise ValueError(
            f"normalise is 'train', 'imagenet' or (mean, std) of three; got {normalise!r}"
        )
    return tuple(map(tuple, normalise))


def _measured(store, rows):
    """Return [mean, standard deviation] of the channels of these rows of store."""
    counts = np.zeros((3, 256))  # of each channel's values
    for piece in np.array_split(rows, -(-len(rows) // 512)):
        pixels = store[piece].reshape(-1, 3)
        counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
    weights = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = weights @ values
    variance = weights @ values**2 - mean**2
    std = np.sqrt(variance).clip(min=1 / 255)  # a constant channel stays finite
    return [mean.tolist(), std.tolist()]


# The cache: <root>/cache/<name>-<key>-<side>/{images.npy, index.json}; key is a hash of relative
# paths and bytes, remembered in keys.json for files whose names, sizes and times have not changed.


def _cached(source, folder, image_size, progress):
    """Return a memory map uint8 [N, H, H, 3], {unreadable file: reason} and the cache folder.

    The images are decoded into it if need be.
    """
    record.make_folder(folder)
    key, source.side = _identify(source, folder / "keys.json", progress)
    side = source.side or round(image_size * MARGIN)
    target = folder / f"{source.name}-{key[:12]}-{side}"
    shape = (len(source.labels), side, side, 3)
    opened = _open(target, shape)
    if opened is None:
        with open(folder / "building.lock", "w") as lock, parallel.in_turn(lock):
            if _open(target, shape) is None:  # else another process has built it meanwhile
                _build(source, target, shape, progress)
        opened = _open(target, shape)
    if opened is None:
        raise RuntimeError(f"the cache {target} cannot be read back: is the disk full?")
    return *opened, target


def _open(target, shape):
    """Return store and {unreadable file: reason}, None for a missing or damaged cache."""
    try:
        store = np.load(target / "images.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    skipped = _read_json(target / "index.json").get("skipped")
    if skipped is None or store.shape != shape or store.dtype != np.uint8:
        return None
    return store, skipped


def _identify(source, memory, progress):
    """Return a hash of what the files hold, and their side if all are equal small squares.

    memory: file that remembers both
    """
    if source.pixels is not None:
        digest = hashlib.sha256(np.ascontiguousarray(source.pixels))
        return digest.hexdigest(), source.pixels.shape[1]
    paths = [source.folder / name for name in source.names]
    stats = [(str(path), path.stat()) for path in paths]
    stats = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    fingerprint = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    known = _read_json(memory)
    if fingerprint not in known:
        content, sizes = hashlib.sha256(), set()
        for name, path in zip(
            source.names, _bar(paths, f"reading {source.name}", progress), strict=True
        ):
            blob = path.read_bytes()
            content.update(f"{name}\0{len(blob)}\0".encode() + blob)
            with contextlib.suppress(
                Exception
            ):  # no image, or one beyond all bounds: decoding names it
                sizes.add(Image.open(io.BytesIO(blob)).size)
        width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
        side = width if width == height <= NATIVE_SIDE else None
        known[fingerprint] = [content.hexdigest(), side]
        _write_json(memory, known)
    return known[fingerprint]


def _build(source, target, shape, progress):
    """Decode into a temporary folder beside target, then rename: target is whole or not there."""
    for stale in target.parent.glob("building-*"):  # left by a killed process
        if time.time() - stale.stat().st_mtime > 86400:
            shutil.rmtree(stale, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as folder:
            work = Path(folder, "cache")  # which all may read, unlike the folder around it
            work.mkdir()
            store = np.lib.format.open_memmap(work / "images.npy", "w+", np.uint8, shape)
            skipped = _fill(store, source, progress)
            store.flush()
            index = {"classes": source.classes, "skipped": skipped}
            (work / "index.json").write_text(json.dumps(index))
            shutil.rmtree(target, ignore_errors=True)  # it is damaged, else nobody would build it
            work.rename(target)
    except OSError as error:
        if not target.exists():  # else another process was first, with the same content
            raise OSError(
                f"cannot write the cache {target} ({error}): "
                f"make room for {math.prod(shape) / 1e6:.0f} MB, or set "
                "VITLAB_DATA to a folder elsewhere"
            ) from error


def _fill(store, source, progress):
    """Write all images into store [N, side, side, 3]; return {unreadable file: reason}."""
    if source.pixels is not None:
        store[:] = source.pixels
        return {}
    skipped = {}
    # Small images spend their time in Python, where a second thread only waits for the first.
    threads = 1 if source.side else min(8, os.cpu_count())
    with ThreadPool(threads) as pool:
        paths = [source.folder / name for name in source.names]
        images = pool.imap(lambda path: _decode(path, store.shape[1]), paths, chunksize=32)
        bar = _bar(images, f"decoding {source.name}", progress, total=len(store))
        for row, image in enumerate(bar):
            if isinstance(image, str):
                skipped[source.names[row]] = image
            else:
                store[row] = image
    return skipped


def _decode(path, side):
    """Return the centre square in RGB, resized to uint8 [side, side, 3].

    If that fails, the reason comes back as text.
    """
    try:
        image = datasets.folder.pil_loader(str(path))
        if image.size != (side, side):
            image = v2.functional.resize(image, [side], antialias=True)
            image = v2.functional.center_crop(image, [side])
        return np.asarray(image)
    except Exception as error:  # whatever a broken file makes a decoder raise
        return f"{type(error).__name__}: {str(error).replace(str(path), path.name)}"


def _bar(items, title, progress, total=None):
    shown = progress and parallel.is_first() and not record.headless()
    return tqdm(items, desc=title, total=total, unit="image", disable=not shown, leave=False)


def _read_json(path):
    """Return what a JSON file holds, {} for one that is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write_json(path, content):
    record.write_atomic(path, json.dumps(content))
