import itertools
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets

from vitlab import files, models
from vitlab.models import checkpoint
from vitlab.training import _folders, _shapes, _sources, data

COUNTS = {"cat": 20, "dog": 30, "owl": 41}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("VITLAB_HEADLESS", "1")


def write_classes(folder, counts=COUNTS, *, size=(16, 16), mode="RGB", suffix="png", seed=0):
    """Class folders of random pictures, no two alike; size None: sizes vary."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            width, height = size or rng.integers(20, 60, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"image_{i:04d}.{suffix}")
    return folder


def load(folder, **options):
    return data.load(folder, **({"root": folder.parent / "home", "image_size": 16} | options))


@pytest.fixture(scope="module")
def one_tree(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("one") / "tree")


def counts_of(split):
    return torch.bincount(split.labels).tolist()


# Splits


@pytest.mark.parametrize("split_seed", range(6))
def test_one_tree_is_split_70_10_20_disjoint_and_per_class(one_tree, split_seed):
    images = load(one_tree, split_seed=split_seed)
    rows = [getattr(images, part).indices for part in ("train", "val", "test")]
    assert sorted(np.concatenate(rows)) == list(range(91))  # disjoint, and nothing is lost
    assert counts_of(images.train) == [14, 21, 29]
    assert counts_of(images.val) == [2, 3, 4]
    assert counts_of(images.test) == [4, 6, 8]
    again = load(one_tree, split_seed=split_seed)
    assert all(
        (a == getattr(again, p).indices).all() for a, p in zip(rows, _folders.SPLITS, strict=True)
    )


def test_another_split_seed_is_another_split(one_tree):
    assert (load(one_tree).test.indices != load(one_tree, split_seed=1).test.indices).any()


def test_images_and_labels_stay_together(one_tree):
    images = load(one_tree)
    for part in _folders.SPLITS:
        split = getattr(images, part)
        assert split.images.shape == (len(split), 16, 16, 3) and split.images.dtype == np.uint8
        for name, count in COUNTS.items():
            files = [
                np.asarray(Image.open(one_tree / name / f"image_{i:04d}.png")) for i in range(count)
            ]
            mine = split.images[split.labels == images.classes.index(name)]
            assert all(any((image == file).all() for file in files) for image in mine)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (("train",), {"train": [14, 21, 29], "val": [2, 3, 4], "test": [4, 6, 8]}),
        (("train", "test"), {"train": [18, 27, 37], "val": [2, 3, 4], "test": [20, 30, 41]}),
        (("train", "val"), {"train": [16, 24, 33], "val": [20, 30, 41], "test": [4, 6, 8]}),
        (("train", "val", "test"), {part: [20, 30, 41] for part in _folders.SPLITS}),
    ],
)
def test_given_splits_are_used_and_missing_ones_are_taken_from_train(tmp_path, given, sizes):
    for seed, part in enumerate(given):
        write_classes(tmp_path / "tree" / part, size=(8, 8), seed=seed)
    images = load(tmp_path / "tree")
    assert {part: counts_of(getattr(images, part)) for part in _folders.SPLITS} == sizes
    assert not set(images.train.indices) & (set(images.val.indices) | set(images.test.indices))


def test_summary_counts_images_and_classes(one_tree):
    summary = load(one_tree).summary()
    assert summary.loc["train"].to_dict() == {
        "images": 64,
        "classes": 3,
        "smallest_class": 14,
        "largest_class": 29,
    }
    assert list(summary.index) == ["train", "val", "test"]


def test_calibration_images_are_apart_from_those_of_training(one_tree):
    whole, images = load(one_tree), load(one_tree, calibration=6)
    assert whole.apart is None and whole.calibration is whole.train
    assert images.calibration is images.apart and len(images.apart) == 6
    both = np.sort(np.concatenate([images.train.indices, images.apart.indices]))
    assert both.tolist() == whole.train.indices.tolist()
    assert images.apart.labels.unique().tolist() == whole.train.labels.unique().tolist()
    for split in ("val", "test"):
        assert getattr(images, split).identity == getattr(whole, split).identity
    assert (images.train.mean, images.train.std) == (whole.train.mean, whole.train.std)
    assert images.identity["train"] != whole.identity["train"]
    assert "6 apart" in repr(images) and images.summary().loc["apart", "images"] == 6
    again = load(one_tree, calibration=6, split_seed=0)
    assert again.apart.indices.tolist() == images.apart.indices.tolist()
    assert len(load(one_tree, calibration=10**6).apart) == len(whole.train) // 4
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1 training image apart, .* got {count}"):
            load(one_tree, calibration=count)


@pytest.mark.parametrize("n", [1, 3, 10, 32, 64])
@pytest.mark.parametrize("seed", range(3))
def test_subset_keeps_the_proportions(one_tree, n, seed):
    train = load(one_tree).train
    part = train.subset(n, seed=seed)
    assert len(part) == n == len(set(part.indices) & set(train.indices))
    found = torch.bincount(part.labels, minlength=3)
    assert (found - n * torch.tensor([14, 21, 29]) / 64).abs().max() < 1.5
    assert set(part.indices) == set(train.subset(n, seed=seed).indices)
    assert set(part.indices) <= set(train.subset(64, seed=seed).indices)


# Batches


def ramp_split(*, side=32, window=None, image_size=None, count=64):
    """The same picture count times; red holds a pixel's row and green its column."""
    picture = np.zeros((side, side, 3), dtype=np.uint8)
    picture[..., 0] = np.arange(side)[:, None]
    picture[..., 1] = np.arange(side)
    store = np.repeat(picture[None], count, axis=0)
    return data.Split(
        store=store,
        indices=np.arange(count),
        labels=torch.arange(count),
        image_size=image_size or window or side,
        window=window or side,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )


def test_plain_batches_are_the_images_normalised(one_tree):
    split = load(one_tree).train
    x = torch.cat([x for x, _ in split.batches(10)])
    y = torch.cat([y for _, y in split.batches(10)])
    expected = (split.images / 255 - np.array(split.mean)) / np.array(split.std)
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and (y == split.labels).all()
    torch.testing.assert_close(x, torch.from_numpy(expected).float().permute(0, 3, 1, 2))
    assert (
        x.mean(dim=(0, 2, 3)).abs().max() < 1e-5 and (x.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    )


def test_every_image_of_a_batch_has_its_own_offset_and_flip():
    x, _ = next(ramp_split().batches(64, augment=True))
    x = x.round().int()
    down = (x[:, 1, :, 16] - x[:, 1, :, 15])[:, 0]  # columns rise by 1, or fall where mirrored
    assert set(down.tolist()) == {-1, 1}
    middle = {(row, column) for row, column in x[:, :2, 15, 15].tolist()}
    assert len(middle) > 30  # of 9 * 9 offsets, and both flips
    rows = x[:, 0, 15, 15]
    assert rows.min() == 15 - 4 and rows.max() == 15 + 4  # an eighth of the side


def test_border_of_a_crop_is_reflected_and_rows_stay_whole():
    x, _ = next(ramp_split().batches(64, augment={"crop": 5, "flip": False}))
    for image in x.round().int():
        top, left = image[0, 10, 10].item() - 10, image[1, 10, 10].item() - 10
        reflected = [abs(i) if i < 32 else 62 - i for i in range(-5, 37)]
        assert image[0, :, 0].tolist() == reflected[5 + top : 37 + top]
        assert image[1, 0].tolist() == reflected[5 + left : 37 + left]


def test_images_stored_larger_are_cropped_inside():
    split = ramp_split(side=37, window=32)
    x, _ = next(split.batches(64))
    assert (x[:, 0, 0, 0] == 2).all() and (
        x[:, 1, 0, 31] == 33
    ).all()  # the centre, without augmentation
    x, _ = next(split.batches(64, augment={"flip": False}))
    assert set(x[:, 0, 0, 0].tolist()) == {0, 1, 2, 3, 4, 5}
    assert (x[:, 0, 31, 0] - x[:, 0, 0, 0] == 31).all()


@pytest.mark.parametrize("size", [8, 24, 48])
def test_small_images_are_resized_on_the_device(size):
    x, _ = next(ramp_split(image_size=size).batches(4))
    raw = torch.from_numpy(ramp_split().store[:4]).permute(0, 3, 1, 2).float()
    expected = F.interpolate(raw, size, mode="bilinear", antialias=size < 32)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-5)


def test_scale_takes_a_part_of_each_image_and_resizes_it():
    x, _ = next(ramp_split(image_size=24).batches(64, augment={"scale": [0.25, 0.5]}))
    assert x.shape == (64, 3, 24, 24)
    height = (x[:, 0, -1] - x[:, 0, 0]).mean(dim=1) * 24 / 23
    width = (x[:, 1, :, -1] - x[:, 1, :, 0]).mean(dim=1) * 24 / 23
    assert (width < 0).any() and (width > 0).any() and (height > 0).all()
    area, ratio = (height * width).abs() / 32**2, (width / height).abs()
    assert 0.25 - 1e-3 < area.min() < 0.3 and 0.45 < area.max() < 0.5 + 1e-3
    assert 0.75 - 1e-3 < ratio.min() < 0.85 and 1.2 < ratio.max() < 4 / 3 + 1e-3
    whole, _ = next(ramp_split().batches(4, augment={"scale": [1, 1], "flip": False}))
    assert (whole[:, 0].amin(dim=(1, 2)) < 5).all()


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_erase_takes_one_rectangle_from_a_share_of_the_images(share):
    split = ramp_split(count=200)
    split.store[:] = 100
    x, _ = next(split.batches(200, augment={"erase": share}))
    holes = (x[:, 0] == 0).float().mean(dim=(1, 2))
    assert ((holes > 0).float().mean() - share).abs() < 0.12
    assert (holes < 0.45).all()
    for hole in (x[:, 0] == 0)[holes > 0]:
        assert hole.sum() == hole.any(dim=0).sum() * hole.any(dim=1).sum()  # it is a rectangle


def stack(batches):
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


EVERYTHING = {"crop": 2, "flip": True, "erase": 0.5}


@pytest.mark.parametrize("augment", [False, True, EVERYTHING, {"scale": [0.5, 1]}])
def test_an_epoch_is_drawn_again_exactly(one_tree, augment):
    split = load(one_tree).train
    options = {"augment": augment, "shuffle": True, "seed": 3, "epoch": 2}
    first = list(split.batches(15, **options))
    second = list(split.batches(15, **options))
    assert len(first) == len(second) == 5
    for (x, y), (x_again, y_again) in zip(first, second, strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    split = ramp_split()
    draws = {}
    for seed, epoch in itertools.product(range(2), range(2)):
        torch.manual_seed(seed + 7)
        np.random.seed(epoch)
        before = torch.get_rng_state()
        options = {"augment": EVERYTHING, "shuffle": True, "seed": seed, "epoch": epoch}
        draws[seed, epoch] = x, y = stack(split.batches(24, **options))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(0)
        x_again, y_again = stack(split.batches(24, **options))
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
        assert sorted(y.tolist()) == list(range(64))
    for a, b in itertools.combinations(draws.values(), 2):
        assert not torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


@pytest.mark.parametrize("batch_size", [1, 7, 16, 64, 100])
def test_number_of_batches(batch_size):
    split = ramp_split()
    sizes = [len(y) for _, y in split.batches(batch_size)]
    assert sum(sizes) == 64 and len(sizes) == -(-64 // batch_size)
    full = [len(y) for _, y in split.batches(batch_size, drop_last=True)]
    assert full == [batch_size] * (64 // batch_size)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"flipp": True}, "unknown augmentation 'flipp', did you mean 'flip'"),
        ({"crop": 32}, "a border of 0 to 31 pixels; got {'crop': 32}"),
        ({"crop": 4, "scale": [0.5, 1]}, "crop or scale, not both"),
        ({"erase": 25}, r"share of the images in \[0, 1\]; got {'erase': 25}"),
        ({"scale": [1, 0.5]}, "low <= high"),
        ({"scale": [0.5]}, "low <= high"),
        ({"scale": 0.5}, "low <= high"),
    ],
)
def test_wrong_augmentation_is_an_error_before_the_first_batch(augment, message):
    with pytest.raises(ValueError, match=message):
        ramp_split().batches(8, augment=augment)


# Cache


def forbid_decoding(monkeypatch):
    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(_sources, "_decode", fail)


def test_images_are_decoded_once(tmp_path, monkeypatch):
    folder = write_classes(tmp_path / "tree", size=None)
    first = load(folder)
    assert isinstance(first.train.store, np.memmap)
    forbid_decoding(monkeypatch)
    again = load(folder)
    assert (first.train.images == again.train.images).all() and first.train.mean == again.train.mean
    for path in folder.rglob("*.png"):  # other times, same content
        path.touch()
    shutil.move(folder, tmp_path / "elsewhere" / "tree")
    load(tmp_path / "elsewhere" / "tree", root=tmp_path / "home")


@pytest.mark.parametrize("file", ["images.npy", "index.json"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone"])
def test_a_damaged_cache_is_built_again(tmp_path, file, damage):
    folder = write_classes(tmp_path / "tree")
    images = load(folder).train.images
    [path] = (tmp_path / "home" / "cache").glob(f"*/{file}")
    if damage == "gone":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[:-9], "text": b"no cache", "empty": b""}[damage])
    assert (load(folder).train.images == images).all()
    assert not (tmp_path / "home" / "cache" / "building").exists()


def test_changed_content_is_another_cache(tmp_path):
    folder = write_classes(tmp_path / "tree")
    before = load(folder)
    Image.new("RGB", (16, 16), "red").save(folder / "cat" / "image_0000.png")
    after = load(folder)
    assert not any((image == [255, 0, 0]).all() for image in before.train.store)
    assert (after.train.store[0] == [255, 0, 0]).all()


def test_varying_sizes_are_stored_as_squares_a_little_larger_than_the_crop(tmp_path):
    folder = write_classes(tmp_path / "tree", size=None)
    for path in folder.rglob("*.png"):
        image = Image.new(
            "RGB", (90, 30), "black"
        )  # two thirds fall away on centring, and they are white
        image.paste("white", (0, 0, 25, 30))
        image.paste("white", (65, 0, 90, 30))
        image.save(path)
    Image.new("RGB", (40, 70)).save(path)
    split = load(folder, image_size=20).train
    assert split.images.shape[1:] == (23, 23, 3) and split.images.max() == 0
    assert next(split.batches(4))[0].shape == (4, 3, 20, 20)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    folder = write_classes(tmp_path / "tree", mode=mode, suffix=suffix)
    images = load(folder).train.images
    assert images.shape[1:] == (16, 16, 3) and images.std() > 0
    if mode == "L":
        assert (images[..., 0] == images[..., 1]).all() and (images[..., 0] == images[..., 2]).all()


def test_normalise(one_tree):
    ours = load(one_tree).train
    pixels = ours.images / 255
    np.testing.assert_allclose(ours.mean, pixels.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(ours.std, pixels.std(axis=(0, 1, 2)))
    assert load(one_tree, normalise="imagenet").val.mean == (0.485, 0.456, 0.406)
    half = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert load(one_tree, normalise=half).test.std == half[1]
    constant = (half[0], (0.25, 0.0, 0.25))  # nothing can be divided by it
    for unknown in ("image-net", "vit_smal_patch16_224", 0.5, constant):
        with pytest.raises(ValueError, match="'train', 'imagenet', the name of a timm model"):
            load(one_tree, normalise=unknown)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "swin_tiny_patch4_window7_224"])
def test_images_are_normalised_as_weights_of_timm_expect(one_tree, name, capsys):
    config = timm.get_pretrained_cfg(name)
    images = load(one_tree, normalise=name).test
    assert (images.mean, images.std) == (config.mean, config.std)
    assert "0.9 of the side, bicubic; here it is 0.87, bilinear" in capsys.readouterr().out


def test_images_are_shown_in_a_line(one_tree, tmp_path):
    images = data.load(one_tree, root=tmp_path, image_size=16)
    counts = [len(split) for split in (images.train, images.val, images.test)]
    shown = f"Dataset 'tree': {counts[0]} train, {counts[1]} val, {counts[2]} test images, 16 px, "
    assert repr(images) == shown + f"{len(images.classes)} classes"
    assert repr(images.val) == f"Split of {counts[1]} images, 16 px, {len(images.classes)} classes"


def test_images_are_normalised_as_a_checkpoint_says(one_tree, tmp_path):
    model = models.create("conv_vit", num_classes=2, image_size=16, embed_dim=16, depth=1)
    checkpoint.save(model, tmp_path / "new")
    with pytest.raises(ValueError, match="new does not say how its images were normalised"):
        load(one_tree, normalise=tmp_path / "new")
    model.normalise = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    checkpoint.save(model, tmp_path / "trained")
    images = load(one_tree, normalise=str(tmp_path / "trained")).val
    assert (images.mean, images.std) == model.normalise


# Named datasets


def test_root(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path))
    assert files.root() == tmp_path
    monkeypatch.delenv("VITLAB_DATA")
    assert files.root().name == "data" and (files.root().parent / "pyproject.toml").exists()


@pytest.mark.parametrize(
    ("suffix", "description"), [("jpg", "CIFAR-10 (JPEG)"), ("png", "CIFAR-10")]
)
def test_cifar10_as_imagefolder_keeps_its_test_set(tmp_path, monkeypatch, suffix, description):
    for seed, part in enumerate(("train", "test")):
        write_classes(tmp_path / "cifar10" / part, size=(32, 32), suffix=suffix, seed=seed)
    with pytest.raises(
        ValueError,
        match="of the 60000 images of CIFAR-10.*, as after half a download: unpack the whole",
    ):
        data.load("cifar10", root=tmp_path, image_size=64)
    monkeypatch.setitem(
        _sources._WHOLE,
        "cifar10",
        sum(path.is_file() for path in (tmp_path / "cifar10").rglob("*.*")),
    )
    images = data.load("cifar10", root=tmp_path, image_size=64)
    assert images.description == description
    assert counts_of(images.test) == [20, 30, 41] and counts_of(images.val) == [2, 3, 4]
    assert images.train.store.shape == (182, 32, 32, 3)  # native, enlarged batch by batch
    assert next(images.train.batches(5))[0].shape == (5, 3, 64, 64)


def test_cifar10_in_torchvisions_layout(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def stand_in(root, train):  # the real one checks the MD5 of 170 MB
        pixels = rng.integers(0, 256, (200 if train else 40, 32, 32, 3), dtype=np.uint8)
        return types.SimpleNamespace(
            data=pixels, targets=[0, 1] * (len(pixels) // 2), classes=["cat", "dog"]
        )

    monkeypatch.setattr(_sources.datasets, "CIFAR10", stand_in)
    (tmp_path / "cifar-10-batches-py").mkdir()
    images = data.load("cifar10", root=tmp_path, image_size=32)
    assert images.description == "CIFAR-10" and images.classes == ["cat", "dog"]
    assert counts_of(images.train) == [90, 90] and counts_of(images.val) == [10, 10]
    assert images.test.indices.tolist() == list(range(200, 240))


def test_caltech101_is_read_as_torchvision_does(tmp_path, monkeypatch):
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    write_classes(folder, COUNTS | {"BACKGROUND_Google": 7}, size=None, suffix="jpg")
    write_classes(folder, {"gray": 10}, size=(50, 40), mode="L", suffix="jpg")
    leave = (
        len(list((folder / "BACKGROUND_Google").glob("*")))
        if (folder / "BACKGROUND_Google").exists()
        else 0
    )
    monkeypatch.setitem(
        _sources._WHOLE, "caltech101", sum(path.is_file() for path in folder.rglob("*.*")) - leave
    )
    images = data.load("caltech101", root=tmp_path, image_size=20)
    theirs = datasets.Caltech101(tmp_path)
    assert images.classes == theirs.categories == ["cat", "dog", "gray", "owl"]
    total = sum(np.array(counts_of(getattr(images, part))) for part in _folders.SPLITS)
    assert total.tolist() == np.bincount(theirs.y).tolist() == [20, 30, 10, 41]
    assert images.train.store.shape == (101, 23, 23, 3)


# Bad input


@pytest.mark.parametrize(
    ("name", "near"),
    [("cifar-10", "'cifar10'"), ("Caltech", "'caltech101'"), ("shape", "'shapes'")],
)
def test_an_unknown_name_is_answered_with_the_nearest(tmp_path, name, near):
    with pytest.raises(
        ValueError,
        match=f"unknown dataset {name!r}, did you mean {near}.*no folder {Path.cwd() / name} .*its path as its name",
    ):
        data.load(name, root=tmp_path, image_size=32)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "images.zip").touch()
    with pytest.raises(ValueError, match="images.zip is a file: unpack it, and give the folder"):
        data.load(tmp_path / "images.zip", root=tmp_path, image_size=32)


def test_nothing_is_downloaded_that_could_leave_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_sources.datasets, "CIFAR10", lambda *_, **__: pytest.fail("downloaded"))
    monkeypatch.setattr(_sources.datasets.CIFAR10, "__name__", "CIFAR10")
    monkeypatch.delattr("tarfile.data_filter", raising=False)  # which 3.11.2 has not
    with pytest.raises(
        RuntimeError, match=r"no images of CIFAR10 .*within its folder, 3\.11\.4 and newer can"
    ):
        data.load("cifar10", root=tmp_path, image_size=32)


@pytest.mark.parametrize(
    ("name", "place"), [("cifar10", "cifar-10-batches-py"), ("caltech101", "101_ObjectCategories")]
)
def test_missing_images_say_where_to_put_them(tmp_path, monkeypatch, name, place):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("tarfile.data_filter", None, raising=False)
    monkeypatch.setattr(
        _sources.datasets, {"cifar10": "CIFAR10", "caltech101": "Caltech101"}[name], no_network
    )
    monkeypatch.setattr(no_network, "__name__", name, raising=False)
    with pytest.raises(RuntimeError, match=rf"no route to host.*{place}[\s\S]*VITLAB_DATA"):
        data.load(name, root=tmp_path, image_size=32)


@pytest.mark.parametrize("fault", ["truncated", "no image", "empty"])
@pytest.mark.parametrize("size", [(64, 64), None])
def test_a_broken_file_is_named_and_skipped_only_if_asked(tmp_path, fault, size):
    folder = write_classes(tmp_path / "tree", size=size, suffix="jpg")
    bad = folder / "dog" / "image_0003.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(
        {"truncated": whole[: len(whole) // 2], "no image": b"hello", "empty": b""}[fault]
    )
    for _ in range(2):  # decoding, and from the cache
        with pytest.raises(
            ValueError, match=r"1 unreadable.*dog.image_0003.jpg.* data.skip_broken=true"
        ):
            load(folder)
        images = load(folder, skip_broken=True)
        assert images.skipped == ["dog/image_0003.jpg"]
        rows = np.concatenate([getattr(images, part).indices for part in _folders.SPLITS])
        assert sorted(rows) == [i for i in range(91) if i != 23]


def test_an_empty_class_folder_is_named(tmp_path):
    folder = write_classes(tmp_path / "tree")
    (folder / "emu").mkdir()
    (folder / "emu" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="empty class folder.*emu"):
        load(folder)


def test_splits_with_other_classes_or_names_are_errors(tmp_path):
    write_classes(tmp_path / "tree" / "train")
    write_classes(tmp_path / "tree" / "test", {"cat": 2, "dog": 2, "emu": 2})
    with pytest.raises(ValueError, match=r"differ from those of train in \['emu', 'owl'\]"):
        load(tmp_path / "tree")
    shutil.move(tmp_path / "tree" / "test", tmp_path / "tree" / "holdout")
    with pytest.raises(ValueError, match=r"found \['holdout'\]"):
        load(tmp_path / "tree")


def test_too_few_images_or_classes_to_split(tmp_path):
    with pytest.raises(ValueError, match="class 'owl' has 2 image"):
        load(write_classes(tmp_path / "few", COUNTS | {"owl": 2}))
    with pytest.raises(ValueError, match="at least two class folders"):
        load(write_classes(tmp_path / "single", {"cat": 9}))


def test_a_cache_that_cannot_be_written_says_which_and_what_to_do(tmp_path):
    folder = write_classes(tmp_path / "tree")
    (tmp_path / "home").write_text(
        "a file where the folder should be, which stops even an administrator"
    )
    with pytest.raises(PermissionError, match="cannot write to .*home.cache.*VITLAB_DATA"):
        load(folder)


def test_a_batch_has_an_image():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ramp_split().batches(0)


def test_sizes(one_tree):
    with pytest.raises(ValueError, match="at least 1; got 0"):
        load(one_tree, image_size=0)
    for n in (0, 65):
        with pytest.raises(ValueError, match="1 to 64 images"):
            load(one_tree).train.subset(n)


# The real images, where they are


@pytest.mark.parametrize(
    ("name", "place", "sizes", "classes"),
    [
        ("cifar10", "cifar10/train", {"train": 45000, "val": 5000, "test": 10000}, 10),
        (
            "caltech101",
            "caltech101/101_ObjectCategories",
            {"train": 6073, "val": 868, "test": 1736},
            101,
        ),
    ],
)
def test_real_images_are_found_and_split(name, place, sizes, classes):
    if not (files.root() / place).is_dir():
        pytest.skip(f"the real images are not under {files.root() / place}")
    found = _sources.find(name, files.root())
    parts = data._split(found, np.ones(len(found.labels), dtype=bool), seed=0)
    assert {part: len(rows) for part, rows in parts.items()} == sizes
    assert len(np.unique(np.concatenate(list(parts.values())))) == sum(sizes.values())
    assert len(found.classes) == classes and "BACKGROUND_Google" not in found.classes
    for rows in parts.values():
        assert len(np.unique(found.labels[rows])) == classes


def test_a_trial_takes_a_stratified_few_of_each_split(tmp_path):
    _shapes.make(tmp_path / "tree", per_class=(6, 2, 3), image_size=16)
    whole = data.load(tmp_path / "tree", root=tmp_path, image_size=16)
    few = data.load(tmp_path / "tree", root=tmp_path, image_size=16, images=20)
    assert [len(split) for split in (few.train, few.val, few.test)] == [20, 20, 20]
    assert set(torch.bincount(few.train.labels).tolist()) <= {1, 2, 3} and len(whole.train) == 60


def test_the_identity_of_a_split_changes_with_what_its_batches_show(tmp_path):
    _shapes.make(tmp_path / "tree", per_class=(6, 2, 3), image_size=16)

    def identity(**options):
        return data.load(
            tmp_path / "tree", root=tmp_path, **{"image_size": 16, **options}
        ).train.identity

    assert identity() == identity()
    assert (
        len(
            {
                identity(),
                identity(image_size=32),
                identity(normalise="imagenet"),
                identity(images=30),
            }
        )
        == 4
    )
