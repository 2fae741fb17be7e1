"""Measure what the loss really does when a layer or a unit goes, beside what scores predict.

Public: ablations, agreement, curves, layer_agreement.
"""

from collections import defaultdict

import pandas as pd
import torch

from vitlab import files, models, names, parallel
from vitlab.pruning import masks, prune, scores

_AGREEMENT = ["criterion", "kind", "spearman", "units"]


@parallel.first_decides
def curves(model, saliency, batches, *, ratios, per="layer"):
    """Return the loss when linear layers lose their least salient weights.

    Each cut is made in a copy, so that the model stays as it is.

    model: a ViT or Swin, cut or not.
    saliency: {parameter name: tensor}, as scores.weights returns for one criterion; its keys are
        the layers.
    batches: the fixed (x, y) to measure on.
    ratios: shares of the weights cut, each in (0, 1).
    per: what is cut at a time: "layer", each layer alone, or "role", all layers of a role together,
        each by that share; layer and block are then "all".

    Returns a DataFrame of layer, block, role, ratio, loss and increase: loss minus the loss of the
    uncut model, in nats.
    Raises ValueError for another per, for a ratio that cuts nothing at all, and what
    masks.keep_largest raises.
    """
    names.check("way to cut (per)", per, ("layer", "role"))
    view = models.view(model)
    groups = defaultdict(list)  # {(layer, block, role): parameters that are cut together}
    for name in saliency:
        layer = name.removesuffix(".weight")
        # A layer outside of the blocks, such as patch merging, has None for its block.
        block = view.block_of(layer)
        place = (layer, block and block.name) if per == "layer" else ("all", "all")
        groups[*place, view.role(layer)].append(name)
    dense_loss = scores.loss(model, batches)
    rows = []
    for group, parameters in files.progress(groups.items(), "cutting in turn"):
        for ratio in ratios:
            cut = prune.masked(model, _cut(saliency, parameters, ratio))
            loss = scores.loss(cut, batches)
            rows.append((*group, ratio, loss, loss - dense_loss))
    return pd.DataFrame(rows, columns=["layer", "block", "role", "ratio", "loss", "increase"])


def _cut(saliency, parameters, ratio):
    """Return masks {name: bool tensor} that drop the least salient share of each parameter."""
    saliency = {name: saliency[name] for name in parameters}
    return masks.keep_largest(saliency, sparsity=ratio, per="layer")


@parallel.first_decides
def ablations(model, batches, *, per_block=16, seed=0):
    """Return how the loss increases when one unit alone goes.

    model: a ViT or Swin, cut or not; each unit is masked in a copy.
    batches: the fixed (x, y) to measure on.
    per_block: largest number of neurons of each block; all heads are measured.
    seed: draws the neurons.

    Returns a DataFrame of block, kind, unit and increase, in nats.
    Raises ValueError for no batches, and for the only head or neuron of a block.
    """
    view = models.view(model)
    generator = torch.Generator().manual_seed(seed)
    dense_loss = scores.loss(model, batches)
    rows = []
    places = view.units().items()
    for (name, kind), count in files.progress(places, "ablating"):
        units = torch.randperm(count, generator=generator)
        if kind == "neurons":
            # There are too many of them: every unit costs a pass over batches.
            units = units[:per_block]
        for unit in units.sort().values.tolist():
            # For the loss a masked unit is the same as a removed one.
            cut = prune.masked(model, prune.units_to_masks(model, {(name, kind): [unit]}))
            rows.append((name, kind, unit, scores.loss(cut, batches) - dense_loss))
    return pd.DataFrame(rows, columns=["block", "kind", "unit", "increase"])


def agreement(unit_scores, measured):
    """Return how well each criterion ranks the units of all blocks.

    unit_scores: {criterion: {(block, kind): tensor}}, as from scores.units.
    measured: DataFrame of `ablations`.

    Returns a DataFrame of criterion, kind, spearman and units (how many were compared). Spearman is
    the rank correlation of score and measured loss increase over all blocks, in [-1, 1].
    """
    rows = []
    for criterion, table in unit_scores.items():
        predicted = [table[row.block, row.kind][row.unit].item() for row in measured.itertuples()]
        for kind, part in measured.assign(score=predicted).groupby("kind"):
            correlation = _spearman(part.score, part.increase)
            rows.append((criterion, kind, correlation, len(part)))
    return pd.DataFrame(rows, columns=_AGREEMENT)


def layer_agreement(weight_scores, saliency, measured):
    """Return how well each criterion ranks layers by what a cut costs.

    What a criterion predicts of a cut is the sum of the scores that the layer loses by it. All
    criteria judge the same cuts.

    weight_scores: {criterion: {parameter name: tensor}}, as from scores.weights.
    saliency: the saliency that `curves` was called with.
    measured: the DataFrame that `curves` returned with per="layer".

    Returns a DataFrame of criterion, kind ("weights"), spearman (rank correlation over layers, its
    mean over ratios) and units (how many layers were compared).
    """
    rows = []
    for ratio, part in measured.groupby("ratio"):
        parameters = [f"{layer}.weight" for layer in part.layer]
        keep = _cut(saliency, parameters, ratio)
        for criterion, scores_by_name in weight_scores.items():
            lost = [scores_by_name[name].double()[~keep[name]].sum().item() for name in parameters]
            correlation = _spearman(pd.Series(lost, part.index), part.increase)
            rows.append((criterion, "weights", correlation, len(part)))
    table = pd.DataFrame(rows, columns=_AGREEMENT)
    # Over layers and ratios together the correlation would be high for any score that adds up.
    by_criterion = table.groupby(["criterion", "kind"], sort=False, as_index=False)
    return by_criterion.agg({"spearman": "mean", "units": "first"})


def _spearman(one, other):
    """Return Pearson's correlation of the ranks; nan where all are equal."""
    return one.rank().corr(other.rank())
