"""Evaluation: how often a model is right, over a split, per class, with which loss and how sure it is of itself;
and what changed between two models."""

import functools
import math
import operator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from . import cost, models, parallel


def device_of(model):
    """Device of the model's first parameter."""
    return next(model.parameters()).device


def precision_on(device, precision="auto"):
    """ "bf16" or "float32", whichever precision means on device: "auto" is bf16 where the device gains from it (CUDA
    with bf16, CPUs with AVX512-bf16 or AMX), else float32. Raises ValueError for another word."""
    if precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"precision must be 'auto', 'bf16' or 'float32', got {precision!r}")
    device = torch.device(device)
    if precision == "auto":
        if device.type == "cuda":
            gains = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            able = torch.cpu.get_capabilities()
            gains = device.type == "cpu" and (able.get("avx512_bf16") or able.get("amx_bf16"))
        precision = "bf16" if gains else "float32"
    return precision


def autocast(device, precision="auto"):
    """Context for mixed precision. precision: as for `precision_on`."""
    mixed = precision_on(device, precision) == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16) if mixed else nullcontext()


@dataclass(frozen=True)
class Result:
    """Counts and rates over one split. top1, top5, mean_per_class in percent; loss is the mean cross entropy in nats;
    ece: expected calibration error of 15 bins, a share in [0, 1] (`expected_calibration_error`); per_class: top-1 in
    percent per class, in the order of the classes."""

    correct: int
    total: int
    top1: float
    top5: float
    mean_per_class: float
    loss: float
    ece: float
    per_class: tuple

    def columns(self):
        """The columns of a results row."""
        return {k: getattr(self, k) for k in ("correct", "total", "top1", "top5", "mean_per_class", "loss", "ece")}


def accuracy(model, images, *, batch_size=512, precision="float32"):
    """Result of model over a data.Split, on the model's own device, in eval mode (restored afterwards).

    Classes that do not occur in the split are left out of mean_per_class and are nan in per_class.
    Raises ValueError for an empty split or logits that are not finite.
    """
    logits, labels = _logits(model, images, batch_size, precision)
    right = logits.argmax(1) == labels
    top5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    per_class = _per_class(logits, labels)
    return Result(
        correct=int(right.sum()),
        total=len(labels),
        top1=100 * right.double().mean().item(),
        top5=100 * top5.double().mean().item(),
        mean_per_class=per_class.nanmean().item(),
        loss=cross_entropy(logits, labels).item(),
        ece=expected_calibration_error(logits.softmax(1), labels),
        per_class=tuple(per_class.tolist()),
    )


def measure(model, images, *, folder=None):
    """Accuracy and cost of model as the columns of a results row: Result.columns and cost.summary.

    images: the data.Split to report on, at the model's own image size. folder: the model's checkpoint, if it has one.
    """
    return accuracy(model, images).columns() | cost.summary(model, folder=folder)


def expected_calibration_error(probabilities, labels, *, bins=15):
    """How far confidence is from accuracy, on average: a share in [0, 1], 0 where a model is as often right as it says.

    Guo et al. 2017, equation 3: predictions are sorted by their confidence, the probability of the predicted class,
    into `bins` equal-width bins (low, high] of [0, 1], and the distances between mean confidence and accuracy (both
    shares) are averaged over the bins, weighted by how many predictions each holds. It depends on the number of bins;
    15 is the paper's.

    probabilities: float [N, classes], rows sum to 1. labels: int64 [N]. Raises ValueError for no rows, rows that do
    not match the labels, or values that are no probabilities (logits, for instance).
    """
    if not len(labels) or len(probabilities) != len(labels):
        raise ValueError(f"need a row of probabilities for each label: {len(probabilities)} rows, {len(labels)} labels")
    if probabilities.min() < 0 or not torch.allclose(probabilities.sum(1), probabilities.new_ones(()), atol=1e-3):
        raise ValueError("probabilities are shares that sum to 1 in each row: give logits.softmax(1)")
    confidence, predicted = probabilities.double().max(1)  # [N], [N]
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    surplus = confidence - (predicted == labels).double()
    return (torch.zeros(bins).to(surplus).index_add(0, place, surplus).abs().sum() / len(labels)).item()


@dataclass(frozen=True)
class Changes:
    """What changed between two models on the same images, as `compare` finds it: two frames, `classes` and `images`."""

    classes: pd.DataFrame
    images: pd.DataFrame


def compare(before, after, images, *, most=24, classes=None, batch_size=512, precision="float32"):
    """Changes from one model to another over a data.Split, in one forward pass of each, each on its own device.

    most: how many images to name, all of them where there are fewer. classes: names in the order of the labels; None
    gives their numbers instead.

    Changes.classes has a row per class, in their order: class, images (how many), before and after (top-1 in percent,
    nan for a class without images) and change (percentage points, negative where it was forgotten).
    Changes.images has a row for each of the images whose predicted distribution moved most, the furthest first: image
    (its place in the split), label, before and after (predicted classes), p_before and p_after (probability of the
    true class, in [0, 1]) and divergence: Jensen-Shannon divergence (Lin 1991) of both distributions over the classes
    in nats, in [0, ln 2], 0 for equal ones and ln 2 for those that share no class. Equal ones keep their order.

    Raises ValueError for an empty split, logits that are not finite, models or names of different numbers of classes,
    and most below 1.
    """
    if most < 1:
        raise ValueError(f"most is how many images to name, at least 1; got {most}")
    (first, labels), (second, _) = (
        [part.cpu() for part in _logits(model, images, batch_size, precision)] for model in (before, after)
    )
    count = first.shape[1]
    if second.shape[1] != count or (classes is not None and len(classes) != count):
        named = "" if classes is None else f" and {len(classes)} names"
        raise ValueError(f"cannot compare models of {count} and {second.shape[1]} classes{named}")
    names = list(range(count)) if classes is None else list(classes)
    top1 = [_per_class(logits, labels) for logits in (first, second)]  # [classes] each
    table = pd.DataFrame({"class": names, "images": torch.bincount(labels, minlength=count).tolist()})
    table = table.assign(before=top1[0].tolist(), after=top1[1].tolist(), change=(top1[1] - top1[0]).tolist())
    p, q = first.double().softmax(1), second.double().softmax(1)
    divergence = _jensen_shannon(p, q)
    order = divergence.argsort(descending=True, stable=True)[:most]
    moved = {"image": order.tolist()}
    for column, of in {"label": labels, "before": first.argmax(1), "after": second.argmax(1)}.items():
        moved[column] = [names[number] for number in of[order].tolist()]
    for column, of in {"p_before": p, "p_after": q}.items():
        moved[column] = of[order, labels[order]].tolist()
    return Changes(table, pd.DataFrame(moved | {"divergence": divergence[order].tolist()}))


def attention(before, after, images, places, *, stages=2):
    """Where two models look on the same images: a frame of image, block, row, column, before and after.

    images: a data.Split. places: of a few images in it; column image has them. Of each of the last so many stages (a
    ViT has one) it is the last block in which both attend. row, column: of the token, from the upper left. before,
    after: models.attention_maps, 1 where a token gets its equal share, to three digits. Raises ValueError for no places
    or such as the split has not, and for models that have no block in common.
    """
    if not len(places) or min(places) < 0 or max(places) >= len(images):
        raise ValueError(f"need the places of images in a split of {len(images)}, got {list(places)}")
    x, _ = next(images.take(np.asarray(places)).batches(len(places), device=device_of(before)))
    first, second = models.attention_maps(before, x), models.attention_maps(after, x.to(device_of(after)))
    last = {
        block.stage: block.name for block in models.view(before).blocks if block.name in first and block.name in second
    }
    if not last:
        raise ValueError("the two models have no block in which both attend")
    frames = []
    for name in list(last.values())[-stages:]:
        number, row, column = np.indices(first[name].shape).reshape(3, -1)
        found = {"image": np.asarray(places)[number], "block": name, "row": row, "column": column}
        for when, maps in (("before", first), ("after", second)):
            found[when] = maps[name].flatten().double().cpu().numpy().round(3)
        frames.append(pd.DataFrame(found))
    return pd.concat(frames, ignore_index=True)


def _jensen_shannon(p, q):
    """Jensen-Shannon divergence in nats of distributions p and q, [N, classes] each: [N], in [0, ln 2]."""
    surplus = torch.special.entr((p + q) / 2) - (torch.special.entr(p) + torch.special.entr(q)) / 2
    return surplus.sum(1).clamp(0, math.log(2))


def _per_class(logits, labels):
    """Top-1 in percent per class, float64 [classes]; nan for one that does not occur."""
    right, classes = labels[logits.argmax(1) == labels], logits.shape[1]
    return 100 * torch.bincount(right, minlength=classes) / torch.bincount(labels, minlength=classes).double()


@torch.inference_mode()
def _logits(model, images, batch_size, precision):
    """(logits float32 [N, classes], labels [N]) of a data.Split, on the model's device, in eval mode, then restored.

    Of several processes each takes every so many-th batch, and all get all of the logits.
    """
    if not len(images):
        raise ValueError("cannot evaluate on an empty split")
    training, device = model.training, device_of(model)
    model.eval()
    mine, labels = {}, []
    with autocast(device, precision):
        for i, (x, y) in enumerate(images.batches(batch_size, device=device)):
            labels.append(y)
            if i % parallel.count() == parallel.rank():
                mine[i] = model(x).float()
    model.train(training)
    found = functools.reduce(operator.or_, parallel.gather(mine))
    logits, labels = torch.cat([found[i] for i in sorted(found)]).to(device), torch.cat(labels)
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: it has diverged, or was cut or loaded wrongly")
    return logits, labels
