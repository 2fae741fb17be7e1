"""What the loss rises by after cuts of one kind of a real ViT-S: predicted, corrected by trial cuts, and measured."""

from itertools import product

import numpy as np
from common import publish
from deployed import with_classifier

from vitlab.pruning import budget, pool, scores

IMAGES, SHARES = 512, (0.9, 0.7)


def predicted(rounds):
    """DINOv2's ViT-S/14 at 112 px with a linear head of 2,000 images of Caltech-101, nothing compensated or trained.

    Half of 512 training images rank, on which the head was fitted, too. Half of the validation images audit, the other
    half is for trial cuts.
    """
    images, dense = with_classifier()
    audited, others = (
        list(images.val.take(np.arange(first, len(images.val), 2)).batches(64)) for first in (0, 1)
    )
    batches = list(images.train.subset(IMAGES).batches(32))
    kinds = ["heads", "neurons", "ranks"]
    known = budget.Calibration(dense, batches, kinds=kinds, held_out=others)
    before, rows = scores.loss(dense, audited), []
    for kind, share in product(kinds, SHARES):
        try:
            plan = known.plan(kinds=[kind], macs=share, keep=["head"])
        except pool.Unreachable as floor:
            rows.append({"kind": kind, "share": share, "note": str(floor)})
            continue
        small, _ = known.cut(plan, compensate=None)
        row = {"kind": kind, "share": share, "predicted": plan.predicted}
        row |= {"expected": known.expected(plan), "measured": scores.loss(small, audited) - before}
        rows.append(row)
        print(row, flush=True)
    publish("predicted", rows)


CASES = {"predicted": predicted}
