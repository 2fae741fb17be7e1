"""Models for other runtimes: torch.export and ONNX, of any cut model, for any number of images, checked by torch."""

import contextlib
import copy
import io
import os
import warnings
from pathlib import Path

import torch

from . import cost

MOST_IMAGES = 4096  # in one batch of an exported model


def program(model):
    """model as a torch.export.ExportedProgram of one input [images, channels, height, width], in eval mode.

    images is free, from 1 to 4096; the size is the model's own. A masked model keeps its zeros; make a cut real by
    `shrink.remove` first. torch.export.save writes it to a file that torch.export.load opens without vitlab or timm.
    """
    subject, images = copy.deepcopy(model).cpu().float().eval(), _images(model, 2)
    count = torch.export.Dim("images", min=1, max=MOST_IMAGES)
    return torch.export.export(subject, (images,), dynamic_shapes=({0: count},), strict=True)  # SwinV2 needs strict


def to_onnx(model, path, *, tolerance=1e-4):
    """Write model in float32 as one ONNX file with input "images" and output "logits", and return its error.

    The error, the largest difference between onnxruntime's and torch's logits over the largest logit, is taken over
    batches of 1, 2 and 5 random images. A file in the way is replaced only by one that passes.
    Raises ValueError for an error above tolerance, ModuleNotFoundError, with what to install, without the packages.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    path, exported = Path(path), program(model)
    new = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):  # it reports its steps
        onnx = torch.onnx.export(exported, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    try:
        onnx.save(new)
        error = _error(model, Session(new))
        if not error <= tolerance:
            raise ValueError(
                f"{path} was not written: its logits differ by {error:.1e} of the largest (at most {tolerance:.0e})"
            )
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return error


class Session:
    """An ONNX file in onnxruntime on the CPU: called with float32 images [B, C, H, W] it gives logits [B, classes].

    threads: None for torch's setting. Raises ModuleNotFoundError, with what to install, without onnxruntime.
    """

    def __init__(self, path, *, threads=None):
        _need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, images):
        return torch.from_numpy(self.session.run(["logits"], {"images": images.numpy()})[0])


def _need(*packages):
    for package in packages:
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise ModuleNotFoundError(f'{package} is missing: pip install "vitlab[export]"', name=package) from error


def _images(model, count):
    return torch.randn(count, *cost.input_shape(model), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _error(model, session):
    """Largest difference of logits, as a share of the largest, over batches of several sizes."""
    subject, errors = copy.deepcopy(model).cpu().float().eval(), []
    for count in (1, 2, 5):
        images = _images(model, count)
        expected = subject(images)
        errors.append(((session(images) - expected).abs().max() / expected.abs().max()).item())
    return max(errors)
