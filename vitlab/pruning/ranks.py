"""Choose the ranks of layers for a share of a model's MACs.

Method: docs/methods/ranks.md.

Public: allocate, uniform.
"""

import math

import numpy as np
import pandas as pd
import torch
from torch import nn

from vitlab import models
from vitlab.evaluation import cost
from vitlab.models import _layers
from vitlab.pruning import factor, pool, scores


def allocate(model, grams, gradients, *, macs, multiple=8, most=None):
    """Choose ranks with which the model keeps a share of its MACs at little predicted loss.

    Use it where ranks are all that may go. Method: docs/methods/ranks.md.

    model: a ViT or Swin; it stays as it is.
    grams: {layer: [n, n]} of scores.grams.
    gradients: {layer: [m, m]} of scores.gradient_grams. Plain layers in both may be factored.
    macs: share to keep, in (0, 1), of the whole model's.
    multiple: ranks are multiples of it; a layer whose break-even rank is lower takes any rank.
    most: {layer: highest rank to factor it at}, as bench.break_even measures; 0 keeps a layer
        dense. None: all that save MACs.

    Returns {layer: rank} for factor.factorise with the same grams, without dense layers.
    Raises ValueError for a share outside (0, 1), one layer of another shape, zero gradients.
    Raises Unreachable for a target below what the lowest ranks leave; it names the floor.
    """
    # These losses order ranks better than those of scores.directions, but are not in loss units
    # (LOG.md). So they cannot compete with units in `plan`, and are searched on their own.
    pool.checked_target({"macs": macs}, model)
    table = cost.breakdown(model)
    directions = {}
    for name, layer in _plain_layers(model).items():
        if name in grams and name in gradients:
            directions[name] = _direction_losses(name, layer, grams[name], gradients[name])
    thin = pool.thin_layers(model, directions, multiple, most or {})
    search = pool.Search(models.view(model), table.assign(cost=table.macs), {}, thin)
    # Where no layer may be factored the floor is the whole model.
    pool.check_reachable("ranks", "macs", macs, search.floor())
    if not any(layer.losses.any() for layer in thin.values()):
        raise ValueError(
            "no rank is predicted to matter: the gradients are zero, nothing reaches the loss"
        )
    losses, costs = search.options(thin)
    # What the other layers cost stays; the rest of the target is room for these.
    whole = sum(layer_costs[0] for layer_costs in costs.values())
    rest = search.total - whole
    chosen = _priced(losses, costs, macs * search.total - rest)
    search.state.update(chosen)
    return search.as_plan("macs").ranks


def _plain_layers(model):
    """Return {name: layer} of the layers that are neither factored nor cut."""
    plain = {}
    for name, layer in models.view(model).matrices.items():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            plain[name] = layer
    return plain


def _direction_losses(name, layer, gram, gradient):
    """Return the loss [R + 1] predicted without all directions from each on."""
    m, n = layer.weight.flatten(1).shape
    if list(gram.shape) != [n, n] or list(gradient.shape) != [m, m]:
        raise ValueError(
            f"{name} [{m}, {n}] needs a gram [{n}, {n}] and gradients [{m}, {m}] of this very model"
        )
    # A direction costs half of (u^T G u)(v^T H v). u v is its part of the activation-weighted SVD,
    # H the gram, G the gradients'. It orders layers well, but is no loss to compare with those of
    # `plan` (see scores.gradient_grams).
    u, v = pool.basis(layer, gram)
    by_outputs = _along(u.T.double(), gradient)
    by_inputs = _along(v.double(), gram)
    lost = by_outputs * by_inputs / 2
    after = lost.flip(0).cumsum(0).flip(0)
    return nn.functional.pad(after, (0, 1))  # without any nothing is lost


def _along(vectors, matrix):
    """Return x^T matrix x of each row x of vectors, [k]."""
    return torch.linalg.vecdot(vectors @ matrix.to(vectors), vectors)


def _priced(losses, costs, room):
    """Return {layer: number of its option} with little loss that fit in room together.

    losses, costs: {layer: array} of each option.
    """
    room = room * (1 + 1e-12)  # rounding alone does not exceed it

    def cheapest(price):
        return {name: (losses[name] + price * costs[name]).argmin() for name in losses}

    def spent(chosen):
        return sum(costs[name][option] for name, option in chosen.items())

    # One price per MAC decides for all layers: each takes the option of least loss and price
    # together. The higher the price, the less they cost. Look for the least at which they fit.
    low, high = 0.0, 1.0
    while spent(cheapest(high)) > room and high < math.inf:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if spent(cheapest(middle)) > room:
            low = middle
        else:
            high = middle
    chosen = cheapest(high)
    # Prices jump over options, so that some room is left.
    pool.spend(chosen, losses, costs, room - spent(chosen))
    return chosen


def uniform(model, batches, *, macs, grams=None):
    """Choose ranks with which each layer keeps the same share: the baseline of `allocate`.

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
    for name, layer in _plain_layers(model).items():
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
