"""Measure how important each weight, row, neuron, head and channel is, in one pass over batches.

A higher score means: keep it. In all functions batches is a list, or anything to iterate over, of
(x [B, 3, H, W], y int64 [B]) on the model's device. The images are of the training split, with
evaluation transforms. The model is a ViT or Swin. It is used in eval mode and left as it was:
modes, requires_grad, gradients and hooks. Where several processes train (see `parallel`), the first
one computes for all.

Public: Answers, ROWS, UNITS, WEIGHTS, change, check_calibration, directions, gradient_grams, grams, loss,
measure, position_weights, rows, units, weights.
"""

import warnings
from collections import defaultdict
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from vitlab import files, models, parallel
from vitlab.models import anatomy
from vitlab.names import known
from vitlab.pruning._sweep import (
    NO_BATCHES,
    Grams,
    Moments,
    Sweep,
    check_images,
    cross_entropy,
    fitting_gram,
    layer_inputs,
    positions_of,
    wide,
    zeros,
)
from vitlab.pruning.lowrank import TINY

# The criteria, the control first. What each one is stands in the tables of the plans below.
WEIGHTS = (
    "random",
    "magnitude",
    "gradient",
    "taylor",
    "fisher",
    "obd",
    "snip",
    "wanda",
    "obs",
)
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
    bases=None,
    grams=None,
    damping=1e-3,
    labels="true",
    seed=0,
):
    """Measure scores of weights, rows, units and directions in one pass.

    model, batches: as at the top of this file.
    weights, rows, units: criteria of the functions of these names, which say what they return.
    parameters, grams, damping: options of `weights`.
    layers: option of `rows`.
    kinds: option of `units`.
    bases: those of `directions`; None: no directions.
    labels: what the loss L of an image is taken by:
      true   cross-entropy with the label of batches
      model  cross-entropy with a label that seed draws from the model's own prediction
      none   <r, f / |f|>, of the features f that a classifier reads and of an r ~ N(0, I) that seed
             draws. For a gate z, E(dL/dz)^2 is the squared change of the normalised features by z.
             It needs neither labels nor a classifier, and says nothing about one.
    seed: of random, and of labels other than true.

    Returns {"weights": ..., "rows": ..., "units": ..., "directions": ...}; a group that is not
    asked for comes back empty.
    Raises ValueError for no criteria at all, unknown names, and a loss or a score that is not
    finite. So it does for missing batches, which only random and magnitude can do without, and for
    a model without classifier unless labels is "none".
    """
    weights = known(weights, WEIGHTS, "criterion")
    rows = known(rows, ROWS, "criterion")
    units = known(units, UNITS, "criterion")
    if not (weights + rows + units or bases):
        raise ValueError("nothing to measure: give criteria of weights, rows or units, or bases")
    plans = {}
    with Sweep(model) as sweep:
        # All plans hook into one sweep. It runs one forward pass for all criteria and, if one of
        # them needs gradients, one backward pass per batch.
        if weights:
            plans["weights"] = _plan_weights(sweep, weights, parameters, grams, damping)
        if rows:
            plans["rows"] = _plan_rows(sweep, rows, layers)
        if units:
            plans["units"] = _plan_units(sweep, units, kinds)
        rises = _plan_directions(sweep, bases or {})
        # The control and magnitudes hook nothing: they need no images.
        if sweep.hooked:
            sweep.run(batches, labels=labels, seed=seed)
    criteria = {"weights": weights, "rows": rows, "units": units}
    scores = {group: {} for group in criteria}
    for group, (table, shapes) in plans.items():
        table["random"] = _random_scores(model, shapes, seed)
        for criterion in criteria[group]:
            values = {key: table[criterion](key) for key in shapes}
            scores[group][criterion] = _finite(criterion, values)
    # A layer that keeps all of its directions loses nothing: entry R is 0.
    means = {name: functional.pad(rise / sweep.images, (0, 1)) for name, rise in rises.items()}
    return scores | {"directions": _finite("direction", means)}


def weights(model, batches=None, *, criteria, **options):
    """Measure scores of single weights.

    model, batches: as at the top of this file.
    criteria: one or several of WEIGHTS. There g is the gradient of the mean loss of one
        batch, E the mean over batches, and H the gram of a layer's inputs:
      random     uniform in [0, 1)
      magnitude  |w|
      gradient   E|g|
      taylor     E|w g|
      fisher     E(w g)^2
      obd        E[B (w g)^2] / 2, Optimal Brain Damage
      snip       |w E g| over its sum over all these parameters
      wanda      |W_ij| ||X_j||, of linear layers only, for masks.keep_largest(per="row")
      obs        w_ij^2 / (2 [H^-1]_jj), Optimal Brain Surgeon, of linear layers only, per="layer"
    options: of `measure`, and
      parameters  names; None means the weights (no biases) of all linear layers but the classifier
      grams       {layer name: [n, n]} as from `grams`; saves obs the pass over batches
      damping     of H for obs, 1e-3 unless given

    Returns {criterion: {parameter name: tensor of its shape}}, float32 or better.
    Raises ValueError as `measure` does, for missing grams, and for a gram without inverse.
    """
    return measure(model, batches, weights=criteria, **options)["weights"]


def rows(model, batches=None, *, criteria, **options):
    """Measure scores of whole rows (output features, filters).

    model, batches: as at the top of this file.
    criteria: one or several of ROWS. There dL/dz is the gradient of one image's loss by a gate z on
        the row's output, and E the mean over images:
      random     uniform in [0, 1)
      magnitude  L2 norm of the row with its bias
      gradient   mean over the row's weights and bias of E|g|, as in `weights`
      taylor     E|dL/dz|
      michel     taylor over the L2 norm of the layer's vector
      fisher     E(dL/dz)^2 / 2, in loss units
      variance   of the row's output over all images and positions
    options: of `measure`, and
      layers     names of linear layers or convolutions; None means all linear layers but the
                 classifier

    Returns {criterion: {layer name: tensor [rows]}}.
    Raises ValueError as `measure` does.
    """
    return measure(model, batches, rows=criteria, **options)["rows"]


def units(model, batches=None, *, criteria, **options):
    """Measure scores of heads, neurons, channels and blocks.

    model, batches: as at the top of this file.
    criteria: one or several of UNITS. There dL/dz is the gradient of one image's loss by a gate z
        on the unit, and E the mean over images:
      random     uniform in [0, 1)
      magnitude  L2 norm of all weights that would go; not for width, filters and block
      taylor     E|dL/dz|
      michel     taylor over the L2 norm of the block's vector
      fisher     E(dL/dz)^2 / 2, in loss units
      variance   sum over the unit's channels of the variance over images and positions
    options: of `measure`, and
      kinds      one or several of heads, neurons, qk, v, filters, width and block; heads and
                 neurons unless given. Dimensions of qk and v are numbered head by head.

    Returns {criterion: {(block, stage or convolution name, kind): tensor [units]}}.
    Raises ValueError as `measure` does, and for qk where queries and keys are normalised.
    """
    return measure(model, batches, units=criteria, **options)["units"]


@parallel.first_decides
def grams(model, batches, *, layers=None, affine=False, tokens=None, weights=None):
    """Measure the second moments X^T X / tokens of layer inputs, by forward passes only.

    model, batches: as at the top of this file.
    layers: names of linear layers and convolutions. None means all linear layers but the
        classifier.
    affine: append a constant 1 to the inputs. The tensors are then [n+1, n+1], and their last row
        is the mean input.
    tokens: number of positions that an image gives a layer, drawn for each batch; None: all. More
        images tell more than more positions of an image, which are alike.
    weights: {layer name: [positions]} of `position_weights`; None: all positions count alike. With
        them tokens before the patches are always looked at.

    Returns {layer name: float64 [n, n]}.
    Raises ValueError for tokens that leave no patch, unknown layers, missing batches, and inputs
    that are not finite.
    """
    chosen = _own_layers(model, layers)
    totals = Grams(affine, positions_of(model, chosen, tokens, weights))
    with Sweep(model) as sweep:

        def add(name, x):
            totals.add(name, x, sweep.batches, sweep.size)

        for name, layer in chosen.items():
            # X [tokens, n] are the inputs over all images and positions, window padding included.
            # For a convolution of one group they are the patches that its filters see. Then n is
            # channels * k * k, as in weight.flatten(1).
            sweep.on_value(layer, partial(add, name))
        sweep.run(batches)
    return _finite("gram", {name: totals.mean(name) for name in chosen})


@parallel.first_decides
def position_weights(model, batches, *, labels="true", seed=0, floor=0.1):
    """Measure how much the positions of an image count for the loss at each layer's output.

    In the last blocks of a ViT that reads its class token, an error of that token is all that
    matters, and it is one position in dozens.

    model, batches: as at the top of this file.
    labels, seed: as for `measure`.
    floor: share in [0, 1] that all positions get alike, so that none is left without a say.

    Returns {layer name: float64 [positions]} of all view.matrices, with mean 1. A token before the
    patches has its mean squared gradient over images, and all patches share theirs. Of a model
    without such tokens nothing is measured and the result is {}.
    Raises ValueError as `measure` does.
    """
    prefix = getattr(model, "num_prefix_tokens", 0)
    if not prefix:
        return {}
    sums = defaultdict(int)

    def add(name, gradient):
        by_image = gradient.square().sum(1).view(sweep.size, -1)
        sums[name] += by_image.sum(0).double()

    with Sweep(model) as sweep:
        for name, layer in models.view(model).matrices.items():
            if name.startswith("blocks."):  # the stem has patches alone
                sweep.on_output_gradient(layer, partial(add, name))
        sweep.run(batches, labels=labels, seed=seed)
    weights = {}
    for name, total in sums.items():
        # Single patches of a few hundred images would differ by chance most.
        total[prefix:] = total[prefix:].mean()
        if total.sum() > 0:
            weights[name] = floor + (1 - floor) * total / total.mean()
    return _finite("position", weights)


@parallel.first_decides
def gradient_grams(model, batches, *, layers=None, labels="true", seed=0):
    """Measure the second moments of the loss's gradients by layer outputs, in one pass.

    model, batches: as at the top of this file.
    layers: as for `grams`.
    labels, seed: as for `measure`.

    Returns {layer name: float64 [m, m]}, the mean over images of the sum over positions of g g^T.
    Raises ValueError as `measure` and `grams` do.
    """
    # g [m] is the gradient of one image's loss by the layer's output at one position. An output
    # error e costs, to second order, half of what the matrix makes of E[e e^T]. That holds if e is
    # independent of g, and if errors or gradients of different positions are uncorrelated (K-FAC's
    # assumptions, Martens and Grosse 2015). They are not: the matrix ranks the errors of different
    # layers well, but is several times below the loss.
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

    model, batches: as at the top of this file.
    bases: {layer name: (u [m, R], v [R, n])} of linear layers and convolutions, by lowrank.svd.
        A weight (flatten(1), [m, n]) is the sum of its R parts u_i v_i, the most important first.
    labels, seed: as for `measure`.

    Returns {layer name: float64 [R+1]}. Entry r is the rise in loss units when the directions from
    r on go, so that it compares with the "fisher" of `units`.
    Raises ValueError as `measure` does.
    """
    return measure(model, batches, bases=bases, labels=labels, seed=seed)["directions"]


@parallel.first_decides
@torch.no_grad()
def loss(model, batches):
    """Return the mean cross-entropy over all images of batches, in eval mode.

    model, batches: as at the top of this file.

    Raises ValueError for no batches, for labels that the model lacks, for a model without
    classifier, and for images that are normalised otherwise than it expects.
    """
    total = images = 0
    with Sweep(model):
        for x, y in files.progress(batches, "measuring the loss"):
            check_images(model, y)
            total += cross_entropy(model, model(x), y).item()
            images += len(x)
    if not images:
        raise ValueError(NO_BATCHES)
    return total / images


@parallel.first_decides
@torch.no_grad()
def change(model, cut, batches):
    """Return half the mean squared change of the normalised features from one model to another.

    It is what labels="none" predicts, 1 minus the mean cosine of both models' features: 0 where
    all keep their direction, 2 where all are reversed.

    model, batches: as at the top of this file; the y of batches are not looked at.
    cut: a model whose features are as wide.

    Raises ValueError for no batches, and for features of another width.
    """
    total = images = 0
    with Sweep(model), Sweep(cut):
        for x, _ in files.progress(batches, "comparing features"):
            before, after = anatomy.features(model, x), anatomy.features(cut, x)
            if before.shape != after.shape:
                raise ValueError(
                    f"features of {before.shape[1]} and of {after.shape[1]} channels have no "
                    "change to measure: leave the width of the last stage as it is"
                )
            cosine = functional.cosine_similarity(wide(before), wide(after), dim=1)
            total += (1 - cosine).sum().item()
            images += len(x)
    if not images:
        raise ValueError(NO_BATCHES)
    return total / images


class Answers:
    """Hold what a model answers to some images, and say how far others are from it, without labels.

    model, batches: as at the top of this file; the y of batches are not looked at.

    Raises ValueError for no batches.
    """

    def __init__(self, model, batches):
        if not batches:
            raise ValueError(NO_BATCHES)
        self.batches, self.has_classes = batches, bool(model.num_classes)
        self.told = self.of(model)

    @torch.no_grad()
    def of(self, model):
        """Return the log-probabilities [N, classes] of a model, or its features [N, channels]."""
        read = model if self.has_classes else partial(anatomy.features, model)
        with Sweep(model):
            found = torch.cat([wide(read(x)) for x, _ in self.batches])
        return found.log_softmax(1) if self.has_classes else found

    @parallel.first_decides
    def distance(self, model, channels=slice(None)):
        """Return how far a model is: the mean KL(held || its own) in nats, or 1 - cosine of features.

        channels: of the held features, those that model still has, see shrink.features_left.
        """
        said = self.of(model)
        if self.has_classes:
            how = {"reduction": "batchmean", "log_target": True}
            return functional.kl_div(said, self.told, **how).item()
        return 1 - functional.cosine_similarity(self.told[:, channels], said, dim=1).mean().item()


def check_calibration(model, calibration, held_out):
    """Return the losses on calibration and held-out batches; warn of a model that fits the first.

    model: as at the top of this file.
    calibration: batches that scores would be measured on.
    held_out: batches of images that the model was not trained on (val, never test).

    Returns (loss on calibration, loss on held_out). A first one below half of the second gives a
    UserWarning.
    """
    fitted = loss(model, calibration)
    unseen = loss(model, held_out)
    # On images that a model fits, true-label gradients vanish and a few outliers rule the scores.
    if fitted < 0.5 * unseen:
        warnings.warn(
            f"the model fits its calibration images: loss {fitted:.3g} on them, {unseen:.3g} on "
            "held-out ones. A few outliers rule scores by true-label gradients: consider "
            'labels="model", augmented images, or some that training never sees '
            "(data.calibration of a study)",
            stacklevel=2,
        )
    return fitted, unseen


# Plans. Each one hooks up what its criteria need and returns ({criterion: function}, {key: shape}).
# The functions give the score of one key, of its shape, after the sweep. Hooks add up statistics
# while values and gradients are fresh, so that no second set of gradients is ever stored.

# How the gradient g of a batch of `size` images is added up for a criterion.
_GRADIENT_SUMS = {
    "gradient": lambda total, g, size: total.add_(g.abs()),
    "taylor": lambda total, g, size: total.add_(g.abs()),
    "fisher": lambda total, g, size: total.addcmul_(g, g),
    "obd": lambda total, g, size: total.addcmul_(g, g, value=size),
    "snip": lambda total, g, size: total.add_(g),
}


def _plan_weights(sweep, criteria, parameters, grams, damping):
    """Plan the scores of parameters."""
    chosen = _own_parameters(sweep.model, parameters)
    shapes = {name: parameter.shape for name, parameter in chosen.items()}
    summed = _GRADIENT_SUMS.keys() & criteria
    sums = {criterion: zeros(sweep.model, shapes) for criterion in summed}

    def add(name, gradient):
        for criterion, totals in sums.items():
            _GRADIENT_SUMS[criterion](totals[name], gradient, sweep.size)

    if sums:
        for name, parameter in chosen.items():
            sweep.on_gradient(parameter, partial(add, name))

    # These are statistics per micro-batch, whose size B is the caller's batch size.
    def mean(criterion, name):
        return sums[criterion][name] / sweep.batches

    def size(name):
        return wide(chosen[name]).abs()

    # SNIP (Lee et al. 2019) is relative: its scores add up to 1 over all these parameters.
    def snip(name):
        return mean("snip", name).abs() * size(name)

    @cache  # the same for all parameters
    def snip_total():
        total = sum(snip(name).sum(dtype=torch.float64) for name in chosen)
        return total.clamp_min(TINY).item()

    table = _plan_inputs(sweep, criteria, chosen, grams, damping) | {
        "magnitude": size,
        # Where the loss would like to move: this is not the cost of a removal.
        "gradient": lambda name: mean("gradient", name),
        # Molchanov et al. (2019), to first order and squared.
        "taylor": lambda name: mean("taylor", name) * size(name),
        "fisher": lambda name: mean("fisher", name) * size(name).square(),
        # The rise of the loss to second order (LeCun et al. 1990), with B g^2 for the diagonal of
        # the Hessian. With labels="model" this estimates the diagonal of the Fisher matrix, here
        # the same as Gauss-Newton's, without bias and for any B, from one drawn label per image. So
        # does labels="none" with Gauss-Newton's of the normalised features.
        # With true labels it is the empirical Fisher for B = 1. For a larger B the squared mean
        # gradient comes on top, B - 1 times.
        "obd": lambda name: mean("obd", name) * size(name).square() / 2,
        "snip": lambda name: snip(name) / snip_total(),
    }
    return table, shapes


def _plan_inputs(sweep, criteria, parameters, grams, damping):
    """Return the functions of the criteria that look at the inputs of linear layers."""
    if not {"wanda", "obs"} & {*criteria}:
        return {}
    moments = Moments()
    products = Grams()
    modules = dict(sweep.model.named_modules())
    for name in parameters:
        layer = modules.get(name.removesuffix(".weight"))
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"wanda and obs are for weights of linear layers, {name} is none: "
                "name the parameters"
            )
        if "wanda" in criteria:
            sweep.on_value(layer, partial(moments.add, name))
        if "obs" in criteria and grams is None:
            sweep.on_value(layer, partial(products.add, name))

    # Sun et al. (2023): ||X_j|| is the L2 norm of input j over all tokens, as counted in `grams`.
    # All weights of a row meet the same inputs, but those of another row lead elsewhere: the scores
    # compare inside each row only.
    def wanda(name):
        return wide(parameters[name]).abs() * moments.norm(name)

    # Half of what the layer's squared output error (lowrank.objective) rises by if that weight goes
    # and its row adapts (Hassibi and Stork 1993, by layer as in SparseGPT, Frantar and Alistarh
    # 2023). That error is another one in each layer: the scores do not compare between layers.
    def obs(name):
        weight = parameters[name]
        layer = name.removesuffix(".weight")
        known_grams = {layer: products.mean(name)} if grams is None else grams
        gram = fitting_gram(known_grams, layer, weight.shape[1], damping)
        factor, failed = torch.linalg.cholesky_ex(gram.to(weight.device))
        if failed:
            raise ValueError(
                f"the gram of {name} has no inverse with damping {damping}: "
                "raise it, or give more batches"
            )
        diagonal = torch.cholesky_inverse(factor).diagonal()
        square = _squares(weight)
        return square / (2 * diagonal).to(square.dtype)

    return {"wanda": wanda, "obs": obs}


def _plan_rows(sweep, criteria, layers):
    """Plan the scores of the rows of layers."""
    chosen = _own_layers(sweep.model, layers)
    # The gate sits on the layer's own output, bias included and before any activation. That of a
    # convolution sits in front of a batch norm.
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
    parameters = list(layer.parameters(recurse=False))
    if not parameters:  # of a factored layer
        raise ValueError(f"the rows of {name} have no weights of their own: use taylor or fisher")
    size = sum(parameter[0].numel() for parameter in parameters)  # of one row

    def add(gradient):
        total.add_(gradient.abs().view(len(total), -1).sum(1) / size)

    for parameter in parameters:
        sweep.on_gradient(parameter, add)


def _plan_units(sweep, criteria, kinds):
    """Plan the scores of units."""
    kinds = known(kinds, anatomy.UNITS, "kind of unit")
    if "magnitude" in criteria:
        # The weights of a channel of the stream or of a filter lie in every layer around.
        for kind in {"width", "filters", "block"} & {*kinds}:
            raise ValueError(
                f'{kind} has no "magnitude" that compares with others: use taylor or fisher'
            )
    view = models.view(sweep.model)
    # Kinds come in one order, whatever the caller's: random scores are drawn in turn.
    counts = view.units(sorted(kinds, key=anatomy.UNITS.index))
    places = {}
    for key in sorted(counts, key=lambda key: key[1] == "width"):  # width comes last
        place = _unit_place(view, *key, counts[key])
        if place.gates:  # a stage may have lost all its blocks
            places[key] = place
    table, shapes = _plan_places(sweep, criteria, places)
    table["magnitude"] = lambda key: _unit_squares(view.block(key[0]), key[1]).sqrt()
    return table, shapes


def _plan_directions(sweep, bases):
    """Plan the rises of `directions`, and return them by layer: they are sums over images."""
    chosen = _own_layers(sweep.model, bases) if bases else {}
    inputs = {}  # of each layer, until its gradients come
    rises = dict.fromkeys(chosen, 0.0)

    def add(name, layer, gradient):
        u, v = (part.to(gradient) for part in bases[name])
        x = layer_inputs(inputs.pop(name), layer)
        # A gate z_i on the part u_i v_i has dL/dz_i = the sum over one image's positions of
        # (u_i . g)(v_i . x). There g and x are the loss's gradient by the layer's output and its
        # input.
        by_position = (x @ v.T) * (gradient @ u)
        gates = by_position.view(sweep.size, -1, len(v)).sum(1)  # [B, R]
        # Entry r is E(sum of dL/dz_i over all i >= r)^2 / 2, where E is the mean over images:
        # signed and summed before it is squared.
        after = gates.flip(1).cumsum(1).flip(1)
        rises[name] += after.double().square().sum(0) / 2

    for name, layer in chosen.items():
        sweep.hook(layer, partial(inputs.__setitem__, name))
        sweep.on_output_gradient(layer, partial(add, name, layer))
    return rises


class _Place(NamedTuple):
    """Where the units of one key are seen in a model."""

    units: int  # how many there are
    # [(module, whether its output is meant)]; a unit has one gate on all of these together.
    gates: list
    # The one whose variance counts; None means the last of gates.
    signal: tuple = None
    # How many of the first channels are the units'; None means all.
    channels: int = None


def _plan_places(sweep, criteria, places):
    """Plan the scores by gates and values, for {key: _Place}."""
    shapes = {key: (place.units,) for key, place in places.items()}
    absolute = zeros(sweep.model, shapes)
    square = zeros(sweep.model, shapes)

    # gradient: dL_b/dz [B, channels], signed and summed over tokens and places.
    def add(key, gradient):
        units = gradient[:, : places[key].channels].unflatten(1, (*shapes[key], -1))
        gates = units.sum(-1)  # [B, units]
        absolute[key] += gates.abs().sum(0)
        square[key] += gates.square().sum(0)

    outputs = Moments()
    for key, place in places.items():
        # One backward pass gives the gates of all images of a batch.
        if {"taylor", "michel", "fisher"} & {*criteria}:
            sweep.on_gate(place.gates, partial(add, key))
        if "variance" in criteria:
            layer, output = place.signal or place.gates[-1]
            sweep.on_value(layer, partial(outputs.add, key), output=output)

    def variance(key):
        by_channel = outputs.variance[key][: places[key].channels]
        return by_channel.unflatten(0, (*shapes[key], -1)).sum(1)

    table = {
        # Michel et al. (2019), equation 2: dL/dz signed and summed over the unit's channels, tokens
        # and writes, then its size. They normalise heads over a layer.
        "taylor": lambda key: absolute[key] / sweep.images,
        "michel": lambda key: functional.normalize(absolute[key], dim=0),
        # In loss units, so that it compares between all units and layers as it is.
        "fisher": lambda key: square[key] / sweep.images / 2,
        # What a mean in the next bias cannot replace, window padding included.
        "variance": variance,
    }
    return table, shapes


def _unit_place(view, where, kind, count):
    """Return the _Place of count units of one kind in a block, stage or convolution."""
    if kind == "width":
        return _stage_place(view, where, count)
    if kind == "filters":
        # A filter of the stem that feeds another convolution goes with its channel of the norm.
        norm = anatomy.norm_after(view.model, where)
        return _Place(count, [(view.layer(norm or where), True)])
    block = view.block(where)
    if kind == "qk" and block.normalises_queries:
        raise ValueError(
            f"{where} normalises queries and keys (qk_norm): their dimensions cannot go one by "
            'one; leave "qk" out of kinds'
        )
    if kind == "qk":
        # One dimension of a head's queries, which come first. A gate on its keys has the same
        # gradient.
        return _Place(count, [(block.attn.qkv, True)], channels=count)
    if kind == "block":
        # One gate on both that the block writes to the residual stream. Its variance is that of
        # what its MLP writes.
        return _Place(count, [(module, True) for module in view.residual_writers(block)])
    # An input channel at fc2, after the activation, or input channels of proj, after softmax: those
    # of a head, or one dimension of its values.
    reader = block.mlp.fc2 if kind == "neurons" else block.attn.proj
    return _Place(count, [(reader, False)])


def _stage_place(view, stage, count):
    """Return the _Place of the channels of a stage's residual stream."""
    # One gate is on all that is written to it: the input of the stage's first block and the outputs
    # of each proj and fc2. Its variance is that of the stage's last output.
    gates = []
    signal = None
    for block in view.blocks:
        if view.stages[block.stage] == stage:
            module = view.layer(block.name)
            gates = gates or [(module, False)]
            gates += [(write, True) for write in view.residual_writers(block)]
            signal = module, True
    return _Place(count, gates, signal)


def _own_parameters(model, names):
    """Return {name: parameter}; for None the weights of all linear layers but the classifier."""
    parameters = dict(model.named_parameters())
    if names is None:
        # A factored layer has several weights.
        layers = tuple(f"{layer}." for layer in models.view(model).linears())
        names = [n for n in parameters if n.startswith(layers) and not n.endswith("bias")]
    return {name: parameters[name] for name in known(names, parameters, "parameter")}


def _own_layers(model, names):
    """Return {name: layer with a weight [rows, ...]}; None: linear layers but the classifier."""
    if names is None:
        return models.view(model).linears()
    layers = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() > 1:
            layers[name] = module
    return {name: layers[name] for name in known(names, layers, "linear layer or convolution")}


def _row_squares(layer):
    """Return the sum of squares of each row's weights and bias, [rows]."""
    total = _squares(layer.weight).flatten(1).sum(1)
    return total if layer.bias is None else total + _squares(layer.bias)


def _unit_squares(block, kind):
    """Return the sum of squares of all weights that go with each unit of a block, [units]."""
    # These are rows of qkv or fc1 with their biases, and columns of proj or fc2.
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
    return wide(parameter).square()


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
