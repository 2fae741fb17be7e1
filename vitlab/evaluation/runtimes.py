"""Say what is left of models in the runtimes where they are deployed.

Public: left, settings, timed.
"""

import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from vitlab import files
from vitlab.evaluation import bench, cost, deploy, evaluate, export

_CALIBRATED = 128  # training images for int8
_SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}


def settings(models, ways, *, images=None):
    """Make models ready to be run and timed in several runtimes.

    models: {name: model}, on one device
    ways: a runtime and a precision each, as in "eager float32", "openvino int8-bf16" or
        "onnxruntime int8-dynamic"; see bench.Setting
    images: data.Dataset, whose training images calibrate int8

    Returns three:
        {"NAME WAY": bench.Setting}
        a frame with model ("NAME WAY") and bytes, of its file or in torch of its weights in memory
        a frame with model, runtime, precision and note, of what cannot be had, and why
    """
    made, sizes, refused = {}, {}, []
    calibration = None
    if images and any("int8" in way for way in ways):
        calibration = deploy.first(images.train, _CALIBRATED)
    for name, model in files.progress(models.items(), "making files"):
        with tempfile.TemporaryDirectory() as folder:
            for way in ways:
                key = f"{name} {way}"
                try:
                    made[key], sizes[key] = _made(model, *way.split(), calibration, Path(folder))
                except (ImportError, RuntimeError, ValueError) as reason:
                    refused.append([key, *way.split(), str(reason).strip().splitlines()[0]])
    sizes = pd.DataFrame({"model": sizes.keys(), "bytes": sizes.values()})
    return made, sizes, pd.DataFrame(refused, columns=["model", "runtime", "precision", "note"])


def timed(model, way):
    """Return the bench.Setting of a model in one way of `settings`, to be timed and no more.

    Its int8 is calibrated by random images: which numbers they hold changes no time.

    model: the model, on the CPU but for the ways of torch
    way: a runtime, and a precision if it is not float32

    Raises ValueError for an unknown way, ModuleNotFoundError without the runtime's package, and
    RuntimeError for a model that cannot be exported.
    """
    runtime, precision = [*way.split(), "float32"][:2]
    images = export.random_images(model, 2 * deploy.BATCH) if "int8" in precision else None
    with tempfile.TemporaryDirectory() as folder:
        return _made(model, runtime, precision, images, Path(folder))[0]


def _made(model, runtime, precision, calibration, folder):
    """Return a setting and the bytes of its file; the folder keeps the ONNX file of the model."""
    setting = bench.Setting(model, runtime, precision)
    device, bf16 = evaluate.device_of(model), "bf16" in precision
    if bf16 and not evaluate.gains_from_bf16(device):
        raise ValueError(f"this {device.type} has no bf16 instructions: it would imitate them")
    if runtime not in bench.EXPORTED:
        run = bench.runnable(setting, device)
        weights = cost.bytes_memory(model)  # in float32
        size = weights if precision == "float32" else weights // 2
        return bench.Setting(model, runtime, precision, run), size
    source = folder / "float32.onnx"
    if not source.exists():
        export.to_onnx(model, source)
    # The same file is run with bf16 and without.
    stored = {"bf16": "float32", "int8-bf16": "int8"}.get(precision, precision)
    path = folder / f"{stored}{_SUFFIXES[runtime]}"
    if stored != "float32" and calibration is None:
        raise ValueError("int8 is calibrated by images; got none")
    if not path.exists():
        images = None if stored == "float32" else calibration
        deploy.convert(source, path, images, dynamic=stored == "int8-dynamic")
    size = sum(path.with_suffix(each).stat().st_size for each in deploy.FILES[path.suffix])
    run = export.session(path, runtime, bf16=bf16)
    return bench.Setting(model, runtime, precision, run), size


@torch.inference_mode()
def left(made, split, *, batch=64):
    """Measure what is left of each model in its runtime, on images.

    made: {name: bench.Setting} of `settings`, in which a model runs in eager float32, too
    split: data.Split of test images
    batch: images in one forward pass

    Returns a frame with a row for each setting:
        model: its name
        top1: in percent, on these images
        difference, difference_mean: the largest and the mean difference of a logit to the same
            model in torch and float32, a share of the largest logit there
        images: how many there were
    """
    rows, expected = [], {}
    for name, setting in files.progress(made.items(), "comparing answers"):
        device = evaluate.device_of(setting.model)
        if setting.model not in expected:
            eager = bench.Setting(setting.model)
            expected[setting.model], labels = _logits(eager, split, batch, device)
        logits, labels = _logits(setting, split, batch, device)
        off = (logits - expected[setting.model]).abs() / expected[setting.model].abs().max()
        rows.append(
            {
                "model": name,
                "top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
                "difference": off.max().item(),
                "difference_mean": off.mean().item(),
                "images": len(labels),
            }
        )
    return pd.DataFrame(rows)


def _logits(setting, split, batch, device):
    """Return the logits of a split in a setting, and its labels, both on the CPU."""
    run = bench.runnable(setting, device)
    to = partial(torch.Tensor.to, device=device, dtype=bench.read_by(setting))
    pairs = [(run(to(x).contiguous()).float().cpu(), y.cpu()) for x, y in split.batches(batch)]
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)
