"""Collect values and gradients of layers in one pass over batches.

Public: Grams, LABELS, Moments, NO_BATCHES, Positions, Sweep, channels_last, check_images,
cross_entropy, fitting_gram, gram, layer_inputs, outputs, patches, positions_of, wide, zeros.
"""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from vitlab import files, names
from vitlab.evaluation import evaluate
from vitlab.models import anatomy
from vitlab.pruning import lowrank

LABELS = ("true", "model", "none")  # what the loss of calibration images is taken by
_BLOCK = 256  # rows of a gram that are computed together
NO_BATCHES = "no batches: give a list of (x, y); a generator is empty after its first use"


class Sweep(ExitStack):
    """Run a model over batches while hooks take statistics, and leave the model as it was.

    Use it in a with statement: ask for statistics by the on_... methods, then call `run`. Each
    statistic goes to its add(tensor), batch by batch. What add receives may share memory with the
    model's own values and must not be changed.
    """

    hooked = False  # whether a statistic needs its inputs
    # Whether one of them needs gradients. Without these no graph is built. Parameters and gates get
    # gradients only where on_gradient, on_gate or on_output_gradient asks for them.
    backward = False
    size = 0  # images of the current batch
    images = batches = 0  # how many have been run

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.watched = set()  # ids of the layers and parameters that statistics are of

    def __enter__(self):
        # ExitStack calls these at the end, the last one first.
        for module in self.model.modules():
            self.callback(setattr, module, "training", module.training)
        for parameter in self.model.parameters():
            self.callback(setattr, parameter, "grad", parameter.grad)
            self.callback(parameter.requires_grad_, parameter.requires_grad)
        self.model.eval().requires_grad_(False)
        self.model.zero_grad()  # sets gradients to None: those from before are not added to
        return self

    def on_gradient(self, parameter, add):
        """Call add(g) with the gradient of each batch's mean loss by a parameter, wide."""

        # `run` differentiates the sum of the losses of a batch.
        def take(gradient):
            add(wide(gradient) / self.size)

        # Freed at once, so that no second set of gradients is ever stored.
        def free(parameter):
            parameter.grad = None

        self.hooked = self.backward = True
        self.watched.add(id(parameter))
        parameter.requires_grad_()
        self.callback(parameter.register_hook(take).remove)
        self.callback(parameter.register_post_accumulate_grad_hook(free).remove)

    def on_gate(self, places, add):
        """Call add(d) for each batch with d [B, channels], the gradients by gates on channels.

        places: [(layer, whether its output is meant)] that the gates are on.
        """
        # Each channel has one gate on all places together: d is summed over them, with signs.
        parts = []  # what the places of the current batch gave so far

        def watch(layer, x):
            x.requires_grad_()  # the graph starts at the first gate; what comes before it is free
            value = x.detach()  # a tensor whose hook held x itself would be a cycle in memory

            def take(gradient):
                # d[b] = dL_b/dz is the gradient of image b's loss by a gate z: the sum over
                # positions of value * gradient.
                product = channels_last(wide(value) * wide(gradient), layer)
                # Images are outermost in Swin's [B * windows, tokens, C]: windows become positions.
                per_image = product.reshape(self.size, -1, product.shape[-1])
                parts.append(per_image.sum(1))
                if len(parts) == len(places):
                    add(sum(parts))
                    parts.clear()

            x.register_hook(take)

        self.backward = True
        for layer, output in places:
            self.hook(layer, partial(watch, layer), output=output)

    def on_value(self, layer, add, *, output=False):
        """Call add(x) for each batch with a layer's input (or output), [tokens, channels], wide."""
        # Inputs of a convolution come as patches, [positions, C * k * k].
        flat = outputs if output else layer_inputs
        self.hook(layer, lambda x: add(flat(x, layer)), output=output)

    def on_output_gradient(self, layer, add):
        """Call add(g) for each batch with g [tokens, channels], wide, gradients by an output."""

        # They are the gradients of each image's own loss by the layer's output.
        def watch(x):
            x.requires_grad_()
            x.register_hook(lambda gradient: add(outputs(gradient, layer)))

        self.backward = True
        self.hook(layer, watch, output=True)

    def hook(self, layer, call, *, output=False):
        """Call call(x) with the layer's input (or output) in each forward pass."""
        self.hooked = True
        self.watched.add(id(layer))
        if output:
            handle = layer.register_forward_hook(lambda _, inputs, result: call(result))
        else:
            handle = layer.register_forward_pre_hook(lambda _, inputs: call(inputs[0]))
        self.callback(handle.remove)

    def run(self, batches, *, labels="true", seed=0):
        """Run one forward pass per batch and, if a statistic needs it, one backward pass.

        batches: (x [B, 3, H, W], y int64 [B]) to iterate over.
        labels: a word of LABELS: "true" for y, "model" for labels drawn from the model's own
            prediction, or "none" for a loss of the features, without labels and classifier.
        seed: of these draws.

        Raises ValueError for no batches, for labels that the model lacks or of another kind, for a
        statistic of the classifier without labels, for images that are normalised otherwise than
        the model expects, and for a loss that is not finite.
        """
        names.check("kind of labels", labels, LABELS)
        if labels == "none" and self.backward:
            self._check_before_classifier()
        with torch.set_grad_enabled(self.backward):
            for x, y in files.progress(batches or (), "measuring"):
                check_images(self.model, y)
                self.size = len(x)
                if self.backward:
                    # The sum, not the mean: dL_b/dz is then image b's own.
                    total = self._loss(x, y, labels, seed + self.batches)
                    if not total.isfinite():
                        raise ValueError(
                            f"the loss of calibration batch {self.batches} is {total.item()}: look "
                            "for NaN in the weights and images, or for an overflow in low precision"
                        )
                    total.backward()
                else:
                    self.model(x)
                self.images += self.size
                self.batches += 1
        if not self.batches:
            raise ValueError(NO_BATCHES)

    def _check_before_classifier(self):
        """Raise ValueError if a statistic is of the classifier, which features do not pass."""
        for name in anatomy.classifier_names(self.model):
            layer = self.model.get_submodule(name)
            if self.watched & {id(part) for part in (layer, *layer.parameters())}:
                raise ValueError(
                    f'labels="none" is a loss of what {name} reads, and says nothing about it: '
                    "leave it out, or take other labels"
                )

    def _loss(self, x, y, labels, seed):
        """Return the sum of a batch's losses by these labels, of which seed draws."""
        generator = torch.Generator(x.device).manual_seed(seed)
        if labels == "none":
            return _probed(self.model, x, generator)
        logits = self.model(x)
        if labels == "model":
            _check_classifier(self.model)
            drawn = wide(logits).softmax(-1).multinomial(1, generator=generator)[:, 0]
            drawn.origin = getattr(y, "origin", drawn)
            y = drawn
        return cross_entropy(self.model, logits, y)


def _probed(model, x, generator):
    """Return the sum over images of <r, f / |f|>, of their features f and random r ~ N(0, I)."""
    # Half the squared change of f / |f| is zero at the model itself, and so is its gradient. Its
    # second derivatives there are the Gauss-Newton matrix J^T J, with J the Jacobian of f / |f|.
    # The gradient of <r, f / |f|> is J^T r, and the mean of J^T r r^T J over r is J^T J. So squares
    # of these gradients estimate the matrix without bias, from one drawn r for each image, as those
    # of the cross-entropy with labels drawn from the model do with its own.
    features = anatomy.features(model, x)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    units = functional.normalize(features, dim=1)
    like = {"dtype": units.dtype, "device": units.device}
    return (torch.randn(units.shape, generator=generator, **like) * units).sum()


def check_images(model, y):
    """Raise ValueError for a batch that is normalised otherwise than a model's weights expect.

    y: its labels, of data.Split; of batches from elsewhere nothing is known.
    """
    if split := getattr(y, "origin", None):
        evaluate.check_normalised(model, split)


def cross_entropy(model, logits, y):
    """Return the sum of a batch's losses.

    Raises ValueError for labels that the model lacks, and for a model without classifier.
    """
    _check_classifier(model)
    # On a GPU torch would end the process.
    anatomy.check_classes(model, getattr(y, "origin", y), logits.shape[1])
    return functional.cross_entropy(logits, y, reduction="sum")


def _check_classifier(model):
    """Raise ValueError for a model that answers with features, which are no logits."""
    if getattr(model, "num_classes", None) == 0:
        raise ValueError(
            "the model has no classifier, so there is no cross-entropy: "
            'take labels="none", a loss of its features'
        )


class Moments:
    """Merge mean and variance of channels over the tokens of all batches."""

    # By the formula of Chan et al. (1979), so that a large mean costs no precision: the sums of x
    # and x^2 would lose the variance between two large numbers.
    def __init__(self):
        self.tokens = defaultdict(int)  # {key: how many}
        self.mean = {}  # {key: [channels]}
        self.variance = {}  # {key: [channels]}

    def add(self, key, x):
        """Add the values of one batch, x [tokens, channels]."""
        variance, mean = torch.var_mean(x, 0, correction=0)
        self.tokens[key] += len(x)
        share = len(x) / self.tokens[key]
        before = self.mean.get(key, mean)
        difference = mean - before
        self.mean[key] = before + share * difference
        # The variance of the whole: within the two parts, and between their means.
        within = torch.lerp(self.variance.get(key, variance), variance, share)
        between = share * (1 - share) * difference.square()
        self.variance[key] = within + between

    def norm(self, key):
        """Return the L2 norm of each channel over all tokens."""
        square = self.variance[key] + self.mean[key].square()
        return (self.tokens[key] * square).sqrt()


class Positions:
    """Choose at which positions of images a layer is looked at, and how much each counts.

    most: how many of an image, on average; None: all.
    weights: [positions], how much each counts; None: all alike.
    prefix: so many tokens before the patches are always looked at, if there are weights.
    """

    def __init__(self, most=None, weights=None, prefix=0):
        self.most = most
        self.weights = weights
        self.prefix = 0 if weights is None else prefix
        if weights is not None and most and most < len(weights):
            patches = len(weights) - prefix
            seen = most - prefix
            if seen < 1:
                raise ValueError(f"tokens={most} leaves no patch beside {prefix} other tokens")
            self.weights = weights.double().clone()  # the caller's stay as they are
            self.weights[prefix:] *= patches / seen  # each stands for those not looked at
            self.weights *= most / len(weights)  # the mean over those seen is 1 again

    def __call__(self, x, number, images):
        """Return [tokens, channels] of x at the positions, which are all of its first dimension.

        number: of the batch. All that has as many positions is looked at at the same ones.
        images: how many x is of.
        """
        if not self.most or len(x) <= images * self.most:
            return x
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(x), generator=generator)
        if self.prefix:
            is_first = order % (len(x) // images) < self.prefix
            order = torch.cat([order[is_first], order[~is_first]])
        return x[order[: images * self.most].to(x.device)]

    def weights_of(self, x, number, images):
        """Return how much each of the positions counts, [tokens, 1]; x: as they were chosen."""
        if self.weights is None:
            return x.new_ones(len(x), 1)
        return self(self.weights.to(x).repeat(images)[:, None], number, images)


def positions_of(model, layers, tokens, weights):
    """Return {layer: Positions} of so many tokens and of {layer: [positions]}, or None, weights."""
    prefix = getattr(model, "num_prefix_tokens", 0)
    return {name: Positions(tokens, (weights or {}).get(name), prefix) for name in layers}


class Grams:
    """Add up x x^T over the tokens of all batches; affine appends a constant 1 to x.

    positions: {key: Positions}; of others all count alike.
    """

    def __init__(self, affine=False, positions=None):
        self.affine = affine
        self.positions = defaultdict(Positions, positions or {})
        self.tokens = defaultdict(int)  # {key: how many, or the sum of their weights}
        self.totals = defaultdict(int)  # {key: sum [channels, channels]}

    def add(self, key, x, number=0, images=1):
        """Add the values of a batch of so many images and of this number, x [tokens, channels]."""
        positions = self.positions[key]
        x = positions(x, number, images)
        if self.affine:
            x = functional.pad(x, (0, 1), value=1)
        weights = positions.weights_of(x, number, images)
        self.tokens[key] += weights.sum().item()
        weighted = x if positions.weights is None else weights * x
        # Products are taken in the inputs' precision, at least float32, and added up in float64.
        self.totals[key] += gram(weighted, x).double()

    def mean(self, key):
        """Return the sum divided by the number of tokens."""
        return self.totals[key] / self.tokens[key]


def gram(weighted, x):
    """Return weighted^T x [n, n], symmetric, as weighted is x [positions, n] times weights."""
    n = x.shape[1]
    product = x.new_empty(n, n)
    # Only blocks that reach the diagonal or lie right of it are computed, little more than half.
    for start in range(0, n, _BLOCK):
        rows = slice(start, start + _BLOCK)
        product[rows, start:] = weighted[:, rows].T @ x[:, start:]
    return product.triu() + product.triu(1).T


def channels_last(x, layer):
    """Return a layer's input or output with its channels as the last dimension."""
    # A convolution and its batch norm have them second.
    return x.movedim(1, -1) if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) else x


def outputs(x, layer=None):
    """Return a layer's output, or gradients by it, as [tokens, channels], wide."""
    return channels_last(wide(x), layer).flatten(0, -2)


def layer_inputs(x, layer):
    """Return a layer's input as its matrix weight.flatten(1) meets it, [tokens, n], wide."""
    x = wide(x)
    return patches(x, layer) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2)


def patches(x, conv):
    """Return what each filter of a convolution sees at each position, [positions, C * k * k].

    x: [B, C, H, W]. conv: a convolution of one group, padded with zeros.

    Raises ValueError for another convolution.
    """
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"no patches of {conv}: supported are convolutions of one group, padded with zeros"
        )
    columns = functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return columns.movedim(1, -1).flatten(0, 1)


def wide(x):
    """Return x without its graph, in float32 or in its own precision if that is higher."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def zeros(model, shapes):
    """Return {key: zeros to add up in}, on the model's device, in float32 or better.

    shapes: {key: shape}.
    """
    # A sum in bfloat16 would stop growing at 256 equal terms.
    like = wide(next(model.parameters()))
    return {key: like.new_zeros(shape) for key, shape in shapes.items()}


def fitting_gram(grams, name, n, damping, *, partial=False):
    """Return the damped gram [n, n] of a layer with n inputs, or None without grams.

    partial: whether grams may lack the layer; None is then returned for it.
    Raises ValueError for a layer without gram and for a gram of another shape.
    """
    if grams is None or (partial and name not in grams):
        return None
    names.check("layer in grams (scores.grams makes them)", name, grams)
    shape = list(grams[name].shape)
    if shape != [n, n]:
        raise ValueError(
            f"gram of {name} is {shape}, not {[n, n]}: take scores.grams of the model as it is now"
        )
    return lowrank.damped(grams[name], damping)
