"""Training: the one loop, on accelerate, for models dense, masked, distilled or cut in steps. A killed run resumes."""

import contextlib
import copy
import functools
import gc
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2
from tqdm.auto import tqdm

from vitlab import cost, evaluate, parallel, prune, record

LOGGED = ("train_loss", "train_top1", "val_loss", "val_top1", "lr", "images_per_s")  # to TensorBoard


def _alone(fit):
    """fit, which refuses to train a stage in a folder where another process trains it."""

    @functools.wraps(fit)
    def inside(*arguments, folder=None, stage="dense", **options):
        if folder is None or not parallel.is_first():
            return fit(*arguments, folder=folder, stage=stage, **options)
        record.make_folder(Path(folder))
        with record.alone(Path(folder, f".{stage}.lock"), f"the training of {stage} in {folder}"):
            return fit(*arguments, folder=folder, stage=stage, **options)

    return inside


@_alone
def fit(
    model,
    train,
    val,
    *,
    epochs,
    lr,
    batch_size=128,
    weight_decay=0.05,
    warmup_epochs=1.0,
    label_smoothing=0.1,
    clip_norm=1.0,
    augment=True,
    images=None,
    precision="auto",
    ema=0.0,
    mixup=0.0,
    cutmix=0.0,
    masks=None,
    teacher=None,
    teacher_share=0.5,
    temperature=2.0,
    keep_best=True,
    seed=0,
    stage="dense",
    folder=None,
    log=None,
):
    """Train model in place with AdamW, linear warm-up and cosine decay to 0; returns its history as a frame.

    train, val: data.Split. epochs: int >= 1. lr: peak rate. warmup_epochs: >= 0 and < epochs. images: draws that
    many training images per epoch (None: all). augment: what train.batches accepts. precision: as for
    evaluate.precision_on. ema: decay in (0, 1) of averaged weights, which are then validated and kept; 0 is off.
    mixup, cutmix: alpha >= 0 of the Beta distribution that says, batch by batch, how much each image gets of another
    one (Zhang et al. 2018, Yun et al. 2019), and its label likewise; 0 is off, and with both each batch gets either.
    masks: {parameter: bool}, applied before the first step and held through every one (METHODS: gradient masking
    alone loses them to momentum and weight decay); each epoch's end asserts them. teacher: distil from this model
    (Hinton et al. 2015), loss (1 - a) CE + a T**2 KL with a = teacher_share, T = temperature. keep_best: end with
    the weights of the epoch that was best on val, else with the last. folder: a state file there after each epoch
    lets a killed run go on to the same result as an unbroken one; a state of other settings or weights is not used,
    and the one before stands in for one that is damaged. Who trains the same stage there at the same time is refused.
    log: a folder for TensorBoard, which gets train and val loss and top-1, rate and images per second of each epoch.

    Started by torchrun (see `parallel`), each process takes its part of each batch of batch_size: the result is that of
    one process, up to rounding and to what drop-out and drop-path draw.

    History has one row per epoch: stage, epoch, train_loss, train_top1 (on augmented batches, in passing; of mixed
    ones for the label of the larger share), val_loss, val_top1, lr, seconds, precision (bf16 or float32), images_per_s,
    data_share (of the seconds, spent waiting for batches; on a GPU that still computes also for it), sparsity, and
    peaks of the epoch in MB of 10**6 bytes: resident_mb of the whole process with all that it loaded before, device_mb
    that torch held on the GPU, and training_mb, by how much training needed more than there was when it began, model
    included, on the device that trains (cost.own_memory_mb): gradients, moments, activations, batches. This one
    compares trainings.
    Raises ValueError for settings out of range, FloatingPointError when the loss is no longer finite, RuntimeError when
    another process trains the same stage in the same folder.
    """
    if epochs < 1 or not 0 <= warmup_epochs < epochs or lr <= 0:
        raise ValueError(f"need epochs >= 1, 0 <= warmup_epochs < epochs, lr > 0; got {epochs}, {warmup_epochs}, {lr}")
    if not 0 <= ema < 1 or not 0 <= teacher_share <= 1 or not 0 <= label_smoothing < 1:
        raise ValueError(
            "ema and label_smoothing lie in [0, 1) and teacher_share in [0, 1], shares and not percentages; "
            f"got {ema}, {label_smoothing} and {teacher_share}"
        )
    if batch_size < 1 or (images is not None and images < 1) or not (mixup >= 0 and cutmix >= 0):
        raise ValueError(
            "need batch_size and images of at least 1 (or images=None for all), mixup and cutmix of at least 0; "
            f"got {batch_size}, {images}, {mixup} and {cutmix}"
        )
    apart = {"model", "train", "val", "masks", "teacher", "folder", "log"}
    settings = record.in_force("train", {k: v for k, v in locals().items() if k not in apart | {"apart"}})
    batch = min(batch_size, len(train))  # of all processes together
    if batch % parallel.count():
        raise ValueError(
            f"a batch of {batch} images cannot be shared out evenly to {parallel.count()} processes: choose a "
            "batch_size that is a multiple of their number"
        )
    parallel.join()
    log = log or (folder and os.environ.get("VITLAB_LOG") and Path(folder) / "tensorboard")
    accelerator = Accelerator(**({"log_with": "tensorboard", "project_dir": log} if log else {}))
    if log:
        accelerator.init_trackers(stage)
    device = accelerator.device
    model.to(device)
    parallel.agree(model)
    if teacher is not None:
        teacher.to(device).eval()
    gc.collect()
    cost.release_memory()
    held = cost.own_memory_mb(device)
    state_file = Path(folder) / f"{stage}.state.pt" if folder else None
    seen = [getattr(split, "identity", len(split)) for split in (train, val)]
    key = _fingerprint(settings | {"images seen": seen}, model, masks, teacher)
    if len(set(parallel.gather(key))) > 1:
        raise RuntimeError(f"{stage}: the processes do not train the same model by the same settings, images and masks")

    groups = param_groups_weight_decay(
        model, weight_decay, no_weight_decay_list=getattr(model, "no_weight_decay", set)()
    )
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    holder = prune.Holder(model, masks, optimizer) if masks else None
    averaged = AveragedModel(model, multi_avg_fn=_averaging(ema), use_buffers=True) if ema else None
    prepared, optimizer = accelerator.prepare(model, optimizer)

    count = min(images or len(train), len(train))
    steps = max(1, count // batch_size)
    history, best, start = [], {"top1": -1.0}, 0
    saved = _load_state(state_file, key)
    if len(set(parallel.gather(len(saved["history"]) if saved else 0))) > 1:
        raise RuntimeError(f"not every process can see {state_file}: give all of them one data root (VITLAB_DATA)")
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if averaged:
            averaged.load_state_dict(saved["averaged"])
        history, best, start = saved["history"], saved["best"], len(saved["history"])
        del saved

    mix = _mixing(mixup, cutmix, model) if mixup or cutmix else None
    step = functools.partial(
        _step, prepared, optimizer, accelerator, label_smoothing=label_smoothing, clip_norm=clip_norm,
        precision=precision, teacher=teacher, teacher_share=teacher_share, temperature=temperature,
    )  # fmt: skip
    for epoch in range(start, epochs):
        begun = time.perf_counter()
        # drop-path and drop-out depend on (seed, epoch, process) alone
        torch.manual_seed(1_000_003 * seed + epoch + 1_000_000_007 * parallel.rank())
        prepared.train()
        sums = torch.zeros(2, device=device)  # of losses, of right answers
        batches = train.batches(
            batch, device=device, augment=augment, shuffle=True, seed=seed, epoch=epoch, drop_last=True
        )
        waited = 0.0
        cost.release_memory()  # of what validation took
        cost.reset_peak_memory()
        bar = tqdm(range(steps), desc=f"{stage} {epoch + 1}/{epochs}", leave=False, disable=record.headless())
        with _plain_attention(model, device), parallel.whole_batch_norms(model):
            for i in bar:
                asked = time.perf_counter()
                x, y = next(batches)
                if mix:
                    x, y = mix(x, y, (seed, epoch, i))
                x, y = parallel.part((x, y))
                waited += time.perf_counter() - asked
                rate = lr * _schedule(epoch * steps + i, epochs * steps, warmup_epochs * steps)
                sums += step(x, y, rate)
                if holder:
                    holder.step()
                if averaged:
                    averaged.update_parameters(model)
            total_loss, mine = parallel.mean(sums).tolist()  # waits for the device, so before the clock is read
        seconds = time.perf_counter() - begun
        peak, used = cost.peak_memory_mb(device), cost.own_memory_mb(device, peak=True) - held
        if not math.isfinite(total_loss):
            raise FloatingPointError(
                f"the training loss is no longer finite in epoch {epoch + 1}; use a lower lr than {lr}"
            )
        if holder:
            holder.check(*([averaged.module] if averaged else []))
        judged = averaged.module if averaged else model
        result = evaluate.accuracy(judged, val, precision=precision)
        seen = steps * batch
        history.append(
            {
                "stage": stage,
                "epoch": epoch + 1,
                "train_loss": total_loss / steps,
                "train_top1": 100 * mine * parallel.count() / seen,
                "val_loss": result.loss,
                "val_top1": result.top1,
                "lr": rate,
                "seconds": seconds,
                "precision": evaluate.precision_on(device, precision),
                "images_per_s": seen / seconds,
                "data_share": waited / seconds,
                "resident_mb": cost.peak_memory_mb("cpu"),
                "device_mb": peak if device.type == "cuda" else 0.0,
                "training_mb": used,
                "sparsity": prune.sparsity(model, masks) if masks else 0.0,
            }
        )
        if result.top1 > best["top1"] or not keep_best:
            best = {"top1": result.top1, "model": copy.deepcopy(judged.state_dict())}
        record.say(
            f"{stage} epoch {epoch + 1}/{epochs}: train {history[-1]['train_top1']:.1f} %, val {result.top1:.1f} %, "
            f"{seconds:.0f} s"
        )
        accelerator.log({name: history[-1][name] for name in LOGGED}, step=epoch + 1)
        _save_state(
            state_file,
            {
                "key": key,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "averaged": averaged.state_dict() if averaged else None,
                "history": history,
                "best": best,
            },
        )
    for tracker in accelerator.trackers:
        tracker.finish()
    model.load_state_dict(best["model"])
    model.eval()
    return pd.DataFrame(history)


def in_steps(
    model, cut, train, val, *, shares, epochs, tail_epochs=None, seed=0, stage="gradual", folder=None, **settings
):
    """Cut a little, train, cut more, train on (Zhu & Gupta 2017). Returns the model, its masks and the history.

    cut: (model, share) -> (model, masks or None), called before each training with the model as it is by then. It
    takes new scores and gives either masks of that sparsity (prune.further: dead weights stay dead) or a smaller
    model (shrink.remove) without masks. What a share is of is its own affair. shares: rising, in (0, 1), such as
    prune.shares gives; one share is one-shot. epochs: after each cut but the last, and tail_epochs (None: as many)
    after that one, with its masks frozen. settings: for `fit`; every training starts its optimizer and schedule of
    rates anew, and draws other images. folder: as for `fit`. A killed run calls all cuts again, which must then
    give the same for the same model (torch is seeded before each), and trains only what was not trained yet.

    History is that of `fit` with epochs counted through, and step (1, 2, ...), share and params (of the model).
    Raises ValueError for shares that do not rise, a first cut that changes nothing, and masks that bring dead
    weights back; else what `fit` raises.
    """
    shares, masks, frames = list(shares), None, []
    if not shares or any(not a < b for a, b in zip([0, *shares], [*shares, 1], strict=True)):
        raise ValueError(f"shares must rise, above 0 and below 1, at least one of them; got {shares}")
    params = _params(model)
    for step, share in enumerate(shares, 1):
        own_seed = len(shares) * seed + step - 1
        torch.manual_seed(own_seed)
        before = masks
        model, masks = cut(model, share)
        if step == 1 and not masks and _params(model) == params:
            raise ValueError(
                f"the first cut, of {share}, changed nothing; give masks or a smaller model, or fewer steps"
            )
        _check_grown(model, before or {}, masks or {})
        length = epochs if step < len(shares) or tail_epochs is None else tail_epochs
        own = {"seed": own_seed, "stage": f"{stage}-{step}", "folder": folder}
        history = fit(model, train, val, epochs=length, masks=masks, **own, **settings)
        frames.append(history.assign(stage=stage, step=step, share=share, params=_params(model)))
    history = pd.concat(frames, ignore_index=True)
    return model, masks, history.assign(epoch=range(1, len(history) + 1))


def _params(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _check_grown(model, before, after):
    """ValueError if masks bring back weights that were masked before; what was removed for good does not count."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, mask in before.items():
        still = shapes.get(name) == mask.shape
        if still and (name not in after or (after[name].to(mask.device) & ~mask).any()):
            raise ValueError(f"the cut brings dead weights of {name} back; prune.further gives masks that do not")


def _step(
    model, optimizer, accelerator, x, y, rate,
    *, label_smoothing, clip_norm, precision, teacher, teacher_share, temperature,
):  # fmt: skip
    """One step at this rate; returns [loss, number of right answers], a tensor on the device. y: int64 [B] or, mixed,
    shares [B, classes]."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with evaluate.autocast(x.device, precision):
        logits = model(x)
        loss = cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
        if teacher is not None:
            with torch.no_grad():
                target = log_softmax(teacher(x).float() / temperature, 1)
            student = log_softmax(logits.float() / temperature, 1)
            distance = kl_div(student, target, reduction="batchmean", log_target=True)
            loss = (1 - teacher_share) * loss + teacher_share * temperature**2 * distance
    accelerator.backward(loss)
    if clip_norm:
        accelerator.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    labels = y if y.ndim == 1 else y.argmax(1)
    return torch.stack([loss.detach(), (logits.detach().argmax(1) == labels).sum().to(loss.dtype)])


def _mixing(mixup, cutmix, model):
    """(x, y int64 [B], seeds) -> (x, shares [B, classes] that sum to 1) of a batch that is mixed with itself, the next
    image with each one; a function of its ints seeds alone. torch's own random numbers are left as they were."""
    choices = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
    mix = v2.RandomChoice([kind(alpha=alpha, num_classes=model.num_classes) for kind, alpha in choices if alpha])

    def mixed(x, y, seeds):
        with torch.random.fork_rng(devices=[]):  # v2 draws from the CPU's, whatever the device
            torch.default_generator.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))
            x, y = mix(x, y)
        return x.contiguous(memory_format=torch.channels_last), y

    return mixed


def _averaging(decay):
    """What AveragedModel does with tensors of one kind. Whole numbers are copied: an average rounds indices down."""
    average = get_ema_multi_avg_fn(decay)

    def update(averaged, current, count):
        if averaged[0].is_floating_point():
            average(averaged, current, count)
        else:
            torch._foreach_copy_(averaged, current)

    return update


@contextlib.contextmanager
def _plain_attention(model, device):
    """On CPUs, attention without the fused kernel, which is slower to train in bf16 there."""
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)] if device.type == "cpu" else []
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _schedule(step, steps, warmup_steps):
    """Share of the peak rate: linear from 0 over the warm-up, then half a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _fingerprint(settings, model, masks, teacher):
    """Hash of everything that the result depends on and that a state file must share to be gone on from."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for tensors in (model.state_dict(), masks or {}, teacher.state_dict() if teacher is not None else {}):
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _save_state(file, state):
    """Write the state of this epoch to file, and keep the one of the epoch before beside it."""
    if file is None or not parallel.is_first():
        return
    record.write_atomic(file, functools.partial(torch.save, state), keep=_before(file))


def _before(file):
    return file.with_suffix(".before.pt")


def _load_state(file, key):
    """The newest whole state of this very run in file, or of the epoch before beside it, on the CPU, else None."""
    for path in [file, _before(file)] if file else []:
        try:
            # not onto accelerate's device: among several CPU processes that is "cpu:0", which torch.load refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["key"] == key:
                return state
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged state costs the epoch in it, not the run
            record.say(f"{path.name} cannot be read ({type(error).__name__}); training goes on from before it")
    return None
