"""Make swin-dinov2.safetensors: a Swin that learns the features of DINOv2's ViT-S/14 without labels.

    .venv/bin/python checkpoints/dinov2.py [EPOCHS [more]]

With `more` it goes on from the weights that are there, by a new warm-up and a new cosine. A killed run goes on, too.

Images are the training images of Caltech-101 and CIFAR-10 at 112 px. An epoch has each of CIFAR-10 once, and each of
Caltech-101 seven times. Made on a GPU, where an epoch takes seconds: a CPU core takes half an hour or more for one.
swin-dinov2.json keeps recipe, images and curve. The studies `caltech101-dinov2` and `cifar10-dinov2` start from the
weights, which are those of no study: the folders beside them are.
"""

import json
import sys
from dataclasses import replace

import numpy as np
import safetensors.torch
import torch

from vitlab import data, files, imitate, models, runs, train

EPOCHS = 8  # of 89,600 images
# Images of each study in a batch, and how often an epoch has each image: CIFAR-10 has seven times as many.
PARTS = {"caltech101-dinov2": (256, 8), "cifar10-dinov2": (256, 1)}
RECIPE = train.Recipe(epochs=EPOCHS, lr=0.002, batch_size=512, precision="bf16")
AUGMENT = {"scale": [0.25, 1.0], "flip": True}
# New views in each epoch, some of them mixed: a few thousand photographs are soon known by heart.
VIEWS = {"views": None, "augment": AUGMENT, "mixup": 0.2, "precision": "bf16"}


def main(epochs=EPOCHS, more=False):
    """Train, and save the model with what it was trained by.

    more: whether to start from the weights that are there; their history stays in the record.
    """
    path = files.repository() / "checkpoints" / "swin-dinov2"
    earlier = json.loads(path.with_suffix(".json").read_text())["history"] if more else []
    home = files.root() / "runs" / "dinov2"
    splits = {study: images_of(study) for study in PARTS}
    teacher = models.create(
        **runs.open_run("caltech101-dinov2", "vit").model, num_classes=0, image_size=112
    )
    parts, held_out = [], []
    for study, (size, times) in PARTS.items():
        images = splits[study]
        every = np.tile(np.arange(len(images.train)), times)
        parts.append((images.train.take(every), size))
        held_out.append((images.val.subset(800), size))
    lessons = imitate.Lessons(teacher, parts, None, **VIEWS)
    val = imitate.Lessons(teacher, held_out, home / "answers", precision="bf16")
    classes = imitate.say(teacher, torch.zeros(1, 3, 112, 112)).shape[1]
    swin = new_swin(classes, path.with_suffix(".safetensors") if more else None)
    recipe = replace(RECIPE, epochs=epochs)
    stage = f"swin-{len(earlier)}"
    history = imitate.fit(swin, lessons, val, recipe, stage=stage, folder=home)
    record = {
        "settings": vars(recipe) | VIEWS | {"images of a batch, and how often": PARTS},
        "images": [images.identity for images in splits.values()],
        "history": earlier + history.to_dict("records"),
        "made": runs.provenance(),
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
