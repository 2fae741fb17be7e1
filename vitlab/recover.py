"""Recovery without training: the layers of a cut model are solved for anew, first to last, against the dense model.

`shrink.remove` and `shrink.refit` compensate each layer by activations of the model before the cut, for itself, in
the same call as the cut. `reconstruct` comes after all cuts and looks at what the smaller model really computes.
"""

import copy
from contextlib import ExitStack, suppress

import torch
from torch import nn

from . import layers, lowrank, models, prune, scores, shrink

LEAST_FACTOR = 0.01  # of LayerScale, below which a channel of a branch is too faint to carry corrections


@torch.no_grad()
def reconstruct(model, dense, batches, *, drops=(), keep=None, tokens=64, damping=1e-3):
    """A copy of model whose layers, one after the other, come as near as they can to what dense computes; no labels.

    Weight and bias of a layer become the least-squares map from its own inputs, as the layers solved before have left
    them, to the outputs of the layer of that name in dense: what went astray earlier is seen and made up for, which
    compensation by activations of the dense model cannot do (asymmetric reconstruction, Zhang et al. 2016, section
    3.3; He et al. 2017 for channels removed). fc2 is solved for all that its block should leave in the residual
    stream, except where a norm follows it or LayerScale is below LEAST_FACTOR; the classifier for dense's logits. A
    layer keeps its form: a factored one its rank (the best map of that rank), a masked one its support. What stays as
    it is: low rank plus sparse layers, convolutions of several groups, norms and all else that is no linear layer of
    models.View or convolution of the stem, and layers that see less than two positions for each of their inputs.

    dense: the model that was cut, of plain layers. drops: what shrink.remove took from it, a dictionary for each call
    in their order, so that each output finds its own. keep: {parameter: bool tensor}, the masks that model has.
    batches: a list of (x, y), as for `scores`. tokens: how many positions an image gives a layer, drawn for each
    batch (the classifier sees one); all together should be many more than a layer has inputs. damping: ridge towards
    the weights that are there, as a share of the inputs' mean variance (without a bias mean square; lowrank.damped).

    On the positions seen no layer is further from its target than before its turn, up to the ridge. Costs about two
    forward passes of dense, four of model, and the products. Holds what goes into a block of either model and the
    block's targets, for all images. Norms behind a layer (SwinV2's, a batch norm) should still be dense's.
    Raises ValueError if model is not dense without drops, for masks of what is not there or is factored, for missing
    batches and values that are not finite.
    """
    if not (images := [x for x, _ in batches or ()]):
        raise ValueError(scores.NO_BATCHES)
    model, rows = copy.deepcopy(model), _rows(dense, drops)
    _check_same(model, rows)
    keep = _checked_masks(model, keep or {})
    both, views, before = (dense, model), [models.view(m) for m in (dense, model)], None
    with scores.Sweep(dense), scores.Sweep(model):  # in eval mode, and afterwards as they were
        for name, own in views[0].segments.items():
            parts = [m.get_submodule(name) for m in both]
            if name in ("patch_embed", ""):
                streams = [list(images), list(images)]
            elif before == "patch_embed":  # the model adds something in between
                streams = [[_see(m, x, part)[part][0] for x in images] for m, part in zip(both, parts, strict=True)]
            places = [_Place(*views, layer, rows[layer], tokens) for layer in own if _is_solved(model, layer, rows)]
            _advance(places, parts[0], streams[0])
            for place in places:
                _solve(place, *_moments(place, parts[1], streams[1]), keep, damping)
            if name not in ("patch_embed", ""):
                for number, x in enumerate(streams[1]):
                    streams[1][number] = parts[1](x)
            before = name
    return model


def _rows(dense, drops):
    """{plain layer: which of dense's outputs it has when these drops are gone}: int64 [outputs], -1 for those that
    are constant, or None for a layer that is gone."""
    for name, layer in dense.named_modules():
        if isinstance(layer, (*layers.CUT, layers.FactoredConv2d)):
            raise ValueError(f"{name} of dense is a {type(layer).__name__}: give the model before it was factored")
    marked = copy.deepcopy(dense).double()
    names = [layer for own in models.view(dense).segments.values() for layer in own]
    names = [name for name in names if type(dense.get_submodule(name)) in (nn.Linear, nn.Conv2d)]
    for name in names:
        weight = marked.get_submodule(name).weight
        number = 1 + torch.arange(len(weight), device=weight.device)
        weight.copy_(number.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight))
    for drop in [drops] if isinstance(drops, dict) else drops:
        marked = shrink.remove(marked, drop) if drop else marked
    left = dict(marked.named_modules())
    return {n: _inner(left[n]).weight.flatten(1)[:, 0].long() - 1 if n in left else None for n in names}


def _check_same(model, rows):
    known = dict(model.named_modules())
    for name, own in rows.items():
        found, wanted = _outputs(known.get(name)), None if own is None else len(own)
        if found != wanted:
            raise ValueError(
                f"model has {found or 'no'} outputs of {name}, dense without drops {wanted or 'none'}: give all that "
                "was removed, in its order"
            )


def _outputs(layer):
    """How many outputs a linear layer or convolution computes; None for none."""
    if isinstance(layer, layers.FactoredConv2d):
        return layer[1].out_channels
    layer = _inner(layer)
    return getattr(layer, "out_features", getattr(layer, "out_channels", None))


def _inner(layer):
    return layer.kept if isinstance(layer, layers.RowLinear) else layer


def _checked_masks(model, keep):
    """keep on the model's device, or ValueError for a mask that does not fit or lies in a factored layer."""
    known, thin = prune.parameters_of(model, keep), layers.FactoredLinear | layers.FactoredConv2d
    for name in keep:
        path = name.split(".")
        if any(isinstance(model.get_submodule(".".join(path[:i])), thin) for i in range(1, len(path))):
            raise ValueError(f"{name} lies in a factored layer, whose parts are solved for whole: mask plain layers")
    return {name: mask.to(known[name].device) for name, mask in keep.items()}


def _is_solved(model, name, rows):
    if rows.get(name) is None or (rows[name] < 0).any():
        return False
    layer = _inner(model.get_submodule(name))
    first = layer[0] if isinstance(layer, layers.FactoredConv2d) else layer
    if isinstance(first, nn.Conv2d):
        return first.groups == 1 and first.padding_mode == "zeros" and not isinstance(first.padding, str)
    return isinstance(layer, nn.Linear | layers.FactoredLinear)


class _Enough(Exception):
    pass


def _see(module, x, *watched):
    """{watched: (its input, its output)} of a forward pass of module on x, which ends at the last one watched."""
    seen = {}

    def look(part, arguments, output):
        seen[part] = arguments[0], output
        if part is watched[-1]:
            raise _Enough

    with ExitStack() as hooks, suppress(_Enough):
        for part in watched:
            hooks.enter_context(part.register_forward_hook(look))
        module(x)
    return seen


class _Place:
    """One layer, in dense and in model (Views): rows, the outputs of dense's that model's has; targets by batch."""

    def __init__(self, dense, model, name, rows, tokens):
        self.rows, self.tokens, self.targets = rows, tokens, []
        self.theirs, self.own = dense.model.get_submodule(name), model.model.get_submodule(name)
        self.name = f"{name}.kept" if isinstance(self.own, layers.RowLinear) else name
        self.written = self.own.rows if isinstance(self.own, layers.RowLinear) else slice(None)
        layer = _inner(self.own)
        self.first, self.last = None, layer
        if isinstance(layer, layers.FactoredLinear):
            self.first, self.last = layer.first, layer.second
        elif isinstance(layer, layers.FactoredConv2d):
            self.first, self.last = layer
        self.their_norm, their_factors = dense.ends_block(name) or (None, None)
        self.own_norm, own_factors = model.ends_block(name) or (None, None)
        self.scale = self.their_scale = torch.ones(len(rows), device=rows.device)
        self.corrects = self.scale > 0
        if own_factors is not None:  # too faint ones are solved for the branch's own output
            own, theirs = own_factors[self.written], their_factors[rows]
            self.corrects = own.abs() >= LEAST_FACTOR
            self.scale, self.their_scale = (torch.where(self.corrects, each, 1) for each in (own, theirs))
        self.shift = 0
        names = [models.norm_after(view.model, name) for view in (dense, model)]
        if all(names):  # what was lost on average may be in the batch norm behind (shrink.remove with means)
            theirs, own = (v.model.get_submodule(n).running_mean for v, n in zip((dense, model), names, strict=True))
            self.shift = own - theirs[rows]

    def some(self, x, number, images):
        """As many rows of x [positions, channels] as are looked at of so many images; the same ones in all that has
        as many positions and comes from the batch of that number."""
        if len(x) <= images * self.tokens:
            return x
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        return x[order[: images * self.tokens].to(x.device)]

    def stream(self, seen, norm, channels, number, images):
        """What the residual stream [positions, m] has in front of a norm, where the layer is to make up for it."""
        return self.some(_flat(seen[norm][0]), number, images)[:, channels] * self.corrects


def _advance(places, part, stream):
    """Set the targets [positions, m] of places in dense's part, and put into stream what part makes of it. The
    targets of a layer that ends a block are what the block leaves in the residual stream."""
    norms = [place.their_norm for place in places if place.their_norm is not None]
    for number, x in enumerate(stream):
        seen = _see(part, x, *norms, *(place.theirs for place in places), part)
        for place in places:
            target = place.some(_flat(seen[place.theirs][1], place.theirs), number, len(x))[:, place.rows]
            target = (target + place.shift) * place.their_scale
            if place.own_norm is not None:
                target = target + place.stream(seen, place.their_norm, place.rows, number, len(x))
            place.targets.append(target)
        stream[number] = seen[part][1]


def _moments(place, part, stream):
    """gram [n+1, n+1] of the inputs of model's layer and a constant 1, and cross [m, n+1] of the targets with them,
    float64, and how many positions they are of. part: the module of model around the layer; stream: what enters it.

    Products in single precision are taken about the first batch's means: about 0 their rounding, which does not cancel
    where positions are alike, would outweigh a small variance and be solved for.
    """
    gram = cross = total = 0
    about = ()
    norm = [] if place.own_norm is None else [place.own_norm]
    convolution = next((c for c in (place.first, place.last) if isinstance(c, nn.Conv2d)), None)
    for number, (x, target) in enumerate(zip(stream, place.targets, strict=True)):
        images, seen = len(x), _see(part, x, *norm, place.own)
        if norm:  # what the stream lacks in front of the MLP is made up for behind it
            target = target - place.stream(seen, place.own_norm, place.written, number, images)
        x = scores.wide(seen[place.own][0])
        x = place.some(_flat(x) if convolution is None else scores.patches(x, convolution), number, images)
        about = about or (x.mean(0), target.mean(0))
        x, target = x - about[0], target - about[1]
        x = nn.functional.pad(x, (0, 1), value=1)
        gram, cross, total = gram + (x.T @ x).double(), cross + (target.T @ x).double(), total + len(x)
    place.targets = []
    back = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)  # from (x - middle, 1) to (x, 1)
    back[:-1, -1] = about[0].double()
    gram, cross = back @ gram @ back.T, (cross + about[1].double()[:, None] * gram[-1]) @ back.T
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise ValueError(f"inputs or targets of {place.name} are not finite: look for NaN in the weights and images")
    return gram / total, cross / total, total


def _flat(x, layer=None):
    return scores.channels_last(scores.wide(x), layer).flatten(0, -2)


def _solve(place, gram, cross, positions, keep, damping):
    """Put the least-squares weight and bias into the layer, in its form."""
    first, last, scale = place.first, place.last, place.scale[:, None].double()
    if positions < 2 * (len(gram) - 1):
        return
    before = last.weight.flatten(1).double()
    before = scale * (before if first is None else before @ first.weight.flatten(1).double())
    mask, bias_mask = (keep.get(f"{place.name}.{part}") for part in ("weight", "bias"))
    free = torch.full_like(scale[:, 0], last.bias is not None, dtype=torch.bool)  # rows with a bias
    free = free if bias_mask is None else free & bias_mask
    mean, average = gram[-1, :-1], cross[:, -1]
    weight = torch.empty_like(before)
    for some, centre in ((free, mean), (~free, 0 * mean)):
        if some.any():
            seen = gram[:-1, :-1] - centre[:, None] * centre
            wanted = cross[some, :-1] - average[some, None] * centre
            ridged = lowrank.damped(seen, damping)
            weight[some] = before[some]
            if seen.diagonal().mean() > 1e-6 * gram[:-1, :-1].diagonal().mean():  # else only rounding varies
                weight[some] = torch.linalg.solve(ridged, (wanted + before[some] @ (ridged - seen)).T).T
            if mask is not None and (own := mask.flatten(1)[some]).any():
                weight[some] = lowrank.refit(weight[some], ridged, own, start=before[some])
    if mask is not None:
        weight *= mask.flatten(1)
    if first is not None:  # never masked: all rows have a bias or none, and ridged is theirs
        u, v = lowrank.svd(weight, len(first.weight), gram=ridged)
        weight = u @ v
        first.weight.copy_(v.view_as(first.weight))
        last.weight.copy_((u / scale).view_as(last.weight))
    else:
        last.weight.copy_((weight / scale).view_as(last.weight))
    if last.bias is not None:
        last.bias.copy_((average - weight @ mean) / scale[:, 0] * free)
