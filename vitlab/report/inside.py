"""Look inside a model: frames of its weights, widths, spectra and attention, for `drawings`.

Functions stand in the order of the drawings that take their frames.

Public: attention_maps, layers, spectra, units, weights, widths.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch
from timm.models import swin_transformer
from torch import nn

from vitlab import models
from vitlab.evaluation import evaluate
from vitlab.models import _layers, anatomy
from vitlab.names import check
from vitlab.pruning import _sweep, lowrank, prune
from vitlab.report import tables

_MOST = 128  # rows and columns that a picture shows, the first ones
_STEPS = np.arange(1, 13) / 12  # ranks that spectra show, as shares and as exponents

# -- for drawings.layers


@torch.no_grad()
def layers(module, *, keep=None, rows=None, columns=None):
    """Return what is left of a linear layer, to be drawn: one line for each row of each matrix.

    module: an nn.Linear or one of `_layers`
    keep: bool [m, n], False for what is drawn as zero; None: what is zero is
    rows, columns: (how many the layer once had, the indices of those that this one has); None: all
        that it has
    Returns a frame of part, row and cells, at most 128 of either. part: "W" of a plain layer; "U",
    "V" and "S" of low rank and sparse ones. cells: a letter for each column. It is a to i for the
    size of the weight, a dot for zero, or x for a row or column that is gone.
    """
    if isinstance(module, _layers.RowLinear):
        # It knows itself which rows are gone.
        rows = module.out_features, module.rows.tolist()
        module = module.kept
    if isinstance(module, _layers.LowRankSparseLinear):
        keep = module.support_mask
    frames = []
    for part, matrix in _factors(module).items():
        alive = matrix != 0
        # A mask is of whole weights: the factors U and V have none.
        if keep is not None and part in ("W", "S"):
            alive = keep
        letters = pd.DataFrame(_letters(matrix, alive))
        # The rows of V and the columns of U are ranks, which no cut of units takes away.
        if rows is not None and part != "V":
            letters = _in_place(letters, *rows, axis=0)
        if columns is not None and part != "U":
            letters = _in_place(letters, *columns, axis=1)
        cells = letters.iloc[:_MOST, :_MOST].agg("".join, axis=1)
        frames.append(pd.DataFrame({"part": part, "row": range(len(cells)), "cells": cells}))
    return pd.concat(frames, ignore_index=True)


def _in_place(letters, count, indices, *, axis):
    """Return letters at these indices of count rows (axis 0) or columns (1), x elsewhere."""
    letters = letters.set_axis(indices, axis=axis)
    return letters.reindex(range(count), axis=axis, fill_value="x")


def _factors(module):
    """Return {part: matrix} of an nn.Linear or a layer with factors."""
    if isinstance(module, nn.Linear):
        return {"W": module.weight}
    parts = dict(zip("UV", module.factors, strict=True)) if module.rank else {}
    if isinstance(module, _layers.LowRankSparseLinear):
        parts["S"] = module.sparse_weight
    return parts


def _letters(matrix, alive):
    """Return the letter of each weight: a to i by its size, a dot where alive [m, n] is False."""
    # The size of a weight is in ninths of the part's 99th percentile of |w|, as a single large
    # weight would make all others pale.
    sizes = matrix.abs()
    place = int(0.99 * (matrix.numel() - 1))
    largest = sizes.flatten().sort().values[place].clamp_min(1e-30)
    ninths = (9 * sizes / largest).ceil().clamp(1, 9)
    ninths = ninths * alive.to(matrix.device)
    # Letters and no digits, which csv would read as numbers.
    letters = np.array(list(".abcdefghi"))
    return letters[ninths.int().cpu().numpy()]


# -- for drawings.widths


def widths(model, small):
    """Return how wide a cut model is, place by place.

    Kinds are those of View.units but block, and qk and v are of one head. If any layer is factored
    there are kinds such as "rank of qkv", too.

    model: the model before the cut.
    small: any cut of it.

    Returns a frame of where, kind, kept (0 for what is gone) and whole, in forward order.
    """
    before = models.view(model)
    left = _widths(models.view(small))
    rows = [(*key, left.get(key, 0), whole) for key, whole in _widths(before).items()]
    modules = dict(small.named_modules())
    if any(hasattr(modules.get(name), "rank") for name in before.matrices):
        for name, layers in before.linears().items():
            # The rank of a plain layer is its smaller side, that of a layer that is gone 0.
            rank = 0
            if now := modules.get(name):
                rank = getattr(now, "rank", min(now.out_features, now.in_features))
            # Layers between blocks stand for themselves.
            where = getattr(before.block_of(name), "name", name)
            whole = min(layers.out_features, layers.in_features)
            rows.append((where, f"rank of {before.role(name)}", rank, whole))
    # Modules are registered in forward order. A stage has no module in a ViT; it stands before its
    # blocks.
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    for number, stage in enumerate(before.stages):
        first = f"layers.{number}.blocks" if before.kind == "swin" else "blocks"
        place[stage] = place[first] + 0.5
    rows.sort(key=lambda row: place[row[0]])
    return pd.DataFrame(rows, columns=["where", "kind", "kept", "whole"])


def _widths(view):
    """Return {(where, kind): how many there are}; of dimensions of heads in one head."""
    counts = view.units(("filters", "width", "heads", "qk", "v", "neurons"))
    # All heads of a block are cut to one size.
    for where, kind in counts:
        if kind in ("qk", "v"):
            counts[where, kind] //= view.block(where).num_heads
    return counts


# -- for weight_histograms and weight_violins


@torch.no_grad()
def weights(stages, keep, *, by="role", bins=81):
    """Return how the weights are distributed at each stage, as a frame.

    stages: {name: model}, the unpruned one first, such as unpruned, pruned and finetuned.
    keep: masks as for `prune.apply`. The weights (no biases) that they name are counted.
    by: "role" counts by the role of the layer and for "all"; "layer" counts by layer.
    bins: number of bins of equal width.

    Columns of the frame are
        stage, role: name of the stage; role of the layer, or "all" with by="role"
        layer, block: with by="layer" only, names of both; block is None outside of blocks
        left, right: edges of the bin, the same everywhere
        count: weights in the bin that are not zero
        survivors: those of them that keep says stay
        zeros: exact zeros of that stage and role or layer
        threshold: the |w| up to which magnitude, over all of these weights together, would cut as
            many of the first stage as keep does

    Raises ValueError for another `by`.
    """
    check("by", by, ("role", "layer"))
    first = next(iter(stages))
    view = models.view(stages[first])
    weights = {stage: prune.parameters_of(model, keep) for stage, model in stages.items()}
    # All stages have the same bins, from minus to plus the largest |w| of all, so that their counts
    # compare.
    limit = 0.0
    for parameters in weights.values():
        limit = max(limit, *(float(weight.abs().max()) for weight in parameters.values()))
    edges = torch.linspace(-limit, limit, bins + 1)
    names = [name for name in keep if name.endswith(".weight")]
    frames = []
    for name in names:
        layers = name.removesuffix(".weight")
        for stage, parameters in weights.items():
            weight = parameters[name].float().flatten().cpu()
            # Zeros stand apart: in the bin around 0 they would hide all small weights.
            alive = weight != 0
            survivors = weight[alive & keep[name].flatten().cpu()]
            columns = {
                "stage": stage,
                "role": view.role(layers),
                "layer": layers,
                "block": getattr(view.block_of(layers), "name", None),
                "left": edges[:-1],
                "right": edges[1:],
                "count": torch.histc(weight[alive], bins, -limit, limit).long(),
                "survivors": torch.histc(survivors, bins, -limit, limit).long(),
                "zeros": int((~alive).sum()),
            }
            frames.append(pd.DataFrame(columns))
    table = pd.concat(frames, ignore_index=True)
    if by == "role":  # the layers of one role, and all layers, add up
        every = pd.concat([table, table.assign(role="all")]).drop(columns=["layer", "block"])
        keys = ["stage", "role", "left", "right"]
        table = every.groupby(keys, sort=False, as_index=False).sum()
    return table.assign(threshold=_magnitude_threshold(weights[first], keep, names))


def _magnitude_threshold(parameters, keep, names):
    """Return the largest |w| that goes if magnitude alone cuts as many as keep; 0 for none."""
    count = sum(int((~keep[name]).count_nonzero()) for name in names)
    if not count:
        return 0.0
    sizes = torch.cat([parameters[name].float().abs().flatten().cpu() for name in names])
    return sizes.kthvalue(count).values.numpy()


# -- for spectra


def spectra(model, grams=None):
    """Return the singular values of the linear layers but the classifier, as a DataFrame.

    grams: {layer: [n, n]} of scores.grams, for the values of W S as in the SVD of
        `factor.compress`; None for those of W.

    Returns a row for each layer and about 24 of its ranks, from 1 to the last:
        layer, block, role, m, n, rank,
        sigma: the singular value of that rank,
        energy: share of the squares up to it, in [0, 1]; 1 at the last rank,
        break_even: rank below which two thin layers execute fewer MACs (_layers.break_even_rank).
    Raises TypeError for a model that vitlab cannot see into.
    Raises ValueError for weights or grams with NaN or inf, and for a layer without its gram [n, n].
    """
    view = models.view(model)
    rows = []
    for name, layers in view.linears().items():
        weight = layers.weight.detach()
        m, n = weight.shape
        # A thousandth of the mean of the gram's diagonal is added to it, see lowrank.damped.
        sigma = lowrank.spectrum(weight, _sweep.fitting_gram(grams, name, n, 1e-3))
        energy = sigma.square().cumsum(0)
        energy = energy / energy[-1].clamp_min(lowrank.TINY)  # a layer of zeros has none
        for rank in _spread_ranks(min(m, n)):
            rows.append(
                {
                    "layer": name,
                    "block": getattr(view.block_of(name), "name", None),
                    "role": view.role(name),
                    "m": m,
                    "n": n,
                    "rank": rank,
                    "sigma": sigma[rank - 1].item(),
                    "energy": energy[rank - 1].item(),
                    "break_even": _layers.break_even_rank(m, n),
                }
            )
    return pd.DataFrame(rows)


def _spread_ranks(largest):
    """Return distinct ranks from 1 to the largest, half linearly, half logarithmically spaced."""
    ranks = np.concatenate([[1], largest * _STEPS, largest**_STEPS]).round()
    # The first linear step of a narrow layer rounds to 0.
    return np.unique(ranks[ranks > 0]).astype(int).tolist()


# -- for attention_maps


def attention_maps(before, after, images, places):
    """Show where two models look on the same images.

    before, after: models
    images: a data.Split
    places: numbers of a few images in the split

    Returns a frame with a row for each image, block and token:
        image: place in the split
        block: name of the block
        row, column: of the token, from the upper left
        before, after: attention that the token receives, to three digits; 1 is its equal share
    Raises ValueError for no places, for places outside the split, and for models that have no block
    in common.
    """
    tables.check_places(places, images)
    looked_at = images.take(np.asarray(places))
    x, _ = next(looked_at.batches(len(places), device=evaluate.device_of(before)))
    maps = {}
    for when, model in (("before", before), ("after", after)):
        maps[when] = _attention_maps(model, x.to(evaluate.device_of(model)))
    # The last two stages are shown (a ViT has one), each by the last block in which both models
    # attend: a later block takes the place of an earlier one of its stage.
    last_blocks = {}
    for block in models.view(before).blocks:
        if block.name in maps["before"] and block.name in maps["after"]:
            last_blocks[block.stage] = block.name
    if not last_blocks:
        raise ValueError("the two models have no block in which both attend")
    frames = []
    for name in list(last_blocks.values())[-2:]:
        image, row, column = np.indices(maps["before"][name].shape).reshape(3, -1)
        frame = {"image": np.take(places, image), "block": name, "row": row, "column": column}
        for when, map_by_block in maps.items():
            frame[when] = map_by_block[name].flatten().double().cpu().numpy().round(3)
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def _attention_maps(model, x):
    """Return {block name: [B, height, width]}, the attention that tokens of images x receive.

    It is the mean over heads, where 1 is what each token would get of equal shares.
    """
    view = models.view(model)
    grid = model.patch_embed.dynamic_feat_size(x.shape[-2:])  # also at another size than its own
    maps = {}
    for name, weights in _attention_weights(model, x).items():
        shares = weights.float().mean(1) * weights.shape[-1]  # [.., from, to]
        if view.kind == "vit":
            # Of a ViT that reads its class token, take what that token attends to, not the one for
            # distillation. Of other ViTs take the mean over all tokens.
            by_token = getattr(model, "global_pool", "") == "token" and model.cls_token is not None
            received = shares[:, 0] if by_token else shares.mean(1)
            patches = received[:, getattr(model, "num_prefix_tokens", 0) :]
            maps[name] = patches.unflatten(1, grid)
        else:
            # Of a Swin take the mean over the tokens of a window, its padding included. Windows lie
            # in the first dimension and are put back where they were in the image.
            # Merging has halved the grid once a stage, rounded up.
            sides = [-(-side // 2 ** view.block(name).stage) for side in grid]
            maps[name] = _windows_in_place(shares.mean(1), model.get_submodule(name), *sides)
    return maps


@torch.no_grad()
def _attention_weights(model, x):
    """Return {block name: attention weights} of images x in evaluation mode; rows sum to 1.

    x: [B, 3, H, W]
    Returns tensors [B, heads, tokens that look, tokens that are looked at].
    """
    # A Swin's tensors are [B * windows, heads, tokens of a window, tokens of a window]. The copy is
    # changed, so that the model stays as it is.
    model = anatomy.copied(model).eval()
    weights = {}
    for block in models.view(model).blocks:
        if block.num_heads:  # a cut may have left none
            block.attn.fused_attn = False  # the fused kernel keeps the weights to itself
            block.attn.attn_drop.register_forward_hook(partial(_keep_output, weights, block.name))
    model(x)
    return weights


def _keep_output(outputs, name, module, inputs, output):
    outputs[name] = output


def _windows_in_place(received, block, height, width):
    """Return values [B * windows, tokens of a window] of a Swin block as images [B, H, W]."""
    rows, columns = block.window_size
    # Windows at the right and lower edge are filled up with padding, which is cut off again.
    padded = height + -height % rows, width + -width % columns
    windows = received.view(-1, rows, columns, 1)
    image = swin_transformer.window_reverse(windows, block.window_size, *padded)[..., 0]
    # In every second block the windows are shifted.
    return image[:, :height, :width].roll(tuple(block.shift_size), (1, 2))


# -- for drawings.heads


def units(scores, alive):
    """Return units with their scores and whether they are left, as a frame.

    scores: {(block, kind): float tensor [units]} of the whole model.
    alive: {(block, kind): indices of the units that are left}, as masks.remaining gives them.

    Columns of the frame are block, kind, unit, score and kept.
    Raises ValueError for a unit that has no score.
    """
    rows = []
    for key, tensor in scores.items():
        left = set(alive[key])
        if not left <= set(range(len(tensor))):
            raise ValueError(f"{key[1]} of {key[0]} are 0 to {len(tensor) - 1}; got {sorted(left)}")
        for unit, score in enumerate(tensor.tolist()):
            rows.append((*key, unit, score, unit in left))
    return pd.DataFrame(rows, columns=["block", "kind", "unit", "score", "kept"])
