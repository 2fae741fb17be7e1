"""Benchmarks: models side by side in several runtimes, what bounds them, memory in a process of its own."""

import argparse
import contextlib
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import checkpoint, cost, export, layers, lowrank, parallel
from . import models as vit_models

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
RUNTIMES = ("eager", "compiled", "onnxruntime")
ZEROS = "unstructured zeros in dense tensors: no gain expected"
ROWS = "zeros of whole rows in dense tensors: no gain until removed"
FREE = {getattr(torch.ops.aten, name) for name in ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty")}
SIZES = (10**5, 10**6, 10**7, 10**8)  # bytes of one operation, at which the memory's rate is measured


@dataclass(frozen=True)
class Setting:
    """A model and how it is run: "eager", "compiled" (torch.compile, once for the first batch and once for any number
    of images) or "onnxruntime" (on CPUs, in float32), with weights and images in float32 or converted to bf16."""

    model: nn.Module
    runtime: str = "eager"
    precision: str = "float32"

    def __post_init__(self):
        for kind, name, known in (("runtime", self.runtime, RUNTIMES), ("precision", self.precision, PRECISIONS)):
            if name not in known:
                raise ValueError(f"unknown {kind} {name!r}; known are {', '.join(known)}")
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
    """Inference time of models ({name: model or Setting}) measured together: a frame with a row per batch and model.

    In every round each model runs one batch, in a new random order, so that whatever else the machine does
    falls on all of them; ratios are taken within rounds. Ends after `repeats` rounds, or after `seconds` and
    at least three rounds. Exporting and compiling are not in the times.

    image_size: None for each model's own. batch: images, or a list of such numbers, timed one after the other.
    precision: of models that are no Setting, which run eagerly. device: None for where the first model is.
    threads: CPU threads, None for torch's setting.

    Columns: model; latency_ms, latency_q1, latency_q3 (median and quartiles per batch), image_ms (per image),
    images_per_s; speedup, speedup_q1, speedup_q3 (times as fast as the first model, median and quartiles over
    rounds); rounds, batch, threads, runtime, precision, image_size, device.
    Raises ValueError for no models, unknown precisions and onnxruntime off the CPU, and what `cost.input_shape` raises.
    """
    if not models:
        raise ValueError("no models to time; give {name: model}")
    settings = _settings(models, precision)
    device = torch.device(device or next(next(iter(settings.values())).model.parameters()).device)
    tables = []
    with contextlib.ExitStack() as stack, _on_threads(threads) as threads:
        calls = {name: _callable(setting, device, stack) for name, setting in settings.items()}
        for size in batch if isinstance(batch, list | tuple) else [batch]:
            runs = {name: (calls[name], _images(s, image_size, size, device)) for name, s in settings.items()}
            milliseconds = _rounds(runs, repeats=repeats, seconds=seconds, warmup=warmup, device=device)
            sides = [images.shape[-1] for _, images in runs.values()]
            tables.append(_summary(milliseconds, size).assign(batch=size, image_size=sides))
    table = pd.concat(tables, ignore_index=True)
    for column in ("runtime", "precision"):
        table[column] = [getattr(settings[name], column) for name in table.model]
    return table.assign(
        threads=threads,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _settings(models, precision="float32"):
    return {name: m if isinstance(m, Setting) else Setting(m, precision=precision) for name, m in models.items()}


@contextlib.contextmanager
def _on_threads(threads):
    """torch on so many CPU threads within (None: as it is); gives their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _callable(setting, device, stack):
    """What takes images to logits. stack: keeps the file of an exported model until it is closed."""
    if setting.runtime == "onnxruntime":
        if device.type != "cpu":
            raise ValueError(f"onnxruntime is timed on the CPU; the first model is on {device}")
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "model.onnx")
        export.to_onnx(setting.model, path)
        return export.Session(path)
    model = _converted(setting, device)
    return _compiled(model) if setting.runtime == "compiled" else model


def _compiled(model):
    # isolated: or all models of a class share eight compilations, and the ninth runs eagerly without a word
    return torch.compile(copy.deepcopy(model), isolate_recompiles=True)


def _converted(setting, device):
    """The model in eval mode on device in its precision; a copy where it is not yet."""
    model, dtype = setting.model, PRECISIONS[setting.precision]
    first = next(model.parameters())
    if model.training or (first.device, first.dtype) != (device, dtype):
        model = copy.deepcopy(model).to(device, dtype).eval()
    return model


def _images(setting, image_size, batch, device):
    """A batch of random images, the same ones for all models of a size."""
    shape = cost.input_shape(setting.model, image_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *shape, generator=generator).to(device, PRECISIONS[setting.precision])


@torch.inference_mode()
def _rounds(runs, *, repeats, seconds, warmup, device):
    """Milliseconds of each model in each round, a frame [rounds, models]."""
    for model, images in runs.values():
        for _ in range(warmup):
            model(images)
    order, shuffle, rows = list(runs), random.Random(0).shuffle, []
    end = time.perf_counter() + seconds
    while len(rows) < repeats and (len(rows) < 3 or time.perf_counter() < end):
        shuffle(order)
        rows.append({name: _milliseconds(*runs[name], device) for name in order})
    return pd.DataFrame(rows, columns=list(runs))


def _milliseconds(model, images, device):
    _synchronize(device)
    start = time.perf_counter()
    model(images)
    _synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(milliseconds, batch):
    """Medians, quartiles and paired speed-ups of a frame [rounds, models] of milliseconds."""
    times = milliseconds.quantile([0.25, 0.5, 0.75]).to_numpy()
    ratios = milliseconds.rdiv(milliseconds.iloc[:, 0], axis=0)
    speedups = ratios.quantile([0.25, 0.5, 0.75]).to_numpy()
    table = {"model": milliseconds.columns}
    table |= dict(zip(("latency_q1", "latency_ms", "latency_q3"), times, strict=True))
    table |= {"image_ms": times[1] / batch, "images_per_s": 1000 * batch / times[1]}
    table |= dict(zip(("speedup_q1", "speedup", "speedup_q3"), speedups, strict=True))
    return pd.DataFrame(table | {"rounds": len(milliseconds)})


# -- why


class Traffic(TorchDispatchMode):
    """Counts what runs within: `operations`, and `bytes`, of all tensors that each reads or writes. Views and memory
    that nothing is written to yet are free."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not function.is_view and function.overloadpacket not in FREE:
            self.operations += 1
            tensors = torch.utils._pytree.tree_leaves((arguments, options, result))
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return result


@functools.lru_cache
def ceilings(device="cpu", precision="float32", threads=None):
    """What this machine can do at best, measured once in a process: {"macs_per_s", "launch_s", "bytes_per_s"}.

    macs_per_s: of the fastest square matrix product of three sizes, by torch's matmul or its convolution. launch_s:
    seconds of one small module, which are all call and no work. bytes_per_s: {bytes read and written: rate} of scaling
    a tensor, for SIZES, as caches make small ones faster. threads: CPU threads, None for torch's setting.
    """
    device, dtype = torch.device(device), PRECISIONS[precision]
    sides = (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048)
    macs_per_s, bytes_per_s = 0, {}
    with _on_threads(threads):
        for side in sides:
            x, y = torch.randn(2, side, side, device=device).to(dtype)
            # 1 x 1 convolution is the same product by another library: on some processors twice as fast
            conv = nn.Conv2d(side, side, 1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            image = x.view(1, side, 32, -1).contiguous(memory_format=torch.channels_last)
            for product in (lambda x=x, y=y: x @ y, lambda conv=conv, image=image: conv(image)):
                macs_per_s = max(macs_per_s, side**3 / _least_seconds(product, device))
        for size in SIZES:
            x = torch.randn(size // (2 * dtype.itemsize), device=device).to(dtype)
            y, times = torch.empty_like(x), max(1, 10**7 // size)
            scale = functools.partial(_repeat, lambda x=x, y=y: torch.mul(x, 2, out=y), times)
            bytes_per_s[size] = times * size / _least_seconds(scale, device)
        small = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)).to(device, dtype)
        x = torch.randn(1, 8, device=device).to(dtype)
        launch_s = _least_seconds(lambda: _repeat(lambda: small(x), 100), device) / 300
    return {"macs_per_s": macs_per_s, "launch_s": launch_s, "bytes_per_s": bytes_per_s}


def _repeat(call, times):
    for _ in range(times):
        call()


@torch.inference_mode()
def _least_seconds(call, device, rounds=8):
    call()
    return min(_milliseconds(lambda _: call(), None, device) for _ in range(rounds)) / 1000


def bounds(models, table, *, image_size=None):
    """table, as `latency` returned it of the same models, with what bounds each row on this machine: a roofline.

    batch_macs, batch_bytes, operations: of one batch, run eagerly (an upper bound of what other runtimes move and
    call). compute_ms, memory_ms, launch_ms: least time that each of these takes, by `ceilings`; bytes at the rate of
    the row's mean operation. bound: the largest of them, "compute", "memory" or "launch". reached: that over the
    latency, 1 for a model that runs as fast as the machine can. macs_per_s, bytes_per_s: the ceilings. promised: MACs
    of an image of the first model over the row's; achieved: speedup / promised. achieved_here: the same with the
    speed-up over the first model in the row's own runtime, precision and batch, nan where the table has no such row:
    what a cut brings there, apart from what the runtime does. note: why no gain is expected, if so.
    """
    settings, counted, lines = _settings(models), {}, []
    whole = settings[table.model.iloc[0]].model
    own_dense = table[[settings[name].model is whole for name in table.model]]
    here = own_dense.groupby(["batch", "runtime", "precision"]).speedup.first().to_dict()
    per_image, ideal = {}, {}
    for name, setting in settings.items():
        own = cost.breakdown(setting.model, image_size=image_size)
        per_image[name], ideal[name] = int(own.macs.sum()), int(own.macs_ideal.sum())
    first = per_image[table.model.iloc[0]]
    for row in table.itertuples():
        setting = settings[row.model]
        device = torch.device("cpu" if row.device == "cpu" else "cuda")
        key = id(setting.model), row.precision, row.batch
        if key not in counted:
            run = Setting(setting.model, precision=row.precision)
            model, images = _converted(run, device), _images(run, image_size, row.batch, device)
            with torch.no_grad(), Traffic() as counted[key]:
                model(images)
        traffic, best = counted[key], ceilings(device.type, row.precision, row.threads)
        each = traffic.bytes / traffic.operations
        rate = best["bytes_per_s"][min(SIZES, key=lambda size, each=each: abs(math.log(size / each)))]
        least = {
            "compute": 1000 * row.batch * per_image[row.model] / best["macs_per_s"],
            "memory": 1000 * traffic.bytes / rate,
            "launch": 1000 * traffic.operations * best["launch_s"],
        }
        promised = first / per_image[row.model]
        speedup_here = row.speedup / here.get((row.batch, row.runtime, row.precision), math.nan)
        lines.append(
            {f"{what}_ms": time for what, time in least.items()}
            | {"bound": max(least, key=least.get), "reached": max(least.values()) / row.latency_ms}
            | {"batch_macs": row.batch * per_image[row.model], "batch_bytes": traffic.bytes}
            | {"operations": traffic.operations, "macs_per_s": best["macs_per_s"], "bytes_per_s": rate}
            | {"promised": promised, "achieved": row.speedup / promised, "achieved_here": speedup_here / promised}
            | {"note": _note(setting.model) if ideal[row.model] < 0.99 * per_image[row.model] else ""}
        )
    return table.join(pd.DataFrame(lines, index=table.index))


def _note(model):
    """What zeros a model has, of which no gain is to be expected: 99 % of them in whole rows (or columns), or not."""
    zeros = within = 0
    for matrix in (parameter.detach().flatten(1) for parameter in model.parameters() if parameter.ndim > 1):
        alive = matrix != 0
        zeros += int((~alive).sum())
        within += alive.numel() - int(alive.any(1).sum() * alive.any(0).sum())
    return ROWS if within >= 0.99 * zeros else ZEROS


@parallel.first_decides
def layer_times(model, table, *, batch=8, image_size=None, repeats=7):
    """Milliseconds of one batch by line of cost.breakdown's table, an array: where the time of a model goes.

    A layer's is that of its module, median of repeats passes; what is left of an attention's after its layers stands
    with its two products, of an MLP's with fc1 (its activation), and of the whole model in the last line, "rest".
    """
    setting, device = Setting(model), next(model.parameters()).device
    subject, images = _converted(setting, device), _images(setting, image_size, batch, device)
    names = [name for name in table.layer if name in dict(subject.named_modules())]
    outer = sorted({name.rpartition(".")[0] for name in names if name.rpartition(".")[0].endswith((".attn", ".mlp"))})
    started, passes = {}, []
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for name in [*names, *outer]:
            module = subject.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda *_, n=name: started.update({n: _now(device)}))
            hooks.enter_context(hook)
            hook = module.register_forward_hook(lambda *_, n=name: passes[-1].update({n: _now(device) - started[n]}))
            hooks.enter_context(hook)
        for _ in range(repeats + 1):
            passes.append({})
            begun = _now(device)
            subject(images)
            passes[-1][""] = _now(device) - begun
    times = 1000 * pd.DataFrame(passes[1:]).median()
    found = {name: times.get(name, 0.0) for name in table.layer}
    for name in outer:
        own = [layer for layer in names if layer.startswith(f"{name}.")]
        left = max(0.0, times[name] - sum(found[layer] for layer in own))
        inside = [f"{name}.qk", f"{name}.av"] if name.endswith("attn") else [f"{name}.fc1"]
        for layer in inside:
            found[layer] += left / len(inside)
    found["rest"] = max(0.0, times[""] - sum(found.values()))
    return np.array([found[name] for name in table.layer])


def _now(device):
    _synchronize(device)
    return time.perf_counter()


# -- where a factored layer is faster


@parallel.first_decides
def rank_speed(model, *, batch=64, multiple=8, steps=8, repeats=15, seconds=5, image_size=None, threads=None):
    """How fast each linear layer and convolution of the stem is when factored, against itself: a frame.

    For each layer at up to `steps` ranks, multiples of `multiple` spread evenly up to the one that saves no MACs, with
    the inputs that it sees in a batch of so many images. Layers of one shape share a measurement. Timed as in
    `latency`, in float32, where the model is. Columns: layer, kind, m, n, positions (rows of its input: tokens or
    pixels of the whole batch), rank, break_even (of MACs), speedup, speedup_q1, speedup_q3, promised (by MACs),
    achieved. Raises ValueError for a model without a plain layer.
    """
    known = {name: layer for name, layer in vit_models.view(model).matrices.items() if _is_plain(layer)}
    if not known:
        raise ValueError("no linear layer or convolution of the stem is plain: there is nothing to factor")
    setting, inputs = Setting(model), {}
    device = next(model.parameters()).device
    with contextlib.ExitStack() as hooks, torch.no_grad():  # which end here, or they would be timed
        for name, layer in known.items():
            keep = functools.partial(lambda name, _, args: inputs.setdefault(name, args[0].detach()), name)
            hooks.enter_context(layer.register_forward_pre_hook(keep))
        _converted(setting, device)(_images(setting, image_size, batch, device))
    same, tables = {}, {}
    for name, layer in known.items():
        if name in inputs:  # SwinV2 may use a weight without a call
            same.setdefault((repr(layer), inputs[name].shape, inputs[name].stride()), []).append(name)
    with _on_threads(threads):
        for key, names in same.items():
            tables[key] = _rank_times(known[names[0]], inputs[names[0]], multiple, steps, repeats, seconds, device)
    frames = [table.assign(layer=name) for key, table in tables.items() for name in same[key]]
    table = pd.concat(frames, ignore_index=True)
    return table[["layer", *table.columns.drop("layer")]]


def _is_plain(layer):
    return type(layer) is nn.Linear or type(layer) is nn.Conv2d and layer.groups == 1


def _rank_times(layer, x, multiple, steps, repeats, seconds, device):
    """Speed-ups of a layer at ranks, on input x."""
    layer = copy.deepcopy(layer).to(x)
    m, n = layer.weight.flatten(1).shape
    even = lowrank.break_even_rank(m, n)
    most = max(1, math.ceil(even) - 1)
    step = multiple if most >= multiple else 1
    ranks = sorted({max(step, round(most * i / steps / step) * step) for i in range(1, steps + 1)})
    ranks = [rank for rank in ranks if rank < even] or [1]
    made = {rank: _factored(layer, rank).to(x) for rank in ranks}
    calls = {"dense": (layer, x)} | {rank: (factored, x) for rank, factored in made.items()}
    times = _summary(_rounds(calls, repeats=repeats, seconds=seconds, warmup=2, device=device), 1).iloc[1:]
    promised = even / np.array(ranks)
    kind = "convolution" if isinstance(layer, nn.Conv2d) else "linear"
    positions = x.shape[0] * x.shape[2] * x.shape[3] if kind == "convolution" else x.numel() // n
    about = {"kind": kind, "m": m, "n": n, "positions": positions, "rank": ranks, "break_even": even}
    speed = {column: times[column].to_numpy() for column in ("speedup", "speedup_q1", "speedup_q3")}
    return pd.DataFrame(about | speed | {"promised": promised, "achieved": speed["speedup"] / promised})


def _factored(layer, rank):
    if isinstance(layer, nn.Conv2d):
        return layers.FactoredConv2d(layer, rank=rank)
    return layers.FactoredLinear(layer.in_features, layer.out_features, rank=rank, bias=layer.bias is not None)


def break_even(table):
    """{layer: the highest rank up to which it was faster factored than dense, 0 for none}, of `rank_speed`'s frame.

    Faster means that the lower quartile of the speed-ups is above 1. For budget.plan and budget.ranks (most=…): these
    limits are what makes factoring faster in time, not in MACs alone. The same share of every layer, or ranks without
    limits, are baselines.
    """
    found = {}
    for name, own in table.groupby("layer", sort=False):
        faster = (own.sort_values("rank").speedup_q1 > 1).cummin()
        found[name] = int(own.sort_values("rank")["rank"][faster].max()) if faster.any() else 0
    return found


# -- memory


def memory_mb(model, *, image_size=None, batch=64, precision="float32", device="cpu", threads=None):
    """Peak memory of one inference in a process of its own, in MB (10^6 bytes): weights, images, activations.

    model: a model, the folder of a checkpoint, or {name: either}, for which {name: MB} comes back sooner than
    one by one. Runs with timm's default attention. The other arguments are those of `latency`. On a CPU it is
    the resident memory above that of a process that has run a tiny transformer, on a GPU
    torch.cuda.max_memory_allocated.
    Raises what `checkpoint.read` raises, and RuntimeError with the last line of the process if it fails.
    """
    named = model if isinstance(model, dict) else {"": model}
    options = {"image_size": image_size, "batch": batch, "precision": precision}
    options |= {"device": device, "threads": threads}
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for i, each in enumerate(named.values()):
            folders.append(f"{scratch}/{i}" if isinstance(each, nn.Module) else str(each))
            if isinstance(each, nn.Module):
                checkpoint.save(each, folders[-1])
            checkpoint.read(folders[-1])  # what is wrong with it is better said here
        given = [f"--{k.replace('_', '-')}={value}" for k, value in options.items() if value is not None]
        command = [sys.executable, "-m", "vitlab.bench", *folders, *given]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no output"])[-1]
        raise RuntimeError(f"python {' '.join(command[1:])} failed: {reason}")
    peaks = dict(zip(named, json.loads(done.stdout)["memory_mb"], strict=True))
    return peaks if isinstance(model, dict) else peaks[""]


def _memory_here(folder, *, image_size, batch, precision, device, threads):
    """Peak MB of one inference in this process, which has run nothing before."""
    torch.set_num_threads(threads or torch.get_num_threads())
    with torch.inference_mode():  # libraries come in at first use: not the model's memory
        layer = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, activation="gelu", batch_first=True)
        layer.eval()(nn.Conv2d(3, 32, 4, 4)(torch.zeros(2, 3, 16, 16)).flatten(2).mT)
    before = psutil.Process().memory_info().rss
    setting, device = Setting(checkpoint.load(folder), precision=precision), torch.device(device)
    model, images = _converted(setting, device), _images(setting, image_size, batch, device)
    del setting  # and with it the weights as they were loaded, where they were converted
    cost.release_memory()  # or what they took stays resident in some processes and not in others
    cost.reset_peak_memory()  # forget the peak of loading, which holds the weights twice
    with torch.inference_mode():
        model(images)
    return cost.peak_memory_mb(images.device) - (0 if images.is_cuda else before / 1e6)


def main():
    """Peak memory of one inference with each checkpoint, each in a new process, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m vitlab.bench", description=main.__doc__)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = vars(parser.parse_args())
    # this process only imports: where forking is safe its children start in no time and are as good as new
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    peaks = []
    for folder in options.pop("folders"):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(_memory_here, (folder,), options))
    print(json.dumps({"memory_mb": peaks}))


if __name__ == "__main__":
    main()
