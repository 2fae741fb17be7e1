"""Sensitivity analysis: what the loss really does when one layer or one unit goes, beside what scores predict."""

from contextlib import contextmanager

import pandas as pd
import torch

from . import masks, models, parallel, scores

AGREEMENT = ["criterion", "kind", "spearman", "units"]


@parallel.first_decides
def curves(model, saliency, batches, *, ratios, per="layer"):
    """Loss when linear layers lose their least salient weights: a frame of layer, block, role, ratio, loss and
    increase (loss minus that of the uncut model, in nats).

    saliency: {parameter name: tensor} as scores.weights returns for one criterion; the layers are its keys.
    batches: the fixed (x, y) of the measurement. ratios: shares cut, each in (0, 1). per: what is cut at a time:
    "layer", each layer alone, or "role", all layers of a role together, each by that share; layer and block are
    then "all". The model is restored bit-equal after each cut. Raises ValueError for another per, and what
    masks.keep_largest raises.
    """
    if per not in ("layer", "role"):
        raise ValueError(f'per must be "layer" or "role"; got {per!r}')
    view, parameters = models.view(model), dict(model.named_parameters())
    groups = {}
    for name in saliency:
        layer = name.removesuffix(".weight")
        block, role = view.block_of(layer), view.role(layer)
        key = (layer, block and block.name, role) if per == "layer" else ("all", "all", role)
        groups.setdefault(key, []).append(name)
    dense = scores.loss(model, batches)
    rows = []
    for key, names in groups.items():
        for ratio in ratios:
            keep = masks.keep_largest({name: saliency[name] for name in names}, sparsity=ratio, per="layer")
            with _cut({name: parameters[name] for name in names}, keep):
                loss = scores.loss(model, batches)
            rows.append((*key, ratio, loss, loss - dense))
    return pd.DataFrame(rows, columns=["layer", "block", "role", "ratio", "loss", "increase"])


@contextmanager
def _cut(parameters, keep):
    """The parameters with zeros where keep is False; put back bit-equal at the end."""
    whole = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.masked_fill_(~keep[name].to(parameter.device), 0)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(whole[name])


@parallel.first_decides
def ablations(model, batches, *, per_block=16, kinds=("heads", "neurons"), seed=0):
    """Loss increase when one unit alone goes: a frame of block, kind, unit and increase (nats).

    All heads, and up to per_block neurons of each block, drawn by seed: every one costs a pass over batches.
    """
    if unknown := set(kinds) - {"heads", "neurons"}:
        raise ValueError(f"ablations are of heads and neurons; got {sorted(unknown)}")
    view, generator = models.view(model), torch.Generator().manual_seed(seed)
    dense = scores.loss(model, batches)
    rows = []
    for (name, kind), count in view.units().items():
        most = {"heads": count, "neurons": per_block}[kind] if kind in kinds else 0
        for unit in torch.randperm(count, generator=generator)[:most].sort().values.tolist():
            with _without(view.block(name), kind, unit):
                rows.append((name, kind, unit, scores.loss(model, batches) - dense))
    return pd.DataFrame(rows, columns=["block", "kind", "unit", "increase"])


@contextmanager
def _without(block, kind, unit):
    """The block with one unit's output zeroed where it enters the next layer: the same as without it."""
    layer, width = (block.attn.proj, block.head_dim) if kind == "heads" else (block.mlp.fc2, 1)

    def silence(_, inputs):
        x = inputs[0].clone()
        x[..., unit * width : (unit + 1) * width] = 0
        return x

    with layer.register_forward_pre_hook(silence):
        yield


def agreement(unit_scores, measured):
    """How well each criterion ranks units: a frame of criterion, kind, spearman (rank correlation, in [-1, 1],
    between score and measured loss increase over all blocks) and units (how many were compared).

    unit_scores: {criterion: {(block, kind): tensor}} of scores.units. measured: frame of `ablations`.
    """
    rows = []
    for criterion, found in unit_scores.items():
        score = [found[block, kind][unit].item() for block, kind, unit in measured[["block", "kind", "unit"]].values]
        for kind, part in measured.assign(score=score).groupby("kind"):
            rank = part.score.rank().corr(part.increase.rank())  # Pearson of ranks; nan where all are equal
            rows.append((criterion, kind, rank, len(part)))
    return pd.DataFrame(rows, columns=AGREEMENT)


def layer_agreement(weight_scores, saliency, measured):
    """How well each criterion ranks layers by what a cut costs: a frame as of `agreement`, of kind "weights".

    The rank correlation, over layers, between the score that a layer loses in all by the cut and the measured loss
    increase, in the mean over ratios (over layers and ratios together it would be high for any score that adds up).
    units: how many layers. weight_scores: {criterion: {parameter name: tensor}} of scores.weights. saliency, measured:
    what `curves` was given and what it returned, per="layer": all criteria are asked about the same cuts.
    """
    rows = []
    for ratio, part in measured.groupby("ratio"):
        names = [f"{layer}.weight" for layer in part.layer]
        keep = masks.keep_largest({name: saliency[name] for name in names}, sparsity=ratio, per="layer")
        for criterion, found in weight_scores.items():
            lost = [found[name].double()[~keep[name].to(found[name].device)].sum().item() for name in names]
            increase = part.increase.reset_index(drop=True)
            rows.append((criterion, "weights", pd.Series(lost).rank().corr(increase.rank()), len(part)))
    table = pd.DataFrame(rows, columns=AGREEMENT)
    return table.groupby(["criterion", "kind"], sort=False, as_index=False).agg({"spearman": "mean", "units": "first"})
