"""What each step of a cut of the real ViT-S takes, in units of forward passes over the same images.

It needs Caltech-101, and the weights of the study caltech101-dinov2.
"""

import functools

import torch
from common import interleaved, publish, rows_of_ratios

from vitlab import models
from vitlab.evaluation import memory
from vitlab.pruning import budget
from vitlab.studies import runs
from vitlab.training import data

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
    known = budget.Calibration(dense, batches, labels="none")
    plan = known.plan(macs=SHARE)
    small, drops = known.cut(plan)

    def anew(part):
        """Measure a part of the calibration once more, from the parts that it needs."""
        fresh = budget.Calibration(dense, batches, labels="none")
        vars(fresh).update({name: each for name, each in vars(known).items() if name != part})
        getattr(fresh, part)

    calls = {"forward": lambda: forward(dense, batches)}
    for part in ("positions", "gradients", "grams", "candidates"):
        calls[part] = functools.partial(anew, part)
    calls["plan"] = lambda: known.plan(macs=SHARE)
    calls["cut"] = lambda: known.cut(plan)
    calls["reconstruct"] = lambda: known.reconstruct(small, drops)
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
