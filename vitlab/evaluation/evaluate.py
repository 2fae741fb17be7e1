"""Evaluate models on a split of images, and compare two models image by image.

A split is a `data.Split`: images with labels. Rates are in percent, losses and divergences in nats.

Public: accuracy, autocast, compare, device_of, measure, precision_on.
"""

import math
from collections import ChainMap, namedtuple

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from torch.special import entr

from vitlab import parallel
from vitlab.evaluation import cost


def device_of(model):
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


def precision_on(device, precision="auto"):
    """Return the precision to compute in on a device, "bf16" or "float32".

    device: a torch.device or its name
    precision: "bf16", "float32", or "auto" for bf16 where the device gains from it, else float32
    Devices that gain from bf16 are GPUs with bf16 and CPUs with AVX512-bf16 or AMX.
    Raises ValueError for another word.
    """
    if precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"precision must be 'auto', 'bf16' or 'float32', got {precision!r}")
    if precision != "auto":
        return precision
    return "bf16" if _gains_from_bf16(torch.device(device)) else "float32"


def _gains_from_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return features.get("avx512_bf16") or features.get("amx_bf16")


def autocast(device, precision="auto"):
    """Return a context in which torch computes in mixed precision, or as usual for float32.

    device, precision: the arguments of `precision_on`
    """
    is_mixed = precision_on(device, precision) == "bf16"
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=is_mixed)


_Result = namedtuple(
    "Result", ["correct", "total", "top1", "top5", "mean_per_class", "loss", "ece", "per_class"]
)


def accuracy(model, images, *, batch_size=512, precision="float32"):
    """Measure how often a model is right over a split, and how sure it is of itself.

    model: runs on its own device, in eval mode; its mode is restored afterwards
    images: a data.Split
    batch_size: images in one forward pass
    precision: a word of `precision_on`

    Returns a named tuple of
        correct, total: how many images are predicted rightly, and how many there are
        top1, top5: share of images in percent with the label first, or among the first five
        mean_per_class: mean of per_class in percent, without classes that do not occur
        loss: mean cross entropy in nats
        ece: expected calibration error of 15 bins, a share in [0, 1]
        per_class: top-1 in percent of each class in their order; nan for one that does not occur
    Raises ValueError for an empty split, or logits that are not finite.
    """
    logits, labels = _logits(model, images, batch_size, precision)
    is_first = logits.argmax(1) == labels
    first_five = logits.topk(min(5, logits.shape[1])).indices
    is_in_five = (first_five == labels[:, None]).any(1)
    shares = torch.stack([is_first, is_in_five]).double().mean(1)
    percent = 100 * shares
    top1, top5 = percent.tolist()
    per_class = _top1_per_class(logits, labels)
    return _Result(
        correct=int(is_first.sum()),
        total=len(labels),
        top1=top1,
        top5=top5,
        mean_per_class=per_class.nanmean().item(),
        loss=cross_entropy(logits, labels).item(),
        ece=_expected_calibration_error(logits.softmax(1), labels),
        per_class=tuple(per_class.tolist()),
    )


def measure(model, images, *, folder=None):
    """Return accuracy and cost of a model as the columns of a results row.

    images: the data.Split to report on, at the model's own image size
    folder: the model's checkpoint, if it has one
    Returns a dict of all that `accuracy` gives but per_class, and all of cost.summary.
    """
    columns = accuracy(model, images)._asdict()
    del columns["per_class"]
    return columns | cost.summary(model, folder=folder)


def _expected_calibration_error(probabilities, labels, *, bins=15):
    """Return how far confidence is from accuracy on average, a share in [0, 1].

    It is 0 where a model is right as often as its confidence says. The confidence of a prediction
    is the probability of the predicted class. Predictions are sorted by it into equal bins
    (low, high] of [0, 1]. In each bin mean confidence and accuracy (both shares) have a distance.
    The error is the mean of the distances, weighted by how many predictions a bin holds
    (Guo et al. 2017, equation 3). It depends on the number of bins; 15 is the paper's.

    probabilities: float [N, classes], rows sum to 1
    labels: int64 [N]
    bins: number of bins
    Raises ValueError for no rows, for rows that do not match the labels, and for values that are
    no probabilities, such as logits.
    """
    if not len(labels) or len(probabilities) != len(labels):
        raise ValueError(
            f"need a row of probabilities for each label: {len(probabilities)} rows, "
            f"{len(labels)} labels"
        )
    one = probabilities.new_ones(())
    if probabilities.min() < 0 or not torch.allclose(probabilities.sum(1), one, atol=1e-3):
        raise ValueError(
            "probabilities are shares that sum to 1 in each row: give logits.softmax(1)"
        )
    confidence, predicted = probabilities.double().max(1)  # [N], [N]
    surplus = confidence - (predicted == labels).double()
    bin_of = (confidence * bins).ceil().long()
    bin_of = bin_of.clamp(1, bins) - 1
    # In a bin of n predictions, n times |mean confidence - accuracy| is |sum of the surplus|.
    sums = surplus.new_zeros(bins).index_add(0, bin_of, surplus)
    return (sums.abs().sum() / len(labels)).item()


_Changes = namedtuple("Changes", ["classes", "images"])


def compare(before, after, images, *, most=24, classes=None):
    """Find what changes from one model to another over a split, by one forward pass of each.

    before, after: models, each on its own device
    images: a data.Split
    most: how many images to name; a smaller split names all of its images
    classes: names of the classes in the order of the labels; None gives their numbers instead

    Returns an object with two frames. `classes` has a row for each class, in their order:
        class: name or number
        images: how many images it has
        before, after: top-1 in percent of each model, nan for a class without images
        change: percentage points, negative where the class was forgotten
    `images` has a row for each image whose predicted distribution moved most, the furthest first.
    Images that moved equally far keep their order.
        image: place in the split
        label: true class
        before, after: predicted classes
        p_before, p_after: probability of the true class, in [0, 1]
        divergence: Jensen-Shannon divergence in nats of the two distributions over the classes
            (Lin 1991), from 0 for equal ones to ln 2 for those that share no class
    Raises ValueError for an empty split, logits that are not finite, models or names of different
    numbers of classes, and most below 1.
    """
    if most < 1:
        raise ValueError(f"most is how many images to name, at least 1; got {most}")
    first, labels = _logits(before, images)
    second, _ = _logits(after, images)
    counts = [first.shape[1], second.shape[1]]
    names = np.asarray(range(counts[0]) if classes is None else classes)
    if set(counts) != {len(names)}:
        raise ValueError(f"cannot compare models of {counts} classes by {len(names)} names")
    labels = labels.cpu()
    logits = {"before": first.cpu(), "after": second.cpu()}
    table = pd.DataFrame({"class": names})
    table["images"] = np.bincount(labels, minlength=len(names))
    places = torch.arange(len(labels))
    moved = pd.DataFrame({"image": places.numpy()})
    moved["label"] = names[labels]
    for when in logits:
        table[when] = _top1_per_class(logits[when], labels).numpy()
        moved[when] = names[logits[when].argmax(1)]
    table["change"] = table.after - table.before
    p = {when: logits[when].double().softmax(1) for when in logits}
    for when in p:
        moved[f"p_{when}"] = p[when][places, labels].numpy()
    moved["divergence"] = _jensen_shannon(p["before"], p["after"]).numpy()
    moved = moved.sort_values(
        "divergence",
        ascending=False,
        kind="stable",  # images that moved equally far keep their order
        ignore_index=True,
    )
    return _Changes(table, moved.head(most))


def _jensen_shannon(p, q):
    """Return the divergence in nats, [N] in [0, ln 2], of distributions p and q [N, classes]."""
    entropy_of_mean = entr((p + q) / 2)
    mean_of_entropies = (entr(p) + entr(q)) / 2
    divergence = entropy_of_mean - mean_of_entropies  # [N, classes]
    return divergence.sum(1).clamp(0, math.log(2))


def _top1_per_class(logits, labels):
    """Return top-1 in percent, float64 [classes]; nan for a class that does not occur."""
    classes = logits.shape[1]
    right = labels[logits.argmax(1) == labels]
    right_counts = torch.bincount(right, minlength=classes)
    counts = torch.bincount(labels, minlength=classes)
    return 100 * right_counts / counts.double()


@torch.inference_mode()
def _logits(model, images, batch_size=512, precision="float32"):
    """Return logits, float32 [N, classes], and labels [N] of a split on the model's device.

    Several processes share out the batches, and each process gets all logits.
    """
    if not len(images):
        raise ValueError("cannot evaluate on an empty split")
    was_training, device = model.training, device_of(model)
    model.eval()
    logits_by_batch, labels = {}, []
    with autocast(device, precision):
        for i, (x, y) in enumerate(images.batches(batch_size, device=device)):
            labels.append(y)
            if i % parallel.world_size() == parallel.rank():
                logits_by_batch[i] = model(x).float()
    model.train(was_training)
    logits_by_batch = ChainMap(*parallel.gather(logits_by_batch))
    in_order = [logits_by_batch[i] for i in sorted(logits_by_batch)]
    logits = torch.cat(in_order).to(device)
    if not logits.isfinite().all():
        raise ValueError(
            "the model's logits are not finite: it has diverged, or was cut or loaded wrongly"
        )
    return logits, torch.cat(labels)
