"""Evaluation: how often a model is right, over a split, per class, and with which loss."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from . import cost


def device_of(model):
    """Device of the model's first parameter."""
    return next(model.parameters()).device


def autocast(device, precision="auto"):
    """Context for mixed precision. precision: "float32", "bf16", or "auto": bf16 where the device gains from it
    (CUDA with bf16, CPUs with AVX512-bf16 or AMX), else float32. Raises ValueError for another word."""
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
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@dataclass(frozen=True)
class Result:
    """Counts and rates over one split. top1, top5, mean_per_class in percent; loss is the mean cross entropy in nats;
    per_class: top-1 in percent per class, in the order of the classes."""

    correct: int
    total: int
    top1: float
    top5: float
    mean_per_class: float
    loss: float
    per_class: tuple

    def columns(self):
        """The columns of a results row."""
        return {k: getattr(self, k) for k in ("correct", "total", "top1", "top5", "mean_per_class", "loss")}


@torch.inference_mode()
def accuracy(model, images, *, batch_size=512, precision="float32"):
    """Result of model over a data.Split, on the model's own device, in eval mode (restored afterwards).

    Classes that do not occur in the split are left out of mean_per_class and are nan in per_class.
    Raises ValueError for an empty split or logits that are not finite.
    """
    if not len(images):
        raise ValueError("cannot evaluate on an empty split")
    training, device = model.training, device_of(model)
    model.eval()
    logits, labels = [], []
    with autocast(device, precision):
        for x, y in images.batches(batch_size, device=device):
            logits.append(model(x).float())
            labels.append(y)
    model.train(training)
    logits, labels = torch.cat(logits), torch.cat(labels)  # [N, classes], [N]
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: it has diverged, or was cut or loaded wrongly")
    classes = logits.shape[1]
    right = logits.argmax(1) == labels
    top5 = (logits.topk(min(5, classes)).indices == labels[:, None]).any(1)
    counts = torch.bincount(labels, minlength=classes).double()
    per_class = 100 * torch.bincount(labels[right], minlength=classes) / counts
    return Result(
        correct=int(right.sum()),
        total=len(labels),
        top1=100 * right.double().mean().item(),
        top5=100 * top5.double().mean().item(),
        mean_per_class=per_class[counts > 0].mean().item(),
        loss=cross_entropy(logits, labels).item(),
        per_class=tuple(per_class.tolist()),
    )


def measure(model, images, *, folder=None):
    """Accuracy and cost of model as the columns of a results row: Result.columns and cost.summary.

    images: the data.Split to report on, at the model's own image size. folder: the model's checkpoint, if it has one.
    """
    return accuracy(model, images).columns() | cost.summary(model, folder=folder)
