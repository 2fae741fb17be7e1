"""Measure models: latency side by side, time by layer, speed by rank, and memory.

Public: EXPORTED, PRECISIONS, Setting, as_settings, break_even, latency, layer_times, memory_mb,
milliseconds, rank_speed, read_by, ready, runnable.
"""

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from vitlab import files, models, names, parallel
from vitlab.evaluation import cost, evaluate, export, memory
from vitlab.models import _layers, anatomy, checkpoint

# -- latency

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
EXPORTED = ("onnxruntime", "openvino")  # runtimes of files, on CPUs here
_OTHERS = {  # precisions of files beside float32
    "onnxruntime": ("int8", "int8-dynamic"),
    "openvino": ("bf16", "int8", "int8-bf16"),
}
_RUNTIMES = ("eager", "compiled", *EXPORTED)
_QUARTILES = [0.25, 0.5, 0.75]


@dataclass(frozen=True)
class Setting:
    """Say which model is run, and how.

    model: the model
    runtime: "eager", "compiled" (torch.compile), or "onnxruntime" or "openvino" (on CPUs)
    precision: "float32" or "bf16", to which weights and images are converted; of onnxruntime
        "float32", "int8" or "int8-dynamic"; of openvino "float32", "bf16", "int8" or "int8-bf16",
        which computes in bf16 what is not in int8, and reads images in float32
    run: what takes images to logits there, as runtimes.settings makes it. None: it is made of the
        model, but not in int8, which is calibrated by images
    Raises ValueError for another runtime or precision, and where the runtime has no such precision.
    """

    model: nn.Module
    runtime: str = "eager"
    precision: str = "float32"
    run: Callable | None = None

    def __post_init__(self):
        names.check("runtime", self.runtime, _RUNTIMES)
        others = _OTHERS.get(self.runtime)
        if others and self.precision in {*PRECISIONS} - {*others, "float32"}:
            raise ValueError(f"{self.runtime} has no {self.precision} on a CPU; run it in float32")
        names.check("precision", self.precision, ["float32", *others] if others else PRECISIONS)


@parallel.first_decides
def latency(models, *, batch=64, repeats=30, seconds=60, precision="float32", device=None):
    """Measure the inference time of several models together, each at its own image size.

    models: {name: model or Setting}
    batch: images, or a list of such numbers, timed one after the other
    repeats: rounds to run at most
    seconds: time after which no more rounds start, once there are three
    precision: of models that are no Setting, which run eagerly
    device: where to run, None for where the first model is

    Returns a frame with a row for each batch and model:
        model: name
        latency_q1, latency_ms, latency_q3: quartiles and median of a batch, in milliseconds
        image_ms: milliseconds of one image
        images_per_s: images in a second
        speedup_q1, speedup, speedup_q3: how many times as fast as the first model, quartiles and
            median over rounds
        here_q1, here, here_q3: the same beside the first model in the result's own runtime and
            precision; nan where that was not timed
        rounds: how many there were
        batch, image_size, runtime, precision, threads, device
    Raises ValueError for no models, unknown precisions, and runtimes of files off the CPU.
    """
    if not models:
        raise ValueError("no models to time; give {name: model}")
    settings = as_settings(models, precision)
    first = next(iter(settings.values())).model
    device = torch.device(device or evaluate.device_of(first))
    # Exporting and compiling are done here, before the clock runs: they are not in the times.
    runnables = {name: runnable(setting, device) for name, setting in settings.items()}
    beside = _beside(settings)
    ways = pd.DataFrame(
        {
            "image_size": [cost.input_shape(s.model)[-1] for s in settings.values()],
            "runtime": [s.runtime for s in settings.values()],
            "precision": [s.precision for s in settings.values()],
        }
    )
    tables = []
    for size in np.atleast_1d(batch).tolist():
        calls = {}
        for name, run in runnables.items():
            images = _images(settings[name], size, device)
            calls[name] = functools.partial(run, images)
        table = _summary(_rounds(calls, repeats, seconds, device), size, beside)
        tables.append(table.assign(batch=size).join(ways))
    device_name = device.type
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    table = pd.concat(tables, ignore_index=True)
    return table.assign(threads=torch.get_num_threads(), device=device_name)


def as_settings(models, precision="float32"):
    """Return {name: Setting} of {name: model or Setting}."""
    settings = {}
    for name, model in models.items():
        is_setting = isinstance(model, Setting)
        settings[name] = model if is_setting else Setting(model, precision=precision)
    return settings


def _beside(settings):
    """Return {name: name of the first model in the same runtime and precision, if it is there}."""
    first = next(iter(settings.values())).model
    dense = {(s.runtime, s.precision): name for name, s in settings.items() if s.model is first}
    return {name: dense.get((s.runtime, s.precision)) for name, s in settings.items()}


def runnable(setting, device):
    """Return what takes images to logits in the setting's runtime, on a device.

    Raises ValueError for a runtime of files off the CPU, and for int8 that is not made yet.
    """
    if setting.runtime in EXPORTED and device.type != "cpu":
        raise ValueError(f"{setting.runtime} is timed on the CPU; the first model is on {device}")
    if setting.run:
        return setting.run
    if setting.runtime in EXPORTED:
        if "int8" in setting.precision:
            raise ValueError("int8 is calibrated by images: runtimes.settings makes it")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            export.to_onnx(setting.model, path)
            # It has read the file when it is made.
            return export.session(path, setting.runtime, bf16=setting.precision == "bf16")
    model = _converted(setting, device)
    if setting.runtime == "compiled":
        # torch.compile works twice: for the first batch, and then once for any number of images.
        # It is isolated: or all models of a class share eight compilations, and the ninth runs
        # eagerly without a word.
        model = torch.compile(model, isolate_recompiles=True)
    return model


def _converted(setting, device):
    """Return a copy of the model in eval mode, on a device in its precision."""
    model = anatomy.copied(setting.model)  # the model itself stays as it is
    return model.to(device, PRECISIONS[setting.precision]).eval()


def _images(setting, batch, device):
    """Return a batch of random images, the same ones for all models of a size."""
    shape = cost.input_shape(setting.model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *shape, generator=generator)
    return images.to(device, read_by(setting))


def read_by(setting):
    """Return the dtype of the images that a setting reads."""
    return torch.float32 if setting.runtime in EXPORTED else PRECISIONS[setting.precision]


def ready(setting, batch, device=None):
    """Return a copy of the model and a batch of images for it, on a device (None: its own)."""
    device = device or evaluate.device_of(setting.model)
    return _converted(setting, device), _images(setting, batch, device)


@torch.inference_mode()
def _rounds(calls, repeats, seconds, device):
    """Return the milliseconds of each call in each round, a frame [rounds, calls]."""
    for call in calls.values():
        milliseconds(call, device, times=2)  # warms up
    order = list(calls)
    shuffle = random.Random(0).shuffle
    rounds = []
    end = time.perf_counter() + seconds
    for _ in files.progress(range(repeats), "timing"):
        if len(rounds) >= 3 and time.perf_counter() > end:
            break
        # In every round each model runs one batch, in a new random order: whatever else the machine
        # does falls on all of them.
        shuffle(order)
        rounds.append({name: milliseconds(calls[name], device) for name in order})
    return pd.DataFrame(rounds, columns=list(calls))


def milliseconds(call, device, times=1):
    """Return how long so many calls take, one after the other."""
    start = _now(device)
    for _ in range(times):
        call()
    return 1000 * (_now(device) - start)


def _now(device):
    """Return the time in seconds when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _summary(milliseconds, batch, beside=()):
    """Return medians, quartiles and paired speed-ups of milliseconds, a frame [rounds, models]."""
    table = pd.DataFrame({"model": milliseconds.columns})
    times = milliseconds.quantile(_QUARTILES)
    table[["latency_q1", "latency_ms", "latency_q3"]] = times.T.to_numpy()
    table["image_ms"] = table.latency_ms / batch
    table["images_per_s"] = 1000 * batch / table.latency_ms
    # Ratios are taken within rounds: a slow spell of the machine hits both sides of a ratio.
    ratios = milliseconds.rdiv(milliseconds.iloc[:, 0], axis=0)
    table[["speedup_q1", "speedup", "speedup_q3"]] = ratios.quantile(_QUARTILES).T.to_numpy()
    if beside:
        dense = milliseconds.reindex(columns=[beside[name] for name in milliseconds])
        ratios = dense.to_numpy() / milliseconds
        table[["here_q1", "here", "here_q3"]] = ratios.quantile(_QUARTILES).T.to_numpy()
    return table.assign(rounds=len(milliseconds))


# -- latency by layer


@parallel.first_decides
def layer_times(model, table, *, batch=8):
    """Return the milliseconds of one batch by layer, which say where the time of a model goes.

    model: the model, on its own device
    table: cost.breakdown of the model
    batch: images in the batch
    Returns an array with a value for each line of table, the median over seven passes.
    """
    model, images = ready(Setting(model), batch)
    modules = dict(model.named_modules())
    layer_names = [name for name in table.layer if name in modules]
    parents = {name.rpartition(".")[0] for name in layer_names}
    outer = sorted(name for name in parents if name.endswith((".attn", ".mlp")))
    measured = {modules[name]: name for name in [*layer_names, *outer, ""]}
    passes = [_module_times(model, images, measured) for _ in range(8)]
    medians = pd.DataFrame(passes[1:]).median()  # the first one warms up
    # A layer's time is that of its module.
    times = medians.reindex(table.layer, fill_value=0.0)
    for name in outer:
        left = max(0.0, medians[name] - times.filter(like=f"{name}.").sum())
        # What an attention takes beside its layers is shared by its two products. What an MLP takes
        # beside its layers (the activation) counts for fc1.
        receivers = ["qk", "av"] if name.endswith("attn") else ["fc1"]
        times[[f"{name}.{receiver}" for receiver in receivers]] += left / len(receivers)
    # What is left of the whole model stands in the last line.
    times["rest"] = max(0.0, medians[""] - times.sum())
    return times.to_numpy()


@torch.inference_mode()
def _module_times(model, images, name_by_module):
    """Return {name: milliseconds} of modules in one pass."""
    started = {}
    times = {}

    def start(module, inputs):
        if module in name_by_module:
            started[module] = _now(images.device)

    def stop(module, inputs, output):
        if module in name_by_module:
            times[name_by_module[module]] = 1000 * (_now(images.device) - started[module])

    with register_module_forward_pre_hook(start), register_module_forward_hook(stop):
        model(images)
    return times


# -- speed by rank


@parallel.first_decides
def rank_speed(model, *, batch=64, repeats=15):
    """Measure how fast each linear layer and convolution of the stem is when factored.

    Each layer runs dense and factored at several ranks, timed as in `latency`, in float32, where
    the model is.

    model: the model
    batch: images in the batch
    repeats: rounds to run at most

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
    # Layers of one shape share a measurement.
    names_by_shape = {}
    for name, x in inputs.items():
        shape = repr(plain[name]), x.shape, x.stride()
        names_by_shape.setdefault(shape, []).append(name)
    tables = {}
    for layer_names in names_by_shape.values():
        first = layer_names[0]
        table = _rank_times(plain[first], inputs[first], repeats)
        tables |= dict.fromkeys(layer_names, table)
    table = pd.concat(tables, names=["layer"])
    return table.reset_index("layer").reset_index(drop=True)


def _is_plain(layer):
    return type(layer) in (nn.Linear, nn.Conv2d) and getattr(layer, "groups", 1) == 1


def _inputs(model, layer_names, batch):
    """Return {name: input} of layers in one pass of a batch, in the order of the layers."""
    model, images = ready(Setting(model), batch)
    name_by_layer = {model.get_submodule(name): name for name in layer_names}
    inputs = {}

    def keep(layer, arguments):
        if layer in name_by_layer:
            inputs.setdefault(name_by_layer[layer], arguments[0].detach())

    # The hook ends here, or it would be timed.
    with register_module_forward_pre_hook(keep), torch.no_grad():
        model(images)
    return {name: inputs[name] for name in layer_names if name in inputs}  # SwinV2 calls not all


def _ranks_to_time(layer, multiple=8, steps=8):
    """Return up to so many ranks below the break-even one, multiples where there is room."""
    break_even_rank = _layers.break_even_rank(*layer.weight.flatten(1).shape)
    most = max(1, math.ceil(break_even_rank) - 1)
    multiple = multiple if most >= multiple else 1
    # They are spread evenly up to the one that saves no MACs.
    spread = most * np.arange(1, steps + 1) / steps
    ranks = multiple * (spread / multiple).round().clip(1).astype(int)
    return np.unique(ranks[ranks < break_even_rank]).tolist() or [1]


def _rank_times(layer, x, repeats):
    """Return a frame of the speed-ups of a layer at some ranks, on input x."""
    layer = copy.deepcopy(layer).to(x)
    is_conv = isinstance(layer, nn.Conv2d)
    m, n = layer.weight.flatten(1).shape
    ranks = _ranks_to_time(layer)
    calls = {"dense": functools.partial(layer, x)}
    for rank in ranks:
        factored = _factored(layer, rank).to(x)
        calls[rank] = functools.partial(factored, x)
    rounds = _rounds(calls, repeats, 5, x.device)  # after 5 seconds no more rounds start
    speed = _summary(rounds, batch=1)
    table = pd.DataFrame(
        {
            "kind": "convolution" if is_conv else "linear",
            "m": m,
            "n": n,
            "positions": x.numel() // x.shape[1 if is_conv else -1],
            "rank": ranks,
            "break_even": _layers.break_even_rank(m, n),
        }
    )
    columns = ["speedup", "speedup_q1", "speedup_q3"]
    table[columns] = speed.loc[1:, columns].to_numpy()  # without the dense one
    table["promised"] = table.break_even / table["rank"]
    table["achieved"] = table.speedup / table.promised
    return table


def _factored(layer, rank):
    if isinstance(layer, nn.Conv2d):
        return _layers.FactoredConv2d(layer, rank=rank)
    return _layers.build(_layers.config(layer) | {"type": "FactoredLinear", "rank": rank})


def break_even(table):
    """Return up to which rank each layer is faster factored than dense.

    table: the frame of `rank_speed`
    Returns {layer: the highest such rank, 0 for none}.
    """
    # These limits are what makes factoring faster in time, not in MACs alone: give them to
    # budget.plan (most=…). The same share of every layer, or ranks without limits, are baselines.
    limits = {}
    for name, lines in table.groupby("layer", sort=False):
        lines = lines.sort_values("rank")
        # Faster means that the lower quartile of the speed-ups is above 1. The first rank that is
        # not faster ends the search, whatever comes after it.
        is_faster = (lines.speedup_q1 > 1).cummin()
        limits[name] = int(lines["rank"].where(is_faster, 0).max())
    return limits


# -- memory


def memory_mb(models, *, batch=64, precision="float32", device="cpu"):
    """Measure the peak memory of one inference, each model in a process of its own.

    It is the memory of weights, images and activations, with timm's default attention.

    models: {name: a model, or the folder of a checkpoint}
    batch: images
    precision, device: how and where to run
    Returns {name: MB}, of 10^6 bytes.
    Raises what `checkpoint.read` raises, and RuntimeError with the last line of the process if it
    fails.
    """
    options = {
        "batch": batch,
        "precision": precision,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    command = ["-m", "vitlab.evaluation.bench", json.dumps(options)]
    with tempfile.TemporaryDirectory() as scratch:
        for i, model in enumerate(models.values()):
            folder = model
            if isinstance(model, nn.Module):
                folder = Path(scratch, str(i))
                checkpoint.save(model, folder)
            checkpoint.read(folder)  # a broken one is an error here, not in the process
            command.append(str(folder))
        said = Path(scratch, "said")  # a pipe that nobody reads would fill up
        pipes = {"stdout": subprocess.PIPE, "text": True}
        with (
            said.open("w") as to,
            subprocess.Popen([sys.executable, *command], stderr=to, **pipes) as process,
        ):
            lines = files.progress(process.stdout, "measuring memory", total=len(models))
            peaks = [json.loads(line) for line in lines]
        if process.returncode:
            reason = said.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"python {' '.join(command)} failed: {reason}")
    return dict(zip(models, peaks, strict=True))


def _memory_here(folder, *, batch, precision, device, threads):
    """Return the peak MB of one inference in this process, which has run nothing before."""
    torch.set_num_threads(threads)
    # On a CPU it is the resident memory above that of a process that has run a tiny transformer:
    # libraries come in at first use, and are not the model's memory.
    with torch.inference_mode():
        tiny = models.create("conv_vit", num_classes=2, image_size=16, depth=1, embed_dim=32)
        tiny.eval()(torch.zeros(2, 3, 16, 16))
    memory.reset_peak_memory()
    before = memory.peak_memory_mb("cpu")  # what is resident now
    # Nothing holds the weights as they were loaded once the model is converted.
    model, images = ready(Setting(checkpoint.load(folder), precision=precision), batch, device)
    memory.release_memory()  # or what they took stays resident in some processes and not in others
    memory.reset_peak_memory()  # forget the peak of loading, which holds the weights twice
    with torch.inference_mode():
        model(images)
    # On a GPU it is torch.cuda.max_memory_allocated.
    peak = memory.peak_memory_mb(device)
    return peak if images.is_cuda else peak - before


def _main():
    """Print the peak memory of one inference with each checkpoint, a line each, in new processes.

    The command line holds the options of `_memory_here` as JSON, and the checkpoints' folders.
    """
    _, options, *folders = sys.argv
    measure = functools.partial(_memory_here, **json.loads(options))
    # This process only imports. Where Python forks, its children start in no time and are as good
    # as new; each measures one checkpoint.
    with multiprocessing.Pool(1, maxtasksperchild=1) as pool:
        for peak in pool.imap(measure, folders):
            print(json.dumps(peak), flush=True)


if __name__ == "__main__":
    _main()
