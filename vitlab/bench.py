"""Benchmarks: latency and throughput of models side by side, and peak memory in a process of its own."""

import argparse
import copy
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time

import pandas as pd
import psutil
import torch
from torch import nn

from . import checkpoint, cost

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


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
    """Inference time of models ({name: model}) measured together: a frame with one row per model.

    In every round each model runs one batch, in a new random order, so that whatever else the machine does
    falls on all of them; ratios are taken within rounds. Ends after `repeats` rounds, or after `seconds` and
    at least three rounds.

    image_size: None for each model's own. precision: "float32", or "bf16" for weights and images converted to
    it. device: None for where the first model is. threads: CPU threads, None for torch's setting.

    Columns: model; latency_ms, latency_q1, latency_q3 (median and quartiles per batch), image_ms (per image),
    images_per_s; speedup, speedup_q1, speedup_q3 (times as fast as the first model, median and quartiles over
    rounds); rounds, batch, threads, precision, image_size, device.
    Raises ValueError for no models and unknown precisions, and what `cost.input_shape` raises.
    """
    if not models:
        raise ValueError("no models to time; give {name: model}")
    device = torch.device(device or next(next(iter(models.values())).parameters()).device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        runs = {name: _ready(m, image_size, batch, precision, device) for name, m in models.items()}
        milliseconds = _rounds(runs, repeats=repeats, seconds=seconds, warmup=warmup, device=device)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    table = _summary(milliseconds, batch)
    return table.assign(
        batch=batch,
        threads=threads,
        precision=precision,
        image_size=[images.shape[-1] for _, images in runs.values()],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _ready(model, image_size, batch, precision, device):
    """Model in eval mode on device in precision (a copy where it is not yet), and a batch of images."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
    dtype, first = PRECISIONS[precision], next(model.parameters())
    shape = cost.input_shape(model, image_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *shape, generator=generator).to(device, dtype)
    if model.training or (first.device, first.dtype) != (images.device, dtype):
        model = copy.deepcopy(model).to(device, dtype).eval()
    return model, images


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
    model, images = _ready(checkpoint.load(folder), image_size, batch, precision, torch.device(device))
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
