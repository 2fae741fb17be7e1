"""Find images, and decode each of them once.

Every image is decoded into a memory-mapped uint8 array under `<data root>/cache`, which is keyed by
content.

Public: MARGIN, NAMES, NATIVE_SIDE, SPLITS, WHOLE, cached, find, read_json, write_json.
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
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2
from tqdm.auto import tqdm

from vitlab import files, names, parallel
from vitlab.training import shapes

SPLITS = ("train", "val", "test")


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


def find(name, home, download):
    """Return the _Found of a named dataset or of the folder that name is the path of."""
    finders = {"caltech101": _find_caltech101, "cifar10": _find_cifar10, "shapes": _find_shapes}
    if name in finders:
        return finders[name](home, download)
    folder = Path(name).expanduser().absolute()
    if folder.is_dir():
        return _find_tree(folder, name=folder.name, description=f"ImageFolder {folder.name}")
    raise ValueError(
        f"{names.unknown('dataset', name, NAMES)} A set of your own has its path as its name: a "
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
        files.make_folder(home)
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


# The cache: <root>/cache/<name>-<key>-<side>/{images.npy, index.json}; key is a hash of relative
# paths and bytes, remembered in keys.json for files whose names, sizes and times have not changed.


def cached(source, folder, image_size, progress):
    """Return a memory map uint8 [N, H, H, 3], {unreadable file: reason} and the cache folder.

    The images are decoded into it if need be.
    """
    files.make_folder(folder)
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
    skipped = read_json(target / "index.json").get("skipped")
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
    known = read_json(memory)
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
        write_json(memory, known)
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
    shown = progress and parallel.is_first() and not files.headless()
    return tqdm(items, desc=title, total=total, unit="image", disable=not shown, leave=False)


def read_json(path):
    """Return what a JSON file holds, {} for one that is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_json(path, content):
    files.write_atomic(path, json.dumps(content))
