"""Train models that are dense, masked, distilled or cut in steps, with one loop on accelerate.

A killed training resumes and ends with the same result as an unbroken one.

Public: Distillation, Recipe, Training, fit, in_steps.
"""

import contextlib
import copy
import math
import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass
from timm.optim import create_optimizer_v2
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from vitlab import files, names, parallel
from vitlab.evaluation import cost, evaluate, memory
from vitlab.models import anatomy
from vitlab.pruning import prune
from vitlab.studies import settings
from vitlab.training import _resume

_Share = Annotated[float, Field(ge=0, lt=1)]
# Fields of a recipe that came later, and the value with which they are off: states of trainings
# from before there was one are still those of such a recipe.
_LATER = {"layer_decay": 1.0, "head": False}


@checked_dataclass(frozen=True)
class Recipe:
    """Hold the settings of one training.

    Beside them the result depends on model, images, masks and teacher alone. Checkpoints of dense
    models keep these fields as "settings".

    Raises ValueError for a value out of range.
    """

    # 0 takes weights that are given as they are, with `head` but for the head.
    epochs: NonNegativeInt
    lr: PositiveFloat  # peak of the learning rate, above 0
    batch_size: PositiveInt = 128  # images of a batch, at least 1, of all processes together
    weight_decay: float = 0.05  # of AdamW; biases and norms have none
    # Share in (0, 1] of the rate of one layer that the layer before it gets, by timm's groups: the
    # head has the whole rate, the stem the smallest. 1 is off.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Epochs of linear warm-up, at least 0 and fewer than all; a cosine down to 0 follows.
    warmup_epochs: NonNegativeFloat = 1.0
    label_smoothing: _Share = 0.1  # share in [0, 1)
    # Highest norm of the gradient of all parameters; 0 switches clipping off.
    clip_norm: float = 1.0
    augment: bool | dict = True  # what `data.Split.batches` accepts
    # Training images that each epoch draws, at least 1; None takes all.
    images: PositiveInt | None = None
    precision: str = "auto"  # what `evaluate.precision_on` accepts
    # Decay in [0, 1) of averaged weights, which are then validated and kept; 0 is off. After n
    # steps the decay is at most (1 + n) / (10 + n), so that a short training forgets its start.
    ema: _Share = 0.0
    # Alphas >= 0 of the Beta distribution that says, batch by batch, how much each image and its
    # label get of another image (Zhang et al. 2018, Yun et al. 2019). 0 is off, and with both each
    # batch gets one of them.
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    # Whether training ends with the weights of the epoch that was best on val, else with the last.
    keep_best: bool = True
    seed: int = 0  # of order, augmentation, mixing, drop-out and drop-path
    # Whether the head alone is fitted before the first epoch, by logistic regression on features of
    # the frozen rest (see evaluate.linear_probe). It is epoch 0 of the history.
    head: bool = False

    def __post_init__(self):
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"a recipe needs warmup_epochs < epochs; got {self}")


@dataclass(frozen=True)
class Distillation:
    """Hold a teacher and its part in the loss (Hinton et al. 2015).

    The loss is (1 - a) CE + a T**2 KL, see docs/methods/distillation.md.

    Raises ValueError for a share that is out of range.
    """

    teacher: torch.nn.Module  # with the classes of the student, in their order
    share: float = 0.5  # a, in [0, 1]
    temperature: float = 2.0  # T, above 0

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(
                f"a teacher's share lies in [0, 1] and is no percentage; got {self.share}"
            )

    def blend(self, loss, logits, x):
        """Return the whole loss of the student.

        loss: its cross entropy
        logits: [B, classes], of the student on the images x
        """
        with torch.no_grad():
            target = log_softmax(self.teacher(x).float() / self.temperature, 1)
        student = log_softmax(logits.float() / self.temperature, 1)
        distance = kl_div(student, target, reduction="batchmean", log_target=True)
        # T**2 makes up for gradients of softened logits, which shrink with 1 / T**2.
        return (1 - self.share) * loss + self.share * self.temperature**2 * distance


def fit(
    model, train, val, recipe, *, masks=None, distil=None, stage="dense", folder=None, log=None
):
    """Train model in place and return its history as a frame.

    The optimizer is AdamW, with linear warm-up and cosine decay of the rate to 0.

    model: with the classes of train; its weights are changed
    train, val: data.Split
    recipe: Recipe, or a mapping of its fields
    masks: {parameter: bool}, held through every step, see docs/methods/schedules.md
    distil: Distillation, or None to train without a teacher
    stage: name of this training in its history, messages and state file
    folder: keeps a state file of each epoch, from which a killed training goes on
    log: folder for the numbers of each epoch, by TensorBoard or by the loggers, with commas between,
        that the environment's VITLAB_LOG names: wandb, mlflow and others of accelerate

    Returns a frame with one row an epoch; `Training.epoch` says what its columns mean. Of 0 epochs
    it has one row, of epoch 0.
    Raises ValueError for settings out of range, for a model, teacher or val of other classes, and
    for 0 epochs of a new head.
    Raises FloatingPointError when the loss is no longer finite.
    Raises RuntimeError when another process trains the same stage in the same folder.
    Raises ModuleNotFoundError, with what to install, for a logger that is not there.
    """
    recipe = _recipe(recipe)
    for part in (train, val):
        anatomy.check_classes(model, part)
        evaluate.check_normalised(model, part)
    if distil:
        anatomy.check_classes(distil.teacher, train)
    # Under torchrun (see `parallel`), each process takes its part of each batch. The result is then
    # that of one process, up to rounding and to what drop-out and drop-path draw.
    batch_size = min(recipe.batch_size, len(train))
    if batch_size % parallel.world_size():
        raise ValueError(
            f"a batch of {batch_size} images cannot be shared out evenly to "
            f"{parallel.world_size()} processes: choose a batch_size that is a multiple of their "
            "number"
        )
    if recipe.epochs or recipe.head:
        training = Training(model, train, val, recipe, masks, distil, stage)
        history = training.run(folder, log)
    else:
        history = _as_given(model, train, val, recipe, stage)
    # From now on its weights give such classes. Checkpoints keep them.
    model.is_head_new = False
    if hasattr(train, "classes"):
        model.class_names = list(train.classes)
    return history


def _as_given(model, train, val, recipe, stage):
    """Return the one row of a history without training: the model as it is, on val."""
    if getattr(model, "is_head_new", False):
        raise ValueError(
            "epochs: 0 takes the model's weights as they are, and its head is new: give weights "
            "whose head has as many classes as the images, or train for an epoch or more"
        )
    model.to(Accelerator().device).eval()
    result = evaluate.accuracy(model, val, precision=recipe.precision)
    model.normalise, model.normalise_is_guess = (train.mean, train.std), False
    row = {"stage": stage, "epoch": 0, "train_top1": math.nan, "seconds": 0.0}
    return pd.DataFrame([row | {"val_loss": result.loss, "val_top1": result.top1}])


def _recipe(recipe):
    return Recipe(**recipe) if isinstance(recipe, Mapping) else recipe


def in_steps(
    model, cut, train, val, recipe, *, shares, tail_epochs=None, stage="gradual", **options
):
    """Cut a little, train, cut more, train on; return the model, its masks and the history.

    The idea is of Zhu & Gupta 2017.

    model: the model before the first cut
    cut: function of (model, share), called before each training with the model as it is by then. It
        takes new scores and returns (model, masks) or a smaller (model, None). Masks have that
        sparsity and keep dead weights dead, as prune.keep_more_zero does; shrink.remove makes
        smaller models. The function decides what a share is a share of
    train, val: data.Split
    recipe: Recipe, or a mapping of its fields; its epochs follow each cut but the last
    shares: rising numbers in (0, 1), as prune.shares returns them; one share is one-shot
    tail_epochs: epochs after the last cut, with its masks frozen; None takes the recipe's
    stage: name of all these trainings in the history
    options: distil, folder and log of `fit`

    Returns a history as `fit` does, with epochs counted through, and the columns step (1, 2, ...),
    share and params (of the model).
    Raises ValueError for shares that do not rise, for a first cut that changes nothing, and for
    masks that bring dead weights back.
    Raises what `fit` raises.
    """
    shares = list(shares)
    if not shares or any(low >= high for low, high in pairwise([0, *shares, 1])):
        raise ValueError(
            f"shares must rise, above 0 and below 1, at least one of them; got {shares}"
        )
    recipe = _recipe(recipe)
    first_seed = len(shares) * recipe.seed
    params = cost.params(model)
    masks = {}
    histories = []
    for step, share in enumerate(shares, 1):
        # Every training starts its optimizer and schedule of rates anew, and draws other images.
        recipe = replace(recipe, seed=first_seed + step - 1)
        if step == len(shares) and tail_epochs is not None:
            recipe = replace(recipe, epochs=tail_epochs)
        # A killed run calls all cuts again, and trains only what was not trained yet. The cuts must
        # then give the same for the same model, so that torch is seeded before each.
        torch.manual_seed(recipe.seed)
        masks_before = masks or {}
        model, masks = cut(model, share)
        if step == 1 and not masks and cost.params(model) == params:
            raise ValueError(
                f"the first cut, of {share}, changed nothing; "
                "give masks or a smaller model, or fewer steps"
            )
        _check_grown(model, masks_before, masks or {})
        history = fit(model, train, val, recipe, masks=masks, stage=f"{stage}-{step}", **options)
        histories.append(
            history.assign(stage=stage, step=step, share=share, params=cost.params(model))
        )
    history = pd.concat(histories, ignore_index=True)
    return model, masks, history.assign(epoch=range(1, len(history) + 1))


def _check_grown(model, before, after):
    """Raise ValueError if the masks after bring back weights that the masks before had cut."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, mask in before.items():
        removed = shapes.get(name) != mask.shape  # for good
        if not removed and (name not in after or (after[name].to(mask.device) & ~mask).any()):
            raise ValueError(
                f"the cut brings dead weights of {name} back; "
                "prune.keep_more_zero gives masks that do not"
            )


def _lock(stage, folder):
    """Return a context in which no other process may train this stage in this folder."""
    if folder is None or not parallel.is_first():
        return contextlib.nullcontext()
    folder = Path(folder)
    files.make_folder(folder)
    return files.lock(folder / f".{stage}.lock", f"the training of {stage} in {folder}")


def _join(stage, folder, log):
    """Meet the other processes and return the Accelerator.

    It logs if log or the environment's VITLAB_LOG asks for it: to the loggers that VITLAB_LOG names.
    """
    parallel.join()
    asked = os.environ.get("VITLAB_LOG", "")
    if folder and asked:
        log = log or Path(folder, "logs")
    loggers = []
    if log:
        loggers = ["tensorboard" if name in ("", "1") else name for name in asked.split(",")]
    there = [str(name) for name in get_available_trackers()]
    for name in loggers:
        names.check("logger (VITLAB_LOG)", name, settings.LOGGERS)
        if name not in there:
            raise ModuleNotFoundError(f"{name} is missing: pip install {name}", name=name)
    accelerator = Accelerator(log_with=loggers or None, project_dir=log and Path(log, stage))
    # A run is called by study, model, seed and stage.
    label = "/".join([*Path(folder or "").parts[-4:-1], stage])
    called = {"wandb": {"name": label}, "mlflow": {"run_name": label}, "trackio": {"name": label}}
    accelerator.init_trackers("vitlab", init_kwargs=called)
    return accelerator


@dataclass
class Training:
    """Hold one training under way: its settings, what the optimizer moves, and its state.

    `fit` makes and runs it. Another one overrides `loss`, `right` and `measured`.
    """

    model: torch.nn.Module
    train: object
    val: object
    recipe: Recipe
    masks: dict | None = None
    distil: Distillation | None = None
    stage: str = "dense"

    def run(self, folder=None, log=None):
        """Train from the start, or from the state in folder, and return the history as a frame.

        The model is left in evaluation mode with the weights that are kept, and says by what its
        images are normalised.
        folder, log: as for `fit`
        Raises RuntimeError when another process trains the same stage in the same folder.
        """
        with _lock(self.stage, folder):
            self.accelerator = _join(self.stage, folder, log)
            file = Path(folder, f"{self.stage}.state.pt") if folder else None
            self.start(file)
            history = self.state["history"]
            if history:
                done = history[-1]["epoch"]
                done = f"{done} of {self.recipe.epochs} epochs" if done else "the head alone"
                files.log(
                    f"{self.stage}: taken from an earlier run ({done}, "
                    f"val {self.state['best']['top1']:.1f} %)"
                )
            for epoch in range(len(history) - self.recipe.head, self.recipe.epochs):
                row = self.epoch(epoch)
                self.validate(row)
                moved = {name: part.state_dict() for name, part in self.moving.items()}
                _resume.save_state(file, {"averaged": None, **self.state, **moved})
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.model.load_state_dict(self.state["best"]["model"])
        self.model.normalise = self.train.mean, self.train.std
        self.model.normalise_is_guess = False
        self.model.eval()
        return pd.DataFrame(history)

    def loss(self, logits, x, y):
        """Return the loss of a batch of images x, whose answers y `train` gave."""
        loss = cross_entropy(logits.float(), y, label_smoothing=self.recipe.label_smoothing)
        return self.distil.blend(loss, logits, x) if self.distil else loss

    def right(self, logits, y):
        """Return how many of a batch's answers are right; of mixed images y has two dimensions."""
        labels = y if y.ndim == 1 else y.argmax(1)
        return (logits.argmax(1) == labels).sum()

    def measured(self):
        """Return the loss and the top-1 in percent on val; a higher top-1 is better."""
        result = evaluate.accuracy(self.outcome, self.val, precision=self.recipe.precision)
        return result.loss, result.top1

    def start(self, file):
        """Make the optimizer, and go on from the state in file if it is of this training.

        Raises RuntimeError if the processes differ in the key of this training or in the state.
        """
        model = self.model
        recipe = self.recipe
        device = self.accelerator.device
        model.to(device)
        parallel.broadcast_weights(model)
        # The teacher answers in evaluation mode and learns nothing.
        teacher = self.distil and self.distil.teacher.to(device).eval()
        # What is held by now, model included, is not what training needs. An earlier training holds
        # nothing: it leaves no reference cycles.
        memory.release_memory()
        self.memory_before = memory.own_memory_mb(device)
        # A state of other settings, images, weights, masks or teacher is not used. The key is taken
        # before the masks change the weights.
        settings = {
            **vars(recipe),
            "stage": self.stage,
            "images seen": [self.train.identity, self.val.identity],
            "distil": self.distil and (self.distil.share, self.distil.temperature),
        }
        for name, off in _LATER.items():
            if settings[name] == off:
                del settings[name]
        if recipe.ema:  # states from before the warm-up had other averages
            settings["ema"] = [recipe.ema, "warm-up"]
        key = _resume.fingerprint(settings, model, self.masks, teacher)
        self.state = _resume.load_state(file, key)
        if len(set(parallel.gather((key, len(self.state["history"]))))) > 1:
            raise RuntimeError(
                f"{self.stage}: the processes do not train the same model by the same settings, "
                f"images and masks, or not all of them can see {file}: "
                "give them one data root (VITLAB_DATA)"
            )
        # timm leaves biases and norms without weight decay.
        options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
        if recipe.layer_decay < 1:
            options["layer_decay"] = recipe.layer_decay
        optimizer = create_optimizer_v2(model, "adamw", **options)
        # The masks are applied before the first step and held through every one. Masked gradients
        # alone would lose them to momentum and weight decay.
        self.holder = prune.MaskHolder(model, self.masks, optimizer) if self.masks else None
        self.prepared, self.optimizer = self.accelerator.prepare(model, optimizer)
        # Training goes on from the states of these, whose names are those in the state file.
        self.moving = {"model": model, "optimizer": self.optimizer}
        self.outcome = model  # what is validated, and whose best weights stay
        if recipe.ema:
            # Running statistics of norms are buffers: averaged weights need averaged ones.
            # It refers to this training weakly: a cycle would hold both models after the end.
            average = partial(Training._average, weakref.proxy(self))
            self.averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
            self.moving["averaged"] = self.averaged
            self.outcome = self.averaged.module
        for name in self.moving.keys() & self.state:
            self.moving[name].load_state_dict(self.state.pop(name))
        images = len(self.train)
        self.batch_size = min(recipe.batch_size, images)  # of all processes together
        images = min(recipe.images or images, images)
        self.steps = max(1, images // recipe.batch_size)  # of an epoch

    def epoch(self, epoch):
        """Train for one epoch, int from 0, and return its row of the history without validation.

        Epoch -1 fits the head alone.
        """
        device = self.accelerator.device
        began = time.perf_counter()
        memory.release_memory()  # what validation took
        memory.reset_peak_memory()
        part = self._head_alone() if epoch < 0 else self._steps(epoch)
        seconds = time.perf_counter() - began
        # Peaks are read before validation has its own.
        device_mb = memory.peak_memory_mb(device) if device.type == "cuda" else 0.0
        training_mb = memory.own_memory_mb(device, peak=True) - self.memory_before
        if not math.isfinite(part["train_loss"]):
            raise FloatingPointError(
                f"the training loss is no longer finite in epoch {epoch + 1}; "
                f"use a lower lr than {self.recipe.lr}"
            )
        waited, images = part.pop("waited"), part.pop("images")
        return {
            "stage": self.stage,
            "epoch": epoch + 1,  # 0 is the head alone
            # Mean over the batches. Of the head alone these two are of the images as they are.
            "train_loss": None,
            # In percent, on augmented batches, in passing. A mixed image counts by the label of its
            # larger share.
            "train_top1": None,
            "val_loss": None,  # `validate` fills all that is None, and sparsity
            "val_top1": None,  # in percent
            # Of the last step; where layers have rates of their own, of the head.
            "lr": None,
            "seconds": seconds,  # without validation
            "precision": evaluate.precision_on(device, self.recipe.precision),  # bf16 or float32
            "images_per_s": images / seconds,
            # Share of the seconds spent waiting for batches, on a GPU also for its computing.
            "data_share": waited / seconds,
            # Peaks of the epoch in MB of 10**6 bytes. The first is of the whole process, with all
            # that it loaded before.
            "resident_mb": None,
            "device_mb": device_mb,  # that torch held on the GPU
            # Memory that training needed on its device beyond what was held at its start, model
            # included: gradients, moments, activations, batches (memory.own_memory_mb). This one
            # compares trainings.
            "training_mb": training_mb,
            "sparsity": 0.0,  # share of zeros in what the masks cover
            **part,
        }

    def _head_alone(self):
        """Fit the head and return what `_steps` does, and the strength of the ridge."""
        # The frozen rest computes the features once, of images as they are.
        precision = self.recipe.precision
        seen = evaluate.features(self.model, self.train, precision=precision)
        unseen = evaluate.features(self.model, self.val, precision=precision)
        probe = evaluate.linear_probe(*seen, *unseen, classes=self.model.num_classes)
        # Where two classifiers are averaged, such as a distilled DeiT's, features are the mean of
        # what both see, so that both get the same weights.
        for name in anatomy.classifier_names(self.model):
            self.model.get_submodule(name).load_state_dict(probe.layer.state_dict())
        parallel.broadcast_weights(self.model)
        if self.holder:
            self.holder.step()
        if self.recipe.ema:
            self.averaged.module.load_state_dict(self.model.state_dict())
        logits = probe.layer(seen.features)
        return {
            "train_loss": cross_entropy(logits, seen.labels).item(),
            "train_top1": evaluate.top1(logits, seen.labels),
            "lr": 0.0,
            "waited": 0.0,
            "images": len(self.train),
            "strength": probe.strength,
        }

    def _steps(self, epoch):
        """Take the steps of an epoch.

        Returns train_loss, train_top1 and lr of its row, how many images it saw, and the seconds
        that this process waited for batches.
        """
        recipe = self.recipe
        device = self.accelerator.device
        steps = self.steps
        # Drop-path and drop-out depend on seed, epoch and process alone: a resumed training draws
        # the same.
        torch.manual_seed(1_000_003 * recipe.seed + epoch + 1_000_000_007 * parallel.rank())
        self.prepared.train()
        batches = self.train.batches(
            self.batch_size,
            device=device,
            augment=recipe.augment,
            shuffle=True,
            seed=recipe.seed,
            epoch=epoch,
            drop_last=True,
        )
        sums = torch.zeros(2, device=device)
        waited = 0.0
        title = f"{self.stage} {epoch + 1}/{recipe.epochs}"
        bar = files.progress(range(steps), title, delay=0)
        with _plain_attention(self.model, device), parallel.whole_batch_norms(self.model):
            for step in bar:
                began = time.perf_counter()
                x, y = next(batches)
                if recipe.mixup or recipe.cutmix:
                    x, y = _mix(x, y, recipe, self.model.num_classes, (recipe.seed, epoch, step))
                x, y = parallel.shard((x, y))
                waited += time.perf_counter() - began
                # The schedule runs over all epochs, step by step.
                step += epoch * steps
                share = _schedule(step, recipe.epochs * steps, recipe.warmup_epochs * steps)
                lr = recipe.lr * share
                # The sums stay on the device: to read them here would wait for it at every step.
                sums += self._step(x, y, lr)
        # This waits for the device, so it comes before the clock is read.
        loss, right = parallel.mean(sums).tolist()
        images = steps * self.batch_size
        return {
            "train_loss": loss / steps,
            "train_top1": 100 * right * parallel.world_size() / images,
            "lr": lr,
            "waited": waited,
            "images": images,
        }

    def _step(self, x, y, lr):
        """Take one step at this rate and return the tensor [loss, number of right answers].

        y: int64 [B] or, of mixed images, shares [B, classes]
        """
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # timm's, of a layer
        with evaluate.autocast(x.device, recipe.precision):
            logits = self.prepared(x)
            loss = self.loss(logits, x, y)
        self.accelerator.backward(loss)
        if recipe.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.holder:
            self.holder.step()
        if recipe.ema:
            self.averaged.update_parameters(self.model)
        return torch.stack([loss.detach(), self.right(logits.detach(), y).to(loss.dtype)])

    def _average(self, averaged, current, _):
        """Average tensors of one kind in place: what AveragedModel calls after each step."""
        if averaged[0].is_floating_point():
            # The count lies on the CPU: to read the one on the device would wait for it.
            steps = self.averaged.n_averaged.item()
            decay = min(self.recipe.ema, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:  # an average would round indices down
            torch._foreach_copy_(averaged, current)

    def validate(self, row):
        """Complete a row of the history on val, and keep the weights if they are the best."""
        # Each epoch's end asserts that the dead weights are zero, in the average, too.
        if self.holder:
            self.holder.check(self.outcome)
            row["sparsity"] = prune.sparsity(self.model, self.masks)
        row["val_loss"], row["val_top1"] = self.measured()
        row["resident_mb"] = memory.peak_memory_mb("cpu")
        self.state["history"].append(row)
        if row["val_top1"] > self.state["best"]["top1"] or not self.recipe.keep_best:
            weights = copy.deepcopy(self.outcome.state_dict())
            self.state["best"] = {"top1": row["val_top1"], "model": weights}
        done = f" epoch {row['epoch']}/{self.recipe.epochs}: train {row['train_top1']:.1f} %"
        if not row["epoch"]:  # what was fitted to features says little by its top-1 on them
            done = ": the head alone is fitted"
        files.log(f"{self.stage}{done}, val {row['val_top1']:.1f} %, {row['seconds']:.0f} s")
        self.accelerator.log(row, step=row["epoch"])


def _mix(x, y, recipe, classes, seeds):
    """Mix each image with the next one and return them with their labels.

    x: float32 [B, 3, S, S]
    y: int64 [B]
    seeds: ints, on which alone the draws depend; torch's own random numbers stay as they were

    Returns x and, in place of y, shares [B, classes] that sum to 1.
    """
    alphas = {v2.MixUp: recipe.mixup, v2.CutMix: recipe.cutmix}
    ways = [way(alpha=alpha, num_classes=classes) for way, alpha in alphas.items() if alpha]
    [seed] = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):  # v2 draws on the CPU, whatever the device
        torch.default_generator.manual_seed(int(seed >> 1))
        x, shares = v2.RandomChoice(ways)(x, y)
    return x.contiguous(memory_format=torch.channels_last), shares


@contextlib.contextmanager
def _plain_attention(model, device):
    """Compute attention on CPUs without the fused kernel, which trains slower in bf16 there."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    try:
        for module in fused:
            module.fused_attn = device.type != "cpu"
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _schedule(step, steps, warmup_steps):
    """Return the share of the peak rate: linear over the warm-up, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
