"""What low rank loses where gradients weigh the outputs of what is factored, without training.

`weighted` is of the small models of CIFAR-10, by top-1 and loss on 2,000 validation images. `weighted_features` is of
the real ViT-S without classifier, by 1 - cosine of its features on 400 validation images; it needs Caltech-101, and the
weights of the study caltech101-dinov2. Columns say what the gradients weigh: the directions that the pool orders, what
reconstruction solves for, and whether heads are made as narrow as their ranks.
"""

import functools
from dataclasses import replace

from common import publish
from torch import cosine_similarity

from vitlab import models
from vitlab.evaluation import cost, evaluate
from vitlab.models import checkpoint
from vitlab.pruning import budget, factor, recover, shrink
from vitlab.studies import runs
from vitlab.training import data

WAYS = {  # whether gradients weigh directions and reconstruction, and whether heads are narrow
    "neither": (False, False, False),
    "reconstruction": (False, True, False),
    "both": (True, True, False),
    "both, narrow heads": (True, True, True),
}
KINDS = {"pool": ("heads", "neurons", "filters", "width", "ranks"), "ranks": ("ranks",)}


class Given(budget.Calibration):
    """What all cuts of a model share."""

    @functools.cached_property
    def unweighted(self):
        """What competes where gradients do not order directions."""
        how = {"kinds": self.kinds, "grams": self.grams, "labels": self.labels}
        return budget.candidates(self.model, self.half, **how)

    def made(self, share, kinds, way):
        """Return the cut of one of WAYS, and its plan."""
        orders, solves, narrow = WAYS[way]
        kinds = [kind for kind in KINDS[kinds] if kind in self.kinds]
        options = {} if orders else self.unweighted
        plan = self.plan(**options, kinds=kinds, narrow=narrow, macs=share)
        small, drops = self.cut(plan)
        how = {"drops": drops, "damping": "held out", **self.positions}
        how["gradients"] = self.gradients if solves else None
        small = recover.reconstruct(small, self.model, self.batches, **how)
        return factor.narrow_heads(small) if narrow else small, plan


def rows_of(given, name, kinds, shares, judge, ways=WAYS):
    rows = []
    for share in shares:
        for way in ways:
            small, plan = given.made(share, kinds, way)
            row = {"model": name, "kinds": kinds, "share": share, "weighted": way}
            row |= {"macs": cost.macs(small), "predicted": plan.predicted}
            rows.append(row | judge(small, plan))
            print(rows[-1], flush=True)
    return rows


def weighted(rounds):
    """The small models at half, a quarter and 0.15 of their MACs; 1,024 calibration images."""
    images = data.load("cifar10", image_size=32)
    val, rows = images.val.subset(2000), []

    def judge(small, _):
        found = evaluate.accuracy(small, val)
        return {"top1": found.top1, "loss": found.loss}

    for name in ("vit", "swin"):
        model = checkpoint.load(f"checkpoints/cifar10-small/{name}")
        rows.append({"model": name, "weighted": "dense", "share": 1.0} | judge(model, None))
        given = Given(model, list(images.train.subset(1024).batches(64)))
        rows += rows_of(given, name, "pool", (0.5, 0.25, 0.15), judge)
        publish("weighted", rows)


def weighted_features(rounds):
    """The real ViT-S without labels, at half and 0.35 of its MACs; 256 calibration images."""
    lab = runs.open_run("caltech101-dinov2", "vit")
    images = data.load(**lab.data)
    model = models.create(**lab.model, num_classes=0, image_size=images.image_size).eval()
    val = images.val.subset(400)
    dense = evaluate.features(model, val, precision="auto").features

    def judge(small, plan):
        filled = dense.mean(0).repeat(len(dense), 1)
        filled[:, shrink.features_left(model, plan.drop)] = evaluate.features(
            small, val, precision="auto"
        ).features
        return {"change": 1 - cosine_similarity(filled, dense).mean().item()}

    given = Given(model, list(images.train.subset(256).batches(32)), labels="none")
    rows = []
    for kinds, shares in (("pool", (0.5, 0.35)), ("ranks", (0.5,))):
        rows += rows_of(given, "ViT-S", kinds, shares, judge, ways=list(WAYS)[:3])
        publish("weighted_features", rows)


def twice(rounds):
    """The small models scored once, or again once the units of a plan half-way have gone; by top-1 on val."""
    images = data.load("cifar10", image_size=32)
    val, rows = images.val.subset(2000), []
    for name in ("vit", "swin"):
        model = checkpoint.load(f"checkpoints/cifar10-small/{name}")
        batches = list(images.train.subset(1024).batches(64))
        known = budget.Calibration(model, batches)
        for share in (0.25, 0.15):
            plan = known.plan(macs=share)
            made = {"once": (known.cut(plan), plan)}
            half = replace(known.plan(macs=share**0.5), ranks={})
            cut, drops = known.cut(half)
            units = recover.reconstruct(cut, model, batches, drops=drops, damping="held out")
            again = budget.Calibration(units, batches)
            plan = again.plan(macs=share * cost.macs(model) / cost.macs(units))
            small, more = again.cut(plan)
            made["twice"] = (small, [*drops, *more]), plan
            for way, (cut, plan) in made.items():
                small = known.reconstruct(*cut)
                row = {"model": name, "share": share, "scored": way, "predicted": plan.predicted}
                found = evaluate.accuracy(small, val)
                row |= {"macs": cost.macs(small), "top1": found.top1, "loss": found.loss}
                rows.append(row)
                print(row, flush=True)
        publish("twice", rows)


CASES = {"weighted": weighted, "weighted_features": weighted_features, "twice": twice}
