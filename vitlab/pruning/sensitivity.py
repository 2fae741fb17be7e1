"""Measure what the loss really does when a layer or a unit goes, beside what scores predict.

Public: ablations, agreement, curves, layer_agreement.
"""

from collections import defaultdict
from contextlib import contextmanager

import pandas as pd
import torch

from vitlab import models, parallel
from vitlab.pruning import masks, scores

_AGREEMENT = ["criterion", "kind", "spearman", "units"]


@parallel.first_decides
def curves(model, saliency, batches, *, ratios, per="layer"):
    """Return the loss when linear layers lose their least salient weights.

    The model is restored bit-equal after each cut.

    saliency: {parameter name: tensor}, as scores.weights returns for one criterion; its keys are
        the layers.
    batches: the fixed (x, y) to measure on.
    ratios: shares of the weights cut, each in (0, 1).
    per: what is cut at a time: "layer", each layer alone, or "role", all layers of a role together,
        each by that share; layer and block are then "all".

    Returns a DataFrame of layer, block, role, ratio, loss and increase: loss minus the loss of the
    uncut model, in nats.
    Raises ValueError for another per, and what masks.keep_largest raises.
    """
    if per not in ("layer", "role"):
        raise ValueError(f'per must be "layer" or "role"; got {per!r}')
    view = models.view(model)
    groups = defaultdict(list)
    for name in saliency:
        layer = name.removesuffix(".weight")
        place = ("all", "all")
        if per == "layer":
            block = view.block_of(layer)
            place = (layer, block and block.name)
        groups[*place, view.role(layer)].append(name)
    dense_loss = scores.loss(model, batches)
    rows = []
    for group, names in groups.items():
        for ratio in ratios:
            keep = _cut(saliency, names, ratio)
            with _masked(model, keep):
                loss = scores.loss(model, batches)
            rows.append((*group, ratio, loss, loss - dense_loss))
    return pd.DataFrame(rows, columns=["layer", "block", "role", "ratio", "loss", "increase"])


def _cut(saliency, names, ratio):
    """Return masks {name: bool tensor} that drop the least salient share of each parameter."""
    saliency = {name: saliency[name] for name in names}
    return masks.keep_largest(saliency, sparsity=ratio, per="layer")


@contextmanager
def _masked(model, keep):
    """Let parameters be zero where keep is False, until the end."""
    whole = []
    try:
        for name, mask in keep.items():
            parameter = model.get_parameter(name)
            values = parameter.data
            whole.append((parameter, values))
            parameter.data = values.masked_fill(~mask.to(values.device), 0)
        yield
    finally:
        for parameter, values in whole:
            parameter.data = values


@parallel.first_decides
def ablations(model, batches, *, per_block=16, kinds=("heads", "neurons"), seed=0):
    """Return how the loss increases when one unit alone goes.

    All heads are measured, and some neurons of each block: every unit costs a pass over batches.

    batches: the fixed (x, y) to measure on.
    per_block: largest number of neurons of each block.
    kinds: "heads", "neurons" or both.
    seed: draws the neurons.

    Returns a DataFrame of block, kind, unit and increase, in nats.
    Raises ValueError for other kinds.
    """
    if unknown := set(kinds) - {"heads", "neurons"}:
        raise ValueError(f"ablations are of heads and neurons; got {sorted(unknown)}")
    view = models.view(model)
    generator = torch.Generator().manual_seed(seed)
    dense_loss = scores.loss(model, batches)
    rows = []
    for (name, kind), count in view.units().items():
        # Drawn for kinds that are not asked for, too, so that neurons are the same with any kinds.
        order = torch.randperm(count, generator=generator)
        if kind not in kinds:
            continue
        units = order if kind == "heads" else order[:per_block]
        for unit in units.sort().values.tolist():
            with _without(view.block(name), kind, unit):
                loss = scores.loss(model, batches)
            rows.append((name, kind, unit, loss - dense_loss))
    return pd.DataFrame(rows, columns=["block", "kind", "unit", "increase"])


@contextmanager
def _without(block, kind, unit):
    """Zero a unit where the next layer reads it, which is the same as removing it."""
    reader = block.mlp.fc2
    count = block.neurons
    if kind == "heads":
        reader = block.attn.proj
        count = block.num_heads

    def silence(_, inputs):
        x = inputs[0].clone()
        x.unflatten(-1, (count, -1))[..., unit, :] = 0
        return x

    with reader.register_forward_pre_hook(silence):
        yield


def agreement(unit_scores, measured):
    """Return how well each criterion ranks the units of all blocks.

    unit_scores: {criterion: {(block, kind): tensor}}, as from scores.units.
    measured: DataFrame of `ablations`.

    Returns a DataFrame of criterion, kind, spearman (rank correlation, in [-1, 1], between score
    and measured loss increase over all blocks) and units (how many were compared).
    """
    rows = []
    for criterion, scores_by_place in unit_scores.items():
        predicted = []
        for row in measured.itertuples():
            predicted.append(scores_by_place[row.block, row.kind][row.unit].item())
        for kind, part in measured.assign(score=predicted).groupby("kind"):
            correlation = _spearman(part.score, part.increase)
            rows.append((criterion, kind, correlation, len(part)))
    return pd.DataFrame(rows, columns=_AGREEMENT)


def layer_agreement(weight_scores, saliency, measured):
    """Return how well each criterion ranks layers by what a cut costs.

    All criteria are asked about the same cuts. Scores are those that a layer loses in all by the
    cut. The rank correlation is over layers, and its mean over ratios is returned. Over layers and
    ratios together it would be high for any score that adds up.

    weight_scores: {criterion: {parameter name: tensor}}, as from scores.weights.
    saliency: the saliency that `curves` was called with.
    measured: the DataFrame that `curves` returned with per="layer".

    Returns a DataFrame as of `agreement`, of kind "weights"; units: number of layers.
    """
    rows = []
    for ratio, part in measured.groupby("ratio"):
        names = [f"{layer}.weight" for layer in part.layer]
        keep = _cut(saliency, names, ratio)
        for criterion, scores_by_name in weight_scores.items():
            lost = []
            for name in names:
                score = scores_by_name[name].double()
                lost.append(score[~keep[name].to(score.device)].sum().item())
            correlation = _spearman(pd.Series(lost, part.index), part.increase)
            rows.append((criterion, "weights", correlation, len(part)))
    table = pd.DataFrame(rows, columns=_AGREEMENT)
    by_criterion = table.groupby(["criterion", "kind"], sort=False, as_index=False)
    return by_criterion.agg({"spearman": "mean", "units": "first"})


def _spearman(one, other):
    """Return Pearson's correlation of the ranks; nan where all are equal."""
    return one.rank().corr(other.rank())
