"""Recovery without training: the layers of a cut model are solved for anew, first to last, against the dense model."""

import copy

import torch
from torch import nn

from . import layers, lowrank, models, scores, shrink


@torch.no_grad()
def reconstruct(model, dense, batches, *, drops=(), keep=None, tokens=64, damping=1e-3):
    """A copy of model whose layers, one after the other, come as near as they can to what dense computes; no labels.

    Weight and bias of a layer become the least-squares map from its own inputs, as the layers solved before have left
    them, to the outputs of the layer of that name in dense: what went astray earlier is seen and made up for, which
    compensation by activations of the dense model (shrink.remove, shrink.refit) cannot do (asymmetric reconstruction,
    Zhang et al. 2016, section 3.3; He et al. 2017 for channels removed). fc2 is solved for all that its block should
    leave in the residual stream, except where a norm follows it; the classifier for dense's logits. A layer keeps its
    form: a factored one its rank (the best map of that rank), a masked one its support. Low rank plus sparse layers
    and what is no linear layer or convolution stay as they are.

    dense: the model that was cut, of plain layers. drops: what shrink.remove took from it, a dictionary for each call
    in their order, so that each output finds its own. keep: {parameter: bool tensor}, the masks that model has.
    batches: a list of (x, y), as for `scores`. tokens: how many positions an image gives a layer, drawn anew for each
    batch; all images together should give many more than a layer has inputs. damping: ridge towards the weights that
    are there, as a share of the inputs' mean variance (lowrank.damped).

    On the positions seen no layer is further from its target than before its turn, up to the ridge. Costs about one
    forward pass of dense and three to four of model, and the products; holds the targets of one block at a time.
    Raises ValueError if model is not dense without drops, for missing batches and values that are not finite.
    """
    if not (images := [x for x, _ in batches or ()]):
        raise ValueError(scores.NO_BATCHES)
    model, rows = copy.deepcopy(model), _rows(dense, drops)
    _check_same(model, rows)
    both, streams, parts, reached = (dense, model), (images, images), None, []
    views = [models.view(m) for m in both]
    with scores.Sweep(dense), scores.Sweep(model):  # in eval mode, and afterwards as they were
        for name, own in views[0].segments.items():
            before, parts = parts, [m.get_submodule(name) for m in both]
            if name in ("patch_embed", ""):
                streams = images, images
            elif before == [m.patch_embed for m in both]:  # the model adds something in between
                streams = [[_see(m, x, part)[part][0] for x in images] for m, part in zip(both, parts, strict=True)]
            else:
                streams = reached, [before[1](x) for x in streams[1]]
            places = [_Place(*views, layer, rows[layer], tokens) for layer in own if _solvable(model, layer)]
            reached = _set_targets(places, parts[0], streams[0])
            for place in places:
                _solve(place, *_moments(place, parts[1], streams[1]), keep or {}, damping)
    return model


def _rows(dense, drops):
    """{layer: which of dense's outputs it still has}, int64 [outputs], when these drops are gone."""
    marked = copy.deepcopy(dense).double()
    names = [layer for own in models.view(dense).segments.values() for layer in own]
    for name in names:
        layer = marked.get_submodule(name)
        if type(layer) not in (nn.Linear, nn.Conv2d):
            raise ValueError(f"{name} of dense is a {type(layer).__name__}: give the model before it was factored")
        number = torch.arange(len(layer.weight), device=layer.weight.device)
        layer.weight.copy_(number.view(-1, *[1] * (layer.weight.dim() - 1)).expand_as(layer.weight))
    for drop in [drops] if isinstance(drops, dict) else drops:
        marked = shrink.remove(marked, drop)
    left = dict(marked.named_modules())
    return {name: _inner(left[name]).weight.flatten(1)[:, 0].long() for name in names if name in left}


def _check_same(model, rows):
    known = dict(model.named_modules())
    for name, own in rows.items():
        found = len(_inner(known[name]).weight) if isinstance(known.get(name), nn.Linear | layers.RowLinear) else None
        if name not in known or found not in (None, len(own)):
            raise ValueError(
                f"model has {'no' if name not in known else found} outputs of {name}, dense without drops "
                f"{len(own)}: give what was removed, in order"
            )


def _inner(layer):
    return layer.kept if isinstance(layer, layers.RowLinear) else layer


def _solvable(model, name):
    known = nn.Linear | nn.Conv2d | layers.FactoredLinear | layers.FactoredConv2d
    return isinstance(_inner(dict(model.named_modules()).get(name)), known)


class _Enough(Exception):
    pass


def _see(module, x, *watched):
    """{watched: (its input, its output)} of a forward pass of module on x, which ends at the last one watched."""
    seen = {}

    def look(part, arguments, output):
        seen[part] = arguments[0], output
        if part is watched[-1]:
            raise _Enough

    handles = [part.register_forward_hook(look) for part in watched]
    try:
        module(x)
    except _Enough:
        return seen
    finally:
        for handle in handles:
            handle.remove()


class _Place:
    """One layer, in dense and in model: rows, the outputs of dense's that model's has; targets of each batch."""

    def __init__(self, dense, model, name, rows, tokens):
        self.name, self.rows, self.tokens, self.targets = name, rows, tokens, []
        self.theirs, self.own = dense.model.get_submodule(name), model.model.get_submodule(name)
        self.their_norm, factors = dense.ends_block(name) or (None, None)
        self.own_norm, _ = model.ends_block(name) or (None, None)
        # factors of the outputs on their way into the residual stream: LayerScale's
        self.scale = torch.ones(len(rows), device=rows.device) if factors is None else factors[rows]
        self.written = self.own.rows if isinstance(self.own, layers.RowLinear) else slice(None)
        self.layer = _inner(self.own)
        self.first, self.last = None, self.layer
        if isinstance(self.layer, layers.FactoredLinear):
            self.first, self.last = self.layer.first, self.layer.second
        elif isinstance(self.layer, layers.FactoredConv2d):
            self.first, self.last = self.layer

    def some(self, x, number):
        """As many rows of x [positions, channels] as are looked at in a batch, the same ones for all x as long."""
        count = self.size * self.tokens
        if len(x) <= count:
            return x
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        return x[order[:count].to(x.device)]


def _set_targets(places, part, stream):
    """Set the targets [positions, m] of places in dense's part, and return what part makes of the stream. The targets
    of a layer that ends a block are what the block leaves in the residual stream."""
    reached = []
    norms = [place.their_norm for place in places if place.their_norm is not None]
    for number, x in enumerate(stream):
        seen = _see(part, x, *norms, *(place.theirs for place in places), part)
        for place in places:
            place.size = len(x)
            target = place.some(_flat(seen[place.theirs][1], place.theirs), number)[:, place.rows] * place.scale
            if place.their_norm is not None:
                target += place.some(_flat(seen[place.their_norm][0]), number)[:, place.rows]
            place.targets.append(target)
        reached.append(seen[part][1])
    return reached


def _moments(place, part, stream):
    """gram [n+1, n+1] of the inputs of model's layer and a constant 1, and cross [m, n+1] of the targets with them,
    float64. part: the module of model that the layer lies in; stream: what goes into it."""
    gram = cross = total = 0
    norm = [] if place.own_norm is None else [place.own_norm]
    convolution = next((c for c in (place.first, place.last) if isinstance(c, nn.Conv2d)), None)
    for number, (x, target) in enumerate(zip(stream, place.targets, strict=True)):
        place.size, seen = len(x), _see(part, x, *norm, place.own)
        for module in norm:  # what the stream lacks in front of the MLP is made up for behind it
            target = target - place.some(_flat(seen[module][0]), number)[:, place.written]
        x = scores.wide(seen[place.own][0])
        x = place.some(_flat(x) if convolution is None else scores.patches(x, convolution), number)
        x = nn.functional.pad(x, (0, 1), value=1)
        gram, cross, total = gram + (x.T @ x).double(), cross + (target.T @ x).double(), total + len(x)
    place.targets = []
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise ValueError(f"inputs or targets of {place.name} are not finite: look for NaN in the weights and images")
    return gram / total, cross / total


def _flat(x, layer=None):
    return scores.channels_last(scores.wide(x), layer).flatten(0, -2)


def _solve(place, gram, cross, keep, damping):
    """Put the least-squares weight and bias into the layer, in its form."""
    first, last, scale = place.first, place.last, place.scale.double()
    weight = last.weight.flatten(1).double()
    weight = scale[:, None] * (weight if first is None else weight @ first.weight.flatten(1).double())
    mean, average = gram[-1, :-1], cross[:, -1]
    gram, cross = gram[:-1, :-1], cross[:, :-1]
    if last.bias is not None:
        gram, cross = gram - mean[:, None] * mean, cross - average[:, None] * mean
    ridged = lowrank.damped(gram, damping)
    if ridged.diagonal().mean() > 0:  # else all inputs are constant, and there is at most a bias to set
        weight = torch.linalg.solve(ridged, (cross + weight @ (ridged - gram)).T).T
    unscale = torch.where(scale == 0, 0, 1 / scale)
    if first is not None:
        u, v = lowrank.svd(weight, len(first.weight), gram=ridged)
        weight = u @ v
        first.weight.copy_(v.view_as(first.weight))
        last.weight.copy_((unscale[:, None] * u).view_as(last.weight))
    else:
        if (mask := keep.get(f"{place.name}.weight")) is not None:
            mask = mask.flatten(1)
            weight = lowrank.refit(weight, ridged, mask) if mask.any() else weight * mask
        last.weight.copy_((unscale[:, None] * weight).view_as(last.weight))
    if last.bias is not None:
        last.bias.copy_(unscale * (average - weight @ mean) * keep.get(f"{place.name}.bias", 1))
