"""Make swin-dinov2.safetensors: a Swin that learns the features of DINOv2's ViT-S/14 without labels.

    .venv/bin/python checkpoints/dinov2.py [EPOCHS [more]]

With `more` it goes on from the weights that are there, by a new warm-up and a new cosine. A killed run goes on, too.

Images are the training images of Caltech-101 and CIFAR-10 at 112 px. swin-dinov2.json keeps recipe, images and curve.
The studies `caltech101-dinov2` and `cifar10-dinov2` start from the weights, which are those of no study: the folders
beside them are.
"""

import json
import sys
from dataclasses import replace

import safetensors.torch
import torch

from vitlab import data, files, imitate, models, runs, train

EPOCHS = 16  # of 12,096 images
PARTS = {"caltech101-dinov2": 32, "cifar10-dinov2": 32}  # images of each study in a batch
RECIPE = train.Recipe(epochs=EPOCHS, lr=0.001, batch_size=64, precision="bf16")
VIEWS = {"views": 4, "augment": {"scale": [0.35, 1.0], "flip": True}, "precision": "bf16"}


def main(epochs=EPOCHS, more=False):
    """Train, and save the model with what it was trained by.

    more: whether to start from the weights that are there; their history stays in the record.
    """
    path = files.repository() / "checkpoints" / "swin-dinov2"
    earlier = json.loads(path.with_suffix(".json").read_text())["history"] if more else []
    home = files.root() / "runs" / "dinov2"
    splits = [images_of(study) for study in PARTS]
    teacher = models.create(
        **runs.open_run("caltech101-dinov2", "vit").model, num_classes=0, image_size=112
    )
    sizes = PARTS.values()
    parts = [(images.train, size) for images, size in zip(splits, sizes, strict=True)]
    held_out = [(images.val.subset(800), size) for images, size in zip(splits, sizes, strict=True)]
    lessons = imitate.Lessons(teacher, parts, home / "answers", **VIEWS)
    val = imitate.Lessons(teacher, held_out, home / "answers", precision="bf16")
    classes = imitate.say(teacher, torch.zeros(1, 3, 112, 112)).shape[1]
    swin = new_swin(classes, path.with_suffix(".safetensors") if more else None)
    recipe = replace(RECIPE, epochs=epochs)
    stage = f"swin-{len(earlier)}"
    history = imitate.fit(swin, lessons, val, recipe, stage=stage, folder=home)
    record = {
        "settings": vars(recipe) | VIEWS | {"images of a batch": PARTS},
        "images": [images.identity for images in splits],
        "history": earlier + history.to_dict("records"),
    }
    save(swin, path, record)


def save(model, path, record):
    """Write the weights of a model in half precision, without its classifier, and a record beside them."""
    tensors = {
        name: tensor.half().contiguous()
        for name, tensor in model.cpu().state_dict().items()
        if not name.startswith("head.")
    }
    files.write_atomic(path.with_suffix(".safetensors"), safetensors.torch.save(tensors))
    files.write_atomic(path.with_suffix(".json"), json.dumps(record, indent=1))


def images_of(study):
    """Return all images of a study, whatever part of them it trains on."""
    lab = runs.open_run(study, "vit")
    return data.load(**lab.data | {"images": None})


def new_swin(classes, weights=None):
    """Return the Swin of the studies, with these weights or none."""
    options = dict(runs.open_run("caltech101-dinov2", "swin").params.models.swin)
    options["weights"] = weights
    options["drop_path_rate"] = 0.0  # it has never enough epochs to overfit
    torch.manual_seed(RECIPE.seed)
    return models.create(**options, num_classes=classes, image_size=112)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), more=sys.argv[2:] == ["more"])
