"""Evaluate models on a split of images, compare two of them, and probe features.

A split is a `data.Split`: images with labels. Rates are in percent, losses and divergences in nats.

Public: STRENGTHS, accuracy, autocast, check_normalised, compare, device_of, features,
gains_from_bf16, knn, linear_probe, measure, precision_on, top1.
"""

import math
from collections import ChainMap, namedtuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils import skip_init
from torch.special import entr

from vitlab import files, names, parallel
from vitlab.evaluation import cost
from vitlab.models import anatomy


def device_of(model):
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


def precision_on(device, precision="auto"):
    """Return the precision to compute in on a device, "bf16" or "float32".

    device: a torch.device or its name
    precision: "bf16", "float32", or "auto" for bf16 where the device gains from it, else float32
    Raises ValueError for another word.
    """
    names.check("precision", precision, ("auto", "bf16", "float32"))
    if precision != "auto":
        return precision
    return "bf16" if gains_from_bf16(torch.device(device)) else "float32"


def gains_from_bf16(device):
    """Return whether a torch.device computes faster in bf16 than in float32.

    Such are GPUs with bf16, and CPUs with AVX512-bf16 or AMX. Others imitate it, many times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.11
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def autocast(device, precision="auto"):
    """Return a context in which torch computes in mixed precision, or as usual for float32.

    device, precision: the arguments of `precision_on`
    """
    is_mixed = precision_on(device, precision) == "bf16"
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=is_mixed)


def check_normalised(model, images):
    """Refuse images that are normalised otherwise than a model's weights expect.

    model: its `normalise` is (mean, std), as models.create and train.fit leave it, or None
    images: a data.Split
    Raises ValueError that names both.
    """
    expected = getattr(model, "normalise", None)
    if expected and not np.allclose(expected, (images.mean, images.std), atol=1e-3):
        mean, std = np.round(expected, 3).tolist()
        both = (
            f"images normalised by mean {mean} and deviation {std}, and these are by "
            f"{np.round(images.mean, 3).tolist()} and {np.round(images.std, 3).tolist()}"
        )
        if getattr(model, "normalise_is_guess", False):
            raise ValueError(
                "the file of the model's weights does not say what they expect; timm's weights of "
                f"that name expect {both}: say how its images were normalised, by normalise= of "
                "data.load and of models.create, in a study by data.normalise or the model's own "
                "normalise"
            )
        raise ValueError(
            f"the model's weights expect {both}: load them with data.load(normalise=...) of the "
            "model's name or checkpoint folder, in a study with data.normalise: weights; or say "
            "that it is meant so, by models.create(normalise=...)"
        )


_Result = namedtuple("Result", "correct total top1 top5 mean_per_class loss ece per_class")


def accuracy(model, images, *, batch_size=128, precision="float32"):
    """Measure how often a model is right over a split, and how sure it is of itself.

    model: runs on its own device
    images: a data.Split
    batch_size: images in one forward pass; more can be slower where they leave the cache
    precision: a word of `precision_on`

    Returns a named tuple of
        correct, total: images that are predicted rightly, and all of them
        top1, top5, mean_per_class: in percent
        loss: mean cross entropy in nats
        ece: expected calibration error, a share in [0, 1]
        per_class: top-1 in percent of each class in their order; nan for one that does not occur
    Raises ValueError for an empty split, for other classes than the model's, and for logits that
    are not finite.
    """
    logits, labels = _logits(model, images, batch_size, precision)
    anatomy.check_classes(model, images, logits.shape[1])  # of a model that says no num_classes
    # Top-1 and top-5 are the shares of images with the label first, or among the first five.
    is_first = logits.argmax(1) == labels
    first_five = logits.topk(min(5, logits.shape[1])).indices
    is_in_five = (first_five == labels[:, None]).any(1)
    per_class = _top1_per_class(logits, labels)
    return _Result(
        correct=int(is_first.sum()),
        total=len(labels),
        top1=100 * is_first.double().mean().item(),
        top5=100 * is_in_five.double().mean().item(),
        # Classes that do not occur are nan, and left out of the mean.
        mean_per_class=per_class.nanmean().item(),
        loss=cross_entropy(logits, labels).item(),
        ece=_expected_calibration_error(logits.softmax(1), labels),
        per_class=tuple(per_class.tolist()),
    )


def measure(model, images):
    """Return accuracy and cost of a model as the columns of a result.

    model: the model, on its own device
    images: the data.Split to report on, at the model's own image size
    Returns a dict of all that `accuracy` gives but per_class, and all of cost.summary.
    Raises ValueError as `accuracy` does, and TypeError as `cost.breakdown` does.
    """
    columns = accuracy(model, images)._asdict()
    del columns["per_class"]
    return columns | cost.summary(model)


def _expected_calibration_error(probabilities, labels, *, bins=15):
    """Return how far confidence is from accuracy on average, a share in [0, 1].

    Guo et al. 2017, equation 3.

    probabilities: float [N, classes], rows sum to 1
    labels: int64 [N]
    bins: number of bins, on which the error depends; 15 is the paper's
    """
    # The confidence of a prediction is the probability of the predicted class. The error is 0 where
    # a model is right as often as its confidence says.
    confidence, predicted = probabilities.double().max(1)  # [N], [N]
    surplus = confidence - (predicted == labels).double()
    # Predictions are sorted by confidence into equal bins (low, high] of [0, 1].
    bin_of = (confidence * bins).ceil().long()
    bin_of = bin_of.clamp(1, bins) - 1
    # In each bin mean confidence and accuracy (both shares) have a distance. The error is the mean
    # of the distances, weighted by how many predictions a bin holds. In a bin of n predictions,
    # n times |mean confidence - accuracy| is |sum of the surplus|.
    sums = surplus.new_zeros(bins).index_add(0, bin_of, surplus)
    return (sums.abs().sum() / len(labels)).item()


_Changes = namedtuple("Changes", "classes images")


def compare(before, after, images, *, classes, most=24):
    """Find what changes from one model to another over a split, by one forward pass of each.

    before, after: models, each on its own device
    images: a data.Split
    classes: names of the classes in the order of the labels
    most: how many images to name; a smaller split names all of its images

    Returns an object with two frames. `classes` has a row for each class, in their order:
        class: name
        images: how many images it has
        before, after: top-1 in percent of each model, nan for a class without images
        change: percentage points
    `images` has a row for each image whose predicted distribution moved most, the furthest first.
        image: place in the split
        label: true class
        before, after: predicted classes
        p_before, p_after: probability of the true class, in [0, 1]
        divergence: Jensen-Shannon divergence in nats of the two distributions over the classes
    Raises ValueError for an empty split and for logits that are not finite. Models and names must
    have the same number of classes.
    """
    first, labels = _logits(before, images)
    second, _ = _logits(after, images)
    # Both models and the names must agree on the number of classes, or lines would mean different
    # things.
    counts = [first.shape[1], second.shape[1]]
    class_names = np.asarray(classes)
    if set(counts) != {len(class_names)}:
        raise ValueError(f"cannot compare models of {counts} classes by {len(class_names)} names")
    first, second, labels = first.cpu(), second.cpu(), labels.cpu()
    table = pd.DataFrame(
        {
            "class": class_names,
            "images": np.bincount(labels, minlength=len(class_names)),
            "before": _top1_per_class(first, labels),
            "after": _top1_per_class(second, labels),
        }
    )
    table["change"] = table.after - table.before  # negative where the class was forgotten
    p = first.double().softmax(1)
    q = second.double().softmax(1)
    divergence = _jensen_shannon(p, q)
    # A stable sort: images that moved equally far keep their order.
    # The furthest come first.
    moved = divergence.argsort(descending=True, stable=True)[:most]
    label = labels[moved]
    furthest = pd.DataFrame(
        {
            "image": moved,
            "label": class_names[label],
            "before": class_names[first[moved].argmax(1)],
            "after": class_names[second[moved].argmax(1)],
            "p_before": p[moved, label],
            "p_after": q[moved, label],
            "divergence": divergence[moved],
        }
    )
    return _Changes(table, furthest)


def _jensen_shannon(p, q):
    """Return the divergence in nats, [N], of distributions p and q [N, classes] (Lin 1991)."""
    # It is how much more uncertain the mean of both is than they are on average: from 0 for equal
    # ones to ln 2 for those that share no class. Rounding may leave it just outside.
    entropy_of_mean = entr((p + q) / 2)
    mean_of_entropies = (entr(p) + entr(q)) / 2
    divergence = entropy_of_mean - mean_of_entropies  # [N, classes]
    return divergence.sum(1).clamp(0, math.log(2))


def _top1_per_class(logits, labels):
    """Return top-1 in percent, float64 [classes]; nan for a class that does not occur."""
    classes = logits.shape[1]
    # Of each class: how many of its images are right, over how many there are. 0 / 0 is nan.
    right = labels[logits.argmax(1) == labels]
    right_counts = torch.bincount(right, minlength=classes)
    counts = torch.bincount(labels, minlength=classes)
    return 100 * right_counts / counts.double()


_Features = namedtuple("Features", "features labels")


def features(model, images, *, batch_size=128, precision="float32"):
    """Return what a model's classifier reads of a split, or would read if it had one.

    model: a ViT or Swin, on its own device
    images: a data.Split, whose classes need not be the model's
    batch_size, precision: as for `accuracy`

    Returns (features, labels): float32 [N, width of the last stage] before any normalisation, and
    int64 [N].
    Raises ValueError for an empty split and for features that are not finite.
    """
    return _Features(*_outputs(model, images, anatomy.features, batch_size, precision))


def top1(logits, labels):
    """Return how often the largest of the logits [N, classes] is at the label [N], in percent."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def knn(
    train_features,
    train_labels,
    test_features,
    test_labels,
    *,
    neighbours=(10, 20),
    temperature=0.07,
):
    """Classify images by the training images whose features are nearest, by cosine.

    Each of the k nearest votes for its class with weight exp(cosine / temperature).

    train_features, train_labels: of `features`, float [N, n] and int64 [N]
    test_features, test_labels: of other images, float [M, n] and int64 [M]
    neighbours: the numbers k, each at most N
    temperature: above 0; the lower, the more the nearest ones count

    Returns {k: top-1 in percent}.
    Raises ValueError for more neighbours than training images.
    Source: Wu et al. 2018, equation 13, with the values of DINO (Caron et al. 2021).
    """
    if max(neighbours) > len(train_features):
        raise ValueError(f"{max(neighbours)} neighbours among {len(train_features)} images")
    known = normalize(train_features, dim=1)
    classes = int(train_labels.max()) + 1
    votes = {k: [] for k in neighbours}
    for part in normalize(test_features, dim=1).split(1024):
        cosine, nearest = (part @ known.T).topk(max(neighbours))  # [part, k], the nearest first
        # Relative to the nearest one, which changes no vote and overflows at no temperature.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        labels = train_labels[nearest]
        for k, found in votes.items():
            empty = weights.new_zeros(len(part), classes)
            found.append(empty.scatter_add(1, labels[:, :k], weights[:, :k]))
    return {k: top1(torch.cat(found), test_labels) for k, found in votes.items()}


# From strong to weak: each fit starts from the last one.
STRENGTHS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
_Probe = namedtuple("Probe", "layer strength val_top1")


def linear_probe(
    train_features,
    train_labels,
    val_features,
    val_labels,
    *,
    strengths=STRENGTHS,
    classes=None,
):
    """Fit a linear classifier of features: multinomial logistic regression with a ridge.

    train_features, train_labels: of `features`, float [N, n] and int64 [N]
    val_features, val_labels: of the images by which the ridge is chosen
    strengths: of the ridge: half of its product with the squared norm of the weights is added to
        the mean cross-entropy. scikit-learn's C is 1 / (N strength). Weights are those of features
        with mean 0 and variance 1 over the training images.
    classes: how many there are; None for as many as the labels tell.

    Returns a named tuple of
        layer: nn.Linear from n features, as they are, to the classes
        strength: the one with the highest top-1 on val, of equal ones the first
        val_top1: that top-1 in percent
    """
    mean = train_features.mean(0)
    deviation = train_features.std(0)
    deviation = deviation.where(deviation > 0, 1)  # a feature that never varies says nothing
    standardised = (train_features - mean) / deviation
    classes = classes or 1 + int(max(train_labels.max(), val_labels.max()))
    # The weights of one strength are where the search for those of the next begins.
    weight = mean.new_zeros(classes, len(mean))
    bias = mean.new_zeros(classes)
    found = []
    for strength in files.progress(strengths, "fitting a probe"):
        _regress(standardised, train_labels, weight, bias, strength)
        # The same answers from features as they are.
        layer = skip_init(nn.Linear, len(mean), classes, device=mean.device)
        layer.to(mean.dtype).requires_grad_(False)
        layer.weight.copy_(weight / deviation)
        layer.bias.copy_(bias - layer.weight @ mean)
        found.append(_Probe(layer, strength, top1(layer(val_features), val_labels)))
    return max(found, key=lambda probe: probe.val_top1)


@torch.enable_grad()
def _regress(x, y, weight, bias, strength):
    """Move weight [classes, n] and bias [classes] to the regression of y [N] on x [N, n]."""
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    search = torch.optim.LBFGS(
        parameters, max_iter=200, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def loss():
        search.zero_grad()
        ridge = strength / 2 * weight.square().sum()
        total = cross_entropy(x @ weight.T + bias, y) + ridge
        total.backward()
        return total

    search.step(loss)
    for parameter in parameters:
        parameter.requires_grad_(False)


def _logits(model, images, batch_size=128, precision="float32"):
    """Return logits, float32 [N, classes], and labels [N] of a split on the model's device."""
    if len(images):
        anatomy.check_classes(model, images)
    return _outputs(model, images, lambda model, x: model(x), batch_size, precision)


@torch.no_grad()
def _outputs(model, images, call, batch_size, precision):
    """Return call(model, x), float32 [N, n], and labels [N] of a split on the model's device."""
    if not len(images):
        raise ValueError("cannot evaluate on an empty split")
    check_normalised(model, images)
    # The model runs in eval mode, and its mode is restored afterwards.
    was_training = model.training
    device = device_of(model)
    model.eval()
    outputs_by_batch = {}
    labels = []
    batches = images.batches(batch_size, device=device)
    count = math.ceil(len(images) / batch_size)
    with autocast(device, precision):
        for i, (x, y) in enumerate(files.progress(batches, "evaluating", total=count)):
            labels.append(y)
            # Several processes share out the batches.
            if i % parallel.world_size() == parallel.rank():
                outputs_by_batch[i] = call(model, x).float()
    model.train(was_training)
    # Each process gets all outputs, in the order of the batches.
    outputs_by_batch = ChainMap(*parallel.gather(outputs_by_batch))
    in_order = [outputs_by_batch[i] for i in sorted(outputs_by_batch)]
    outputs = torch.cat(in_order).to(device)
    if not outputs.isfinite().all():
        raise ValueError(
            "the model's outputs are not finite: it has diverged, or was cut or loaded wrongly"
        )
    return outputs, torch.cat(labels)
