"""Measure how important each weight, row, neuron, head and channel is, in one pass over batches.

A higher score means: keep it. All criteria of a call share one forward pass and, if one of them
needs gradients, one backward pass per batch. Hooks take the statistics while values and gradients
are fresh, so that no second set of gradients is ever stored.

In all functions batches is a list (or anything to iterate over) of (x [B, 3, H, W], y int64 [B]) on
the model's device, from the training split with evaluation transforms. The model is used in eval
mode and left as it was: modes, requires_grad, gradients and hooks. Where several processes train
(see `parallel`), the first one computes for all.

Public: ROWS, UNITS, WEIGHTS, check_calibration, directions, gradient_grams, grams,
inverse_diagonal, loss, measure, rows, units, weights.
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional

from vitlab import models, names, parallel
from vitlab.models import anatomy
from vitlab.names import nearest
from vitlab.pruning import sweep
from vitlab.pruning.sweep import Gates, Grams, Moments, Sweep, layer_inputs, wide, zeros

WEIGHTS = ("random", "magnitude", "gradient", "taylor", "fisher", "obd", "snip", "wanda", "obs")
ROWS = ("random", "magnitude", "gradient", "taylor", "michel", "fisher", "variance")
UNITS = ("random", "magnitude", "taylor", "michel", "fisher", "variance")


@parallel.first_decides
def measure(
    model,
    batches=None,
    *,
    weights=(),
    rows=(),
    units=(),
    parameters=None,
    layers=None,
    kinds=("heads", "neurons"),
    grams=None,
    damping=1e-3,
    labels="true",
    seed=0,
):
    """Measure scores of weights, rows and units in one pass.

    Criteria that need no gradients run forward passes only; random and magnitude need no batches.

    weights, rows, units: criteria of the functions of these names, which say what they mean and
        return.
    parameters, grams, damping: options of `weights`.
    layers: option of `rows`.
    kinds: option of `units`.
    labels, seed: options of all three.

    Returns {"weights": ..., "rows": ..., "units": ...}; a group without criteria comes back empty.
    Raises ValueError for no criteria at all and what the three functions raise.
    """
    weights = names.known(weights, WEIGHTS, "criterion")
    rows = names.known(rows, ROWS, "criterion")
    units = names.known(units, UNITS, "criterion")
    if not weights + rows + units:
        raise ValueError("nothing to measure: give criteria of weights, rows or units")
    plans = {}
    with Sweep(model) as sweep:
        if weights:
            plans["weights"] = _plan_weights(sweep, weights, parameters, grams, damping)
        if rows:
            plans["rows"] = _plan_rows(sweep, rows, layers)
        if units:
            plans["units"] = _plan_units(sweep, units, kinds)
        if sweep.hooked:
            sweep.run(batches, labels=labels, seed=seed)
    criteria = {"weights": weights, "rows": rows, "units": units}
    scores = {group: {} for group in criteria}
    for group, (table, shapes) in plans.items():
        table["random"] = _random_scores(model, shapes, seed)
        for criterion in criteria[group]:
            values = {key: table[criterion](key) for key in shapes}
            scores[group][criterion] = _finite(criterion, values)
    return scores


@parallel.first_decides
def weights(
    model,
    batches=None,
    *,
    criteria,
    parameters=None,
    grams=None,
    damping=1e-3,
    labels="true",
    seed=0,
):
    """Measure scores of single weights.

    g is the gradient of the mean cross-entropy of one batch, E the mean over batches. These are
    statistics per micro-batch, whose size B is the caller's batch size.

    criteria: one or several of
      random     uniform in [0, 1), drawn from seed
      magnitude  |w|
      gradient   E|g|: where the loss would like to move; it is not the cost of a removal
      taylor     E|w g| (Molchanov et al. 2019, first order)
      fisher     E(w g)^2 (Molchanov et al. 2019)
      obd        E[B (w g)^2] / 2, the rise of the loss to second order (Optimal Brain Damage, LeCun
                 et al. 1990) with B g^2 for the diagonal of the Hessian. With labels="model" this
                 estimates the diagonal of the Fisher matrix, here the same as Gauss-Newton's,
                 without bias and for any B, from one drawn label per image. With true labels it is
                 the empirical Fisher for B = 1. For a larger B the squared mean gradient comes on
                 top, B - 1 times.
      snip       |w E g| over its sum over all these parameters (Lee et al. 2019)
      wanda      |W_ij| ||X_j||, where ||X_j|| is the L2 norm of input j over all tokens (Sun et al.
                 2023). It compares inside each row only: masks.keep_largest(per="row")
      obs        w_ij^2 / (2 [H^-1]_jj), half of what the layer's squared output error
                 (lowrank.objective) rises by if that weight goes and its row adapts (Optimal Brain
                 Surgeon, Hassibi and Stork 1993, by layer as in SparseGPT, Frantar and Alistarh
                 2023). H is the layer's gram plus damping times the mean of its diagonal. It does
                 not compare between layers: per="layer"
    wanda and obs are for linear layers only; their inputs are counted as in `grams`.
    parameters: names of parameters. None means the weights (no biases) of all linear layers but the
        classifier.
    grams: {layer name: [n, n]} as from `grams`; saves obs the pass over batches.
    damping: of H for obs, 1e-3 unless given.
    labels: "true", or "model" for labels that seed draws from the model's own prediction (the true
        Fisher, for models that fit their calibration images).
    seed: of random and of labels="model", 0 unless given.

    Returns {criterion: {parameter name: tensor of its shape}}, float32 or better.
    Raises ValueError for unknown names, missing batches (random and magnitude need none) or grams,
    a gram without inverse, and a loss or a score that is not finite.
    """
    options = {"parameters": parameters, "grams": grams, "damping": damping}
    scores = measure(model, batches, weights=criteria, labels=labels, seed=seed, **options)
    return scores["weights"]


@parallel.first_decides
def rows(model, batches=None, *, criteria, layers=None, labels="true", seed=0):
    """Measure scores of whole rows (output features, filters).

    dL/dz is the gradient of one image's loss by a gate z on the row's output, bias included and
    before any activation. E is the mean over images.

    criteria: one or several of
      random     uniform in [0, 1), drawn from seed
      magnitude  L2 norm of the row with its bias
      gradient   mean over the row's weights and bias of E|g|, with g and E per micro-batch as in
                 `weights`
      taylor     E|dL/dz|
      michel     taylor over the L2 norm of the layer's vector, as Michel et al. (2019) do for heads
      fisher     E(dL/dz)^2 / 2, in loss units, so that it compares between layers as it is
      variance   of the row's output over all images and positions (window padding included): what
                 its mean in the next bias cannot replace
    layers: names of linear layers or convolutions. None means all linear layers but the classifier.
        The gate of a convolution sits on its own output, in front of a batch norm.
    labels, seed: as for `weights`.

    Returns {criterion: {layer name: tensor [rows]}}.
    Raises ValueError as `weights` does.
    """
    scores = measure(model, batches, rows=criteria, layers=layers, labels=labels, seed=seed)
    return scores["rows"]


@parallel.first_decides
def units(model, batches=None, *, criteria, kinds=("heads", "neurons"), labels="true", seed=0):
    """Measure scores of heads, neurons, channels and blocks.

    dL/dz is the gradient of one image's loss by a gate z on the unit, signed and summed over the
    unit's channels, tokens and writes. E is the mean over images. One backward pass gives the gates
    of all images of a batch; Swin's windows are folded back to images.

    criteria: one or several of
      random     uniform in [0, 1), drawn from seed
      magnitude  L2 norm of all weights that would go: rows of qkv or fc1 with biases, columns of
                 proj or fc2. Not for width and filters, whose weights lie in every layer around,
                 nor for blocks
      taylor     E|dL/dz| (Michel et al. 2019, equation 2)
      michel     taylor over the L2 norm of the block's vector (their normalisation over a layer)
      fisher     E(dL/dz)^2 / 2, in loss units, so that it compares between all units as it is
      variance   sum over the unit's channels of the variance over images and positions. For width
                 it is that of the stage's last output, for a block that of what its MLP writes
    kinds: one or several of
      heads      input channels of a head at proj (after softmax)
      neurons    an input channel at fc2 (after the activation)
      qk         one dimension of a head's queries and keys, gated at q: [heads * dimensions], head
                 by head. Not for models that normalise queries and keys
      v          one dimension of a head's values, gated at the input of proj: [heads * dimensions],
                 head by head
      filters    of a convolution of the stem that feeds another one, gated behind its batch norm,
                 under keys (convolution name, "filters")
      width      a channel of the residual stream, under keys ("stages.0", "width") for a ViT and
                 ("stages.s", "width") for stage s of a Swin. One gate is on all that is written to
                 it: the input of the stage's first block and the outputs of each proj and fc2
      block      a whole block, [1]: one gate on both that it writes to the residual stream
    labels, seed: as for `weights`.

    Returns {criterion: {(block or stage name, kind): tensor [units]}}.
    Raises ValueError as `weights` does.
    """
    scores = measure(model, batches, units=criteria, kinds=kinds, labels=labels, seed=seed)
    return scores["units"]


@parallel.first_decides
def grams(model, batches, *, layers=None, affine=False):
    """Measure the second moments X^T X / tokens of layer inputs, by forward passes only.

    X [tokens, n] are the inputs of a linear layer over all images and positions, window padding
    included. For a convolution of one group they are the patches that its filters see. Then n is
    channels * k * k, as in weight.flatten(1). Products are taken in the inputs' precision, at least
    float32, and added up in float64.

    layers: names of linear layers and convolutions. None means all linear layers but the
        classifier.
    affine: append a constant 1 to the inputs. The tensors are then [n+1, n+1], and their last row
        is the mean input.

    Returns {layer name: float64 [n, n]}.
    Raises ValueError for unknown layers, missing batches, inputs that are not finite.
    """
    chosen = _own_layers(model, layers)
    totals = Grams(affine)
    with Sweep(model) as sweep:
        for name, layer in chosen.items():
            sweep.on_value(layer, partial(totals.add, name))
        sweep.run(batches)
    return _finite("gram", {name: totals.mean(name) for name in chosen})


@parallel.first_decides
def gradient_grams(model, batches, *, layers=None, labels="true", seed=0):
    """Measure the second moments of the loss's gradients by layer outputs, in one pass.

    g [m] is the gradient of one image's loss by the layer's output at one position. The matrix is
    the mean over images of the sum over positions of g g^T. An output error e costs, to second
    order, half of what this matrix makes of E[e e^T], if e is independent of g, and if errors or
    gradients of different positions are uncorrelated (K-FAC's assumptions, Martens and Grosse
    2015). They are not: the matrix ranks the errors of different layers well, but is several times
    below the loss.

    layers: as for `grams`. labels, seed: as for `weights`.

    Returns {layer name: float64 [m, m]}.
    Raises ValueError as `weights` and `grams` do.
    """
    chosen = _own_layers(model, layers)
    totals = Grams()
    with Sweep(model) as sweep:
        for name, layer in chosen.items():
            sweep.on_output_gradient(layer, partial(totals.add, name))
        sweep.run(batches, labels=labels, seed=seed)
    return _finite("gram", {name: totals.totals[name] / sweep.images for name in chosen})


@parallel.first_decides
def directions(model, batches, bases, *, labels="true", seed=0):
    """Predict what the loss rises by when a layer keeps only its first directions.

    A gate z_i on one of the R parts u_i v_i of a weight has dL/dz_i = the sum over one image's
    positions of (u_i . g)(v_i . x). There g and x are the loss's gradient by the layer's output and
    its input. Entry r of the result is E(sum of dL/dz_i over all i >= r)^2 / 2, where E is the mean
    over images. It is signed and summed before it is squared, in loss units, so that it compares
    with the "fisher" of `units`. Entry R is 0.

    bases: {layer name: (u [m, R], v [R, n])} of linear layers and convolutions (weight.flatten(1)
        is [m, n]), whose weight is the sum of its R parts u_i v_i, the most important first, as
        lowrank.svd gives them.
    labels, seed: as for `weights`.

    Returns {layer name: float64 [R+1]}.
    Raises ValueError as `weights` does, and for a basis of another shape.
    """
    chosen = _own_layers(model, bases)
    for name, layer in chosen.items():
        m, n = layer.weight.flatten(1).shape
        u, v = bases[name]
        if u.shape != (m, len(v)) or v.shape[1] != n:
            raise ValueError(
                f"the basis of {name} [{m}, {n}] is u [m, R] and v [R, n]; "
                f"got {[*u.shape]}, {[*v.shape]}"
            )
    inputs = {}  # of each layer, until its gradients come
    rises = defaultdict(int)

    def add(name, layer, gradient):
        u, v = (part.to(gradient) for part in bases[name])
        x = layer_inputs(inputs.pop(name).detach(), layer)
        # dL/dz_i at each position of all images, then summed over an image's positions
        by_position = (x @ v.T) * (gradient @ u)
        gates = by_position.view(sweep.size, -1, len(v)).sum(1)  # [B, R]
        # where the directions from r on go, their signed gradients add up
        after = gates.flip(1).cumsum(1).flip(1)
        rises[name] += after.double().square().sum(0) / 2

    with Sweep(model) as sweep:
        for name, layer in chosen.items():
            sweep.hook(layer, partial(inputs.__setitem__, name))
            sweep.on_output_gradient(layer, partial(add, name, layer))
        sweep.run(batches, labels=labels, seed=seed)
    # a layer that keeps all of its directions loses nothing: entry R
    means = {name: functional.pad(rises[name] / sweep.images, (0, 1)) for name in chosen}
    return _finite("direction", means)


@parallel.first_decides
@torch.no_grad()
def loss(model, batches):
    """Return the mean cross-entropy over all images of batches, in eval mode.

    Raises ValueError for no batches.
    """
    total = images = 0
    with sweep.Sweep(model):
        for x, y in batches:
            total += functional.cross_entropy(model(x), y, reduction="sum").item()
            images += len(x)
    if not images:
        raise ValueError(sweep.NO_BATCHES)
    return total / images


def check_calibration(model, calibration, held_out, *, share=0.5):
    """Return the losses on calibration and held-out batches; warn of a model that fits the first.

    On images that a model fits, true-label gradients vanish and a few outliers rule the scores.

    calibration: batches that scores would be measured on.
    held_out: batches of images that the model was not trained on (val, never test).
    share: a first loss below this share of the second gives a UserWarning.

    Returns (loss on calibration, loss on held_out).
    """
    fitted = loss(model, calibration)
    unseen = loss(model, held_out)
    if fitted < share * unseen:
        warnings.warn(
            f"the model fits its calibration images: loss {fitted:.3g} on them, {unseen:.3g} on "
            "held-out ones. A few outliers rule scores by true-label gradients: consider "
            'labels="model" or augmented images',
            stacklevel=2,
        )
    return fitted, unseen


# Plans. Each one hooks up what its criteria need and returns ({criterion: function}, {key: shape}).
# The functions give the score of one key, of its shape, after the sweep.

# How the gradient g of a batch of `size` images is added up for a criterion.
_GRADIENT_SUMS = {
    "gradient": lambda total, g, size: total.add_(g.abs()),
    "taylor": lambda total, g, size: total.add_(g.abs()),
    "fisher": lambda total, g, size: total.addcmul_(g, g),
    "obd": lambda total, g, size: total.addcmul_(g, g, value=size),
    "snip": lambda total, g, size: total.add_(g),
}


def _plan_weights(sweep, criteria, names, grams, damping):
    """Plan the scores of parameters."""
    chosen = _own_parameters(sweep.model, names)
    shapes = {name: parameter.shape for name, parameter in chosen.items()}
    summed = [criterion for criterion in criteria if criterion in _GRADIENT_SUMS]
    sums = {criterion: zeros(sweep.model, shapes) for criterion in summed}

    def add(name, gradient):
        for criterion, totals in sums.items():
            _GRADIENT_SUMS[criterion](totals[name], gradient, sweep.size)

    if sums:
        for name, parameter in chosen.items():
            sweep.on_gradient(parameter, partial(add, name))

    def mean(criterion, name):
        return sums[criterion][name] / sweep.batches

    def size(name):
        return wide(chosen[name].detach()).abs()

    def snip(name):
        return mean("snip", name).abs() * size(name)

    @cache  # the same for all parameters
    def snip_total():
        total = sum(snip(name).sum(dtype=torch.float64) for name in chosen)
        return total.clamp_min(1e-37).item()

    table = _plan_inputs(sweep, criteria, chosen, grams, damping) | {
        "magnitude": size,
        "gradient": lambda name: mean("gradient", name),
        "taylor": lambda name: mean("taylor", name) * size(name),
        "fisher": lambda name: mean("fisher", name) * size(name).square(),
        "obd": lambda name: mean("obd", name) * size(name).square() / 2,
        "snip": lambda name: snip(name) / snip_total(),
    }
    return table, shapes


def _plan_inputs(sweep, criteria, parameters, grams, damping):
    """Return the functions of the criteria that look at the inputs of linear layers."""
    moments = Moments()
    products = Grams()
    if {"wanda", "obs"} & {*criteria}:
        modules = dict(sweep.model.named_modules())
        for name in parameters:
            layer_name = name.removesuffix(".weight")
            layer = modules.get(layer_name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(
                    f"wanda and obs are for weights of linear layers, {name} is none: "
                    "name the parameters"
                )
            if "wanda" in criteria:
                sweep.on_value(layer, partial(moments.add, name))
            if "obs" in criteria and grams is None:
                sweep.on_value(layer, partial(products.add, name))
            elif "obs" in criteria:
                _check_gram(grams, layer_name, layer.in_features)

    def weight(name):
        return wide(parameters[name].detach())

    def wanda(name):
        return weight(name).abs() * moments.norm(name)

    def obs(name):
        gram = products.mean(name) if grams is None else grams[name.removesuffix(".weight")]
        gram = gram.to(parameters[name].device)
        diagonal = inverse_diagonal(gram, damping=damping, name=name)
        square = weight(name).square()
        return square / (2 * diagonal).to(square.dtype)

    return {"wanda": wanda, "obs": obs}


def _check_gram(grams, layer, size):
    """Raise ValueError if there is no gram [size, size] of the layer."""
    if layer not in grams or grams[layer].shape != (size, size):
        hint = "." if layer in grams else names.nearest(layer, grams)
        raise ValueError(
            f"obs needs a gram [{size}, {size}] of {layer!r}{hint} scores.grams makes one"
        )


def _plan_rows(sweep, criteria, names):
    """Plan the scores of the rows of layers."""
    chosen = _own_layers(sweep.model, names)
    places = {name: _Place(len(layer.weight), [(layer, True)]) for name, layer in chosen.items()}
    table, shapes = _plan_places(sweep, criteria, places)
    table["magnitude"] = lambda name: _row_squares(chosen[name]).sqrt()
    if "gradient" in criteria:
        totals = zeros(sweep.model, shapes)
        for name, layer in chosen.items():
            _add_row_gradients(sweep, layer, name, totals[name])
        table["gradient"] = lambda name: totals[name] / sweep.batches
    return table, shapes


def _add_row_gradients(sweep, layer, name, total):
    """Have the mean of |gradient| over each row's weights and bias added to total [rows]."""
    parameters = dict(layer.named_parameters(recurse=False))
    if "weight" not in parameters:
        raise ValueError(f"the rows of {name} have no weights of their own: use taylor or fisher")
    size = sum(parameter[0].numel() for parameter in parameters.values())  # of one row

    def add(gradient):
        total.add_(gradient.abs().view(len(total), -1).sum(1) / size)

    for parameter in parameters.values():
        sweep.on_gradient(parameter, add)


def _plan_units(sweep, criteria, kinds):
    """Plan the scores of units."""
    kinds = names.known(kinds, anatomy.UNITS, "kind of unit")
    if "magnitude" in criteria:
        for kind in {"width", "filters", "block"} & {*kinds}:
            raise ValueError(
                f'{kind} has no "magnitude" that compares with other units\': use taylor or fisher'
            )
    view = models.view(sweep.model)
    table, shapes = _plan_places(sweep, criteria, _unit_places(view, kinds))
    table["magnitude"] = lambda key: _unit_squares(view.block(key[0]), key[1]).sqrt()
    return table, shapes


@dataclass
class _Place:
    """Where the units of one key are seen in a model.

    units: how many there are.
    gates: list of (module, whether its output is meant). A unit has one gate on all of these
        together.
    signal: the one whose variance counts; None means the last of gates.
    channels: how many of the first channels are the units'; None means all.
    """

    units: int
    gates: list
    signal: tuple = None
    channels: int = None


def _plan_places(sweep, criteria, places):
    """Plan the scores by gates and values, for {key: _Place}."""
    shapes = {key: (place.units,) for key, place in places.items()}
    gates = Gates(sweep.model, shapes)
    sweep.at_end.append(gates.finish)
    outputs = Moments()
    for key, place in places.items():
        if {"taylor", "michel", "fisher"} & {*criteria}:
            for layer, output in place.gates:
                add = partial(gates.add, key, place.channels)
                sweep.on_gate(layer, add, output=output)
        if "variance" in criteria:
            layer, output = place.signal or place.gates[-1]
            sweep.on_value(layer, partial(outputs.add, key), output=output)

    def variance(key):
        by_channel = outputs.variance[key][: places[key].channels]
        return by_channel.unflatten(0, (*shapes[key], -1)).sum(1)

    table = {
        "taylor": lambda key: gates.absolute[key] / sweep.images,
        "michel": lambda key: functional.normalize(gates.absolute[key], dim=0),
        "fisher": lambda key: gates.square[key] / sweep.images / 2,
        "variance": variance,
    }
    return table, shapes


def _unit_places(view, kinds):
    """Return {(block or stage name, kind): _Place} of the units of these kinds that there are."""
    counts = view.units([kind for kind in anatomy.UNITS if kind in kinds])
    places = {}
    for key in sorted(counts, key=lambda key: key[1] == "width"):  # width comes last
        place = _unit_place(view, *key, counts[key])
        if place.gates:  # a stage may have lost all its blocks
            places[key] = place
    return places


def _unit_place(view, where, kind, count):
    """Return the _Place of count units of one kind in a block, stage or convolution."""
    if kind == "width":
        return _stage_place(view, where, count)
    if kind == "filters":
        norm = anatomy.norm_after(view.model, where)  # a filter goes with its channel of the norm
        return _Place(count, [(view.model.get_submodule(norm or where), True)])
    block = view.block(where)
    if kind == "block":
        return _Place(count, [(module, True) for module in view.residual_writers(block)])
    if kind == "neurons":
        return _Place(count, [(block.mlp.fc2, False)])
    if kind != "qk":
        return _Place(count, [(block.attn.proj, False)])
    if block.normalises_queries:
        raise ValueError(
            f"{where} normalises queries and keys (qk_norm): their dimensions cannot go one by "
            'one; leave "qk" out of kinds'
        )
    return _Place(count, [(block.attn.qkv, True)], channels=count)  # queries come first


def _stage_place(view, stage, count):
    """Return the _Place of the channels of a stage's residual stream."""
    gates = []
    signal = None
    for block in view.blocks:
        if view.stages[block.stage] == stage:
            module = view.model.get_submodule(block.name)
            gates = gates or [(module, False)]
            gates += [(write, True) for write in view.residual_writers(block)]
            signal = module, True
    return _Place(count, gates, signal)


def _own_parameters(model, names):
    """Return {name: parameter}; for None the weights of all linear layers but the classifier."""
    parameters = dict(model.named_parameters())
    if names is None:  # a factored layer has several weights
        layers = tuple(f"{layer}." for layer in models.view(model).linears())
        inside = [name for name in parameters if name.startswith(layers)]
        names = [name for name in inside if not name.endswith("bias")]
    return _chosen("parameter", names, parameters)


def _own_layers(model, names):
    """Return {name: layer with a weight [rows, ...]}; None: linear layers but the classifier."""
    if names is None:
        return models.view(model).linears()
    layers = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() > 1:
            layers[name] = module
    return _chosen("linear layer or convolution", names, layers)


def _chosen(noun, names, values):
    """Return {name: value} of these names; ValueError for a name without a value."""
    for name in names:
        if name not in values:
            raise ValueError(f"no {noun} {name!r} in this model{nearest(name, values)}")
    return {name: values[name] for name in names}


def inverse_diagonal(gram, *, damping, name):
    """Return the diagonal [n] of the inverse of a damped gram, in float64.

    gram: [n, n]; damping times the mean of its diagonal is added to its diagonal.
    name: of the gram, for the error.

    Raises ValueError for a gram without inverse.
    """
    gram = gram.double()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    shift = damping * gram.diagonal().mean() * eye
    factor, failed = torch.linalg.cholesky_ex(gram + shift)
    if failed:
        raise ValueError(
            f"the gram of {name} has no inverse with damping {damping}: "
            "raise it, or give more batches"
        )
    return torch.cholesky_inverse(factor).diagonal()


def _row_squares(layer):
    """Return the sum of squares of each row's weights and bias, [rows]."""
    total = _squares(layer.weight).flatten(1).sum(1)
    return total if layer.bias is None else total + _squares(layer.bias)


def _unit_squares(block, kind):
    """Return the sum of squares of all weights that go with each unit of a block, [units]."""
    if kind == "neurons":
        return _row_squares(block.mlp.fc1) + _squares(block.mlp.fc2.weight).sum(0)
    columns = _squares(block.attn.proj.weight).sum(0)
    queries = block.num_heads * block.qk_dim
    q, k, v = _row_squares(block.attn.qkv).split([queries, queries, len(columns)])
    if getattr(block.attn, "q_bias", None) is not None:
        # SwinV2 keeps biases beside qkv, and keys have none
        q = q + _squares(block.attn.q_bias)
        v = v + _squares(block.attn.v_bias)
    if kind == "qk":
        return q + k
    if kind == "v":
        return v + columns
    return sum(part.view(block.num_heads, -1).sum(1) for part in (q, k, v, columns))


def _squares(parameter):
    """Return the squares of a parameter's entries, in float32 or better."""
    return sweep.wide(parameter.detach()).square()


def _random_scores(model, shapes, seed):
    """Return a function from a key to uniform scores; all keys draw from one stream, in order."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    return lambda key: torch.rand(shapes[key], generator=generator).to(device)


def _finite(criterion, scores):
    """Return {key: tensor}; ValueError naming the first tensor that is not finite."""
    for key, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(
                f"the {criterion} scores of {key} are not finite: look for NaN in the weights and "
                "images, or for an overflow in low precision"
            )
    return scores
