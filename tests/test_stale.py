"""What an earlier notebook left is compared with the study, its images and its weights of now."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vitlab import files, models
from vitlab.studies import notebooks, results, runs, settings
from vitlab.training import data, train

ROW = {"method": "dense", "stage": "dense", "top1": 90.0}


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A study of one's own, with images and weights beside its file, and functions to change it."""
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path / "data"))
    folder = tmp_path / "mine"
    for number in range(30):
        draw(folder / "images" / "abc"[number % 3] / f"{number:02}.png", number)
    (folder / "dense.pth").write_bytes(b"weights")
    values = yaml.safe_load((files.repository() / "notebooks/params/demo.yaml").read_text())
    values["data"] |= {"name": "images", "image_size": 16}
    values["models"]["vit"]["weights"] = "dense.pth"

    def edit(section, **changes):
        values[section] |= changes
        (folder / "mine.yaml").write_text(yaml.safe_dump(values))

    def lab(**override):
        return runs.open_run(folder / "mine.yaml", "vit", 0, override)

    def keep(folder, record):
        files.write_atomic(folder / "model.json", json.dumps({"extra": record}))

    def trained():
        """Leave what notebook 1 leaves, and return the images that it saw."""
        images = data.load(**lab().data)
        keep(lab().path("dense"), lab().record(lab().training(), images))
        lab().save_results("1_train", [ROW], identity=images.identity)
        return images

    edit("data")
    return SimpleNamespace(folder=folder, edit=edit, lab=lab, keep=keep, trained=trained)


def pictures(split):
    return {image.tobytes() for image in split.images}


# -- paths


def test_paths_begin_at_the_file_of_the_study_in_a_cell_without_a_screen_and_in_the_graph(
    mine, monkeypatch, tmp_path
):
    images, weights = mine.folder / "images", mine.folder / "dense.pth"
    assert mine.lab().data["name"] == str(images) and mine.lab().model["weights"] == str(weights)
    assert mine.lab().origin["data"]["name"] == "images", "as it is written"
    given = {}

    def execute(path, running, parameters, **options):
        given.update(parameters)
        running.touch()

    monkeypatch.setattr("papermill.execute_notebook", execute)
    monkeypatch.chdir(mine.folder)
    assert runs.open_run("mine.yaml", "vit").data["name"] == str(images)
    assert settings.find("mine.yaml", "images") == images
    notebook = notebooks._find_notebook("1_train")
    notebooks._execute(notebook, {"study": "mine.yaml"}, out=tmp_path / "out.ipynb")
    monkeypatch.chdir(notebook.parent)  # where the kernel works
    assert runs.open_run(given["study"], "vit").data["name"] == str(images)
    for name in ("./images", "../mine/images", str(images)):
        assert settings.find(given["study"], name) == images


def test_a_path_that_leads_nowhere_says_where_it_was_sought(mine):
    mine.edit("data", name="imagse")
    places = f"{mine.folder / 'imagse'} or {files.repository() / 'imagse'}"
    with pytest.raises(FileNotFoundError, match=f"unknown dataset 'imagse'.*no {places}"):
        _ = mine.lab().data
    (mine.folder / "dense.pth").unlink()
    with pytest.raises(FileNotFoundError, match=str(mine.folder / "dense.pth")):
        _ = mine.lab().model


def test_a_known_dataset_comes_before_a_folder_of_its_name_and_the_repository_last(mine):
    (mine.folder / "shapes").mkdir()
    for name, found in [
        ("shapes", "shapes"),
        ("./shapes", str(mine.folder / "shapes")),
        ("notebooks/params", str(files.repository() / "notebooks/params")),
    ]:
        mine.edit("data", name=name)
        assert mine.lab().data["name"] == found
    assert runs.open_run("demo", override={"data.name": "notebooks"}).data["name"] == str(
        files.repository() / "notebooks"
    )


def test_a_study_knows_the_datasets_that_can_be_loaded():
    with pytest.raises(ValueError, match=f"Known are {', '.join(sorted(settings.DATASETS))}"):
        data.load("no such set", image_size=16)


# -- what is left


def remove_one(mine):
    next((mine.folder / "images" / "b").iterdir()).unlink()


def add_class(mine):
    for number in range(10):
        draw(mine.folder / "images" / "frog" / f"{number}.png", 100 + number)


def swap_weights(mine):
    (mine.folder / "dense.pth").write_bytes(b"WEIGHTS")


WAYS = {  # what happens after notebook 1, and the words that notebooks 2 to 5 stop with
    "nothing": (lambda mine: None, None),
    "another cut": (lambda mine: mine.edit("budget", epochs=3), None),
    "a hidden file": (lambda mine: draw(mine.folder / "images" / ".a.png", 9), None),
    "split_seed": (lambda mine: mine.edit("data", split_seed=1), "data.split_seed: 0 then, 1 now"),
    "image_size": (lambda mine: mine.edit("data", image_size=8), "data.image_size: 16 then, 8 now"),
    "fewer images": (lambda mine: mine.edit("data", images=6), r"images.train: '16 images.*'5 im"),
    "depth": (
        lambda mine: mine.edit("models", vit={"name": "conv_vit", "depth": 6}),
        "model.depth: 3 then, 6 now",
    ),
    "epochs": (lambda mine: mine.edit("train", epochs=40), "settings.epochs: 6 then, 40 now"),
    "image added": (lambda mine: draw(mine.folder / "images/a/x.png", 99), "images.content: 'im"),
    "image replaced": (lambda mine: draw(mine.folder / "images/a/00.png", 99), "images.content"),
    "image removed": (remove_one, "images.content: 'images-"),
    "class added": (add_class, "images.classes: 3 then, 4 now"),
    "weights replaced": (swap_weights, "weights: '"),
}


@pytest.mark.parametrize("way", [*WAYS, "split_seed, overridden", "image added, overridden"])
def test_no_path_leads_to_a_test_image_that_was_trained_on(mine, way):
    way, _, overridden = way.partition(", ")
    change, words = WAYS[way]
    override = {"budget.epochs": 2} if overridden else {}
    seen = pictures(mine.trained().train)
    change(mine)
    lab = mine.lab(**override)
    images = data.load(**lab.data)
    if words is None:
        assert lab.need("dense", "1_train", images) == mine.lab().path("dense")
        assert not seen & pictures(images.test)
        return
    with pytest.raises(ValueError, match=words) as error:
        lab.need("dense", "1_train", images)
    assert "vitlab run 1_train --study" in str(error.value)
    assert "dense is of another study, or of other images" in str(error.value)
    mine.trained()
    assert lab.need("dense", "1_train", images).is_dir(), "after notebook 1 has run again"


def test_an_override_of_the_images_has_a_dense_model_of_its_own(mine):
    mine.trained()
    with pytest.raises(FileNotFoundError, match="run notebooks/1_train.ipynb first"):
        mine.lab(**{"data.split_seed": 1}).need("dense", "1_train")


def test_a_record_from_before_images_were_kept_is_compared_by_its_values(mine):
    mine.trained()
    lab = mine.lab()
    record = lab.record(lab.training())
    assert record.keys() == {"settings", "values", "weights"}
    mine.keep(lab.path("dense"), {name: record[name] for name in ("settings", "values")})
    draw(mine.folder / "images" / "a" / "x.png", 99)
    assert lab.need("dense", "1_train", data.load(**lab.data))
    mine.edit("data", split_seed=1)
    with pytest.raises(ValueError, match="values.data.split_seed"):
        mine.lab().need("dense", "1_train")
    (mine.folder / "dense.pth").unlink()  # what a trained model started from may go
    mine.edit("data", split_seed=0)
    assert mine.lab().need("dense", "1_train")


def test_results_of_other_values_or_images_than_the_dense_model_are_refused(mine):
    images = mine.trained()
    mine.lab().save_results("5_budget", [ROW], identity=images.identity)
    assert len(mine.lab().load_results("5_budget")) == 1
    mine.edit("budget", shares=[0.3])
    with pytest.raises(ValueError, match=r"5_budget.csv .*\n  budget.shares: \[0.5\] then, \[0.3"):
        mine.lab().load_results("5_budget")
    assert len(mine.lab().load_results("1_train")) == 1, "it has no use for budgets"
    mine.edit("budget", shares=[0.5])
    draw(mine.folder / "images" / "a" / "x.png", 99)
    mine.trained()
    with pytest.raises(ValueError, match="images.content(.|\n)*run 5_budget --study"):
        mine.lab().load_results("5_budget")


@pytest.mark.parametrize("number", range(2, 7))
def test_each_notebook_that_reads_a_model_compares_its_images(number):
    [path] = (files.repository() / "notebooks").glob(f"{number}_*.ipynb")
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    loaded = "data.load(**lab.data)"
    assert loaded in source
    assert 'lab.need("dense", "1_train", images)' in source.replace(loaded, "images")


def test_a_report_says_which_values_its_results_were_not_made_with(mine):
    images = mine.trained()
    mine.lab().save_results("5_budget", [ROW], identity=images.identity)
    study = mine.folder / "mine.yaml"
    assert results.read(study).changes == []
    mine.edit("budget", shares=[0.3])
    mine.edit("efficiency", rounds=3)  # which no result has used
    assert results.read(study).changes == ["budget.shares: [0.5] then, [0.3] now"]


def test_a_published_checkpoint_of_other_images_is_not_taken(mine, monkeypatch):
    images = mine.trained()
    lab = mine.lab()
    monkeypatch.setattr(files, "repository", lambda: mine.folder)
    shipped = mine.folder / "checkpoints" / "mine" / "vit"
    mine.keep(shipped, lab.record(lab.training(), images))
    assert lab.shipped(lab.training(), images) == shipped
    draw(mine.folder / "images" / "a" / "x.png", 99)
    assert lab.shipped(lab.training(), data.load(**lab.data)) is None


def test_weights_that_have_seen_another_split_of_the_images_are_refused(mine):
    images = mine.trained()
    other = mine.folder / "other"
    mine.keep(other, mine.lab().record(mine.lab().training(), images))
    (other / "model.safetensors").write_bytes(b"")
    mine.edit("models", vit={"name": "conv_vit", "weights": "other"})
    assert mine.lab().record({}, images)["weights"]
    mine.edit("data", split_seed=1)
    lab = mine.lab()
    with pytest.raises(ValueError, match="has seen another split .*\n  split_seed: 0 then, 1 now"):
        lab.record(lab.training(), data.load(**lab.data))
    (mine.folder / "images").rename(mine.folder / "photos")  # the same images
    mine.edit("data", name="photos")
    lab = mine.lab()
    with pytest.raises(ValueError, match="has seen another split"):
        lab.record(lab.training(), data.load(**lab.data))
    mine.edit("data", split_seed=0)
    lab = mine.lab()
    assert lab.record(lab.training(), data.load(**lab.data))["weights"]


def test_weights_of_unknown_training_with_a_kept_head_warn_of_a_test_split_that_is_drawn(mine):
    lab, images = mine.lab(), data.load(**mine.lab().data)
    kept, new = SimpleNamespace(is_head_new=False), SimpleNamespace(is_head_new=True)
    words = r"dense.pth may have learnt from .* test images \(6 images taken from images/ here\)"
    with pytest.warns(UserWarning, match=words):
        lab.record({}, images, kept)
    lab.record({}, images, new)  # warnings are errors here
    lab.record({}, replace(images, drawn={"val": "3 images"}), kept)
    mine.keep(mine.folder, lab.record(lab.training(), images))  # as of a vitlab checkpoint
    lab.record({}, images, kept)


def test_a_training_does_not_go_on_with_other_images(mine):
    def key():
        torch.manual_seed(0)
        images = data.load(**mine.lab().data)
        sizes = {"embed_dim": 8, "depth": 1, "num_heads": 1, "stem_widths": [4, 4]}
        model = models.create("conv_vit", num_classes=3, image_size=16, **sizes)
        recipe = {"epochs": 1, "lr": 0.001, "warmup_epochs": 0}
        train.fit(model, images.train, images.val, recipe, folder=mine.folder / "training")
        state = torch.load(mine.folder / "training" / "dense.state.pt", weights_only=True)
        return state["key"]

    before = key()
    assert key() == before
    draw(mine.folder / "images" / "a" / "x.png", 99)
    assert key() != before


# -- what tells files from others


def test_a_fingerprint_changes_with_each_file_but_not_with_hidden_ones_or_its_place(tmp_path):
    folder = tmp_path / "a"
    for name in ("x/1.png", "x/2.png", "y/z/3.png"):
        draw(folder / name, 0)
    before = files.fingerprint(folder)
    draw(folder / ".hidden" / "4.png", 0)
    draw(folder / "x" / ".5.png", 0)
    folder = folder.rename(tmp_path / "b")
    assert files.fingerprint(folder) == before
    seen = {before}
    draw(folder / "x" / "6.png", 0)
    seen.add(files.fingerprint(folder))
    os.utime(folder / "y" / "z" / "3.png", ns=(0, 0))
    seen.add(files.fingerprint(folder))
    (folder / "x" / "1.png").rename(folder / "x" / "7.png")
    seen.add(files.fingerprint(folder))
    assert len(seen) == 4
    one = files.fingerprint(folder / "x" / "6.png")
    os.utime(folder / "x" / "6.png", ns=(0, 0))
    assert files.fingerprint(folder / "x" / "6.png") == one, "of a file its content counts"


def test_the_identity_of_images_is_that_of_files_and_splits_whatever_the_size(mine):
    def identity(**changes):
        return data.load(**mine.lab().data | changes).identity

    one = identity()
    assert identity(image_size=32) == identity(normalise="imagenet") == one
    assert {one["classes"], one["train"][:9]} == {3, "16 images"}
    other = identity(split_seed=1)
    assert other["content"] == one["content"] and other["test"] != one["test"]
    assert identity(images=3)["train"].startswith("2 images")  # one is apart for calibration
