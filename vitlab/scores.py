"""Sensitivity: how important is every weight, row, neuron, head and channel, from data, in one pass over the batches.

Higher stays. All criteria of a call share one forward and, if one of them needs gradients, one backward pass per
batch; hooks take the statistics while values and gradients are fresh, so that no second set of gradients is ever
stored. batches is a list (or anything to iterate over) of (x [B, 3, H, W], y int64 [B]) on the model's device, from
the training split with evaluation transforms. The model is used in eval mode and left as it was: modes,
requires_grad, gradients and hooks. Of several processes (see `parallel`) the first computes for all.
"""

import warnings
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional

from . import models, parallel

WEIGHTS = ("random", "magnitude", "gradient", "taylor", "fisher", "obd", "snip", "wanda", "obs")
ROWS = ("random", "magnitude", "gradient", "taylor", "michel", "fisher", "variance")
UNITS = ("random", "magnitude", "taylor", "michel", "fisher", "variance")
KINDS = ("heads", "neurons", "qk", "v", "filters", "width", "block")
NO_BATCHES = "no batches: give a list of (x, y); a generator is empty after its first use"


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
    """Scores of weights, rows and units in one pass: {"weights": ..., "rows": ..., "units": ...}.

    weights, rows, units: criteria of the functions of these names, which say what they mean and return; a group
    without criteria comes back empty. parameters, grams and damping are for weights, layers for rows, kinds for
    units. Criteria that need no gradients run forward passes only, and random and magnitude need no batches.
    Raises ValueError for no criteria at all and what the three functions raise.
    """
    criteria = {
        "weights": known(weights, WEIGHTS, "criterion"),
        "rows": known(rows, ROWS, "criterion"),
        "units": known(units, UNITS, "criterion"),
    }
    if not any(criteria.values()):
        raise ValueError("nothing to measure: give criteria of weights, rows or units")
    with Sweep(model) as sweep:
        plans = {
            "weights": lambda c: plan_weights(sweep, c, parameters, grams=grams, damping=damping, seed=seed),
            "rows": lambda c: plan_rows(sweep, c, layers, seed=seed),
            "units": lambda c: plan_units(sweep, c, kinds, seed=seed),
        }
        values = {group: plans[group](chosen) for group, chosen in criteria.items() if chosen}
        if sweep.handles:
            sweep.run(batches, labels=labels, seed=seed)
    found = {group: {} for group in criteria}
    for group, (keys, value) in values.items():
        found[group] = finite({c: {key: value[c](key) for key in keys} for c in criteria[group]})
    return found


@parallel.first_decides
def weights(model, batches=None, *, criteria, parameters=None, grams=None, damping=1e-3, labels="true", seed=0):
    """Scores of single weights: {criterion: {parameter name: tensor of its shape}}, float32 or better.

    g is the gradient of the mean cross-entropy of one batch, E the mean over batches: these are statistics
    per micro-batch, whose size B is the caller's batch size. criteria, any of
      random      uniform in [0, 1), drawn from seed
      magnitude   |w|
      gradient    E|g|: where the loss would like to move, no cost of removal
      taylor      E|w g| (Molchanov et al. 2019, first order)
      fisher      E(w g)^2 (Molchanov et al. 2019)
      obd         E[B (w g)^2] / 2, the rise of the loss to second order (Optimal Brain Damage, LeCun et al. 1990)
                  with B g^2 for the diagonal of the Hessian. With labels="model" this estimates the diagonal of the
                  Fisher matrix, here the same as Gauss-Newton's, without bias and for any B, from one drawn label per
                  image; with true labels it is the empirical Fisher for B = 1 and has B - 1 times the squared mean
                  gradient on top for larger ones
      snip        |w E g| over its sum over all parameters given (Lee et al. 2019)
      wanda       |W_ij| ||X_j||, the L2 norm of input j over all tokens (Sun et al. 2023). Of use inside each row
                  only: masks.keep_largest(per="row")
      obs         w_ij^2 / (2 [H^-1]_jj), half of what the layer's squared output error (lowrank.objective) rises by
                  if that weight goes and its row adapts (Optimal Brain Surgeon, Hassibi and Stork 1993, by layer as
                  in SparseGPT, Frantar and Alistarh 2023). Layers are not comparable: per="layer"
    wanda and obs are for linear layers only, their inputs are counted as in `grams`. H is the layer's gram plus
    damping times the mean of its diagonal; grams, as from `grams`, saves the pass over batches for obs.
    parameters: names; None means the weights (no biases) of all linear layers but the classifier. labels:
    "true", or "model" for labels drawn from the model's own prediction by seed (the true Fisher; for models
    that fit their calibration images). random and magnitude need no batches. Raises ValueError for unknown
    names, missing batches or grams, a gram without inverse, a loss or a score that is not finite.
    """
    options = {"parameters": parameters, "grams": grams, "damping": damping}
    return measure(model, batches, weights=criteria, labels=labels, seed=seed, **options)["weights"]


@parallel.first_decides
def rows(model, batches=None, *, criteria, layers=None, labels="true", seed=0):
    """Scores of whole rows (output features, filters): {criterion: {layer name: tensor [rows]}}.

    dL/dz is the gradient of one image's loss by a gate z on the row's output, bias included and before any
    activation; E is the mean over images. criteria, any of
      random      uniform in [0, 1), drawn from seed
      magnitude   L2 norm of the row with its bias
      gradient    mean over the row's weights and bias of E|g|, g and E per micro-batch as in `weights`
      taylor      E|dL/dz|
      michel      the same divided by the L2 norm of the layer's vector, as Michel et al. (2019) do for heads
      fisher      E(dL/dz)^2 / 2, in loss units: comparable between layers as it is
      variance    of the row's output over all images and positions (window padding included): what its mean in the
                  next bias cannot replace
    layers: names of linear layers or convolutions; None means all linear layers but the classifier. The gate
    of a convolution sits on its own output, in front of a batch norm. labels, batches, errors: as for
    `weights`.
    """
    return measure(model, batches, rows=criteria, layers=layers, labels=labels, seed=seed)["rows"]


@parallel.first_decides
def units(model, batches=None, *, criteria, kinds=("heads", "neurons"), labels="true", seed=0):
    """Scores of heads, neurons and channels: {criterion: {(block or stage name, kind): tensor [units]}}.

    kinds, any of
      heads       input channels of a head at proj (after softmax)
      neurons     an input channel at fc2 (after the activation)
      qk          one dimension of a head's queries and keys, gated at q: [heads * dimensions], head by head; not for
                  models that normalise queries and keys
      v           one dimension of a head's values, gated at the input of proj: [heads * dimensions], head by head
      filters     of a convolution of the stem that feeds another one, gated behind its batch norm, keys (convolution
                  name, "filters")
      width       a channel of the residual stream, keys ("stages.0", "width") for a ViT, ("stages.s", "width") for
                  stage s of a Swin: one gate on all that is written to it, which is the input of the stage's first
                  block and the outputs of each proj and fc2
      block       a whole block, [1]: one gate on both that it writes to the residual stream
    dL/dz is the gradient of one image's loss by a gate z on the unit, signed and summed over its channels, tokens
    and writes; E is the mean over images. criteria, any of
      random      uniform in [0, 1), drawn from seed
      magnitude   L2 norm of all weights that would go: rows of qkv or fc1 with biases, columns of proj or fc2; not
                  for width and filters, whose weights lie in every layer around, nor for whole blocks
      taylor      E|dL/dz| (Michel et al. 2019, equation 2)
      michel      the same divided by the L2 norm of the block's vector (their normalisation over a layer)
      fisher      E(dL/dz)^2 / 2, in loss units: comparable between all units as it is
      variance    sum over the unit's channels of the variance over images and positions; of the stage's last output
                  for width, of what its MLP writes for a block
    One backward pass gives the gates of all images of a batch; Swin's windows are folded back to images.
    labels, batches, errors: as for `weights`.
    """
    return measure(model, batches, units=criteria, kinds=kinds, labels=labels, seed=seed)["units"]


@parallel.first_decides
def grams(model, batches, *, layers=None, affine=False):
    """Second moments of layer inputs: {layer name: float64 [n, n]}, X^T X / tokens. Forward passes only.

    X [tokens, n] are the inputs of a linear layer over all images and positions, window padding included; of a
    convolution of one group the patches that its filters see, n = channels * k * k, as in weight.flatten(1).
    layers: names of linear layers and convolutions; None means all linear layers but the classifier. affine: append
    a constant 1 to the inputs, so that the tensors are [n+1, n+1] and their last row is the mean input. Products are
    taken in the inputs' precision, at least float32, and added up in float64. Raises ValueError for unknown layers,
    missing batches, inputs that are not finite.
    """
    chosen = own_layers(model, layers)
    totals = Grams(affine)
    with Sweep(model) as sweep:
        for name, layer in chosen.items():
            if isinstance(layer, nn.Conv2d):
                sweep.hook(layer, lambda x, n=name, conv=layer: totals.add(n, patches(wide(x.detach()), conv)))
            else:
                sweep.on_value(layer, partial(totals.add, name))
        sweep.run(batches)
    return finite({"gram": {name: totals.mean(name) for name in chosen}})["gram"]


@parallel.first_decides
def gradient_grams(model, batches, *, layers=None, labels="true", seed=0):
    """Second moments of the loss's gradients by layer outputs: {layer name: float64 [m, m]}, one pass.

    With g [m] the gradient of one image's loss by the layer's output at one position: the mean over images of the sum
    over positions of g g^T. To second order, half of what this matrix makes of E[e e^T] is what an output error e
    costs if e is independent of g, and errors or gradients of different positions are uncorrelated (K-FAC's
    assumptions, Martens and Grosse 2015). They are not: it ranks the errors of different layers well, but is several
    times below the loss. labels, layers, batches, errors: as for `weights` and `grams`.
    """
    chosen = own_layers(model, layers)
    totals = Grams()
    with Sweep(model) as sweep:
        for name, layer in chosen.items():
            sweep.on_output_gradient(layer, partial(totals.add, name))
        sweep.run(batches, labels=labels, seed=seed)
    return finite({"gram": {name: totals.totals[name] / sweep.images for name in chosen}})["gram"]


@parallel.first_decides
def directions(model, batches, bases, *, labels="true", seed=0):
    """What the loss is predicted to rise by when a layer keeps only its first directions: {layer name: float64 [R+1]}.

    bases: {layer name: (u [m, R], v [R, n])} of linear layers and convolutions (weight.flatten(1) is [m, n]), whose
    weight is the sum of its R parts u_i v_i, the most important first, as lowrank.svd gives them. A gate z_i on such a
    part has dL/dz_i = the sum over one image's positions of (u_i . g)(v_i . x), g and x the loss's gradient by the
    layer's output and its input there. found[r] is E(sum of dL/dz_i over all i >= r)^2 / 2, E the mean over images:
    signed and summed before it is squared, in loss units, so that it compares with the "fisher" of `units`; found[R]
    is 0. labels, batches, errors: as for `weights`; also ValueError for a basis of another shape.
    """
    chosen, lost = own_layers(model, bases), {}
    for name, layer in chosen.items():
        (m, n), (u, v) = layer.weight.flatten(1).shape, bases[name]
        if u.shape != (m, len(v)) or v.shape[1] != n:
            raise ValueError(f"the basis of {name} [{m}, {n}] is u [m, R] and v [R, n]; got {[*u.shape]}, {[*v.shape]}")
    with Sweep(model) as sweep:

        def add(name, layer, seen, gradient):
            u, v = (part.to(gradient) for part in bases[name])
            x = seen.pop()
            x = patches(x, layer) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2)
            parts = ((x @ v.T) * (gradient @ u)).view(sweep.size, -1, len(v))
            after = parts.sum(1).flip(1).cumsum(1).flip(1)  # [B, R]: all from r on go
            lost[name] = lost.get(name, 0) + after.double().square().sum(0) / 2

        for name, layer in chosen.items():
            seen = []  # the layer's inputs, until its gradients come
            sweep.hook(layer, lambda x, seen=seen: seen.append(wide(x.detach())))
            sweep.on_output_gradient(layer, partial(add, name, layer, seen))
        sweep.run(batches, labels=labels, seed=seed)
    found = {name: functional.pad(lost[name] / sweep.images, (0, 1)) for name in chosen}
    return finite({"direction": found})["direction"]


@parallel.first_decides
@torch.no_grad()
def loss(model, batches):
    """Mean cross-entropy over all images of batches, in eval mode. Raises ValueError for no batches."""
    total = images = 0
    with Sweep(model):
        for x, y in batches:
            total += functional.cross_entropy(model(x), y, reduction="sum").item()
            images += len(x)
    if not images:
        raise ValueError(NO_BATCHES)
    return total / images


def check_calibration(model, calibration, held_out, *, share=0.5):
    """The two losses (on calibration, on held_out), with a UserWarning if the first is below share of the second.

    calibration, held_out: batches, the second of images that the model was not trained on (val, never test). On
    images that a model fits, true-label gradients vanish and a few outliers rule the scores.
    """
    seen, unseen = loss(model, calibration), loss(model, held_out)
    if seen < share * unseen:
        warnings.warn(
            f"the model fits its calibration images: loss {seen:.3g} on them, {unseen:.3g} on held-out ones. A few "
            'outliers rule scores by true-label gradients: consider labels="model" or augmented images',
            stacklevel=2,
        )
    return seen, unseen


class Sweep:
    """Passes over batches with statistics taken by hooks, on a model that is put back as it was at the end.

    Nothing gets a gradient but what on_gradient and on_gate ask for, and without these no graph is built. What is
    asked for twice is taken once: what add receives is shared and not to be changed. size: images of the batch at
    hand. images, batches: how many were seen. at_end: called after each batch.
    """

    def __init__(self, model):
        self.model, self.handles, self.size, self.images, self.batches = model, [], 0, 0, 0
        self.adds, self.backward, self.at_end = {}, False, []

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
        """Have add(g) called with the gradient of each batch's mean loss, wide."""

        def take(parameter):
            gradient, parameter.grad = wide(parameter.grad) / self.size, None
            self.tell(parameter, gradient)

        if self.is_first(parameter, add):
            self.backward = True
            parameter.requires_grad_(True)
            self.handles.append(parameter.register_post_accumulate_grad_hook(take))

    def on_gate(self, layer, add, *, output=False):
        """Have add(d) called for each batch with d [B, channels] = dL_b/dz: gradients of image b's loss by a
        gate on each channel of the layer's input (or output), sums over positions of value * gradient."""
        place = "gate", layer, output

        def watch(x):
            if not x.requires_grad:  # the first gate of all: the graph starts here, what is before is free
                x.requires_grad_()
            value = x.detach()  # not x itself: a tensor whose hook holds it is a cycle and stays in memory

            def take(gradient):
                product = channels_last(wide(value) * wide(gradient), layer)
                # Images are outermost in Swin's [B * windows, tokens, C], so windows fold into positions.
                self.tell(place, product.reshape(self.size, -1, product.shape[-1]).sum(1))

            x.register_hook(take)

        if self.is_first(place, add):
            self.backward = True
            self.hook(layer, watch, output=output)

    def on_value(self, layer, add, *, output=False):
        """Have add(x) called for each batch with the layer's input (or output), [tokens, channels] and wide."""
        place = "value", layer, output
        if self.is_first(place, add):
            self.hook(
                layer,
                lambda x: self.tell(place, channels_last(wide(x.detach()), layer).flatten(0, -2)),
                output=output,
            )

    def on_output_gradient(self, layer, add):
        """Have add(g) called for each batch with the gradients of each image's loss by the layer's output,
        [tokens, channels] and wide."""
        place = "gradient", layer

        def watch(y):
            if not y.requires_grad:
                y.requires_grad_()
            y.register_hook(lambda gradient: self.tell(place, channels_last(wide(gradient), layer).flatten(0, -2)))

        if self.is_first(place, add):
            self.backward = True
            self.hook(layer, watch, output=True)

    def is_first(self, place, add):
        """Put add on the list of those who are told about a place; whether the list is new."""
        self.adds.setdefault(place, []).append(add)
        return len(self.adds[place]) == 1

    def tell(self, place, value):
        for add in self.adds[place]:
            add(value)

    def hook(self, layer, call, *, output=False):
        """Have call(x) called with the input (or output) of each forward pass of a layer."""
        if output:
            handle = layer.register_forward_hook(lambda _, arguments, result: call(result))
        else:
            handle = layer.register_forward_pre_hook(lambda _, arguments: call(arguments[0]))
        self.handles.append(handle)

    def run(self, batches, *, labels="true", seed=0):
        """One forward pass per batch and, if gradients are asked for, the backward pass of the sum of its losses:
        dL_b/dz is image b's own."""
        known([labels], ("true", "model"), "kind of labels")
        with torch.set_grad_enabled(self.backward):
            for x, y in batches or ():
                self.size = len(x)
                logits = self.model(x)
                if self.backward:
                    self.total_loss(logits, y, labels=labels, seed=seed).backward()
                for end in self.at_end:
                    end()
                self.images += self.size
                self.batches += 1
        if not self.batches:
            raise ValueError(NO_BATCHES)

    def total_loss(self, logits, y, *, labels, seed):
        """Sum of the losses of one batch; ValueError if it is not finite."""
        if labels == "model":
            generator = torch.Generator(logits.device).manual_seed(seed + self.batches)
            y = wide(logits.detach()).softmax(-1).multinomial(1, generator=generator)[:, 0]
        total = functional.cross_entropy(logits, y, reduction="sum")
        if not total.isfinite():
            raise ValueError(
                f"the loss of calibration batch {self.batches} is {total.item()}: look for NaN in "
                "the weights and images, or for an overflow in low precision"
            )
        return total


class Gates:
    """Sums over images of |dL/dz| and (dL/dz)^2 for the units of each key. shapes: {key: (units,)}."""

    def __init__(self, model, shapes):
        self.absolute, self.square, self.parts = zeros(model, shapes), zeros(model, shapes), {}

    def add(self, key, gradient):
        """gradient: [B, channels]; channels of one unit (a head's dimensions) lie together and add up."""
        gradient = gradient.unflatten(1, (len(self.absolute[key]), -1)).sum(-1)  # [B, units]
        self.absolute[key] += gradient.abs().sum(0)
        self.square[key] += gradient.square().sum(0)

    def collect(self, key, channels, gradient):
        """The first channels (None: all) of what one of several places has of the same gate, until `finish`."""
        part = gradient[:, :channels]
        self.parts[key] = self.parts[key] + part if key in self.parts else part

    def finish(self):
        """Add what was collected of one batch: the places of a gate are summed first, with their signs."""
        for key, gradient in self.parts.items():
            self.add(key, gradient)
        self.parts = {}


class Moments:
    """Mean and variance of channels over all tokens of all batches, merged by Chan et al. (1979)."""

    def __init__(self):
        self.tokens, self.mean, self.variance = {}, {}, {}

    def add(self, key, x):
        """x: [tokens, channels]."""
        variance, mean = torch.var_mean(x, 0, correction=0)
        before = self.tokens.get(key, 0)
        self.tokens[key] = before + len(x)
        share = len(x) / self.tokens[key]
        difference = mean - self.mean.get(key, mean)
        self.mean[key] = self.mean.get(key, mean) + share * difference
        within = torch.lerp(self.variance.get(key, variance), variance, share)
        self.variance[key] = within + share * (1 - share) * difference.square()

    def norm(self, key):
        """L2 norm of each channel over all tokens."""
        return (self.tokens[key] * (self.variance[key] + self.mean[key].square())).sqrt()


class Grams:
    """Sums over tokens of x x^T in float64, with a constant 1 appended to x if affine."""

    def __init__(self, affine=False):
        self.affine, self.tokens, self.totals = affine, {}, {}

    def add(self, key, x):
        """x: [tokens, channels]."""
        x = functional.pad(x, (0, 1), value=1) if self.affine else x
        self.tokens[key] = self.tokens.get(key, 0) + len(x)
        self.totals[key] = self.totals.get(key, 0) + (x.T @ x).double()

    def mean(self, key):
        return self.totals[key] / self.tokens[key]


@dataclass(frozen=True)
class Place:
    """Where the units of one key are seen: gates on all of these (module, output or input), of which the first
    channels (None: all) are the units', in order; signal: the one whose variance counts."""

    units: int
    gates: tuple
    signal: tuple
    channels: int | None = None


# What is added up over batches from each batch's gradient g of size images, and for which criteria.
GRADIENT_SUMS = {
    "absolute": ({"gradient", "taylor"}, lambda total, g, size: total.add_(g.abs())),
    "square": ({"fisher"}, lambda total, g, size: total.addcmul_(g, g)),
    "scaled": ({"obd"}, lambda total, g, size: total.addcmul_(g, g, value=size)),
    "signed": ({"snip"}, lambda total, g, size: total.add_(g)),
}


def plan_weights(sweep, criteria, names, *, grams, damping, seed):
    """Parameter names, and for each criterion the function from a name to its score after the sweep."""
    chosen = own_parameters(sweep.model, names)
    shapes = {name: parameter.shape for name, parameter in chosen.items()}
    sums = {k: zeros(sweep.model, shapes) for k, (serves, _) in GRADIENT_SUMS.items() if serves & {*criteria}}

    def add(name, gradient):
        for kind, totals in sums.items():
            GRADIENT_SUMS[kind][1](totals[name], gradient, sweep.size)

    for name, parameter in chosen.items() if sums else ():
        sweep.on_gradient(parameter, partial(add, name))

    def mean(kind, name):
        return sums[kind][name] / sweep.batches

    def size(name):
        return wide(chosen[name].detach()).abs()

    @cache
    def total():
        return sum((mean("signed", name).abs() * size(name)).sum(dtype=torch.float64) for name in chosen)

    return chosen, plan_inputs(sweep, criteria, chosen, grams=grams, damping=damping) | {
        "random": random_scores(sweep.model, shapes, seed),
        "magnitude": size,
        "gradient": lambda name: mean("absolute", name),
        "taylor": lambda name: mean("absolute", name) * size(name),
        "fisher": lambda name: mean("square", name) * size(name).square(),
        "obd": lambda name: mean("scaled", name) * size(name).square() / 2,
        "snip": lambda name: mean("signed", name).abs() * size(name) / total().clamp_min(1e-37).item(),
    }


def plan_inputs(sweep, criteria, parameters, *, grams, damping):
    """The part of plan_weights for criteria that look at the inputs of linear layers."""
    inputs, seen = Moments(), Grams()
    linears = own_linears(sweep.model, parameters) if {"wanda", "obs"} & {*criteria} else {}
    for name, (layer_name, layer) in linears.items():
        if "wanda" in criteria:
            sweep.on_value(layer, partial(inputs.add, name))
        if "obs" in criteria and grams is None:
            sweep.on_value(layer, partial(seen.add, name))
        elif "obs" in criteria:
            shape = [layer.in_features] * 2
            if layer_name not in grams or list(grams[layer_name].shape) != shape:
                hint = "." if layer_name in grams else models.nearest(layer_name, grams)
                raise ValueError(f"obs needs a gram {shape} of {layer_name!r}{hint} scores.grams makes one")

    def obs(name):
        gram = seen.mean(name) if grams is None else grams[linears[name][0]]
        weight = wide(parameters[name].detach())
        diagonal = inverse_diagonal(gram.to(weight.device), damping=damping, name=name)
        return weight.square() / (2 * diagonal).to(weight.dtype)

    return {"wanda": lambda name: wide(parameters[name].detach()).abs() * inputs.norm(name), "obs": obs}


def plan_rows(sweep, criteria, names, *, seed):
    """Layer names, and for each criterion the function from a name to its score after the sweep."""
    chosen = own_layers(sweep.model, names)
    shapes = {name: (len(layer.weight),) for name, layer in chosen.items()}
    gates, gradients, outputs = Gates(sweep.model, shapes), zeros(sweep.model, shapes), Moments()
    for name, layer in chosen.items():
        if {"taylor", "michel", "fisher"} & {*criteria}:
            sweep.on_gate(layer, partial(gates.add, name), output=True)
        if "variance" in criteria:
            sweep.on_value(layer, partial(outputs.add, name), output=True)
        if "gradient" in criteria:
            own = dict(layer.named_parameters(recurse=False))
            if "weight" not in own:
                raise ValueError(f"the rows of {name} have no weights of their own: use taylor or fisher")
            size = sum(parameter[0].numel() for parameter in own.values())
            for parameter in own.values():
                sweep.on_gradient(parameter, partial(add_rows, gradients[name], size))
    return chosen, {
        "random": random_scores(sweep.model, shapes, seed),
        "magnitude": lambda name: row_squares(chosen[name]).sqrt(),
        "gradient": lambda name: gradients[name] / sweep.batches,
        "taylor": lambda name: gates.absolute[name] / sweep.images,
        "michel": lambda name: functional.normalize(gates.absolute[name], dim=0),
        "fisher": lambda name: gates.square[name] / sweep.images / 2,
        "variance": lambda name: outputs.variance[name],
    }


def plan_units(sweep, criteria, kinds, *, seed):
    """Keys of units, and for each criterion the function from a key to its score after the sweep."""
    kinds = known(kinds, KINDS, "kind of unit")
    for kind in {"width", "filters", "block"} & {*kinds} if "magnitude" in criteria else ():
        raise ValueError(f'{kind} has no "magnitude" that compares with other units\': use taylor or fisher')
    view = models.view(sweep.model)
    places = unit_places(view, kinds)
    shapes = {key: (place.units,) for key, place in places.items()}
    gates, outputs = Gates(sweep.model, shapes), Moments()
    sweep.at_end.append(gates.finish)
    for key, place in places.items():
        if {"taylor", "michel", "fisher"} & {*criteria}:
            for layer, output in place.gates:
                sweep.on_gate(layer, partial(gates.collect, key, place.channels), output=output)
        if "variance" in criteria:
            layer, output = place.signal
            sweep.on_value(layer, partial(outputs.add, key), output=output)

    def variance(key):
        return outputs.variance[key][: places[key].channels].unflatten(0, (places[key].units, -1)).sum(1)

    return places, {
        "random": random_scores(sweep.model, shapes, seed),
        "magnitude": lambda key: unit_squares(view.block(key[0]), key[1]).sqrt(),
        "taylor": lambda key: gates.absolute[key] / sweep.images,
        "michel": lambda key: functional.normalize(gates.absolute[key], dim=0),
        "fisher": lambda key: gates.square[key] / sweep.images / 2,
        "variance": variance,
    }


def unit_places(view, kinds):
    """{(block or stage name, kind): Place} of the units of these kinds that there are."""
    counts, places = view.units(kinds), {}
    for block in view.blocks:
        for kind in ("heads", "neurons", "qk", "v"):
            if (block.name, kind) in counts:
                places[block.name, kind] = block_place(block, kind, counts[block.name, kind])
        if (block.name, "block") in counts:
            writes = tuple((module, True) for module in view.writes(block))
            places[block.name, "block"] = Place(1, writes, writes[-1])
    for name, count in ((name, count) for (name, kind), count in counts.items() if kind == "filters"):
        end = models.norm_after(view.model, name) or name  # a filter goes with its channel of the batch norm
        gate = view.model.get_submodule(end), True
        places[name, "filters"] = Place(count, (gate,), gate)
    for number, stage in enumerate(view.stages) if "width" in kinds else ():
        blocks = [block for block in view.blocks if block.stage == number]
        if blocks:
            first, last = (view.model.get_submodule(blocks[i].name) for i in (0, -1))
            writes = [(module, True) for block in blocks for module in view.writes(block)]
            places[stage, "width"] = Place(counts[stage, "width"], ((first, False), *writes), (last, True))
    return places


def block_place(block, kind, count):
    """Place of the count units of one kind in one block; ValueError for qk where queries are normalised."""
    if kind == "qk":
        if block.normalises_queries:
            raise ValueError(
                f"{block.name} normalises queries and keys (qk_norm): their dimensions cannot go one by one; "
                'leave "qk" out of kinds'
            )
        gate = block.attn.qkv, True
        return Place(count, (gate,), gate, channels=count)
    gate = (block.mlp.fc2 if kind == "neurons" else block.attn.proj), False
    return Place(count, (gate,), gate)


def inverse_diagonal(gram, *, damping, name):
    """Diagonal of the inverse of gram [n, n] plus damping times the mean of its diagonal, float64 [n]."""
    gram = gram.double()
    shift = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + shift)
    if failed:
        raise ValueError(f"the gram of {name} has no inverse with damping {damping}: raise it, or give more batches")
    return torch.cholesky_inverse(factor).diagonal()


def channels_last(x, layer):
    """x with the channels of the layer's output as its last dimension; a convolution and its norm have them second."""
    return x.movedim(1, -1) if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) else x


def patches(x, conv):
    """What each filter of a convolution sees at each position, [positions, C * k * k], of x [B, C, H, W]."""
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(f"no patches of {conv}: supported are convolutions of one group, padded with zeros")
    shape = {"dilation": conv.dilation, "padding": conv.padding, "stride": conv.stride}
    return functional.unfold(x, conv.kernel_size, **shape).movedim(1, -1).flatten(0, 1)


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


def own_linears(model, names):
    """{parameter name: (layer name, nn.Linear)} of weights; ValueError for one that is of no linear layer."""
    found = {}
    for name in names:
        layer_name, _, last = name.rpartition(".")
        layer = model.get_submodule(layer_name)
        if last != "weight" or not isinstance(layer, nn.Linear):
            raise ValueError(f"wanda and obs are for weights of linear layers, {name} is none: name the parameters")
        found[name] = layer_name, layer
    return found


def add_rows(total, size, gradient):
    """Add to total [rows] each row's part in the mean of |gradient| over size weights and bias."""
    total += gradient.abs().view(len(total), -1).sum(1) / size


def row_squares(layer):
    """Sum of squares of each row's weights and bias, [rows]."""
    total = wide(layer.weight.detach()).flatten(1).square().sum(1)
    return total if layer.bias is None else total + wide(layer.bias.detach()).square()


def unit_squares(block, kind):
    """Sum of squares of all weights that go with each unit of a block, [units]."""
    first, second = (block.mlp.fc1, block.mlp.fc2) if kind == "neurons" else (block.attn.qkv, block.attn.proj)
    rows, columns = row_squares(first), wide(second.weight.detach()).square().sum(0)
    if kind == "neurons":
        return rows + columns
    queries = block.num_heads * block.qk_dim
    q, k, v = rows.split([queries, queries, len(columns)])
    if getattr(block.attn, "q_bias", None) is not None:  # SwinV2 keeps biases beside qkv, and keys have none
        q, v = (part + wide(bias.detach()).square() for part, bias in ((q, block.attn.q_bias), (v, block.attn.v_bias)))
    if kind == "heads":
        return sum(part.view(block.num_heads, -1).sum(1) for part in (q, k, v, columns))
    return q + k if kind == "qk" else v + columns


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
