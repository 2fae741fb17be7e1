"""Images: named datasets and ImageFolders as train / val / test, decoded once, augmented in batches.

Every image is decoded once into a memory-mapped uint8 array under `<data root>/cache` that is keyed by
content. Batches are cut from it, sent to the device as uint8 and only there cropped, flipped, normalised
and enlarged; each image of a batch has its own draw.
"""

import contextlib
import difflib
import hashlib
import io
import json
import math
import os
import shutil
import tarfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2
from tqdm.auto import tqdm

from vitlab import parallel, record, shapes

NAMES = ("caltech101", "cifar10", "shapes")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std that ImageNet weights expect
SPLITS = ("train", "val", "test")
WHOLE = {"cifar10": 60_000, "caltech101": 8_677}  # images, whatever the layout
NATIVE_SIDE = 96  # equal squares up to this many pixels are stored as they are, all else as squares
MARGIN = 1.15  # those squares are this much larger than the crop


@dataclass(frozen=True)
class Split:
    """Some images of a cache with their labels.

    store: uint8 [all, H, H, 3] memory map that the splits share. indices: int64 array [N], rows of store.
    labels: int64 tensor [N]. image_size: side S of a batch. window: side in stored pixels of what a batch
    shows; it is enlarged to S where smaller. mean, std: of the three channels, in [0, 1].
    """

    store: np.ndarray
    indices: np.ndarray
    labels: torch.Tensor
    image_size: int
    window: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def identity(self) -> str:
        """Hash of what its batches depend on: which images (by the cache's content key), labels, sizes, moments."""
        digest = hashlib.sha256(self.indices.tobytes() + self.labels.numpy().tobytes())
        cache = Path(getattr(self.store, "filename", "")).parent.name
        digest.update(repr((cache, self.image_size, self.window, self.mean, self.std)).encode())
        return digest.hexdigest()

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, H, H, 3], row i belongs to labels[i]; read from the memory map into a new array."""
        return np.take(self.store, self.indices, axis=0)

    def subset(self, n: int, *, seed: int = 0) -> "Split":
        """n images, the classes in the proportions of this split; n larger contains n smaller."""
        if not 1 <= n <= len(self):
            raise ValueError(f"a subset has 1 to {len(self)} images here, got n={n}")
        labels, rng = self.labels.numpy(), np.random.default_rng(seed)
        place = np.empty(len(self))  # how far down its shuffled class an image stands, in (0, 1)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        chosen = np.sort(np.argsort(place, kind="stable")[:n])
        return self.take(chosen)

    def take(self, chosen: np.ndarray) -> "Split":
        """The images at these places of the split, int64 [n], in that order."""
        changed = {"indices": self.indices[chosen], "labels": self.labels[torch.from_numpy(chosen)]}
        return Split(**(vars(self) | changed))

    def batches(
        self,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        augment: bool | dict = False,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches (x float32 [B, 3, S, S] normalised, in channels_last memory; y int64 [B]) of one epoch.

        A function of (seed, epoch) alone, the same on every device; torch's and numpy's own random states
        are neither read nor moved. start: number of the first batch, as if those before had been drawn.
        augment: False; True for crop and flip; or a dict with any of
          crop   int, pixels of reflected border (of stored pixels) that a random crop may reach into; by
                 default an eighth of the side, or 0 where images are stored larger than the crop
          flip   bool, mirror half of the images; True by default
          scale  [low, high], instead of crop: a random-resized crop of this share of the area, with
                 an aspect ratio of 3/4 to 4/3
          erase  share of the images, in [0, 1], that lose a rectangle of 2 to 33 % of their area
        Raises ValueError for another key or a value out of range.
        """
        if batch_size < 1 or start < 0:
            raise ValueError(f"batch_size is at least 1 and start at least 0, got {batch_size} and {start}")
        options = _augmentation(augment, self.store.shape[1], self.window)
        order = np.arange(len(self))
        if shuffle:
            order = np.random.default_rng([seed, epoch, 0]).permutation(order)
        stop = len(self) // batch_size if drop_last else -(-len(self) // batch_size)
        steps = ((i, order[i * batch_size : (i + 1) * batch_size]) for i in range(start, stop))
        return self._draw(steps, torch.device(device), options, (seed, epoch))

    def _draw(self, steps, device: torch.device, options: dict | None, seeds: tuple[int, int]) -> Iterator:
        for step, chosen in steps:
            raw = torch.from_numpy(np.take(self.store, self.indices[chosen], axis=0))
            if device.type == "cuda":
                raw = raw.pin_memory()
            raw = raw.to(device, non_blocking=True)
            rng = np.random.default_rng([*seeds, 1 + step])  # 0 draws the order
            yield self._prepare(raw, options, rng), self.labels[torch.from_numpy(chosen)].to(device)

    def _prepare(self, raw: torch.Tensor, options: dict | None, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [B, H, H, 3] to float32 [B, 3, S, S], on raw's device; options None: the centre."""
        side = raw.shape[1]
        if options is None:
            edge = (side - self.window) // 2
            raw = raw[:, edge : edge + self.window, edge : edge + self.window]
        elif options["scale"] is None:
            raw = _shifted(raw, self.window, options["crop"], options["flip"], rng)
        x = _normalised(raw, self.mean, self.std)
        if options and options["scale"]:
            x = _resized_crops(x, self.image_size, options["scale"], options["flip"], rng)
        elif x.shape[-1] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bilinear", antialias=x.shape[-1] > self.image_size)
        if options and options["erase"]:
            x = x.masked_fill(_rectangles(x, options["erase"], rng), 0)  # 0 is the mean
        return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Dataset:
    """Train, val and test of one set of images; skipped lists the unreadable files that were left out."""

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    image_size: int
    description: str
    skipped: list[str] = field(default_factory=list)

    def summary(self) -> pd.DataFrame:
        """One row a split: images, classes, images of the smallest and of the largest class."""
        rows = {}
        for name in SPLITS:
            counts = torch.bincount(getattr(self, name).labels, minlength=len(self.classes))
            rows[name] = {
                "images": int(counts.sum()),
                "classes": int((counts > 0).sum()),
                "smallest_class": int(counts.min()),
                "largest_class": int(counts.max()),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")


# Augmentation: whole batches on the device, one draw an image. The draws come from a numpy generator, so
# that every device sees the same ones.


def _augmentation(augment: bool | dict, side: int, window: int) -> dict | None:
    if augment is False or augment is None:
        return None
    given = {} if augment is True else dict(augment)
    default = {"crop": window // 8 if side == window else 0, "flip": True, "scale": None, "erase": 0.0}
    for key in given.keys() - default.keys():
        near = difflib.get_close_matches(key, default, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown augmentation {key!r}{hint} Known are {', '.join(default)}")
    options = default | given
    if options["scale"] and given.get("crop"):
        raise ValueError("augment takes crop or scale, not both")
    if not 0 <= options["crop"] < side:
        raise ValueError(f"augment's crop is a border of 0 to {side - 1} pixels, got {options['crop']}")
    if not 0 <= options["erase"] <= 1:
        raise ValueError(f"augment's erase is a share of the images in [0, 1], got {options['erase']}")
    scale = options["scale"] or [1.0, 1.0]
    if not isinstance(scale, list | tuple) or len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"augment's scale is [low, high] with 0 < low <= high <= 1, got {scale}")
    return options


def _shifted(raw: torch.Tensor, window: int, pad: int, flip: bool, rng: np.random.Generator) -> torch.Tensor:
    """Window at a random offset of each image [B, H, H, 3], up to pad pixels over its reflected border."""
    count, side = raw.shape[:2]
    offsets = rng.integers(-pad, side - window + pad, size=(2, count, 1), endpoint=True)
    mirrored = flip & (rng.random((count, 1)) < 0.5)
    places = np.abs(offsets + np.arange(window))
    rows, columns = side - 1 - np.abs(side - 1 - places)  # reflected at both borders
    columns = np.where(mirrored, columns[:, ::-1], columns)
    pixels = (np.arange(count)[:, None] * side + rows)[:, :, None] * side + columns[:, None, :]
    chosen = torch.from_numpy(pixels.ravel()).to(raw.device)
    return raw.reshape(-1, 3).index_select(0, chosen).view(count, window, window, 3)


def _normalised(raw: torch.Tensor, mean, std) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in channels_last memory, zero mean and unit deviation."""
    scale, shift = 1 / (255 * np.array(std)), -np.array(mean) / np.array(std)
    scale, shift = (torch.tensor(np.tile(v, raw.shape[2]), dtype=torch.float32) for v in (scale, shift))
    rows = raw.flatten(2).float()  # [B, H, W * 3]: long rows are quicker than rows of three channels
    rows = rows.mul_(scale.to(raw.device)).add_(shift.to(raw.device))
    return rows.view(raw.shape).permute(0, 3, 1, 2)


def _resized_crops(x: torch.Tensor, size: int, scale, flip: bool, rng: np.random.Generator) -> torch.Tensor:
    """A random part of each image, a share of its area in scale, resized to [B, 3, size, size]."""
    count = len(x)
    area, ratio = rng.uniform(*scale, count), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), count))
    width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    right, down = (rng.uniform(-1, 1, count) * (1 - extent) for extent in (width, height))
    mirror = np.where(flip & (rng.random(count) < 0.5), -1, 1)
    theta = np.zeros((count, 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = mirror * width, right, height, down
    theta = torch.from_numpy(theta).to(x.device)
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _rectangles(x: torch.Tensor, share: float, rng: np.random.Generator) -> torch.Tensor:
    """bool [B, 1, S, S], True inside one rectangle of a share of the images (Zhong et al. 2020)."""
    count, size = len(x), x.shape[-1]
    area, ratio = rng.uniform(0.02, 0.33, count), np.exp(rng.uniform(np.log(0.3), np.log(3.3), count))
    inside = []
    for extent in (np.sqrt(area * ratio), np.sqrt(area / ratio)):
        extent = np.minimum(extent, 1) * size
        first = rng.random(count) * (size - extent)
        inside.append((np.arange(size) >= first[:, None]) & (np.arange(size) < (first + extent)[:, None]))
    erased = rng.random(count) < share
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :] & erased[:, None, None, None]
    return torch.from_numpy(mask).to(x.device)


# Loading


def load(
    name: str | Path,
    *,
    root: str | Path | None = None,
    image_size: int,
    split_seed: int = 0,
    normalise: str | tuple = "train",
    images: int | None = None,
    skip_broken: bool | None = False,
    download: bool = True,
    progress: bool = True,
) -> Dataset:
    """A dataset as train / val / test, from its cache or decoded into it.

    name: "cifar10", "caltech101", "shapes" (drawn at first use), or the path of an ImageFolder: `train/`
    with or without `val/` and `test/`, or one tree of class folders. Splits are stratified and depend on
    split_seed alone, never on a run's seed: what is not given is taken from train (val 10 %, test 20 %);
    one tree and Caltech-101 become 70 / 10 / 20. CIFAR-10 keeps its test set.
    image_size: side of a batch in pixels. normalise: "train" for mean and deviation of the train split,
    "imagenet" for those that pretrained weights expect, or (mean, std) of three numbers each.
    images: at most so many of each split, stratified, for a trial run (None: all).
    skip_broken: leave out files that cannot be decoded and list them in `skipped`.
    Raises ValueError for an unknown name, an empty class folder or a file that is no whole image,
    RuntimeError where the images are missing and cannot be downloaded, PermissionError where the cache
    cannot be written.
    """
    if image_size < 1:
        raise ValueError(f"image_size is a side in pixels, at least 1; got {image_size}")
    home = Path(root).expanduser().absolute() if root else record.root()
    found = _find(str(name), home, download)
    store, skipped, cache = _cached(found, home / "cache", image_size, progress)
    if skipped and not skip_broken:
        path, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{len(skipped)} unreadable image file(s), the first is {found.folder / path} ({reason}): "
            f"replace or delete it, or go on without by skip_broken=True (in a study: --set data.skip_broken=true)"
        )
    usable = np.array([path not in skipped for path in found.relative] or [True] * len(found.labels))
    parts = _split(found, usable, split_seed)
    window = store.shape[1] if found.side else image_size
    mean, std = _moments(store, parts["train"], normalise, cache / f"moments-{split_seed}.json")
    splits = {
        part: Split(store, rows, torch.from_numpy(found.labels[rows]), image_size, window, mean, std)
        for part, rows in parts.items()
    }
    if images is not None:
        splits = {part: split.subset(min(images, len(split))) for part, split in splits.items()}
    return Dataset(
        name=found.name,
        classes=found.classes,
        **splits,
        image_size=image_size,
        description=found.description,
        skipped=sorted(skipped),
    )


@dataclass
class _Found:
    """What lies on disk, before anything is decoded; given: "train", "val", "test" or "" an image."""

    name: str
    description: str
    folder: Path
    classes: list[str]
    labels: np.ndarray
    given: np.ndarray
    paths: list[Path]
    pixels: np.ndarray | None = None  # of the binary layout, which is no tree of files
    side: int | None = None  # of equal small squares, which are stored as they are

    @property
    def relative(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.paths]


def _find(name: str, home: Path, download: bool) -> _Found:
    if name == "cifar10":
        return _find_cifar10(home, download)
    if name == "caltech101":
        folder = home / "caltech101" / "101_ObjectCategories"
        if not folder.is_dir():
            _fetch(datasets.Caltech101, home, download, f"the class folders of Caltech-101 into {folder}")
        return _whole(_find_tree(folder, name="caltech101", description="Caltech-101", leave=("BACKGROUND_Google",)))
    if name == "shapes":
        folder = home / f"shapes-{shapes.VERSION}"
        if not folder.is_dir():
            record.make_folder(home)
            try:
                shapes.make(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same pictures
                    raise
        return _find_tree(folder, name="shapes", description="shapes")
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser().absolute()
        return _find_tree(folder, name=folder.name, description=f"ImageFolder {folder.name}")
    near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise ValueError(
        f"unknown dataset {name!r}{hint} Known are {', '.join(NAMES)}, or the path of a folder of images "
        f"(train/, val/ and test/ with a folder a class, or one tree of class folders)"
    )


def _find_cifar10(home: Path, download: bool) -> _Found:
    tree, layout = home / "cifar10", "cifar-10-batches-py"
    holder = next((folder for folder in (home, tree) if (folder / layout).is_dir()), None)
    if holder is None and (tree / "train").is_dir():
        found = _whole(_find_tree(tree, name="cifar10", description="CIFAR-10"))
        if found.paths[0].suffix.lower() in (".jpg", ".jpeg"):
            found.description = "CIFAR-10 (JPEG)"  # lossy: accuracies are a little below
        return found
    if holder is None:
        remedy = f"the folder {layout} into {home}, or train/ and test/ with a folder a class into {tree}"
        _fetch(datasets.CIFAR10, home, download, remedy)
    try:
        parts = [datasets.CIFAR10(holder or home, train=train) for train in (True, False)]
    except RuntimeError as error:  # its files are not those that were published
        folder = (holder or home) / layout
        raise RuntimeError(
            f"{folder} is not whole ({error}): delete it, and it is downloaded or unpacked anew"
        ) from error
    given = np.repeat(["train", "test"], [len(part.data) for part in parts])
    return _Found(
        name="cifar10",
        description="CIFAR-10",
        folder=(holder or home) / layout,
        classes=parts[0].classes,
        labels=np.concatenate([part.targets for part in parts]).astype(np.int64),
        given=given,
        paths=[],
        pixels=np.concatenate([part.data for part in parts]),
    )


def _whole(found: _Found) -> _Found:
    """found, if no image is missing. ValueError for a set that was downloaded or unpacked half: it has a name that
    results are compared by."""
    if len(found.paths) != WHOLE[found.name]:
        raise ValueError(
            f"{found.folder} holds {len(found.paths)} of the {WHOLE[found.name]} images of {found.description}, as "
            "after half a download: unpack the whole archive there again. A set of your own has its path as its name"
        )
    return found


def _fetch(kind, home: Path, download: bool, remedy: str) -> None:
    reason = "download=False"
    if download and not hasattr(tarfile, "data_filter"):  # torchvision would unpack without it, wherever names lead
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


def _find_tree(folder: Path, *, name: str, description: str, leave: tuple[str, ...] = ()) -> _Found:
    """Files of an ImageFolder: train/ with or without val/ and test/, or one tree of class folders."""
    tops = _folders(folder)
    parts = [part for part in SPLITS if part in tops] if "train" in tops else [""]
    if parts != [""] and (others := set(tops) - set(parts)):
        raise ValueError(f"{folder}: beside train/ only val/ and test/ are read; found {sorted(others)}")
    classes = [name for name in _folders(folder / parts[0]) if name not in leave]
    if len(classes) < 2:
        raise ValueError(f"{folder / parts[0]}: at least two class folders are needed, found {classes}")
    paths, labels, given = [], [], []
    for part in parts:
        if strange := set(_folders(folder / part)) - set(leave) ^ set(classes):
            raise ValueError(f"{folder / part}: class folders differ from train/ in {sorted(strange)}")
        numbers = {name: i for i, name in enumerate(classes)}
        files = datasets.folder.make_dataset(folder / part, numbers, datasets.folder.IMG_EXTENSIONS, allow_empty=True)
        paths += [Path(path) for path, _ in files]
        labels += (mine := [label for _, label in files])
        given += [part] * len(files)
        for empty in set(range(len(classes))) - set(mine):
            raise ValueError(f"empty class folder: {folder / part / classes[empty]} has no image files")
    labels, given = np.array(labels, dtype=np.int64), np.array(given)
    return _Found(name, description, folder, classes, labels, given, paths)


def _folders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _split(found: _Found, usable: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Rows of train, val, test: as given; what is missing is drawn class by class from the rest."""
    given = set(found.given)
    parts = {part: [np.flatnonzero((found.given == part) & usable)] for part in SPLITS}
    missing = {part: share for part, share in (("val", 0.1), ("test", 0.2)) if part not in given}
    rest = (found.given == ("train" if "train" in given else "")) & usable
    parts["train"] = []
    for label, name in enumerate(found.classes):
        rows = np.flatnonzero(rest & (found.labels == label))
        if len(rows) <= len(missing):
            raise ValueError(f"class {name!r} has {len(rows)} image(s) to make {1 + len(missing)} splits of")
        rows = np.random.default_rng([seed, label]).permutation(rows)
        sizes = {part: max(1, round(share * len(rows))) for part, share in missing.items()}
        for part, size in sizes.items():
            parts[part].append(rows[:size])
            rows = rows[size:]
        parts["train"].append(rows)
    return {part: np.sort(np.concatenate(pieces)) for part, pieces in parts.items()}


def _moments(store: np.ndarray, rows: np.ndarray, normalise, memory: Path) -> tuple[tuple, tuple]:
    """Mean and standard deviation of the three channels in [0, 1]; of train they are kept in the cache."""
    if normalise == "imagenet":
        return IMAGENET
    if normalise != "train":
        if isinstance(normalise, str) or np.shape(normalise) != (2, 3):
            raise ValueError(f"normalise is 'train', 'imagenet' or (mean, std) of three; got {normalise!r}")
        mean, std = normalise
        return tuple(mean), tuple(std)
    if memory.exists():
        mean, std = json.loads(memory.read_text())
        return tuple(mean), tuple(std)
    counts = np.zeros((3, 256))
    for piece in np.array_split(rows, -(-len(rows) // 512)):
        pixels = np.take(store, piece, axis=0).reshape(-1, 3)
        counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
    weights, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = weights @ values
    std = np.sqrt(weights @ values**2 - mean**2).clip(min=1 / 255)  # a constant channel stays finite
    _write_json(memory, [mean.tolist(), std.tolist()])
    return tuple(mean.tolist()), tuple(std.tolist())


# The cache: <root>/cache/<name>-<key>-<side>/{images.npy, index.json}; key is a hash of relative paths and
# bytes, remembered in keys.json for files whose names, sizes and times have not changed.


def _cached(found: _Found, folder: Path, image_size: int, progress: bool):
    """(memory map uint8 [N, H, H, 3], {unreadable file: reason}, cache folder), decoded if need be."""
    record.make_folder(folder)
    key, found.side = _identify(found, folder / "keys.json", progress)
    side = found.side or round(image_size * MARGIN)
    target = folder / f"{found.name}-{key[:12]}-{side}"
    shape = (len(found.labels), side, side, 3)
    if (opened := _open(target, shape)) is None:
        with open(folder / "building.lock", "w") as lock, parallel.in_turn(lock):
            if _open(target, shape) is None:  # else another process has built it meanwhile
                _build(found, target, shape, progress)
        opened = _open(target, shape)
        if opened is None:
            raise RuntimeError(f"the cache {target} cannot be read back: is the disk full?")
    return *opened, target


def _open(target: Path, shape: tuple) -> tuple[np.ndarray, dict] | None:
    """Store and index of a whole cache, None for one that is missing or damaged."""
    try:
        store = np.load(target / "images.npy", mmap_mode="r")
        skipped = json.loads((target / "index.json").read_text())["skipped"]
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return (store, skipped) if store.shape == shape and store.dtype == np.uint8 else None


def _identify(found: _Found, memory: Path, progress: bool) -> tuple[str, int | None]:
    """Hash of what the files hold, and the common side if all are equal squares small enough."""
    if found.pixels is not None:
        return hashlib.sha256(np.ascontiguousarray(found.pixels)).hexdigest(), found.pixels.shape[1]
    stats = [(str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in found.paths]
    fingerprint = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    known = _read_json(memory)
    if fingerprint not in known:
        content, sizes = hashlib.sha256(), set()
        names = zip(found.relative, found.paths, strict=True)
        for name, path in _bar(names, f"reading {found.name}", progress, len(found.paths)):
            blob = path.read_bytes()
            content.update(f"{name}\0{len(blob)}\0".encode() + blob)
            with contextlib.suppress(Exception):  # no image, or one beyond all bounds: decoding names it
                sizes.add(Image.open(io.BytesIO(blob)).size)
        width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
        known[fingerprint] = [content.hexdigest(), width if width == height <= NATIVE_SIDE else None]
        _write_json(memory, known)
    return tuple(known[fingerprint])


def _build(found: _Found, target: Path, shape: tuple, progress: bool) -> None:
    """Decode into a temporary folder beside target, then rename: target is whole or not there."""
    for stale in target.parent.glob("building-*"):  # left by a killed process
        if time.time() - stale.stat().st_mtime > 86400:
            shutil.rmtree(stale, ignore_errors=True)
    work = target.parent / f"building-{uuid.uuid4().hex}"
    try:
        work.mkdir()
        store = np.lib.format.open_memmap(work / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        skipped, names = {}, found.relative
        if found.pixels is not None:
            store[:] = found.pixels
        else:
            # small images spend their time in Python, where a second thread only waits for the first
            with ThreadPool(1 if found.side else min(8, os.cpu_count())) as pool:
                decoded = pool.imap(lambda path: _decode(path, shape[1]), found.paths, chunksize=32)
                for i, image in enumerate(_bar(decoded, f"decoding {found.name}", progress, len(store))):
                    if isinstance(image, str):
                        skipped[names[i]] = image
                    else:
                        store[i] = image
        store.flush()
        _write_json(work / "index.json", {"classes": found.classes, "skipped": skipped})
        shutil.rmtree(target, ignore_errors=True)  # damaged, or this would not have been called
        os.rename(work, target)
    except OSError as error:
        if not target.exists():  # else another process was first, with the same content
            raise OSError(
                f"cannot write the cache {target} ({error}): "
                f"make room for {math.prod(shape) / 1e6:.0f} MB, or set "
                "VITLAB_DATA to a folder elsewhere"
            ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _decode(path: Path, side: int) -> np.ndarray | str:
    """uint8 [side, side, 3]: the centre square in RGB, resized; the reason as text if that fails."""
    try:
        image = datasets.folder.pil_loader(str(path))
        if image.size != (side, side):
            image = v2.functional.center_crop(v2.functional.resize(image, [side], antialias=True), [side])
        return np.asarray(image)
    except Exception as error:  # whatever a broken file makes a decoder raise
        return f"{type(error).__name__}: {str(error).replace(str(path), path.name)}"


def _bar(items, what: str, progress: bool, total: int | None = None):
    shown = progress and parallel.is_first() and not record.headless()
    return tqdm(items, desc=what, total=total, unit="image", disable=not shown, leave=False)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, content) -> None:
    """Write whole or not at all."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(content))
    os.replace(draft, path)
