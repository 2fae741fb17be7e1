"""Choose ranks with which each layer keeps the same share: the control of ranks that compete.

Ranks that compete are those of budget.plan. Method: docs/methods/ranks.md.

Public: uniform.
"""

import numpy as np
import pandas as pd
from torch import nn

from vitlab import models
from vitlab.evaluation import cost
from vitlab.models import _layers
from vitlab.pruning import factor, pool, scores


def uniform(model, batches, *, macs, grams=None):
    """Choose ranks with which each layer keeps the same share.

    model: a ViT or Swin; it stays as it is.
    batches: a list of (x, y) of calibration images.
    macs: the share that the model keeps at most, in (0, 1), of the whole model's.
    grams: as for factor.factorise, which gets the ranks with the same grams. None: plain SVD.

    Returns {layer: rank}. Layers that are factored or cut already stay as they are.
    Raises ValueError for a share outside (0, 1).
    Raises Unreachable for a share below what rank 1 leaves everywhere; it names the floor.
    """
    pool.checked_target({"macs": macs}, model)
    table = cost.breakdown(model).set_index("layer").macs
    even = {}
    for name, layer in models.view(model).matrices.items():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            even[name] = _layers.break_even_rank(*layer.weight.flatten(1).shape)
    even = pd.Series(even, dtype=float)
    # What shares the cut: the linear layers alone, or with the stem's convolutions, or with all of
    # these but the first, which sees three channels. The variant with the lowest loss on batches,
    # by their labels, is taken; of models without classifier that whose features change least.
    stem = tuple(name for name, _ in models.view(model).stem)
    head = models.view(model).classifiers
    floors = []
    ranks_by_loss = {}
    for whole in dict.fromkeys([stem, (), stem[:1]]):
        factored = even.drop(list(whole), errors="ignore")
        floor, ranks = _equal_share(table, factored, macs)
        floors.append(floor)
        if floor <= macs:
            thin = factor.factorise(model, ranks, grams=grams)
            # Of equal losses the first one stays.
            loss = scores.loss(thin, batches) if head else scores.change(model, thin, batches)
            ranks_by_loss.setdefault(loss, ranks)
    pool.check_reachable("one share of all layers", "macs", macs, min(floors))
    return ranks_by_loss[min(ranks_by_loss)]


def _equal_share(table, even, macs):
    """Return the model's share at rank 1, and {layer: rank} of the highest share that fits.

    table: the MACs of each layer. even: the break-even rank of each layer to factor. macs: the
        share that the model may keep.
    """
    even = even[even > 1]  # elsewhere rank 1 saves nothing

    def ranks_at(share):
        """Return the ranks that keep a share of each layer, at least 1 and below even."""
        highest = np.ceil(even) - 1
        ranks = np.floor(share * even + 1e-9)
        return ranks.clip(1, highest).astype(int)

    def left_at(share):
        saved = table * (1 - ranks_at(share) / even)
        return 1 - saved.sum() / table.sum()

    # The higher the share of each layer, the more of the model stays. Halve the interval around the
    # highest one that fits until it is one of rounding.
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if left_at(middle) > macs:
            high = middle
        else:
            low = middle
    return left_at(0.0), ranks_at(low).to_dict()
