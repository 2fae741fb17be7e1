"""Classes of a model and of images are compared before anything is measured or learnt."""

import types

import pytest
import torch
from conftest import toy

from vitlab import models
from vitlab.evaluation import evaluate
from vitlab.models import checkpoint
from vitlab.pruning import budget, scores, sensitivity, shrink
from vitlab.training import _shapes, data, train

RECIPE = dict(epochs=1, lr=1e-3, batch_size=12, warmup_epochs=0.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten")
    _shapes.make(folder / "shapes", per_class=(2, 1, 1), image_size=16)
    return data.load(folder / "shapes", root=folder, image_size=16)


def model_of(classes):
    return models.create(
        "conv_vit", num_classes=classes, image_size=16, embed_dim=24, depth=1, num_heads=3
    )


@pytest.mark.parametrize("classes", [1000, 11, 5, 9, 0])
def test_more_and_fewer_outputs_are_named_at_every_door(images, classes):
    model, fitting = model_of(classes), model_of(10)
    for call in (
        lambda: models.check_classes(model, images),
        lambda: evaluate.accuracy(model, images.val),
        lambda: evaluate.measure(model, images.val),
        lambda: train.fit(model, images.train, images.val, RECIPE),
        lambda: train.fit(
            fitting, images.train, images.val, RECIPE, distil=train.Distillation(model)
        ),
    ):
        with pytest.raises(ValueError, match=f"the model has {classes} classes, the images 10:"):
            call()


def test_of_a_batch_only_labels_are_known():
    model, batches = toy("conv_vit", embed_dim=24, depth=1, num_heads=3), []
    batches.append((torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 5, 1])))
    for call in (
        lambda: scores.loss(model, batches),
        lambda: scores.units(model, batches, criteria="taylor"),
        lambda: scores.gradient_grams(model, batches),
        lambda: sensitivity.ablations(model, batches),
    ):
        with pytest.raises(ValueError, match="has 3 classes, the images at least 6"):
            call()


@pytest.mark.parametrize("classes", [1000, 11, 9])
def test_batches_of_a_split_know_its_classes(images, classes):
    model, batches = model_of(classes), list(images.train.batches(10))
    for call in (
        lambda: scores.loss(model, batches),
        lambda: scores.weights(model, batches, criteria="taylor"),
        lambda: scores.weights(model, batches, criteria="taylor", labels="model"),
        lambda: budget.reach(model, batches, macs=0.5),
    ):
        with pytest.raises(ValueError, match=f"has {classes} classes, the images 10:"):
            call()
    assert scores.loss(model_of(10), batches) > 0


def test_a_model_that_says_no_number_is_judged_by_its_answers(images):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 12))
    with pytest.raises(ValueError, match="the model has 12 classes, the images 10"):
        evaluate.accuracy(net, images.val)


def test_names_stay_with_a_trained_model_through_cuts_and_files(images, tmp_path):
    model = model_of(10)
    train.fit(model, images.train, images.val, RECIPE)
    small = shrink.remove(model, {("blocks.0", "heads"): [1]})
    checkpoint.save(small, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert checkpoint.read(tmp_path)["classes"] == loaded.class_names == images.classes
    evaluate.accuracy(loaded, images.test)

    def named(classes):
        return types.SimpleNamespace(classes=classes)

    first, second, *rest = images.classes
    with pytest.raises(ValueError, match=f"another order: label 0 is '{first}' .* '{second}' for"):
        models.check_classes(loaded, named([second, first, *rest]))
    with pytest.raises(ValueError, match="of other names: label 1 is .* and 'emu' for the images"):
        models.check_classes(loaded, named([first, "emu", *rest]))
    loaded.reset_classifier(4)  # a new head learns new names
    models.check_classes(loaded, named(["a", "b", "c", "d"]))
