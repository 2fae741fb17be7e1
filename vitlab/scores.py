"""Sensitivity: how important is every weight, row, neuron and head, from data, in one pass over the batches.

Higher stays. All criteria of a call share one forward and one backward pass per batch; hooks take the
statistics while gradients are fresh, so that no second set of gradients is ever stored. batches is a list (or
anything to iterate over) of (x [B, 3, H, W], y int64 [B]) on the model's device, from the training split with
evaluation transforms. The model is used in eval mode and left as it was: modes, requires_grad, gradients and
hooks.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from . import models

WEIGHTS = ROWS = ("random", "magnitude", "gradient", "taylor", "fisher")
UNITS = ("random", "magnitude", "taylor", "michel", "fisher")


def weights(model, batches=None, *, criteria, parameters=None, labels="true", seed=0):
    """Scores of single weights: {criterion: {parameter name: tensor of its shape}}, float32 or better.

    g is the gradient of the mean cross-entropy of one batch, E the mean over batches: these are statistics
    per micro-batch, whose size is the caller's batch size. criteria, any of
      random      uniform in [0, 1), drawn from seed
      magnitude   |w|
      gradient    E|g|: where the loss would like to move, no cost of removal
      taylor      E|w g| (Molchanov et al. 2019, first order; SNIP, Lee et al. 2019, if there is one batch)
      fisher      E(w g)^2 (Molchanov et al. 2019; twice OBD with the empirical Fisher of micro-batches)
    parameters: names; None means the weights (no biases) of all linear layers but the classifier. labels:
    "true", or "model" for labels drawn from the model's own prediction by seed (the true Fisher; for models
    that fit their calibration images). random and magnitude need no batches. Raises ValueError for unknown
    names, missing batches, a loss or a score that is not finite.
    """
    criteria = known(criteria, WEIGHTS, "criterion")
    chosen = own_parameters(model, parameters)
    shapes = {name: parameter.shape for name, parameter in chosen.items()}
    absolute = zeros(model, shapes) if {"gradient", "taylor"} & {*criteria} else {}
    square = zeros(model, shapes) if "fisher" in criteria else {}

    def add(name, gradient):
        if square:
            square[name].addcmul_(gradient, gradient)
        if absolute:
            absolute[name].add_(gradient.abs_())

    if absolute or square:
        with Sweep(model) as sweep:
            for name, parameter in chosen.items():
                sweep.on_gradient(parameter, partial(add, name))
            sweep.run(batches, labels=labels, seed=seed)
        for total in (*absolute.values(), *square.values()):
            total /= sweep.batches
    values = {
        "random": random_scores(model, shapes, seed),
        "magnitude": lambda name: wide(chosen[name].detach()).abs(),
        "gradient": lambda name: absolute[name],
        "taylor": lambda name: absolute[name] * chosen[name].detach().abs(),
        "fisher": lambda name: square[name] * wide(chosen[name].detach()).square(),
    }
    return finite({c: {name: values[c](name) for name in chosen} for c in criteria})


def rows(model, batches=None, *, criteria, layers=None, labels="true", seed=0):
    """Scores of whole rows (output features, filters): {criterion: {layer name: tensor [rows]}}.

    dL/dz is the gradient of one image's loss by a gate z on the row's output, bias included and before any
    activation; E is the mean over images. criteria, any of
      random      uniform in [0, 1), drawn from seed
      magnitude   L2 norm of the row with its bias
      gradient    mean over the row's weights and bias of E|g|, g and E per micro-batch as in `weights`
      taylor      E|dL/dz|
      fisher      E(dL/dz)^2 / 2, in loss units: comparable between layers as it is
    layers: names of linear layers or convolutions; None means all linear layers but the classifier. The gate
    of a convolution sits on its own output, in front of a batch norm. labels, batches, errors: as for
    `weights`.
    """
    criteria = known(criteria, ROWS, "criterion")
    chosen = own_layers(model, layers)
    shapes = {name: (len(layer.weight),) for name, layer in chosen.items()}
    gates, gradients = Gates(model, shapes), zeros(model, shapes)
    with Sweep(model) as sweep:
        for name, layer in chosen.items():
            if {"taylor", "fisher"} & {*criteria}:
                sweep.on_gate(layer, partial(gates.add, name), output=True)
            if "gradient" in criteria:
                for parameter in row_parameters(name, layer):
                    sweep.on_gradient(parameter, partial(add_rows, gradients[name], row_size(layer)))
        if sweep.handles:
            sweep.run(batches, labels=labels, seed=seed)
    values = {
        "random": random_scores(model, shapes, seed),
        "magnitude": lambda name: row_squares(chosen[name]).sqrt(),
        "gradient": lambda name: gradients[name] / sweep.batches,
        "taylor": lambda name: gates.absolute[name] / sweep.images,
        "fisher": lambda name: gates.square[name] / sweep.images / 2,
    }
    return finite({c: {name: values[c](name) for name in chosen} for c in criteria})


def units(model, batches=None, *, criteria, labels="true", seed=0):
    """Scores of heads and neurons: {criterion: {(block name, "heads" or "neurons"): tensor [units]}}.

    dL/dz is the gradient of one image's loss by a gate z on the unit's output, which is the input of proj or
    fc2 (after softmax or activation), signed and summed over tokens; E is the mean over images. criteria, any
    of
      random      uniform in [0, 1), drawn from seed
      magnitude   L2 norm of all weights that would go: rows of qkv or fc1 with biases, columns of proj or fc2
      taylor      E|dL/dz| (Michel et al. 2019, equation 2)
      michel      the same divided by the L2 norm of the block's vector (their normalisation over a layer)
      fisher      E(dL/dz)^2 / 2, in loss units: comparable between all units as it is
    One backward pass gives the gates of all images of a batch; Swin's windows are folded back to images.
    labels, batches, errors: as for `weights`.
    """
    criteria = known(criteria, UNITS, "criterion")
    view = models.view(model)
    blocks = {(b.name, kind): b for b in view.blocks for kind in ("heads", "neurons")}
    shapes = {key: (count,) for key, count in view.units().items()}
    gates = Gates(model, shapes)
    with Sweep(model) as sweep:
        if {"taylor", "michel", "fisher"} & {*criteria}:
            for key, block in blocks.items():
                layer = block.attn.proj if key[1] == "heads" else block.mlp.fc2
                sweep.on_gate(layer, partial(gates.add, key))
            sweep.run(batches, labels=labels, seed=seed)
    values = {
        "random": random_scores(model, shapes, seed),
        "magnitude": lambda key: unit_squares(blocks[key], key[1]).sqrt(),
        "taylor": lambda key: gates.absolute[key] / sweep.images,
        "michel": lambda key: functional.normalize(gates.absolute[key], dim=0),
        "fisher": lambda key: gates.square[key] / sweep.images / 2,
    }
    return finite({c: {key: values[c](key) for key in shapes} for c in criteria})


def grams(model, batches, *, layers=None, affine=False):
    """Second moments of layer inputs: {layer name: float64 [n, n]}, X^T X / tokens. Forward passes only.

    X [tokens, n] are the inputs of a linear layer over all images and positions, window padding included.
    layers: names of linear layers; None means all but the classifier. affine: append a constant 1 to the
    inputs, so that the tensors are [n+1, n+1] and their last row is the mean input. Products are taken in the
    inputs' precision, at least float32, and added up in float64. Raises ValueError for unknown layers,
    missing batches, inputs that are not finite.
    """
    chosen = own_layers(model, layers)
    for name, layer in chosen.items():
        if isinstance(layer, nn.Conv2d):
            raise ValueError(f"{name} is a convolution; grams are of the inputs of linear layers")
    totals, tokens = {}, dict.fromkeys(chosen, 0)

    def add(name, layer, arguments):
        x = wide(arguments[0].flatten(0, -2))  # [tokens, n]
        x = functional.pad(x, (0, 1), value=1) if affine else x
        tokens[name] += len(x)
        totals[name] = totals.get(name, 0) + (x.T @ x).double()

    with Sweep(model) as sweep, torch.no_grad():
        sweep.handles += [layer.register_forward_pre_hook(partial(add, n)) for n, layer in chosen.items()]
        for x, _ in batches:
            model(x)
    if not totals:
        raise ValueError("no batches: give a list of (x, y); a generator is empty after its first use")
    return finite({"gram": {name: totals[name] / tokens[name] for name in chosen}})["gram"]


@torch.no_grad()
def loss(model, batches):
    """Mean cross-entropy over all images of batches, in eval mode, to hold beside validation's.

    If it is far below the validation loss, a few outliers rule true-label gradients; consider labels="model".
    """
    total = images = 0
    with Sweep(model):
        for x, y in batches:
            total += functional.cross_entropy(model(x), y, reduction="sum").item()
            images += len(x)
    return total / images


class Sweep:
    """Passes over batches with statistics taken by hooks, on a model that is put back as it was at the end.

    Nothing gets a gradient but what on_gradient and on_gate ask for. images, batches: how many were seen.
    """

    def __init__(self, model):
        self.model, self.handles, self.size, self.images, self.batches = model, [], 0, 0, 0

    def __enter__(self):
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        self.model.eval().requires_grad_(False)
        for parameter, _, _ in self.before:
            parameter.grad = None
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag, gradient in self.before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient

    def on_gradient(self, parameter, add):
        """Have add(g) called with the gradient of each batch's mean loss, wide and free to change."""

        def take(parameter):
            gradient, parameter.grad = wide(parameter.grad) / self.size, None
            add(gradient)

        parameter.requires_grad_(True)
        self.handles.append(parameter.register_post_accumulate_grad_hook(take))

    def on_gate(self, layer, add, *, output=False):
        """Have add(d) called for each batch with d [B, channels] = dL_b/dz: gradients of image b's loss by a
        gate on each channel of the layer's input (or output), sums over positions of value * gradient."""
        channels = 1 if output and isinstance(layer, nn.Conv2d) else -1

        def watch(x):
            if not x.requires_grad:  # the first gate of all: the graph starts here, what is before is free
                x.requires_grad_()
            value = x.detach()  # not x itself: a tensor whose hook holds it is a cycle and stays in memory

            def take(gradient):
                product = (wide(value) * wide(gradient)).movedim(channels, -1)
                # Images are outermost in Swin's [B * windows, tokens, C], so windows fold into positions.
                add(product.reshape(self.size, -1, product.shape[-1]).sum(1))

            x.register_hook(take)

        if output:
            hook = layer.register_forward_hook(lambda _, arguments, result: watch(result))
        else:
            hook = layer.register_forward_pre_hook(lambda _, arguments: watch(arguments[0]))
        self.handles.append(hook)

    def run(self, batches, *, labels="true", seed=0):
        """One forward and backward pass per batch, of the sum of its losses: dL_b/dz is image b's own."""
        known([labels], ("true", "model"), "kind of labels")
        with torch.enable_grad():
            for x, y in batches or ():
                self.size = len(x)
                logits = self.model(x)
                if labels == "model":
                    generator = torch.Generator(logits.device).manual_seed(seed + self.batches)
                    y = wide(logits.detach()).softmax(-1).multinomial(1, generator=generator)[:, 0]
                total = functional.cross_entropy(logits, y, reduction="sum")
                if not total.isfinite():
                    raise ValueError(
                        f"the loss of calibration batch {self.batches} is {total.item()}: look for NaN in "
                        "the weights and images, or for an overflow in low precision"
                    )
                total.backward()
                self.images += self.size
                self.batches += 1
        if not self.batches:
            raise ValueError("no batches: give a list of (x, y); a generator is empty after its first use")


class Gates:
    """Sums over images of |dL/dz| and (dL/dz)^2 for the units of each key. shapes: {key: (units,)}."""

    def __init__(self, model, shapes):
        self.absolute, self.square = zeros(model, shapes), zeros(model, shapes)

    def add(self, key, gradient):
        """gradient: [B, channels]; channels of one unit (a head's dimensions) lie together and add up."""
        gradient = gradient.unflatten(1, (len(self.absolute[key]), -1)).sum(-1)  # [B, units]
        self.absolute[key] += gradient.abs().sum(0)
        self.square[key] += gradient.square().sum(0)


def wide(x):
    """x in float32, or in its own precision if that is higher."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zeros(model, shapes):
    """{key: zeros to add up in}, on the model's device, in float32 or better."""
    like = next(model.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    return {key: torch.zeros(shape, dtype=dtype, device=like.device) for key, shape in shapes.items()}


def known(names, allowed, noun):
    """names as a list (one may come bare); ValueError, with the nearest, for one that is not allowed."""
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in allowed:
            hint = models.nearest(name, allowed)
            raise ValueError(f"unknown {noun} {name!r}{hint} Known here are {', '.join(allowed)}.")
    return names


def own_parameters(model, names):
    """{name: parameter}; names None: weights of all linear layers but the classifier, factored or not."""
    found = dict(model.named_parameters())
    if names is None:
        layers = tuple(f"{layer}." for layer in models.view(model).linears())
        names = [n for n in found if n.startswith(layers) and not n.endswith("bias")]
    for name in names:
        if name not in found:
            raise ValueError(f"no parameter {name!r} in this model{models.nearest(name, found)}")
    return {name: found[name] for name in names}


def own_layers(model, names):
    """{name: layer with a weight [rows, ...]}; names None: all linear layers but the classifier."""
    if names is None:
        return models.view(model).linears()
    found = dict(model.named_modules())
    for name in names:
        weight = getattr(found.get(name), "weight", None)
        if weight is None or weight.dim() < 2:
            raise ValueError(f"no linear layer or convolution {name!r}{models.nearest(name, found)}")
    return {name: found[name] for name in names}


def row_parameters(name, layer):
    """Weight and bias of a layer whose rows have gradients; a factored layer raises ValueError."""
    parameters = dict(layer.named_parameters(recurse=False))
    if "weight" not in parameters:
        raise ValueError(f"the rows of {name} have no weights of their own: use taylor or fisher")
    return parameters.values()


def row_size(layer):
    """Number of weights and bias in one row."""
    return layer.weight[0].numel() + (layer.bias is not None)


def add_rows(total, size, gradient):
    """Add to total [rows] each row's part in the mean of |gradient| over size weights and bias."""
    total += gradient.abs_().view(len(total), -1).sum(1) / size


def row_squares(layer):
    """Sum of squares of each row's weights and bias, [rows]."""
    total = wide(layer.weight.detach()).flatten(1).square().sum(1)
    return total if layer.bias is None else total + wide(layer.bias.detach()).square()


def unit_squares(block, kind):
    """Sum of squares of all weights that go with each unit of a block, [heads] or [neurons]."""
    first, second = (block.attn.qkv, block.attn.proj) if kind == "heads" else (block.mlp.fc1, block.mlp.fc2)
    rows, columns = row_squares(first), wide(second.weight.detach()).square().sum(0)
    if kind == "neurons":
        return rows + columns
    heads = block.num_heads
    return rows.view(3, heads, -1).sum((0, 2)) + columns.view(heads, -1).sum(1)


def random_scores(model, shapes, seed):
    """A function from a key to uniform scores of its shape; called for all keys in order, one stream."""
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    return lambda key: torch.rand(shapes[key], generator=generator).to(device)


def finite(scores):
    """scores, {criterion: {key: tensor}}; ValueError naming the first tensor that is not."""
    for criterion, tensors in scores.items():
        for key, score in tensors.items():
            if not score.isfinite().all():
                raise ValueError(
                    f"the {criterion} scores of {key} are not finite: look for NaN in the weights and "
                    "images, or for an overflow in low precision"
                )
    return scores
