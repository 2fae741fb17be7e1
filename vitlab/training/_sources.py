"""Find images, and decode each of them once.

Every image is decoded into a memory-mapped uint8 array under `<data root>/cache`, which is keyed by
content.

Public: MARGIN, cached, find, read_json.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import tarfile
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from vitlab import files, names
from vitlab.training import _folders, _shapes

_WHOLE = {"cifar10": 60_000, "caltech101": 8_677}  # images, whatever the layout
_NATIVE_SIDE = (
    96  # equal squares up to this many pixels are stored as they are, all else as squares
)
MARGIN = 1.15  # those squares are this much larger than the crop


@dataclass
class _Source:
    """Hold what lies on disk, before anything is decoded."""

    name: str
    description: str
    folder: Path
    classes: list
    names: list  # paths of the images in folder; "" for each in the binary layout of CIFAR-10
    labels: np.ndarray
    splits: np.ndarray  # "train", "val", "test" or, before the split, "" for each image
    pixels: np.ndarray | None = None  # uint8 [N, H, H, 3] of the binary layout, which has no files
    side: int | None = None  # of equal small squares, which are stored as they are
    layout: str = ""  # how the folder was read
    undivided: str = ""  # what splits that do not lie on disk are taken from


def find(name, home):
    """Return the _Source of a named dataset or of the folder that name is the path of.

    home: folder of the named datasets, into which they are drawn or downloaded if need be

    Raises ValueError for an unknown name and for a folder that is no whole dataset, RuntimeError
    where the images are missing and cannot be downloaded.
    """
    finders = {"caltech101": _find_caltech101, "cifar10": _find_cifar10, "shapes": _find_shapes}
    if name in finders:
        return finders[name](home)
    folder = Path(name).expanduser().absolute()
    if folder.is_dir():
        return _find_tree(folder, folder.name, f"ImageFolder {folder.name}")
    if folder.is_file():
        raise ValueError(f"{folder} is a file: unpack it, and give the folder of the images")
    raise ValueError(
        f"{names.unknown('dataset', name, finders)} There is no folder {folder} either: a set of "
        "your own has its path as its name, a folder with train/, val/ and test/ that hold a "
        "folder a class, or one tree of them, or images with a table of labels."
    )


def _find_caltech101(home):
    folder = home / "caltech101" / "101_ObjectCategories"
    if not folder.is_dir():
        _fetch(datasets.Caltech101, home, f"the class folders of Caltech-101 into {folder}")
    source = _find_tree(folder, "caltech101", "Caltech-101", leave=("BACKGROUND_Google",))
    return _whole(source)


def _find_shapes(home):
    folder = home / f"shapes-{_shapes.VERSION}"
    if not folder.is_dir():
        files.make_folder(home)
        _make_once(folder, Path.is_dir, _shapes.make)
    return _find_tree(folder, "shapes", "shapes")


def _find_cifar10(home):
    """Return CIFAR-10 from its binary layout or, else, from a tree of files in home/cifar10."""
    layout = home / "cifar-10-batches-py"
    tree = home / "cifar10"
    if not layout.is_dir():
        if (tree / "train").is_dir():
            source = _whole(_find_tree(tree, "cifar10", "CIFAR-10"))
            if source.names[0].lower().endswith((".jpg", ".jpeg")):
                source.description = "CIFAR-10 (JPEG)"  # lossy: accuracies are a little below
            return source
        remedy = f"the folder {layout.name} into {home}, or train/ and test/ with a folder a class"
        _fetch(datasets.CIFAR10, home, f"{remedy} into {tree}")
    train = datasets.CIFAR10(home, train=True)
    test = datasets.CIFAR10(home, train=False)
    pixels = np.concatenate([train.data, test.data])
    names = [""] * len(pixels)
    labels = np.array(train.targets + test.targets, dtype=np.int64)
    splits = np.repeat(["train", "test"], [len(train.data), len(test.data)])
    classes = train.classes
    source = _Source("cifar10", "CIFAR-10", layout, classes, names, labels, splits, pixels)
    source.layout = f"{len(names)} images in the binary files of {layout.name}/"
    source.undivided = "the training images"
    return source


def _whole(source):
    """Return source if no image is missing.

    Raises ValueError for a set that was downloaded or unpacked half: it has a name that results are
    compared by.
    """
    if len(source.names) != _WHOLE[source.name]:
        raise ValueError(
            f"{source.folder} holds {len(source.names)} of the {_WHOLE[source.name]} images of "
            f"{source.description}, as after half a download: "
            "unpack the whole archive there again. A set of your own has its path as its name"
        )
    return source


def _fetch(kind, home, remedy):
    """Download a dataset of torchvision into home.

    Raises RuntimeError with the remedy, what to put where, if that fails.
    """
    # Without this filter torchvision would unpack to wherever the names in an archive lead.
    reason = "this Python cannot keep an archive within its folder, 3.11.4 and newer can"
    if hasattr(tarfile, "data_filter"):
        try:
            kind(home, download=True)
            return
        except (OSError, RuntimeError) as error:
            reason = f"the download failed: {error}"
    raise RuntimeError(
        f"no images of {kind.__name__} under {home} ({reason}). Put {remedy}; "
        f"or set VITLAB_DATA to the folder that holds them"
    )


def _find_tree(folder, name, description, leave=()):
    """Return the images of a folder in any of the layouts of `_folders`.

    leave: class folders that are left out
    """
    layout = _folders.read(folder, leave)
    paths, own_classes, splits = zip(*layout.images, strict=True)
    classes, labels = np.unique(own_classes, return_inverse=True)
    start = f"{folder}{os.sep}"
    names = [path.removeprefix(start).replace(os.sep, "/") for path in paths]
    source = _Source(name, description, folder, classes.tolist(), names, labels, np.array(splits))
    source.layout, source.undivided = str(layout), layout.undivided
    return source


# The cache: <root>/cache/<name>-<key>-<side>/{images.npy, index.json}; key is a hash of relative
# paths and bytes, remembered in keys.json for files whose names, sizes and times have not changed.


def cached(source, folder, image_size):
    """Return a memory map uint8 [N, H, H, 3], {unreadable file: reason} and the cache folder.

    The images are decoded into it if need be.

    Raises OSError, with what to do, where the cache cannot be written.
    """
    files.make_folder(folder)
    key, source.side = _identify(source, folder / "keys.json")
    side = source.side or round(image_size * MARGIN)
    target = folder / f"{source.name}-{key[:12]}-{side}"
    shape = (len(source.labels), side, side, 3)
    try:
        _make_once(
            target,
            is_whole=lambda folder: _open(folder, shape),
            write=lambda folder: _decode_all(source, folder, shape),
        )
    except OSError as error:
        raise OSError(
            f"cannot write the cache {target} ({error}): "
            f"make room for {math.prod(shape) / 1e6:.0f} MB, or set "
            "VITLAB_DATA to a folder elsewhere"
        ) from error
    return *_open(target, shape), target


def _make_once(target, is_whole, write):
    """Write a folder whole or not at all, in one process, if it is not whole already.

    is_whole: function of the folder
    write: function that makes and fills the folder it is called with
    """
    with FileLock(target.parent / "building.lock"):
        if is_whole(target):  # another process has written it meanwhile
            return
        work = target.parent / "building"
        shutil.rmtree(work, ignore_errors=True)  # left by a killed process
        try:
            write(work)
            shutil.rmtree(target, ignore_errors=True)  # it is damaged, else nobody would write it
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


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


def _identify(source, memory):
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
        content = hashlib.sha256()
        sides = set()
        for name in files.progress(source.names, f"reading {source.name}", unit="image"):
            blob = (source.folder / name).read_bytes()
            content.update(f"{name}\0{len(blob)}\0".encode() + blob)
            # What is no image, or one beyond all bounds, is named when it is decoded.
            with contextlib.suppress(Exception):
                sides.update(Image.open(io.BytesIO(blob)).size)
        is_native = len(sides) == 1 and max(sides) <= _NATIVE_SIDE
        known[fingerprint] = [content.hexdigest(), max(sides) if is_native else None]
        files.write_atomic(memory, json.dumps(known))
    return known[fingerprint]


def _decode_all(source, folder, shape):
    """Write all images into a new cache folder, as uint8 of this shape, with what was skipped."""
    folder.mkdir()
    store = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    skipped = {}
    # Small images spend their time in Python, where a second thread only waits for the first.
    threads = 1 if source.side else min(8, os.cpu_count())
    with ThreadPool(threads) as pool:
        images = source.pixels
        if images is None:
            decode = functools.partial(_decode, source.folder, shape[1])
            images = pool.imap(decode, source.names, chunksize=32)
        title = f"decoding {source.name}"
        bar = files.progress(images, title, total=len(store), unit="image")
        for row, image in enumerate(bar):
            if isinstance(image, str):
                skipped[source.names[row]] = image
            else:
                store[row] = image
    store.flush()
    index = {"classes": source.classes, "skipped": skipped}
    (folder / "index.json").write_text(json.dumps(index))


def _decode(folder, side, name):
    """Return the centre square in RGB, resized to uint8 [side, side, 3].

    If that fails, the reason comes back as text.
    """
    path = folder / name
    try:
        image = datasets.folder.pil_loader(str(path))
        image = v2.functional.resize(image, [side], antialias=True)
        image = v2.functional.center_crop(image, [side])
        return np.asarray(image)
    except Exception as error:  # whatever a broken file makes a decoder raise
        return f"{type(error).__name__}: {str(error).replace(str(path), path.name)}"


def read_json(path):
    """Return what a JSON file holds, {} for one that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
