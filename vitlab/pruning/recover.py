"""Recover accuracy without training: solve a cut model's layers anew against the dense model.

`shrink.remove` and `compensate.refit` compensate each layer for itself, in the same call as the
cut, by activations of the model before the cut. `reconstruct` comes after all cuts, and looks at
what the smaller model really computes.

Public: reconstruct.
"""

import dataclasses
from contextlib import ExitStack, suppress
from itertools import chain

import torch
from torch import Tensor, nn

from vitlab import files, models
from vitlab.models import _layers, _structure, anatomy
from vitlab.pruning import _sweep, lowrank, prune, shrink

_LEAST_FACTOR = 0.01  # factors of LayerScale below it leave a channel too faint for corrections
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # what "held out" chooses from
_HELD_OUT = 4  # of so many batches one is held out


@torch.no_grad()
def reconstruct(
    model,
    dense,
    batches,
    *,
    drops=(),
    keep=None,
    untouched=(),
    tokens=64,
    damping=1e-3,
    weights=None,
    gradients=None,
):
    """Return a copy of model whose layers come as near as they can to what dense computes.

    Layers are solved for one after the other, first to last, without labels. Weight and bias of a
    layer become the least-squares map from its inputs to the outputs of its namesake in dense. Its
    inputs are as the layers solved before have left them. Errors of earlier layers are thus seen
    and made up for, which activations of the dense model alone cannot do.

    fc2 is solved for all that its block should leave in the residual stream, except where a norm
    follows it or LayerScale is below 0.01. The classifier is solved for the logits of dense. A
    layer keeps its form: a factored one its rank, a masked one its support.

    model: the cut model. Norms behind a layer (SwinV2's, a batch norm) should still be those of
        dense.
    dense: the model before the cuts, of plain layers.
    batches: a list of (x, y), as for `scores`.
    drops: what shrink.remove took from dense: one dictionary, or one for each call in their order.
        By it each output finds the one that it stands for.
    keep: {parameter: bool tensor}, the masks of model.
    untouched: names of layers that are not solved for.
    tokens: number of positions that an image gives a layer, drawn for each batch; the classifier
        sees one. All together should be many more than a layer has inputs.
    damping: ridge towards the weights that are there, see lowrank.damped. It is a share of the
        inputs' mean variance, or without a bias of their mean square. "held out" chooses it for
        each layer: of 1e-3, 1e-2, 0.1, 1 and 10 the one whose map from three quarters of the
        batches is nearest to the targets of the others, in every fourth output. It serves where
        images are few for the model's width (docs/methods/recovery.md) and takes four batches or
        more.
    weights: {layer: [positions]} of scores.position_weights, by which errors count; then tokens
        before the patches are always looked at. None: all positions count alike.
    gradients: {layer: [m, m]} of scores.gradient_grams of dense, by which errors of a factored
        layer's outputs count (see lowrank.svd). A plain layer has the best map for each output
        apart, however much it counts. None: all outputs count alike.

    On the positions seen, no layer is further from its target than before its turn, up to the
    ridge. The cost is about two forward passes of dense, three of model, and the products. For all
    images at once, memory holds what enters a block of either model, and the targets of the block.

    Raises ValueError if model is not dense without drops, for missing batches or too few to hold
    one out, and for values that are not finite. Masks must be of parameters that are there, and in
    no factored layer.
    Source: asymmetric reconstruction (Zhang et al. 2016, section 3.3); He et al. 2017 for channels
    that are removed.
    """
    images = []
    for x, y in batches or ():
        _sweep.check_images(dense, y)
        images.append(x)
    if not images:
        raise ValueError(_sweep.NO_BATCHES)
    if damping == "held out" and len(images) < _HELD_OUT:
        raise ValueError(
            f'damping="held out" needs {_HELD_OUT} batches or more, got {len(images)}: '
            "give smaller ones, or a number as damping"
        )
    model = anatomy.copied(model)
    rows_by_layer = _rows(dense, drops)
    _check_same(model, rows_by_layer)
    masks = _checked_masks(model, keep or {})
    positions = _sweep.positions_of(dense, rows_by_layer, tokens, weights)
    view = models.view(model)
    dense_view = models.view(dense)
    segments = dense_view.layers_along_stream
    _, first_block, *_ = segments  # behind the patch embedding
    with _sweep.Sweep(dense), _sweep.Sweep(model):  # in eval mode; later as they were
        for name, layer_names in files.progress(segments.items(), "reconstructing"):
            part = model.get_submodule(name)
            dense_part = dense.get_submodule(name)
            reads_images = name in ("patch_embed", "")
            if reads_images:
                inputs = list(images)
                dense_inputs = list(images)
            elif name == first_block:
                # A model adds to the stream between the patch embedding and the first block.
                inputs = [_watch(model, x, part)[part] for x in images]
                dense_inputs = [_watch(dense, x, dense_part)[dense_part] for x in images]
            places = []
            for layer_name in layer_names:
                rows = rows_by_layer.get(layer_name, ())
                if layer_name not in untouched and _is_solved(model, layer_name, rows):
                    place = _place(dense_view, view, layer_name, rows)
                    place.positions = positions[layer_name]
                    place.gradient = _gradient(place, (gradients or {}).get(layer_name))
                    places.append(place)
            if reads_images and not places:  # nothing to solve for, nor a stream to move
                continue
            _advance(places, dense_part, dense_inputs)
            for place in places:
                fitted, held_out = _moments(place, part, inputs)
                share = damping
                if damping == "held out":
                    share = _chosen(place, fitted, held_out)
                _solve(place, fitted + held_out, masks, share)
            if not reads_images:
                for number, x in enumerate(inputs):
                    inputs[number] = part(x)
    return model


def _rows(dense, drops):
    """Return {plain layer: numbers of the outputs in dense that are left without drops}.

    The numbers are int64 [outputs], -1 for an output that is constant; none for a layer that is
    gone. They are found by removal from a copy whose weights are the numbers of their rows.
    """
    kinds = (*_layers.COMPRESSED_LAYERS, _layers.FactoredConv2d)
    if cut := list(_structure.modules_of(dense, kinds)):
        raise ValueError(f"dense must be the model before the cuts; its {cut[0]} was cut already")
    marked = anatomy.copied(dense).double()
    rows_by_layer = {}
    for name in chain(*models.view(dense).layers_along_stream.values()):
        layer = marked.get_submodule(name)
        if type(layer) in (nn.Linear, nn.Conv2d):
            # Counted from 1, because removal writes zeros.
            numbers = 1 + torch.arange(len(layer.weight))
            layer.weight.movedim(0, -1).copy_(numbers)
            rows_by_layer[name] = torch.arange(0)
    for drop in [drops] if isinstance(drops, dict) else drops:
        if drop:
            marked = shrink.remove(marked, drop)
    for name, module in marked.named_modules():
        if name in rows_by_layer:
            numbers = _matrices(module)[-1].weight.flatten(1)[:, 0]
            rows_by_layer[name] = numbers.long() - 1
    return rows_by_layer


def _check_same(model, rows_by_layer):
    """Raise ValueError if a layer of model has not the outputs that dense has without drops."""
    modules = dict(model.named_modules())
    for name, rows in rows_by_layer.items():
        last = _matrices(modules.get(name))[-1]
        weight = getattr(last, "weight", ())
        if len(weight) != len(rows):
            raise ValueError(
                f"model has {len(weight) or 'no'} outputs of {name}, dense without drops "
                f"{len(rows) or 'none'}: give all that was removed, in its order"
            )


def _matrices(layer):
    """Return the modules that hold a layer's weight: one, or the first and second factor."""
    if isinstance(layer, _layers.RowLinear):
        layer = layer.kept
    if isinstance(layer, _layers.FactoredLinear):
        return [layer.first, layer.second]
    if isinstance(layer, _layers.FactoredConv2d):
        return list(layer)
    return [layer]


def _checked_masks(model, keep):
    """Return keep on the model's device, or raise ValueError for a mask that cannot be held."""
    parameters = prune.parameters_of(model, keep)
    for name in keep:
        part, _, _ = name.rpartition(".")
        whole = model.get_submodule(part.rpartition(".")[0])
        if isinstance(whole, _layers.FactoredLinear | _layers.FactoredConv2d):
            raise ValueError(
                f"{name} lies in a factored layer, whose parts are solved for whole: "
                "mask plain layers"
            )
    return {name: mask.to(parameters[name].device) for name, mask in keep.items()}


def _is_solved(model, name, rows):
    """Return whether a layer is there, varies, and has a form that can be solved for."""
    if not len(rows) or (rows < 0).any():
        return False
    # These stay as they are: low rank plus sparse layers, convolutions of several groups, norms,
    # and all else that is no linear layer of anatomy.View or convolution of the stem.
    first = _matrices(model.get_submodule(name))[0]
    if isinstance(first, nn.Conv2d):
        has_zero_padding = first.padding_mode == "zeros" and not isinstance(first.padding, str)
        return first.groups == 1 and has_zero_padding
    return isinstance(first, nn.Linear)


class _Enough(Exception):
    """End a forward pass."""


def _watch(module, x, *watched, outputs=False):
    """Return {watched: its input} of module on x, up to the last module watched.

    watched: modules inside module, or None.
    outputs: return {watched: (its input, its output)}.
    """
    seen = {}

    def record(part, arguments, *output):
        seen[part] = (arguments[0], *output) if outputs else arguments[0]
        if part is watched[-1]:
            raise _Enough

    with ExitStack() as hooks, suppress(_Enough):
        for part in watched:
            if part is not None:
                register = part.register_forward_hook if outputs else part.register_forward_pre_hook
                hooks.enter_context(register(record))
        module(x)
    return seen


@dataclasses.dataclass
class _Place:
    """One layer to be solved for, where it stands in dense and in the model."""

    name: str  # of the module that holds its weight or factors
    dense_layer: nn.Module
    layer: nn.Module
    rows: Tensor  # outputs of dense's layer that the model's layer has
    channels: Tensor | slice  # of the residual stream, if the layer writes to it
    scale: Tensor | float = 1.0  # factors of the outputs: LayerScale, or 1
    dense_scale: Tensor | float = 1.0
    corrects: Tensor | bool = True  # channels in which the layer corrects the residual stream
    norm: nn.Module | None = None  # sees the stream in front of it, if the layer ends a block
    dense_norm: nn.Module | None = None
    shift: Tensor | float = 0.0  # of a batch norm's mean against dense's
    positions: _sweep.Positions | None = None  # at which images are looked at
    gradient: Tensor | None = None  # [m, m], how much errors of the scaled outputs count
    targets: list = dataclasses.field(default_factory=list)  # [positions, outputs] of each batch


def _place(dense_view, view, name, rows):
    """Return the _Place of the layer called name."""
    layer = view.model.get_submodule(name)
    dense_layer = dense_view.model.get_submodule(name)
    channels = slice(None)
    inner = name
    if isinstance(layer, _layers.RowLinear):
        channels = layer.rows
        inner = f"{name}.kept"
    place = _Place(inner, dense_layer, layer, rows, channels)
    if view.block_end(name):
        place.norm, factors = view.block_end(name)
        place.dense_norm, dense_factors = dense_view.block_end(name)
        if factors is not None:
            factors = factors[place.channels]
            # A channel that is too faint is solved for the branch's own output.
            place.corrects = factors.abs() >= _LEAST_FACTOR
            place.scale = torch.where(place.corrects, factors, 1)
            place.dense_scale = torch.where(place.corrects, dense_factors[rows], 1)
    norm = anatomy.norm_after(view.model, name)
    if norm is not None:
        # shrink.remove with means may have put what was lost on average into the norm behind.
        dense_mean = dense_view.model.get_submodule(norm).running_mean
        place.shift = view.model.get_submodule(norm).running_mean - dense_mean[rows]
    return place


def _gradient(place, gradient):
    """Return the gradients' moments [m, m] of the outputs that are left, behind their scale."""
    if gradient is None:
        return None
    rows = place.rows.to(gradient.device)
    scale = torch.as_tensor(place.scale).to(gradient).expand(len(rows))
    return gradient[rows][:, rows] / torch.outer(scale, scale)


def _advance(places, part, stream):
    """Set the targets of places in a part of dense, and move the stream through the part.

    places: those of the part. stream: what enters the part, by batch; replaced by what leaves it.
    """
    norms = [place.dense_norm for place in places]
    dense_layers = [place.dense_layer for place in places]
    for number, x in enumerate(stream):
        batch = number, len(x)
        seen = _watch(part, x, *norms, *dense_layers, part, outputs=True)
        for place in places:
            # 1. The target is what the layer gives in dense, of the outputs that are left.
            outputs = _sweep.outputs(seen[place.dense_layer][1], place.dense_layer)
            target = place.positions(outputs, *batch)[:, place.rows]
            # 2. It is compared where it acts: behind the mean of a batch norm, and LayerScale.
            target = (target + place.shift) * place.dense_scale
            # 3. At the end of a block it is all that the block leaves in the residual stream.
            if place.norm is not None:
                before = _sweep.outputs(seen[place.dense_norm][0])
                before = place.positions(before, *batch)[:, place.rows]
                target = target + before * place.corrects
            place.targets.append(target)
        stream[number] = seen[part][1]


@dataclasses.dataclass
class _Moments:
    """Hold second moments that a layer is solved from, as sums over positions, in float64."""

    gram: Tensor | float = 0.0  # [n+1, n+1], of the layer's inputs and a constant 1
    cross: Tensor | float = 0.0  # [m, n+1], of the targets with these
    positions: float = 0.0  # how many, or the sum of their weights

    def __add__(self, other):
        return _Moments(
            self.gram + other.gram, self.cross + other.cross, self.positions + other.positions
        )


def _moments(place, part, stream):
    """Return the _Moments of a layer over the batches to fit on, and over those held out.

    part: the module of the model around the layer. stream: what enters part, by batch.
    """
    first = _matrices(place.layer)[0]
    sums = [_Moments(), _Moments()]
    for number, (x, target) in enumerate(zip(stream, place.targets, strict=True)):
        batch = number, len(x)
        seen = _watch(part, x, place.norm, place.layer)
        # 1. The layer has to add what the target has more than the stream in front of it.
        if place.norm is not None:
            before = place.positions(_sweep.outputs(seen[place.norm]), *batch)
            target = target - before[:, place.channels] * place.corrects
        inputs = place.positions(_sweep.layer_inputs(seen[place.layer], first), *batch)
        weights = place.positions.weights_of(inputs, *batch)
        # 2. Products in single precision are taken about the means of the first batch. About 0
        # their rounding does not cancel where positions are alike: it would outweigh a small
        # variance and be solved for.
        if number == 0:
            centre = (weights * inputs).sum(0) / weights.sum()
            target_centre = (weights * target).sum(0) / weights.sum()
        inputs = nn.functional.pad(inputs - centre, (0, 1), value=1)
        target = target - target_centre
        weighted = weights * inputs
        products = _sweep.gram(weighted, inputs).double(), (target.T @ weighted).double()
        is_held_out = number % _HELD_OUT == _HELD_OUT - 1
        sums[is_held_out] += _Moments(*products, weights.sum().item())
    place.targets = []
    # 3. In double precision the products are moved back to 0.
    moved = [_moved(part, centre.double(), target_centre.double()) for part in sums]
    whole = moved[0] + moved[1]
    if not (whole.gram.sum() + whole.cross.sum()).isfinite():
        raise ValueError(
            f"inputs or targets of {place.name} are not finite: look for NaN in weights and images"
        )
    return moved


def _moved(moments, centre, target_centre):
    """Return moments about 0 of inputs and targets that were taken about these centres."""
    if not moments.positions:
        return moments
    # (x, 1) = (x - centre, 1) + shift
    shift = nn.functional.pad(centre, (0, 1))
    total = moments.gram[-1]  # the sum of (x - centre, 1)
    gram = moments.gram + torch.outer(total + moments.positions * shift, shift)
    gram += torch.outer(shift, total)
    cross = moments.cross + torch.outer(target_centre, total)
    cross += torch.outer(cross[:, -1], shift)
    return _Moments(gram, cross, moments.positions)


def _chosen(place, fitted, held_out):
    """Return the damping whose map, fitted on some positions, is nearest to others' targets."""
    _, before, has_bias = _present(place, {}, fitted.gram)
    # A quarter of the outputs tells as much: all are fitted to the same inputs.
    few = slice(None, None, 4)
    before, has_bias = before[few], has_bias[few]
    fitted = dataclasses.replace(fitted, cross=fitted.cross[few])
    held_out = dataclasses.replace(held_out, cross=held_out.cross[few])
    errors = {}
    for damping in _DAMPINGS:
        weight, bias, _ = _regress(fitted, before, has_bias, damping)
        affine = torch.cat([weight, bias[:, None]], 1)
        # E|W x + b - y|^2 without E|y|^2, which is the same for all
        errors[damping] = ((affine @ held_out.gram - 2 * held_out.cross) * affine).sum().item()
    return min(errors, key=errors.get)


def _present(place, masks, like):
    """Return of a layer's outputs: scale, weight [m, n] behind it, and which may have a bias."""
    *first, last = _matrices(place.layer)
    # The map from the inputs to what the layer adds has the layer's scale in it.
    scale = torch.as_tensor(place.scale).double().to(like.device)
    before = last.weight.flatten(1).double()
    for factor in first:
        before = before @ factor.weight.flatten(1).double()
    has_bias = torch.full((len(before),), last.bias is not None, device=before.device)
    return scale, scale[..., None] * before, has_bias & masks.get(f"{place.name}.bias", True)


def _regress(moments, before, has_bias, damping, mask=None):
    """Return the least-squares weight [m, n] and bias [m], and the ridged gram of the last rows.

    Solved is weight (covariance + ridge) = wanted + before ridge, with inputs and targets about
    their means. What the positions do not determine thus stays as it was before.
    """
    gram = moments.gram / moments.positions
    cross = moments.cross / moments.positions
    second, mean, target_mean = gram[:-1, :-1], gram[-1, :-1], cross[:, -1]
    weight = before.clone()
    # Rows with a bias are fitted about the mean of the inputs, the others through the origin.
    for rows, centre in ((has_bias, mean), (~has_bias, 0 * mean)):
        if not rows.any():
            continue
        covariance = second - centre[:, None] * centre
        ridged = lowrank.damped(covariance, damping)
        # Inputs that vary less than this vary by rounding alone: keep the weights that are there.
        if covariance.diagonal().mean() > 1e-6 * second.diagonal().mean():
            wanted = cross[rows, :-1] - target_mean[rows, None] * centre
            ridge = (ridged - covariance).diagonal()
            wanted = wanted + before[rows] * ridge  # pulls towards these weights
            weight[rows] = lowrank.solve(ridged, wanted.T).T
        if mask is not None and mask[rows].any():
            weight[rows] = lowrank.refit(weight[rows], ridged, mask[rows], start=before[rows])
    return weight, (target_mean - weight @ mean) * has_bias, ridged


def _solve(place, moments, masks, damping):
    """Put the least-squares weight and bias into a layer, in its form.

    moments: as from `_moments`. masks: {parameter: bool tensor}.
    """
    # A layer that sees less than two positions for each of its inputs stays as it is.
    if moments.positions < 2 * (len(moments.gram) - 1):
        return
    *first, last = _matrices(place.layer)
    scale, before, has_bias = _present(place, masks, moments.gram)
    mask = masks.get(f"{place.name}.weight")
    mask = mask if mask is None else mask.flatten(1)
    weight, _, ridged = _regress(moments, before, has_bias, damping, mask)
    if mask is not None:
        weight *= mask
    left = weight
    for factor in first:
        # Never masked: all rows have a bias or none, so there was one ridged gram, theirs.
        # The layer gets the best map of its rank.
        how = {"gram": ridged, "gradient": place.gradient}
        left, right = lowrank.svd(weight, len(factor.weight), **how)
        weight = left @ right
        factor.weight.copy_(right.view_as(factor.weight))
    last.weight.copy_((left / scale[..., None]).view_as(last.weight))
    if last.bias is not None:
        gram, cross = moments.gram / moments.positions, moments.cross / moments.positions
        bias = cross[:, -1] - weight @ gram[-1, :-1]
        last.bias.copy_(bias / scale * has_bias)
