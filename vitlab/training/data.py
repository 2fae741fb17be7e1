"""Load named datasets and image folders as train, val and test, and give batches of them.

A batch is cut from the decoded images and sent to the device as uint8. Only there it is cropped,
flipped, normalised and enlarged. Each image of a batch has its own draw.

Public: Dataset, Split, is_here, load.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vitlab import files
from vitlab.models import _weights, build
from vitlab.training import _folders, _shapes, _sources
from vitlab.training._augment import augmentation, prepare


@dataclass(frozen=True, repr=False)
class Split:
    """Hold some images of a cache with their labels.

    store: uint8 [all, H, H, 3] memory map that the splits share
    indices: int64 array [N], rows of store
    labels: int64 tensor [N]
    image_size: side S of a batch, in pixels
    window: side in stored pixels of what a batch shows; it is enlarged to S where it is smaller
    mean, std: of the three channels, in [0, 1]
    classes: names in the order of the labels; () where nobody says them
    """

    store: np.ndarray
    indices: np.ndarray
    labels: torch.Tensor
    image_size: int
    window: int
    mean: tuple
    std: tuple
    classes: tuple = ()

    def __len__(self):
        return len(self.indices)

    def __repr__(self):
        return f"Split of {len(self)} images, {self.image_size} px, {len(self.classes)} classes"

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
        seed: int from 0, by which the images are drawn

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
        return replace(self, indices=self.indices[places], labels=self.labels[places])

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
    ):
        """Yield the batches (x, y) of one epoch.

        They are a function of (seed, epoch) alone, the same on every device. torch's and numpy's
        own random states are neither read nor moved.

        batch_size: images of a batch, at least 1
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
        seed, epoch: ints from 0, by which order and augmentation are drawn
        drop_last: whether a last batch of fewer images is left out

        Yields x, float32 [B, 3, S, S], normalised, in channels_last memory, and y, int64 [B], whose
        attribute `origin` is this Split.
        Raises ValueError for another key of augment and for a value out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        options = augmentation(augment, self.store.shape[1], self.window)
        order = np.arange(len(self))
        if shuffle:
            order = np.random.default_rng([seed, epoch, 0]).permutation(order)
        if drop_last:
            order = order[: len(self) // batch_size * batch_size]

        # A generator of its own, so that wrong arguments show before the first batch.
        def draw():
            starts = range(0, len(order), batch_size)
            for number, start in enumerate(starts, 1):  # 0 drew the order
                batch = self.take(order[start : start + batch_size])
                raw = torch.from_numpy(batch.images)
                if torch.device(device).type == "cuda":
                    raw = raw.pin_memory()
                raw = raw.to(device, non_blocking=True)
                rng = np.random.default_rng([seed, epoch, number])
                labels = batch.labels.to(device)
                labels.origin = (
                    self  # scores compare a model with the images that they are taken from
                )
                yield prepare(raw, self, options, rng), labels

        return draw()


@dataclass(frozen=True, repr=False)
class Dataset:
    """Hold train, val and test of one set of images.

    classes: names, in the order of the labels
    image_size: side of a batch, in pixels
    description: what results call the images, such as "CIFAR-10 (JPEG)"
    skipped: the unreadable files that were left out
    layout: how the folder was read, with the endings of images and of what was left out, and
        from where the splits were taken that were not there
    drawn: {split that was not there: how many images were taken from where, in words}
    apart: images of train that no training sees, or None
    """

    name: str
    classes: list
    train: Split
    val: Split
    test: Split
    image_size: int
    description: str
    skipped: list = field(default_factory=list)
    layout: str = ""
    drawn: dict = field(default_factory=dict)
    apart: Split | None = None

    @property
    def calibration(self):
        """Return the Split that calibration images are taken from: `apart`, or train."""
        return self.train if self.apart is None else self.apart

    def __repr__(self):
        counts = ", ".join(f"{len(getattr(self, part))} {part}" for part in _folders.SPLITS)
        counts += f", {len(self.apart)} apart" if self.apart else ""
        classes = f"{len(self.classes)} classes"
        return f"Dataset {self.name!r}: {counts} images, {self.image_size} px, {classes}"

    @property
    def identity(self):
        """Return what tells these images and their splits from others, whatever their size.

        Returns a dict of classes (how many), content (of the image files), and train, val and test:
        how many images, and a hash of which they are and of their labels.
        """
        cache = Path(getattr(self.train.store, "filename", "")).parent.name
        known = {"classes": len(self.classes), "content": cache.rpartition("-")[0]}
        for name in _folders.SPLITS:
            split = getattr(self, name)
            digest = hashlib.sha256(split.indices.tobytes() + split.labels.numpy().tobytes())
            digest.update(repr(self.classes).encode())
            known[name] = f"{len(split)} images, {digest.hexdigest()[:12]}"
        return known

    def summary(self):
        """Return a row for each split: images, classes, images of smallest and largest class."""
        counts = {}
        for name in [*_folders.SPLITS, *(["apart"] if self.apart else [])]:
            labels = getattr(self, name).labels
            counts[name] = torch.bincount(labels, minlength=len(self.classes)).numpy()
        counts = pd.DataFrame(counts)
        table = {
            "images": counts.sum(),
            "classes": (counts > 0).sum(),
            "smallest_class": counts.min(),
            "largest_class": counts.max(),
        }
        return pd.DataFrame(table).rename_axis("split")


# Loading


def load(
    name,
    *,
    root=None,
    image_size,
    split_seed=0,
    normalise="train",
    images=None,
    calibration=None,
    skip_broken=False,
):
    """Return a Dataset of train / val / test, from its cache or decoded into it.

    Splits are stratified and depend on split_seed alone, never on a run's seed. A split that is not
    there is taken from train (val 10 %, test 20 %). One tree and Caltech-101 become 70 / 10 / 20.
    CIFAR-10 keeps its test set.

    name: "cifar10", "caltech101", "shapes" (drawn at first use), or the path of a folder:
        `train/` with or without `val/` and `test/`, or one tree of class folders, or images with a
        table of labels; data/README.md has all layouts
    root: folder of the images and of the cache; None for the data root, `files.root()`
    image_size: side of a batch in pixels, >= 1
    split_seed: int from 0, by which splits that are not there are drawn
    normalise: "train" for mean and deviation of the train split; the name of a timm model, such as
        "vit_small_patch16_224", for those that its pretrained weights expect; a checkpoint folder
        for those of its record; {"name": of a model, "weights": its file or folder} for those that
        the file says, else timm's for the name; "imagenet"; or (mean, std) of three numbers each
    images: at most so many of each split, stratified, for a trial run; None for all
    calibration: so many images of train, stratified and a quarter at most, become the split
        `apart`, which training never sees: a cut costs a model more of such images than of those
        that it fits
    skip_broken: leave out files that cannot be decoded and list them in `skipped`

    Raises ValueError for an unknown name, a folder of no known layout, an empty class folder, a
    file that is no whole image, or a number of calibration images below 1.
    Raises RuntimeError where the images are missing and cannot be downloaded.
    Raises PermissionError where the cache cannot be written.
    """
    if image_size < 1:
        raise ValueError(f"image_size is a side in pixels, at least 1; got {image_size}")
    home = Path(root).expanduser().absolute() if root else files.root()
    source = _sources.find(str(name), home)
    store, skipped, cache = _sources.cached(source, home / "cache", image_size)
    if skipped and not skip_broken:
        path, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{len(skipped)} unreadable image file(s), the first is {source.folder / path} "
            f"({reason}): replace or delete it, or go on without by skip_broken=True "
            "(in a study: --set data.skip_broken=true)"
        )
    usable = ~np.isin(source.names, list(skipped))
    parts = _split(source, usable, split_seed)
    # A table of labels may change and leave the cache as it is: moments belong to their rows.
    key = hashlib.sha256(parts["train"].tobytes()).hexdigest()[:12]
    memory = cache / f"moments-{key}.json"
    mean, std = _moments(store, parts["train"], normalise, memory)
    window = store.shape[1] if source.side else image_size
    classes = tuple(source.classes)
    splits = {}
    for part, rows in parts.items():
        labels = torch.from_numpy(source.labels[rows])
        splits[part] = Split(store, rows, labels, image_size, window, mean, std, classes)
        if images is not None:
            splits[part] = splits[part].subset(min(images, len(rows)))
    if calibration is not None:
        splits |= _apart(splits["train"], calibration, split_seed)
    drawn = _drawn(source, splits)
    return Dataset(
        source.name,
        source.classes,
        **splits,
        image_size=image_size,
        description=source.description,
        skipped=sorted(skipped),
        layout="; ".join([source.layout, *(f"{part}: {words}" for part, words in drawn.items())]),
        drawn=drawn,
    )


def _apart(train, count, seed):
    """Return {"train", "apart"}: so many images of a split, a quarter at most, and those that stay."""
    if count < 1:
        raise ValueError(f"calibration keeps at least 1 training image apart, or None; got {count}")
    apart = train.subset(max(1, min(count, len(train) // 4)), seed=seed)
    stays = ~np.isin(train.indices, apart.indices)
    return {"train": train.take(np.flatnonzero(stays)), "apart": apart}


def is_here(name, *, root=None):
    """Return whether `load` finds the images of a name without drawing or downloading them."""
    home = Path(root) if root else files.root()
    folders = {
        "cifar10": [home / "cifar-10-batches-py", home / "cifar10" / "train"],
        "caltech101": [home / "caltech101" / "101_ObjectCategories"],
        "shapes": [home / f"shapes-{_shapes.VERSION}"],
    }
    places = folders.get(name) or [Path(name).expanduser()]
    return bool(name) and any(place.is_dir() for place in places)


def _drawn(source, splits):
    """Return {split that does not lie on disk: how many images were taken from where, in words}."""
    absent = [part for part in ("val", "test") if part not in source.splits]
    return {part: f"{len(splits[part])} images taken from {source.undivided}" for part in absent}


def _split(source, usable, seed):
    """Return {"train", "val", "test": sorted rows}.

    Splits that do not lie on disk are drawn class by class.

    usable: bool [N], False for images that are left out
    """
    splits = source.splits.astype("U8")
    splits[~usable] = "left out"
    shares = {"val": 0.1, "test": 0.2}
    for split in shares.keys() & set(source.splits):
        del shares[split]
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
    return {split: np.flatnonzero(splits == split) for split in _folders.SPLITS}


def _moments(store, rows, normalise, memory):
    """Return mean and standard deviation of the three channels, in [0, 1].

    memory: file that keeps those of train
    """
    given = normalise
    if given == "imagenet":
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if given == "train":
        normalise = _sources.read_json(memory)
        if not normalise:
            normalise = _measured(store, rows)
            files.write_atomic(memory, json.dumps(normalise))
    elif isinstance(given, dict):
        normalise = _expected(**given)
    elif isinstance(given, str | Path):
        is_folder = Path(given).is_dir()
        normalise = _expected("", given) if is_folder else _expected(given)
    if np.shape(normalise) != (2, 3) or not min(normalise[1]) > 0:
        raise ValueError(
            "normalise is 'train', 'imagenet', the name of a timm model, a checkpoint folder that "
            f"says its own, or (mean, std) of three, std above 0; got {given!r}"
        )
    return tuple(map(tuple, normalise))


def _expected(name, weights=None):
    """Return the moments that weights expect: those of a file or folder, or timm's of a name.

    Raises ValueError for a file or folder of which nobody knows it.
    """
    unsaid = ""
    if weights:
        moments, is_guess = _weights.expected(name, weights)
        if moments is None:
            raise ValueError(
                f"{weights} does not say how its images were normalised, and no weights of timm "
                "have its name: say it by normalise=(mean, std), in a study by data.normalise or "
                "the model's own normalise"
            )
        if not is_guess:
            return moments
        unsaid = f"{Path(weights).name} does not say what it expects. "
    if not timm.is_model(name):
        return None
    config = timm.get_pretrained_cfg(name)
    # Only the moments follow timm.
    files.log(
        f"{unsaid}{name}: mean and deviation as timm's weights expect. timm shows them "
        f"{config.crop_pct} of the side, {config.interpolation}; here it is "
        f"{1 / _sources.MARGIN:.2f}, bilinear."
    )
    return build.moments(name)


def _measured(store, rows):
    """Return [mean, standard deviation] of the channels of these rows of store."""
    counts = np.zeros((3, 256))  # of each channel's values
    for piece in np.array_split(rows, 1 + len(rows) // 512):
        pixels = store[piece].reshape(-1, 3)
        counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
    weights = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = weights @ values
    variance = weights @ values**2 - mean**2
    std = np.sqrt(variance).clip(min=1 / 255)  # a constant channel stays finite
    return [mean.tolist(), std.tolist()]
