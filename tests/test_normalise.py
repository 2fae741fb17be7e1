"""Tests that images are normalised as a model's weights expect."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.models.vision_transformer import VisionTransformer

from vitlab import models
from vitlab.evaluation import evaluate
from vitlab.models import _weights, checkpoint
from vitlab.pruning import budget, recover, scores, shrink
from vitlab.studies import runs, settings
from vitlab.training import data, train

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NAME = "vit_tiny_patch16_224"  # timm: mean and deviation 0.5
RECIPE = {"epochs": 1, "lr": 1e-3, "warmup_epochs": 0}
SIZES = {"patch_size": 8, "embed_dim": 24, "depth": 1}
SMALL = {"num_classes": 10, "image_size": 32, **SIZES}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight images of each split of the drawn set, by mean and deviation of train."""
    rng = torch.Generator().manual_seed(0)
    store = torch.randint(0, 256, (8, 32, 32, 3), generator=rng, dtype=torch.uint8).numpy()
    labels = torch.arange(8) % 10
    ours = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    return data.Split(store, torch.arange(8).numpy(), labels, 32, 32, *ours)


@pytest.fixture
def pretrained(tmp_path):
    """A model with weights from a folder that says what they expect."""
    source = models.create(NAME, **SMALL)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    said = {"image_mean": HALF[0], "image_std": HALF[1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    return models.create(NAME, weights=tmp_path / "weights.pth", **SMALL)


def test_other_images_than_the_weights_expect_are_refused(pretrained, images):
    both = r"expect images normalised by mean \[0.5, .* and these are by \[0.4, 0.5, 0.6\]"
    with pytest.raises(ValueError, match=both):
        evaluate.accuracy(pretrained, images)
    with pytest.raises(ValueError, match=both):
        train.fit(pretrained, images, images, RECIPE)
    batches = list(images.batches(8))
    for call in (
        lambda: scores.loss(pretrained, batches),
        lambda: scores.grams(pretrained, batches),
        lambda: budget.reach(pretrained, batches, params=0.5),
        lambda: recover.reconstruct(pretrained, pretrained, batches),
    ):
        with pytest.raises(ValueError, match=both):
            call()
    own = replace(images, mean=HALF[0], std=HALF[1])
    evaluate.accuracy(pretrained, own)
    assert scores.loss(pretrained, own.batches(8)) > 0


def test_a_cut_and_saved_model_expects_what_it_did(pretrained, images, tmp_path):
    small = shrink.remove(pretrained, {("blocks.0", "heads"): [0]})
    checkpoint.save(small, tmp_path / "small")
    loaded = checkpoint.load(tmp_path / "small")
    assert pretrained.normalise == small.normalise == loaded.normalise == HALF
    assert _weights.expected(NAME, tmp_path / "small") == (HALF, False)
    with pytest.raises(ValueError, match="data.normalise: weights"):
        evaluate.accuracy(loaded, images)


def test_a_new_model_expects_what_it_is_trained_on(images):
    model = models.create("conv_vit", num_classes=10, image_size=32, embed_dim=16, depth=1)
    assert model.normalise is None  # nothing is known of new weights, and any images do
    train.fit(model, images, images, RECIPE)
    assert model.normalise == (images.mean, images.std)
    with pytest.raises(ValueError, match="normalised by mean"):
        evaluate.accuracy(model, replace(images, mean=HALF[0]))


def test_other_images_on_purpose(pretrained, images, tmp_path):
    own = models.create(NAME, weights=tmp_path / "weights.pth", normalise="train", **SMALL)
    evaluate.accuracy(own, images)
    train.fit(own, images, images, RECIPE)
    assert own.normalise == (images.mean, images.std)


@pytest.mark.parametrize("study", ["cifar10", "caltech101"])
def test_each_model_of_a_shipped_study_has_what_its_weights_expect(study):
    for model, options in settings.study(study).models.items():
        assert runs.open_run(study, model).data["normalise"] == options.name


@pytest.mark.parametrize("study", ["cifar10-small", "caltech101-small", "demo"])
def test_published_studies_have_the_moments_of_train(study):
    for model in settings.study(study).models:
        lab = runs.open_run(study, model)
        assert lab.data["normalise"] == lab.origin["data"]["normalise"] == "train"


def test_a_model_of_a_study_may_have_its_own_word():
    lab = runs.open_run("cifar10", "vit", override={"models.vit.pretrained": False})
    assert lab.data["normalise"] == "train"  # there are no weights
    assert runs.open_run("cifar10").data["normalise"] == "train"  # nor a model


def test_a_word_of_ones_own_is_the_models(tmp_path):
    study = (settings.files.repository() / "notebooks" / "params" / "cifar10.yaml").read_text()
    own = "    name: vit_small_patch16_224\n    normalise: imagenet\n"
    path = tmp_path / "own.yaml"
    path.write_text(study.replace("    name: vit_small_patch16_224\n", own))
    lab = runs.open_run(str(path), "vit")
    assert lab.data["normalise"] == lab.model["normalise"] == "imagenet"
    assert runs.open_run(str(path), "swin").data["normalise"] == "swin_tiny_patch4_window7_224"


# -- files that do not say


@pytest.fixture
def unsaid(tmp_path):
    """The path of weights whose file says nothing, under a name that timm has weights of."""
    torch.save(models.create(NAME, **SMALL).state_dict(), tmp_path / "own.ckpt")
    return tmp_path / "own.ckpt"


def normalise_of(lab):
    return lab._normalise(lab.params.data.normalise)


def study_with(folder, *, normalise, **model):
    """Return the run of a study file with one ViT, whose images lie nowhere."""
    values = yaml.safe_load(
        (settings.files.repository() / "notebooks/params/demo.yaml").read_text()
    )
    values["data"]["normalise"] = normalise
    values["models"] = {"vit": {"name": NAME, **model}}
    (folder / "own.yaml").write_text(yaml.safe_dump(values))
    return runs.open_run(folder / "own.yaml", "vit")


def test_a_guess_is_called_one_and_a_word_of_the_study_comes_before_it(unsaid, images, capsys):
    model = models.create(NAME, weights=unsaid, **SMALL)
    assert model.normalise == HALF
    with pytest.raises(ValueError, match="does not say what they expect; timm's weights of that"):
        evaluate.accuracy(model, images)
    for word in ("train", "imagenet", [[0.4, 0.5, 0.6], [0.2, 0.3, 0.2]]):
        lab = study_with(unsaid.parent, normalise=word, weights="own.ckpt", **SIZES)
        capsys.readouterr()
        model = models.create(**lab.model, num_classes=10, image_size=32)
        assert f"own.ckpt does not say how its images were normalised: taken is {word}" in (
            capsys.readouterr().out
        )
        evaluate.accuracy(model, images)
    train.fit(model, images, images, RECIPE)
    with pytest.raises(ValueError, match="the model's weights expect images normalised"):
        evaluate.accuracy(model, replace(images, mean=HALF[0]))


def test_a_word_of_the_study_does_not_replace_what_the_weights_say(pretrained, images, tmp_path):
    lab = study_with(tmp_path, normalise="train", weights="weights.pth", **SIZES)
    model = models.create(**lab.model, num_classes=10, image_size=32)
    with pytest.raises(ValueError, match="the model's weights expect images normalised"):
        evaluate.accuracy(model, images)


def test_names_of_torchvision_mean_imagenet(tmp_path, images):
    state = VisionTransformer(32, 8, 1, 3, 24, 96, num_classes=10).state_dict()
    torch.save(state, tmp_path / "vit_b.pth")
    lab = study_with(tmp_path, normalise="weights", weights="vit_b.pth", **SIZES)
    model = models.create(**lab.model, num_classes=10, image_size=32)
    imagenet = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    assert model.normalise == imagenet == data._expected(**normalise_of(lab))
    with pytest.raises(ValueError, match="the model's weights expect .*0.485"):
        evaluate.accuracy(model, images)


def test_the_word_weights_is_what_the_model_expects_wherever_that_comes_from(unsaid, capsys):
    folder = unsaid.parent
    lab = study_with(folder, normalise="weights", weights="own.ckpt", **SIZES)
    capsys.readouterr()
    assert data._expected(**normalise_of(lab)) == HALF
    assert f"own.ckpt does not say what it expects. {NAME}: mean" in capsys.readouterr().out
    (folder / "config.json").write_text('{"model_type": "vit"}')  # without preprocessor_config.json
    assert data._expected(NAME, folder / "own.ckpt") == HALF
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    expected = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model = models.create(**lab.model, num_classes=10, image_size=32)
    assert model.normalise == expected == data._expected(**normalise_of(lab))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="own.ckpt does not say how .* by data.normalise"):
        data._expected("conv_vit", Path(unsaid))
