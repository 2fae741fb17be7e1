"""Measure models: latency side by side, time by layer, speed by rank, and memory.

Public: PRECISIONS, Setting, as_settings, break_even, latency, layer_times, main, memory_mb,
milliseconds, on_threads, rank_speed, ready, repeat.
"""

import argparse
import copy
import functools
import json
import math
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch import nn

from vitlab import models, parallel
from vitlab.evaluation import cost, export, memory
from vitlab.models import checkpoint, layers

# -- latency

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
_KNOWN = {"runtime": ("eager", "compiled", "onnxruntime"), "precision": tuple(PRECISIONS)}
_QUARTILES = [0.25, 0.5, 0.75]


@dataclass(frozen=True)
class Setting:
    """Say which model is run, and how.

    model: the model
    runtime: "eager", "compiled" (torch.compile, once for the first batch and once for any number of
        images) or "onnxruntime" (on CPUs, in float32)
    precision: "float32" or "bf16", to which weights and images are converted
    Raises ValueError for another runtime or precision, and for onnxruntime in bf16.
    """

    model: nn.Module
    runtime: str = "eager"
    precision: str = "float32"

    def __post_init__(self):
        for field, known in _KNOWN.items():
            name = getattr(self, field)
            if name not in known:
                raise ValueError(f"unknown {field} {name!r}; known are {', '.join(known)}")
        if self.runtime == "onnxruntime" and self.precision != "float32":
            raise ValueError(f"onnxruntime has no {self.precision} on a CPU; run it in float32")


@parallel.first_decides
def latency(
    models,
    *,
    image_size=None,
    batch=64,
    repeats=30,
    seconds=60,
    warmup=2,
    precision="float32",
    device=None,
    threads=None,
):
    """Measure the inference time of several models together.

    In every round each model runs one batch, in a new random order. So whatever else the machine
    does falls on all of them, and ratios are taken within rounds. Exporting and compiling are not
    in the times.

    models: {name: model or Setting}
    image_size: side in pixels, None for each model's own
    batch: images, or a list of such numbers, timed one after the other
    repeats: rounds to run at most
    seconds: time after which no more rounds start, once there are three
    warmup: batches that each model runs before the first round
    precision: of models that are no Setting, which run eagerly
    device: where to run, None for where the first model is
    threads: CPU threads, None for torch's setting

    Returns a frame with a row for each batch and model:
        model: name
        latency_q1, latency_ms, latency_q3: quartiles and median of a batch, in milliseconds
        image_ms: milliseconds of one image
        images_per_s: images in a second
        speedup_q1, speedup, speedup_q3: how many times as fast as the first model, quartiles and
            median over rounds
        rounds: how many there were
        batch, image_size, runtime, precision, threads, device
    Raises ValueError for no models, unknown precisions and onnxruntime off the CPU, and what
    `cost.input_shape` raises.
    """
    if not models:
        raise ValueError("no models to time; give {name: model}")
    settings = as_settings(models, precision)
    first = next(iter(settings.values())).model
    device = torch.device(device or next(first.parameters()).device)
    tables = []
    with on_threads(threads) as threads:
        runnables = {name: _runnable(setting, device) for name, setting in settings.items()}
        for size in [batch] if isinstance(batch, int) else batch:
            calls, sides = {}, []
            for name, setting in settings.items():
                images = _images(setting, image_size, size, device)
                calls[name] = functools.partial(runnables[name], images)
                sides.append(images.shape[-1])
            table = _summary(_rounds(calls, repeats, seconds, warmup, device), size)
            tables.append(table.assign(batch=size, image_size=sides))
    table = pd.concat(tables, ignore_index=True)
    table["runtime"] = [settings[name].runtime for name in table.model]
    table["precision"] = [settings[name].precision for name in table.model]
    device_name = device.type
    if device_name == "cuda":
        device_name = torch.cuda.get_device_name(device)
    return table.assign(threads=threads, device=device_name)


def as_settings(models, precision="float32"):
    """Return {name: Setting} of {name: model or Setting}."""
    settings = {}
    for name, model in models.items():
        is_setting = isinstance(model, Setting)
        settings[name] = model if is_setting else Setting(model, precision=precision)
    return settings


@contextmanager
def on_threads(threads):
    """Run torch on so many CPU threads inside (None: as it is), and yield their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _runnable(setting, device):
    """Return what takes images to logits in the setting's runtime."""
    if setting.runtime == "onnxruntime":
        if device.type != "cpu":
            raise ValueError(f"onnxruntime is timed on the CPU; the first model is on {device}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            export.to_onnx(setting.model, path)
            return export.Session(path)  # which has read the file when it is made
    model = _converted(setting, device)
    return _compiled(model) if setting.runtime == "compiled" else model


def _compiled(model):
    # isolated: or all models of a class share eight compilations, and the ninth runs eagerly
    # without a word
    return torch.compile(copy.deepcopy(model), isolate_recompiles=True)


def _converted(setting, device):
    """Return the model in eval mode on a device in its precision: a copy, if it is not so yet."""
    model = setting.model
    dtype = PRECISIONS[setting.precision]
    first = next(model.parameters())
    is_ready = (first.device, first.dtype) == (device, dtype)
    if model.training or not is_ready:
        model = copy.deepcopy(model).to(device, dtype).eval()
    return model


def _images(setting, image_size, batch, device):
    """Return a batch of random images, the same ones for all models of a size."""
    shape = cost.input_shape(setting.model, image_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *shape, generator=generator)
    return images.to(device, PRECISIONS[setting.precision])


def ready(setting, image_size, batch, device=None):
    """Return the model as `_converted` and a batch of images, on a device (None: its own)."""
    device = device or next(setting.model.parameters()).device
    images = _images(setting, image_size, batch, device)
    return _converted(setting, device), images


@torch.inference_mode()
def _rounds(calls, repeats, seconds, warmup, device):
    """Return the milliseconds of each call in each round, a frame [rounds, calls]."""
    for call in calls.values():
        repeat(call, warmup)
    order = list(calls)
    shuffle = random.Random(0).shuffle
    rounds = []
    end = time.perf_counter() + seconds
    while len(rounds) < repeats and (len(rounds) < 3 or time.perf_counter() < end):
        shuffle(order)
        rounds.append({name: milliseconds(calls[name], device) for name in order})
    return pd.DataFrame(rounds, columns=list(calls))


def milliseconds(call, device):
    start = _now(device)
    call()
    return 1000 * (_now(device) - start)


def _now(device):
    """Return the time in seconds when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _summary(milliseconds, batch):
    """Return medians, quartiles and paired speed-ups of milliseconds, a frame [rounds, models]."""
    table = pd.DataFrame({"model": milliseconds.columns})
    times = milliseconds.quantile(_QUARTILES)
    table[["latency_q1", "latency_ms", "latency_q3"]] = times.T.to_numpy()
    table["image_ms"] = table.latency_ms / batch
    table["images_per_s"] = 1000 * batch / table.latency_ms
    ratios = milliseconds.rdiv(milliseconds.iloc[:, 0], axis=0)  # within rounds
    table[["speedup_q1", "speedup", "speedup_q3"]] = ratios.quantile(_QUARTILES).T.to_numpy()
    return table.assign(rounds=len(milliseconds))


def repeat(call, times):
    for _ in range(times):
        call()


# -- latency by layer


@parallel.first_decides
def layer_times(model, table, *, batch=8, image_size=None, repeats=7):
    """Return the milliseconds of one batch by layer: where the time of a model goes.

    A layer's time is that of its module. What an attention takes beside its layers is shared by its
    two products. What an MLP takes beside its layers (the activation) counts for fc1. What is left
    of the whole model stands in the last line, "rest".

    model: the model, on its own device
    table: cost.breakdown of the model
    batch: images in the batch
    image_size: side in pixels, None for the model's own
    repeats: passes to take the median of
    Returns an array with a value for each line of table.
    """
    model, images = ready(Setting(model), image_size, batch)
    modules = dict(model.named_modules())
    names = [name for name in table.layer if name in modules]
    parents = {name.rpartition(".")[0] for name in names}
    outer = sorted(name for name in parents if name.endswith((".attn", ".mlp")))
    measured = [*names, *outer, ""]
    _module_times(model, images, measured)  # warms up
    passes = [_module_times(model, images, measured) for _ in range(repeats)]
    medians = pd.DataFrame(passes).median()
    times = medians.reindex(table.layer, fill_value=0.0)
    for name in outer:
        inside = [layer for layer in names if layer.startswith(f"{name}.")]
        left = max(0.0, medians[name] - times[inside].sum())
        receivers = [f"{name}.fc1"]
        if name.endswith("attn"):
            receivers = [f"{name}.qk", f"{name}.av"]
        times[receivers] += left / len(receivers)
    times["rest"] = max(0.0, medians[""] - times.sum())
    return times.to_numpy()


@torch.inference_mode()
def _module_times(model, images, names):
    """Return {name: milliseconds} of modules in one pass; "" is the whole model."""
    started, times = {}, {}

    def start(name, *_):
        started[name] = _now(images.device)

    def stop(name, *_):
        times[name] = 1000 * (_now(images.device) - started[name])

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            before = module.register_forward_pre_hook(functools.partial(start, name))
            after = module.register_forward_hook(functools.partial(stop, name))
            hooks.enter_context(before)
            hooks.enter_context(after)
        model(images)
    return times


# -- speed by rank


@parallel.first_decides
def rank_speed(model, *, batch=64, multiple=8, steps=8, repeats=15, seconds=5):
    """Measure how fast each linear layer and convolution of the stem is when factored.

    Each layer runs dense and factored at several ranks, on the inputs that it sees in a batch of
    the model. Layers of one shape share a measurement. They are timed as in `latency`, in float32,
    where the model is.

    model: the model
    batch: images in the batch
    multiple: ranks are multiples of it
    steps: how many ranks at most, spread evenly up to the one that saves no MACs
    repeats, seconds: the arguments of `latency`

    Returns a frame with a row for each layer and rank:
        layer: name
        kind: "linear" or "convolution"
        m, n: shape of its weight
        positions: rows of its input, tokens or pixels of the whole batch
        rank, break_even: the rank, and the one that saves no MACs
        speedup, speedup_q1, speedup_q3: how many times as fast as dense, median and quartiles
        promised, achieved: the speed-up by MACs, and speedup / promised
    Raises ValueError for a model without a plain layer.
    """
    matrices = models.view(model).matrices
    plain = {name: layer for name, layer in matrices.items() if _is_plain(layer)}
    if not plain:
        raise ValueError("no linear layer or convolution of the stem is plain: nothing to factor")
    inputs = _inputs(model, plain, batch)
    names_by_shape = {}
    for name, x in inputs.items():
        shape = repr(plain[name]), x.shape, x.stride()
        names_by_shape.setdefault(shape, []).append(name)
    tables = {}
    for names in names_by_shape.values():
        layer = plain[names[0]]
        ranks = _ranks_to_time(layer, multiple, steps)
        table = _rank_times(layer, inputs[names[0]], ranks, repeats, seconds)
        tables |= dict.fromkeys(names, table)
    table = pd.concat(tables, names=["layer"])
    return table.reset_index("layer").reset_index(drop=True)


def _is_plain(layer):
    if type(layer) is nn.Conv2d:
        return layer.groups == 1
    return type(layer) is nn.Linear


def _inputs(model, layer_by_name, batch):
    """Return {name: input} of layers in one pass of a batch, in the order of the layers."""
    inputs = {}

    def keep(name, _, arguments):
        inputs.setdefault(name, arguments[0].detach())

    with ExitStack() as hooks, torch.no_grad():  # the hooks end here, or they would be timed
        for name, layer in layer_by_name.items():
            hook = layer.register_forward_pre_hook(functools.partial(keep, name))
            hooks.enter_context(hook)
        model, images = ready(Setting(model), None, batch)
        model(images)
    return {name: inputs[name] for name in layer_by_name if name in inputs}  # SwinV2 calls not all


def _ranks_to_time(layer, multiple, steps):
    """Return up to so many ranks below the break-even one, multiples where there is room."""
    break_even_rank = layers.break_even_rank(*layer.weight.flatten(1).shape)
    most = max(1, math.ceil(break_even_rank) - 1)
    multiple = multiple if most >= multiple else 1
    spread = most * np.arange(1, steps + 1) / steps
    ranks = multiple * (spread / multiple).round().clip(1).astype(int)
    return np.unique(ranks[ranks < break_even_rank]).tolist() or [1]


def _rank_times(layer, x, ranks, repeats, seconds):
    """Return a frame of the speed-ups of a layer at some ranks, on input x."""
    layer = copy.deepcopy(layer).to(x)
    is_conv = isinstance(layer, nn.Conv2d)
    m, n = layer.weight.flatten(1).shape
    calls = {"dense": functools.partial(layer, x)}
    for rank in ranks:
        factored = _factored(layer, rank).to(x)
        calls[rank] = functools.partial(factored, x)
    milliseconds = _rounds(calls, repeats, seconds, warmup=2, device=x.device)
    speed = _summary(milliseconds, batch=1)
    table = pd.DataFrame(
        {
            "kind": "convolution" if is_conv else "linear",
            "m": m,
            "n": n,
            "positions": x.numel() // x.shape[1 if is_conv else -1],
            "rank": ranks,
            "break_even": layers.break_even_rank(m, n),
        }
    )
    columns = ["speedup", "speedup_q1", "speedup_q3"]
    table[columns] = speed.loc[1:, columns].to_numpy()  # without the dense one
    table["promised"] = table.break_even / table["rank"]
    table["achieved"] = table.speedup / table.promised
    return table


def _factored(layer, rank):
    if isinstance(layer, nn.Conv2d):
        return layers.FactoredConv2d(layer, rank=rank)
    has_bias = layer.bias is not None
    return layers.FactoredLinear(layer.in_features, layer.out_features, rank=rank, bias=has_bias)


def break_even(table):
    """Return up to which rank each layer is faster factored than dense.

    Faster means that the lower quartile of the speed-ups is above 1. These limits are what makes
    factoring faster in time, not in MACs alone: give them to budget.plan and ranks.allocate (most=…).
    The same share of every layer, or ranks without limits, are baselines.

    table: the frame of `rank_speed`
    Returns {layer: the highest such rank, 0 for none}.
    """
    limits = {}
    for name, rows in table.groupby("layer", sort=False):
        rows = rows.sort_values("rank")
        is_faster = (rows.speedup_q1 > 1).cummin()  # up to the first rank that is not
        limits[name] = int(rows["rank"].where(is_faster, 0).max())
    return limits


# -- memory


def memory_mb(model, *, image_size=None, batch=64, precision="float32", device="cpu", threads=None):
    """Measure the peak memory of one inference in a process of its own, in MB (10^6 bytes).

    It is the memory of weights, images and activations, with timm's default attention. On a CPU it
    is the resident memory above that of a process that has run a tiny transformer. On a GPU it is
    torch.cuda.max_memory_allocated.

    model: a model, the folder of a checkpoint, or {name: either}
    image_size, batch, precision, device, threads: the arguments of `latency`
    Returns MB, or {name: MB}, which is sooner there than one by one.
    Raises what `checkpoint.read` raises, and RuntimeError with the last line of the process if it
    fails.
    """
    models = model if isinstance(model, dict) else {"": model}
    options = {
        "image-size": image_size,
        "batch": batch,
        "precision": precision,
        "device": device,
        "threads": threads,
    }
    command = [sys.executable, "-m", "vitlab.evaluation.bench"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    with tempfile.TemporaryDirectory() as scratch:
        for i, one in enumerate(models.values()):
            folder = one
            if isinstance(one, nn.Module):
                folder = Path(scratch, str(i))
                checkpoint.save(one, folder)
            checkpoint.read(folder)  # a broken one is an error here, not in the process
            command.append(str(folder))
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no output"])[-1]
        raise RuntimeError(f"python {' '.join(command[1:])} failed: {reason}")
    peaks = dict(zip(models, json.loads(done.stdout)["memory_mb"], strict=True))
    return peaks if isinstance(model, dict) else peaks[""]


def _memory_here(folder, *, image_size, batch, precision, device, threads):
    """Return the peak MB of one inference in this process, which has run nothing before."""
    torch.set_num_threads(threads or torch.get_num_threads())
    with torch.inference_mode():  # libraries come in at first use: not the model's memory
        stem = nn.Conv2d(3, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(
            32, 2, dim_feedforward=64, activation="gelu", batch_first=True
        )
        layer.eval()(stem(torch.zeros(2, 3, 16, 16)).flatten(2).mT)
    before = psutil.Process().memory_info().rss
    device = torch.device(device)
    setting = Setting(checkpoint.load(folder), precision=precision)
    model, images = ready(setting, image_size, batch, device)
    del setting  # and with it the weights as they were loaded, where they were converted
    memory.release_memory()  # or what they took stays resident in some processes and not in others
    memory.reset_peak_memory()  # forget the peak of loading, which holds the weights twice
    with torch.inference_mode():
        model(images)
    peak = memory.peak_memory_mb(device)
    return peak if images.is_cuda else peak - before / 1e6


def main():
    """Print as JSON the peak memory of one inference with each checkpoint, in new processes."""
    parser = argparse.ArgumentParser(
        prog="python -m vitlab.evaluation.bench", description=main.__doc__
    )
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = vars(parser.parse_args())
    # this process only imports: where forking is safe its children start in no time and are as
    # good as new
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    peaks = []
    for folder in options.pop("folders"):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(_memory_here, (folder,), options))
    print(json.dumps({"memory_mb": peaks}))


if __name__ == "__main__":
    main()
