"""What each step of a cut of the real ViT-S takes, in units of forward passes over the same images.

It needs Caltech-101, and the weights of the study caltech101-dinov2.
"""

import torch
from common import interleaved, publish, rows_of_ratios

from vitlab import models
from vitlab.pruning import budget, recover, scores
from vitlab.studies import runs
from vitlab.training import data

KINDS = ("heads", "neurons", "width", "ranks")
IMAGES, SHARE = 512, 0.5


def steps(rounds):
    """The calls inside budget.reach to half the MACs, without labels, and all of them together.

    ratio: seconds of a call over those of one forward pass in float32, within rounds.
    """
    lab = runs.open_run("caltech101-dinov2", "vit")
    images = data.load(**lab.data)
    dense = models.create(**lab.model, num_classes=0, image_size=images.image_size).eval()
    batches = list(images.train.subset(IMAGES).batches(lab.params.calibration.batch_size))
    how = {"layers": list(models.view(dense).matrices), "affine": True}

    seen = budget.positions(dense, batches, labels="none")
    grams = scores.grams(dense, batches, **how, **seen)
    few = batches[:: max(1, len(batches) // 4)]
    felt = {"layers": list(models.view(dense).matrices), "labels": "none"}
    gradients = scores.gradient_grams(dense, few, **felt)
    options = {"kinds": KINDS, "grams": grams, "gradients": gradients, "labels": "none"}
    found = budget.candidates(dense, batches, **options)
    plan = budget.plan(dense, **found, kinds=KINDS, macs=SHARE)
    cut = {"grams": grams, "compensate": "least squares", **seen}
    small, drops = budget.cut(dense, plan, batches, **cut)
    solved = {"drops": drops, "damping": "held out", "gradients": gradients, **seen}

    calls = {
        "forward": lambda: forward(dense, batches),
        "positions": lambda: budget.positions(dense, batches, labels="none"),
        "gradients": lambda: scores.gradient_grams(dense, few, **felt),
        "grams": lambda: scores.grams(dense, batches, **how, **seen),
        "candidates": lambda: budget.candidates(dense, batches, **options),
        "plan": lambda: budget.plan(dense, **found, kinds=KINDS, macs=SHARE),
        "cut": lambda: budget.cut(dense, plan, batches, **cut),
        "reconstruct": lambda: recover.reconstruct(small, dense, batches, **solved),
    }
    seconds = interleaved(calls, rounds)
    seconds["all steps"] = seconds.drop(columns="forward").sum(axis=1)
    publish("steps", rows_of_ratios(f"steps, ViT-S, {IMAGES} images", seconds, "forward"))


@torch.inference_mode()
def forward(model, batches):
    for x, _ in batches:
        model(x)


CASES = {"steps": steps}
