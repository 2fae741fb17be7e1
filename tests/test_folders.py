"""Folders of images: the same images in any layout are the same splits, or the layout is refused."""

import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_data import write_classes

from vitlab.training import _folders, data

COUNTS = {"cat": 10, "dog": 12, "owl": 14}
ALL = sum(COUNTS.values())


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("VITLAB_HEADLESS", "1")


def load(folder, **options):
    options = {"root": folder.parent / "home", "image_size": 16} | options
    return data.load(folder, **options)


def content(images):
    """Return what a model sees of a dataset: class names, and images and labels of each split."""
    seen = [images.classes]
    for part in _folders.SPLITS:
        split = getattr(images, part)
        seen.append((split.images.tobytes(), split.labels.tolist(), split.mean, split.std))
    return seen


def tree(folder, counts=COUNTS, seed=0):
    """Write class folders whose file names are unlike in all classes, so that they can be mixed."""
    write_classes(folder, counts, seed=seed)
    for path in folder.rglob("*.png"):
        path.rename(path.with_name(f"{path.parent.name}{path.name[5:]}"))
    return folder


def flatten(folder, into, *, ending=True):
    """Put all images of class folders into one folder, and return the rows of their table."""
    into.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in sorted(folder.rglob("*.png")):
        rows.append((path.name if ending else path.stem, path.parent.name))
        shutil.copy(path, into)
    return pd.DataFrame(rows, columns=["image", "label"]).sample(frac=1, random_state=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("source") / "set")


# Splits


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "TEST"), ("training", "testing"), ("training_set", "test_set")]
)
def test_splits_by_other_names_are_splits(tmp_path, train, test):
    for names in (("train", "val", "test"), (train, "Valid", test)):
        for seed, name in enumerate(names):
            tree(tmp_path / names[0] / "set" / name, seed=seed)
    expected = load(tmp_path / "train" / "set")
    images = load(tmp_path / train / "set")
    assert content(images) == content(expected) and len(images.test) == ALL
    assert f"{test}/ is test" in images.layout and "is train" not in expected.layout
    assert "taken from" not in images.layout and not images.drawn
    shutil.rmtree(tmp_path / train / "set" / test)
    images = load(tmp_path / train / "set")
    assert images.layout.endswith(f"; test: {len(images.test)} images taken from {train}/")
    assert [*images.drawn] == ["test"] and len(images.test) == 7


def test_splits_that_could_be_two_are_refused(tmp_path):
    for name in ("train", "val", "dev"):
        tree(tmp_path / "set" / name)
    with pytest.raises(ValueError, match=r"which one is val\? found \['dev', 'val'\]"):
        load(tmp_path / "set")


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("test", "val"), ("a", "b", "c")])
def test_folders_that_hold_the_same_folders_are_no_classes(tmp_path, names):
    for name in names:
        tree(tmp_path / "set" / name)
    words = r"all hold folders \['cat', 'dog', 'owl'\] .* name them train, val and test"
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "set")
    assert not list((tmp_path / "home").rglob("images.npy"))


def test_a_class_may_be_called_train(tmp_path):
    images = load(tree(tmp_path / "set", {"bus": 9, "train": 8}))
    assert images.classes == ["bus", "train"] and len(images.test) == 4


# Depth


@pytest.mark.parametrize("outer", ["archive", "archive/data", "set"])
def test_a_tree_below_folders_that_hold_nothing_else_is_read(tmp_path, source, outer):
    shutil.copytree(source, tmp_path / "mine" / outer)
    (tmp_path / "mine" / "readme.txt").write_text("images of animals")
    images = load(tmp_path / "mine")
    assert content(images) == content(load(source)) and f"read from {outer}/" in images.layout


def test_splits_that_hold_themselves_once_more_are_read(tmp_path):
    for part in ("training_set", "test_set"):
        tree(tmp_path / "set" / part / part)
    images = load(tmp_path / "set")
    assert images.classes == [*COUNTS] and len(images.test) == ALL


def test_images_deeper_in_a_class_are_found(tmp_path, source):
    mine = shutil.copytree(source, tmp_path / "mine")
    for name in COUNTS:
        shutil.move(mine / name, tmp_path / "part")
        shutil.move(tmp_path / "part", mine / name / "images")
    assert content(load(mine)) == content(load(source))


# What counts as an image


def test_hidden_copies_never_count(tmp_path, source):
    mine = shutil.copytree(source, tmp_path / "set")
    before = load(mine)
    for inside in (mine, mine / "cat", mine / "dog"):
        for name in (".ipynb_checkpoints", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"):
            shutil.copytree(source / "owl", inside / name / "deeper")
        (inside / "._cat_0000.png").write_bytes(b"no image")
    after = load(mine)
    assert content(after) == content(before) and after.layout == before.layout
    assert after.test.identity == before.test.identity


def test_adding_a_file_changes_the_identity_and_what_is_no_image_does_not(tmp_path, source):
    mine = shutil.copytree(source, tmp_path / "set")
    before = load(mine)
    (mine / "cat" / "notes.txt").write_text("no image")
    (mine / "cat" / "phone.heic").write_bytes(b"none that Pillow reads")
    noted = load(mine)
    assert noted.train.identity == before.train.identity
    assert noted.description == before.description == "ImageFolder set"
    taken = "val: 3 images taken from set/; test: 7 images taken from set/"
    assert before.layout == f"36 images (36 .png); {taken}"
    assert noted.layout == f"36 images (36 .png); left out: 1 .heic, 1 .txt; {taken}"
    Image.new("RGB", (16, 16)).save(mine / "cat" / "new.png")
    assert load(mine).train.identity != before.train.identity


@pytest.mark.parametrize("ending", ["jfif", "JPE", "gif", "webp", "avif", "ico", "tga"])
def test_whatever_pillow_reads_is_read(tmp_path, source, ending):
    if f".{ending}".lower() not in Image.registered_extensions():
        pytest.skip("this Pillow has not learnt it")
    mine = shutil.copytree(source, tmp_path / "set")
    for path in sorted((mine / "cat").iterdir())[::2]:
        Image.open(path).save(path.with_suffix(f".{ending}"))
        path.unlink()
    images = load(mine)
    assert len(images.train) + len(images.val) + len(images.test) == ALL
    assert f"31 .png, 5 .{ending.lower()}" in images.layout


def test_a_class_without_images_says_what_it_holds(tmp_path, source):
    mine = shutil.copytree(source, tmp_path / "set")
    for path in (mine / "cat").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"empty class folder.*cat has no.*only 10 \.heic"):
        load(mine)


# Tables of labels


@pytest.mark.parametrize(("place", "ending"), [("images", True), ("photos", False), (".", True)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("labels.csv", {}),
        ("labels.csv", {"header": False, "sep": ";"}),
        ("labels.tsv", {"sep": "\t"}),
        ("labels.txt", {"header": False, "sep": " "}),
    ],
)
def test_a_table_of_labels_is_as_good_as_class_folders(
    tmp_path, source, place, name, options, ending
):
    mine = tmp_path / "mine"
    rows = flatten(source, mine / place, ending=ending)
    rows.to_csv(mine / name, index=False, **options)
    (mine / "readme.txt").write_text("Images of animals,\nby us, of cats, dogs and owls")
    (mine / "sample_submission.csv").write_text(rows.assign(label="cat").to_csv(index=False))
    images = load(mine)
    assert content(images) == content(load(source)) and f"from {name}" in images.layout


def test_other_labels_over_the_same_images_are_other_splits(tmp_path, source):
    mine = tmp_path / "mine"
    rows = flatten(source, mine)
    rows.to_csv(mine / "labels.csv", index=False)
    before = load(mine)
    rows.loc[rows.image == "cat_0003.png", "label"] = "owl"
    rows.to_csv(mine / "labels.csv", index=False)
    after = load(mine)
    assert after.train.identity != before.train.identity
    pixels = after.train.images / 255  # moments are of these rows, not of those before
    np.testing.assert_allclose(after.train.mean, pixels.mean(axis=(0, 1, 2)))


def test_the_column_of_classes_is_the_one_that_says_so(tmp_path, source):
    mine = tmp_path / "mine"
    rows = flatten(source, mine / "images")
    rows = rows.assign(width=16, camera="K1", path="images/" + rows.image)
    rows = rows.rename(columns={"label": "Class_Name"})[["width", "path", "camera", "Class_Name"]]
    rows.to_csv(mine / "labels.csv", index=False)
    assert content(load(mine)) == content(load(source))
    rows.rename(columns={"Class_Name": "kind"}).to_csv(mine / "labels.csv", index=False)
    with pytest.raises(ValueError, match=r"found \['width', 'camera', 'kind'\]: call it label"):
        load(mine)


def test_splits_may_have_a_table_each_or_share_one(tmp_path, source):
    expected = tmp_path / "folders"
    other = tree(tmp_path / "other", seed=1)
    for path in other.rglob("*.png"):
        path.rename(path.with_stem(f"{path.stem}x"))
    sources = {"train": source, "val": other}
    for part in sources:
        shutil.copytree(sources[part], expected / part)
    for way in ("inside", "beside", "shared"):
        mine = tmp_path / way
        tables = {part: flatten(sources[part], mine / part) for part in sources}
        if way == "shared":
            tables = {"": pd.concat(tables.values())}
        for part, rows in tables.items():
            name = f"{part}/labels.csv" if way == "inside" else f"{part}_labels.csv"
            name = "labels.csv" if way == "shared" else name
            rows.to_csv(mine / name, index=False)
        images = load(mine)
        assert content(images) == content(load(expected))


def test_a_table_of_train_is_not_taken_for_images_of_test_that_are_called_alike(tmp_path, source):
    mine = tmp_path / "mine"
    flatten(source, mine / "test")
    flatten(source, mine / "train").to_csv(mine / "labels.csv", index=False)
    with pytest.raises(ValueError, match=r"labels.csv names images of two splits alike.*\.png"):
        load(mine)
    (mine / "labels.csv").rename(mine / "train_labels.csv")
    images = load(mine)
    assert len(images.test) == 7 and "test/ is left out" in images.layout


def test_tiny_imagenet_is_read_as_it_is_unzipped(tmp_path, source):
    mine = tmp_path / "tiny-imagenet-200"
    for name in COUNTS:
        shutil.copytree(source / name, mine / "train" / name / "images")
        (mine / "train" / name / f"{name}_boxes.txt").write_text("a_0.JPEG\t0\t0\t63\t63")
    rows = flatten(source, mine / "val" / "images").assign(x=0, y=32, width=44, height=62)
    rows.to_csv(mine / "val" / "val_annotations.txt", sep="\t", header=False, index=False)
    flatten(source, mine / "test" / "images")
    (mine / "words.txt").write_text("cat\tan animal\ndog\tanother")
    images = load(mine)
    assert images.classes == [*COUNTS] and len(images.val) == ALL
    assert [len(images.train), len(images.test)] == [29, 7]  # test is of train, class by class
    assert "test/ is left out, nothing says its labels" in images.layout
    assert "labels of val/images/ from val_annotations.txt" in images.layout
    assert "left out: 3 .txt" in images.layout
    for split in (images.train, images.val, images.test):
        assert set(split.labels.tolist()) == {0, 1, 2}


def without(mine, rows):
    next(mine.glob("*.png")).unlink()


def unlabelled(mine, rows):
    rows[1:].to_csv(mine / "labels.csv", index=False)


def second(mine, rows):
    rows.to_csv(mine / "more.csv", index=False)


def contradiction(mine, rows):
    rows = pd.concat([rows, rows[:1].assign(label="emu")])
    rows.to_csv(mine / "labels.csv", index=False)


def empty(mine, rows):
    rows.assign(label=["", *rows.label[1:]]).to_csv(mine / "labels.csv", index=False)


def broken(mine, rows):
    (mine / "labels.csv").write_text("image,label\na,b,c,d\n")


def gone(mine, rows):
    (mine / "labels.csv").unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without, r"labels.csv has labels of 1 images that are not there: the first is '\w+.png'"),
        (unlabelled, r"1 images of .*mine have no label in .*labels.csv, the first is \w+.png"),
        (second, r"several tables name its images, \['labels.csv', 'more.csv'\]"),
        (contradiction, r"labels.csv gives 1 images two classes, the first is \w+.png"),
        (empty, r"1 images of .*mine have no label in .*labels.csv"),
        (broken, r"labels.csv cannot be read as a table"),
        (gone, r"mine: at least two class folders are needed, found \[\]; or beside the images"),
    ],
)
def test_a_table_that_does_not_fit_its_images_is_named(tmp_path, source, fault, message):
    mine = tmp_path / "mine"
    rows = flatten(source, mine)
    rows.to_csv(mine / "labels.csv", index=False)
    fault(mine, rows)
    with pytest.raises(ValueError, match=message):
        load(mine)
    assert not list((tmp_path / "home").rglob("images.npy"))


def test_flat_images_without_labels_are_refused_in_a_few_words(tmp_path, source):
    mine = tmp_path / "mine"
    tree(mine / "train", {f"class{i:03}": 1 for i in range(60)})
    flatten(source, mine / "val")
    with pytest.raises(ValueError, match="val: at least two class folders.*one table") as error:
        load(mine)
    assert len(str(error.value)) < 400
    shutil.rmtree(mine / "val")
    tree(mine / "val", COUNTS)
    with pytest.raises(ValueError, match="differ from those of train in .* and 54 more") as error:
        load(mine)
