"""Damaged files: checkpoints, study files and images that were altered at random, or made by a stranger.

Each case ends in an error that names the file, or in the very model, study or image that was there: never in another
one, a crash or a hang.
"""

import contextlib
import io
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
import yaml
from conftest import toy
from PIL import Image

from vitlab import files
from vitlab.models import checkpoint
from vitlab.pruning import prune
from vitlab.studies import settings
from vitlab.training import _folders, data

FEW, MANY = 50, 600  # cases of each of four kinds
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.long)]
SECONDS = 20  # that a case may take, which is a hundred times what it takes


@contextlib.contextmanager
def no_hang():
    def stop(*_):
        raise AssertionError(f"not done in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damaged(blob, draw):
    """blob with one of the faults that disks, transfers and people make."""
    blob, start = bytearray(blob), draw.randrange(len(blob))
    size = draw.choice([1, 1, 8, 100])
    kind = draw.choice(
        ["flip", "cut", "empty", "zeros", "insert", "delete", "double", "noise", "head", "swap"]
    )
    if kind == "flip":
        for _ in range(size):
            blob[draw.randrange(len(blob))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del blob[start:]
    elif kind == "empty":
        blob.clear()
    elif kind == "zeros":
        blob[start : start + size] = bytes(len(blob[start : start + size]))
    elif kind == "insert":
        blob[start:start] = draw.randbytes(size)
    elif kind == "delete":
        del blob[start : start + size]
    elif kind == "double":
        blob += bytes(blob)
    elif kind == "noise":
        blob[start : start + size] = draw.randbytes(size)
    elif kind == "head":  # where lengths and magic numbers stand
        blob[: min(16, len(blob))] = draw.randbytes(16)
    elif kind == "swap":
        other = draw.randrange(len(blob))
        blob[start], blob[other] = blob[other], blob[start]
    return bytes(blob)


VALUES = [
    0,
    -1,
    1,
    3,
    10**9,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    None,
    True,
    [],
    {},
]
VALUES += [
    [1, 2],
    {"a": 1},
    "__import__('os').system('false')",
    "!!python/object/apply:os.system ['false']",
    "ü" * 500,
]


def altered(tree, draw):
    """A copy of a tree of dicts and lists with one place changed, lost, or grown."""
    tree = json.loads(json.dumps(tree))
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    node, key = draw.choice(places)
    kind = draw.choice(["value", "value", "value", "number", "lost", "grown"])
    if kind == "number" and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = draw.choice([-node[key], node[key] + 1, node[key] * 1000, node[key] / 2])
    elif kind == "lost":
        del node[key]
    elif kind == "grown" and isinstance(node, dict):
        node[f"{key}x"] = draw.choice(VALUES)
    else:
        node[key] = draw.choice(VALUES)
    return tree


# -- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a masked checkpoint of each toy, its files, and what was saved."""
    found = []
    for name, options in {
        "conv_vit": dict(embed_dim=32, depth=1, num_heads=2),
        "conv_swin": dict(embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=2),
    }.items():
        model, folder = toy(name, **options), tmp_path_factory.mktemp(name)
        weight = next(n for n, p in model.named_parameters() if n.endswith("fc1.weight"))
        keep = {weight: torch.rand(model.get_parameter(weight).shape) > 0.8}
        prune.apply(model, keep)
        checkpoint.save(model, folder, masks=keep, extra={"top1": 12.5})
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        found.append((folder, files, {k: v.clone() for k, v in model.state_dict().items()}, keep))
    return found


def restore(folder, files):
    for path in folder.iterdir():
        path.unlink()
    for name, blob in files.items():
        (folder / name).write_bytes(blob)


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_checkpoint_is_refused_or_unharmed(saved, count):
    refused = 0
    for case in range(count):
        draw = random.Random(case)
        folder, files, state, keep = saved[case % len(saved)]
        name = draw.choice(sorted(files))
        restore(folder, files | {name: damaged(files[name], draw)})
        try:
            with no_hang():
                model, masks = checkpoint.load(folder), checkpoint.load_masks(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), f"case {case}: {error!r}"
            refused += 1
        else:
            assert all(
                torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items()
            ), f"case {case}"
            assert all(torch.equal(mask, keep[key]) for key, mask in masks.items()), f"case {case}"
    assert refused > 0.9 * count


@pytest.mark.parametrize("count", COUNTS)
def test_a_strangers_record_with_right_hashes_is_refused_or_harmless(saved, count):
    refused = 0
    for case in range(count):
        draw = random.Random(1_000_000 + case)
        folder, files, state, _ = saved[case % len(saved)]
        kept = altered(json.loads(files["model.json"]), draw)
        with contextlib.suppress(Exception):
            kept["sha256"]["record"] = checkpoint._own_hash(kept)
        restore(folder, files | {"model.json": json.dumps(kept).encode()})
        try:
            with no_hang():
                model = checkpoint.load(folder)
                checkpoint.load_masks(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), f"case {case}: {error!r}"
            refused += 1
        else:
            assert all(
                torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items()
            ), f"case {case}"
    assert refused > 0.2 * count  # what is left are notes and rates of drop-out


# -- studies


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_study_is_refused_or_still_a_study(tmp_path, count):
    text = (files.repository() / "notebooks" / "params" / "demo.yaml").read_text()
    values, path, refused = yaml.safe_load(text), tmp_path / "own.yaml", 0
    for case in range(count):
        draw = random.Random(2_000_000 + case)
        if draw.random() < 0.5:
            path.write_bytes(damaged(text.encode(), draw))
        else:
            path.write_text(yaml.safe_dump(altered(values, draw)))
        try:
            with no_hang():
                study = settings.study(str(path))
        except (ValueError, TypeError) as error:
            assert "own.yaml" in str(error) or any(s in str(error) for s in settings._SECTIONS), (
                f"case {case}: {error!r}"
            )
            refused += 1
        else:
            assert set(settings._SECTIONS) <= set(study), f"case {case}"
    assert refused > 0.3 * count


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n"
        + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
        ),
        "about: !!python/object/apply:os.system ['touch /tmp/owned']",
        "[" * 5000,
        "- 1\n- 2",
        "just words",
        "\0",
        "? [1, 2]\n: 3",
    ],
    ids=["bomb", "python", "deep", "list", "words", "zero", "key"],
)
def test_a_strangers_study_neither_runs_nor_hangs(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text)
    with no_hang(), pytest.raises((ValueError, TypeError), match="own.yaml"):
        settings.study(str(tmp_path / "own.yaml"))
    assert not os.path.exists("/tmp/owned")


# -- images


def picture(ending):
    pixels, file = (
        np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8),
        io.BytesIO(),
    )
    Image.fromarray(pixels).save(
        file, {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "gif": "GIF"}[ending]
    )
    return file.getvalue()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, on strange metadata
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_image_is_named_or_read(tmp_path, count):
    for label in "ab":
        for i in range(4):
            (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / label / f"{i}.jpg").write_bytes(picture("jpg"))
    refused = 0
    for case in range(count):
        draw = random.Random(3_000_000 + case)
        ending = draw.choice(["jpg", "png", "bmp"])
        path = tmp_path / "set" / "a" / f"x.{ending}"
        path.write_bytes(damaged(picture(ending), draw))
        try:
            with no_hang():
                images = data.load(tmp_path / "set", root=tmp_path / "root", image_size=12)
        except ValueError as error:
            assert str(path) in str(error), f"case {case}: {error!r}"
            refused += 1
        else:
            assert sum(len(getattr(images, part)) for part in _folders.SPLITS) == 9
        path.unlink()
    assert refused > 0.2 * count


def test_an_image_that_would_fill_the_memory_is_named(tmp_path):
    import struct
    import zlib

    for label in "ab":
        for i in range(4):
            (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / label / f"{i}.png").write_bytes(picture("png"))

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    blob = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "set" / "a" / "bomb.png").write_bytes(blob)
    with no_hang(), pytest.raises(ValueError, match=r"bomb\.png"):
        data.load(tmp_path / "set", root=tmp_path / "root", image_size=12)
