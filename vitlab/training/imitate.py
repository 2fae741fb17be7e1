"""Teach a model what another one answers, on images without labels.

`fit` teaches a new model the features of a larger one. The teacher answers each view of an image
once, and its answers are kept on disk. Where views never come again, it answers in passing.
`relearn` teaches a cut model to answer as it did before the cut.

Public: Lessons, fit, relearn, say.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, mse_loss

from vitlab import files
from vitlab.evaluation import evaluate
from vitlab.models import anatomy
from vitlab.training import _resume, train


@torch.no_grad()
def say(teacher, x):
    """Return the features that a teacher has of images, float32 [B, D].

    They are what its classifier sees, and where that is a class token the mean of its patches, too.

    teacher: a ViT or Swin of timm in evaluation mode
    x: float32 [B, 3, S, S]
    """
    tokens = teacher.forward_features(x)
    found = [teacher.forward_head(tokens, pre_logits=True)]
    if getattr(teacher, "global_pool", "") == "token":
        found.append(tokens[:, teacher.num_prefix_tokens :].mean(1))
    return torch.cat(found, 1).float()


@dataclass
class Lessons:
    """Give batches of images of several splits, with a teacher's features in place of labels.

    teacher: the model; it is put into evaluation mode
    parts: pairs (data.Split, how many images of it each batch has); an epoch ends where the first
        split does
    folder: where the answers are kept, a file for each epoch of views; None without views
    views: int >= 1; after so many epochs the same views come again. None for new ones in each
        epoch, which pays where the teacher is quick, as on a GPU
    augment: what `data.Split.batches` accepts
    mixup: alpha >= 0 of the Beta distribution of how much each image gets of the next one, before
        the teacher answers; 0 is off
    precision: of the teacher, a word of `evaluate.precision_on`

    Raises ValueError for splits that are normalised otherwise than each other or the teacher, and
    for views without a folder.
    Source of mixup: Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and
    consistent", where the teacher answers the very image that the student sees.
    """

    teacher: torch.nn.Module
    parts: list
    folder: Path | None
    views: int | None = 1
    augment: bool | dict = False
    mixup: float = 0.0
    precision: str = "auto"
    mean: tuple = field(init=False)
    std: tuple = field(init=False)

    def __post_init__(self):
        self.teacher.eval()
        if self.views and not self.folder:
            raise ValueError("views that come again need a folder for the teacher's answers")
        for split, _ in self.parts:
            evaluate.check_normalised(self.teacher, split)
        moments = {(split.mean, split.std) for split, _ in self.parts}
        if len(moments) > 1:
            raise ValueError(f"the splits are normalised in several ways: {moments}")
        [(self.mean, self.std)] = moments
        settings = {
            "parts": [(split.identity, images) for split, images in self.parts],
            "augment": self.augment,
        }
        if self.mixup:  # answers without it keep the name that they had before there was one
            settings["mixup"] = self.mixup
        # The teacher's classifier has no part in its answers, and may be new in each process.
        heads = anatomy.classifier_names(self.teacher)
        body = {
            name: tensor
            for name, tensor in self.teacher.state_dict().items()
            if name.rpartition(".")[0] not in heads
        }
        self.identity = _resume.fingerprint(settings, torch.nn.Module(), body, None)

    @property
    def batch_size(self):
        """Return how many images a batch has."""
        return sum(images for _, images in self.parts)

    def __len__(self):
        return self.batch_size * min(len(split) // images for split, images in self.parts)

    def batches(self, batch_size, *, device="cpu", shuffle=False, seed=0, epoch=0, **options):
        """Yield (x, y) of an epoch, with features y, float32 [B, D]; see `data.Split.batches`.

        batch_size: that of the lessons
        options: augment and drop_last have no say here, as views are fixed and batches are full
        """
        view = epoch % self.views if self.views else epoch
        options = {"shuffle": shuffle, "seed": seed, "epoch": view, "augment": self.augment}
        parts = [
            split.batches(images, device=device, drop_last=True, **options)
            for split, images in self.parts
        ]
        name = f"{self.identity[:16]}-{seed}-{int(shuffle)}-{view}.npy"
        file = Path(self.folder, name) if self.views else None
        for number, drawn in enumerate(zip(*parts, strict=False)):
            x = torch.cat([x for x, _ in drawn])
            if self.mixup:
                x = self._mixed(x, np.random.default_rng([seed, view, number]))
            rows = slice(number * batch_size, (number + 1) * batch_size)
            yield x, self._answer(x, file, rows) if file else self._said(x)

    def _mixed(self, x, rng):
        """Return images [B, 3, S, S], each with its own share of the next one."""
        shares = rng.beta(self.mixup, self.mixup, (len(x), 1, 1, 1))
        shares = torch.from_numpy(shares).float().to(x.device)
        return torch.lerp(x, x.roll(1, 0), shares)

    def _answer(self, x, file, rows):
        """Return the features of images from these rows of a file, which the teacher fills."""
        if not file.exists():
            size = self._said(x[:1]).shape[1]
            empty = np.full((len(self), size), np.nan, np.float16)  # what is not answered yet
            files.write_atomic(file, partial(_save, array=empty))
        kept = np.load(file, mmap_mode="r+")
        if np.isnan(kept[rows]).any():
            kept[rows] = self._said(x).cpu().numpy()
            kept.flush()
        return torch.from_numpy(kept[rows].astype(np.float32)).to(x.device)

    def _said(self, x):
        self.teacher.to(x.device)
        with evaluate.autocast(x.device, self.precision):
            return say(self.teacher, x)


def _save(path, array):
    with open(path, "wb") as file:
        np.save(file, array)


class _Imitation(train.Training):
    """Train for the features themselves, each with mean 0 and deviation 1 over val."""

    def scale(self):
        """Take the mean and the deviation of each feature from val."""
        answers = torch.cat([y for _, y in self.val.batches(self.val.batch_size)])
        self.std, self.mean = torch.std_mean(answers, 0)
        return self

    def loss(self, outputs, x, y):
        target = (y - self.mean.to(y.device)) / self.std.to(y.device)
        return mse_loss(outputs.float(), target)

    def right(self, outputs, y):
        return (1 - self.loss(outputs, None, y)) * len(y)

    @torch.no_grad()
    def measured(self):
        self.outcome.eval()
        device = self.accelerator.device
        losses = []
        for x, y in self.val.batches(self.val.batch_size, device=device):
            with evaluate.autocast(device, self.recipe.precision):
                losses.append(self.loss(self.outcome(x), x, y))
        loss = torch.stack(losses).mean().item()
        return loss, 100 * max(0.0, 1 - loss)


def fit(model, lessons, val, recipe, *, stage="imitate", folder=None, log=None):
    """Train model in place to give the teacher's features, and return its history as a frame.

    Its classifier learns to project its own features onto the teacher's, and has no use afterwards:
    `models.create(weights=...)` starts a new one. The loss is the mean squared error of features
    that have mean 0 and deviation 1. So 1 is the loss of a model that has learnt nothing.

    model: with as many classes as the teacher has features; its weights are changed
    lessons, val: Lessons, of one teacher
    recipe: train.Recipe, or a mapping of its fields; batch size and augmentation are the lessons'
    stage, folder, log: as for `train.fit`, with which a killed training goes on

    Returns the frame of `train.fit`, with train_explained and val_explained in place of top-1: the
    percentage of the variance of the teacher's features that is explained, 100 * (1 - loss).
    Raises ValueError for a model with another number of classes, or normalised otherwise.
    Source: the features of Wei et al. 2022, "Contrastive Learning Rivals Masked Image Modeling in
    Fine-tuning via Feature Distillation", whitened over val instead of over each image.
    """
    evaluate.check_normalised(model, lessons)
    recipe = recipe if isinstance(recipe, train.Recipe) else train.Recipe(**recipe)
    recipe = replace(recipe, batch_size=lessons.batch_size, augment=lessons.augment)
    training = _Imitation(model, lessons, val, recipe, stage=stage).scale()
    if len(training.mean) != model.num_classes:
        raise ValueError(
            f"the teacher has {len(training.mean)} features, the model {model.num_classes} "
            f"classes: make it by models.create(..., num_classes={len(training.mean)})"
        )
    history = training.run(folder, log)
    names = {f"{part}_top1": f"{part}_explained" for part in ("train", "val")}
    return history.rename(columns=names)


def relearn(
    model,
    dense,
    train_images,
    val,
    recipe,
    *,
    channels=None,
    masks=None,
    stage="relearned",
    folder=None,
    log=None,
):
    """Train a cut model in place to answer as dense does, without labels.

    A classifier's answers are compared by their divergence KL(dense || model), and features of a
    model without classifier by their cosine. A few hundred steps do (docs/methods/distillation.md).

    model, dense: the smaller model, and the one that it was cut from
    train_images, val: data.Split; their labels only say in the history how many answers are right
    recipe: train.Recipe, or a mapping of its fields. The weights of the last epoch are kept, as the
        best epoch on val would be chosen by labels
    channels: of dense's features, those that model still has, see shrink.features_left; None: all
    masks, stage, folder, log: as for `train.fit`

    Returns the frame of `train.fit`. Without classifier train_cosine and val_cosine, in percent,
    stand in place of top-1.
    Raises what `train.fit` raises.
    Source: Hinton et al. 2015, with the whole weight on the teacher.
    """
    recipe = recipe if isinstance(recipe, train.Recipe) else train.Recipe(**recipe)
    recipe = replace(recipe, keep_best=False, label_smoothing=0.0)
    how = {"distil": train.Distillation(dense, share=1.0, temperature=1.0)}
    how |= {"masks": masks, "stage": stage}
    if dense.num_classes:
        return train.fit(model, train_images, val, recipe, **how, folder=folder, log=log)
    for split in (train_images, val):
        evaluate.check_normalised(model, split)
    history = _Relearning(model, train_images, val, recipe, **how).of(channels).run(folder, log)
    names = {f"{part}_top1": f"{part}_cosine" for part in ("train", "val")}
    return history.rename(columns=names)


class _Relearning(train.Training):
    """Train for the direction of the features that a model without classifier had."""

    def of(self, channels):
        """Compare these channels of the teacher's features; None: all."""
        self.channels = slice(None) if channels is None else channels
        return self

    def loss(self, outputs, x, y):
        with torch.no_grad():
            target = self.distil.teacher(x)[:, self.channels]
        self.alike = cosine_similarity(outputs.float(), target.float()).mean()
        return 1 - self.alike

    def right(self, outputs, y):
        return self.alike.detach() * len(y)  # of the step that was just taken

    def measured(self):
        both = self.outcome, self.distil.teacher
        how = {"precision": self.recipe.precision}
        own, whole = (evaluate.features(model, self.val, **how).features for model in both)
        alike = cosine_similarity(own, whole[:, self.channels]).mean().item()
        return 1 - alike, 100 * max(0.0, alike)
