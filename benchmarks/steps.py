"""What each step of a cut of the real ViT-S takes, in units of forward passes over the same images.

It needs Caltech-101, and the weights of the study caltech101-dinov2.
"""

import torch
from common import interleaved, publish, rows_of_ratios

from vitlab import models
from vitlab.evaluation import memory
from vitlab.pruning import budget, recover, scores
from vitlab.studies import runs
from vitlab.training import data

KINDS = ("heads", "neurons", "width", "ranks")
IMAGES, SHARE = 512, 0.5


def steps(rounds):
    """The calls inside budget.reach to half the MACs, without labels, and all of them together.

    ratio: seconds of a call over those of one forward pass in float32, within rounds.
    peak_mb: the most memory during a call beyond the images and what was loaded before the model: the
        model, what the calls before it return, and what it needs itself.
    share: that over what a forward and backward pass of one batch takes, model included.
    """
    lab = runs.open_run("caltech101-dinov2", "vit")
    images = data.load(**lab.data)
    batches = list(images.train.subset(IMAGES).batches(lab.params.calibration.batch_size))
    memory.release_memory()
    before = memory.own_memory_mb("cpu")
    dense = models.create(**lab.model, num_classes=0, image_size=images.image_size).eval()
    how = {"layers": list(models.view(dense).matrices), "affine": True}
    half = batches[::2]
    peaks = {}

    def watched(name, call):
        """Return a pair for `interleaved`: the second part calls, and keeps the peak of memory."""

        def prepare():
            memory.release_memory()
            memory.reset_peak_memory()

        def run(_):
            call()
            peaks[name] = memory.own_memory_mb("cpu", peak=True) - before

        return prepare, run

    prepare, run = watched("one batch", lambda: forward_and_backward(dense, *batches[0]))
    run(prepare())
    seen = budget.positions(dense, batches, labels="none")
    grams = scores.grams(dense, batches, **how, **seen)
    few = budget._few(batches)
    felt = {"layers": list(models.view(dense).matrices), "labels": "none"}
    gradients = scores.gradient_grams(dense, few, **felt)
    options = {"kinds": KINDS, "grams": grams, "gradients": gradients, "labels": "none"}
    found = budget.candidates(dense, half, **options)
    plan = budget.plan(dense, **found, kinds=KINDS, narrow=True, macs=SHARE)
    cut = {"grams": grams, "compensate": "least squares", **seen}
    small, drops = budget.cut(dense, plan, half, **cut)
    solved = {"drops": drops, "damping": "held out", "gradients": gradients, **seen}

    calls = {
        "forward": lambda: forward(dense, batches),
        "positions": lambda: budget.positions(dense, batches, labels="none"),
        "gradients": lambda: scores.gradient_grams(dense, few, **felt),
        "grams": lambda: scores.grams(dense, batches, **how, **seen),
        "candidates": lambda: budget.candidates(dense, half, **options),
        "plan": lambda: budget.plan(dense, **found, kinds=KINDS, narrow=True, macs=SHARE),
        "cut": lambda: budget.cut(dense, plan, half, **cut),
        "reconstruct": lambda: recover.reconstruct(small, dense, batches, **solved),
    }
    calls = {name: watched(name, call) for name, call in calls.items()}
    seconds = interleaved(calls, rounds)
    seconds["all steps"] = seconds.drop(columns="forward").sum(axis=1)
    one_batch = peaks.pop("one batch")
    peaks["all steps"] = max(peaks.values())
    rows = rows_of_ratios(f"steps, ViT-S, {IMAGES} images", seconds, "forward")
    for row in rows:
        row["peak_mb"] = peaks[row["what"]]
        row["share"] = row["peak_mb"] / one_batch
    publish("steps", rows)


@torch.inference_mode()
def forward(model, batches):
    for x, _ in batches:
        model(x)


def forward_and_backward(model, x, _):
    model(x).sum().backward()
    model.zero_grad()


CASES = {"steps": steps}
