"""Models for other runtimes: torch.export and ONNX, of any cut model, for any number of images, checked by torch."""

import contextlib
import copy
import functools
import io
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from . import cost, layers

MOST_IMAGES = 4096  # in one batch of an exported model


def program(model):
    """model as a torch.export.ExportedProgram of one input [images, channels, height, width], in eval mode.

    images is free, from 1 to 4096; the size is the model's own. A masked model keeps its zeros; make a cut real by
    `shrink.remove` first. torch.export.save writes it to a file that torch.export.load opens without vitlab or timm.
    """
    subject, images = copy.deepcopy(model).cpu().float().eval(), _images(model, 2)
    count = torch.export.Dim("images", min=1, max=MOST_IMAGES)
    with torch.no_grad():  # no masks that only training needs
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
        # between calls its threads would spin on the cores that others are timed on
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # one pool of memory for all: each would keep what its largest batch took, which can be gigabytes
        _shared_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, images):
        return torch.from_numpy(self.session.run(["logits"], {"images": images.numpy()})[0])


@functools.cache
def _shared_memory():
    from onnxruntime import OrtAllocatorType, OrtArenaCfg, OrtMemoryInfo, OrtMemType, create_and_register_allocator

    cpu = OrtMemoryInfo("Cpu", OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, OrtMemType.DEFAULT)
    create_and_register_allocator(cpu, OrtArenaCfg(0, -1, -1, -1))  # as each has by default


def is_two_of_four(weight):
    """Whether of each 4 neighbours along a row of weight [m, n] at most 2 are not zero, and some are; n a multiple
    of 4."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    counts = (weight != 0).unflatten(1, (-1, 4)).sum(-1)
    return bool(counts.max() <= 2) and bool(counts.any())


def two_of_four(model):
    """Names of model's parameters that have 2:4 zeros and can be semi-structured: weights of linear layers, and sparse
    parts beside a low-rank one or alone (shrink.compress with support "2:4")."""
    found = []
    for name, module in model.named_modules():
        own = {nn.Linear: "weight", layers.LowRankSparseLinear: "sparse"}.get(type(module))
        if own and getattr(module, own) is not None and is_two_of_four(getattr(module, own)):
            found.append(f"{name}.{own}")
    return found


def semi_structured(model, *, precision="bf16"):
    """A copy of model on its GPU whose 2:4 masked linear weights are torch's semi-structured sparse tensors, which
    its tensor cores multiply at up to twice the rate (Mishra et al. 2021).

    model: on the GPU, with masks of 2:4 applied (masks.n_of_m, shrink.compress with support "2:4"): see `two_of_four`.
    Layers whose shape the kernels refuse stay dense. For inference only (torch.inference_mode): autograd and
    checkpoint.save do not know such tensors.
    precision: "bf16" or "float16", which these kernels want.
    Raises RuntimeError off such a GPU (compute capability 8.0 or newer), saying what is there, and ValueError for
    another precision or a model without a 2:4 layer.
    """
    types = {"bf16": torch.bfloat16, "float16": torch.float16}
    if precision not in types:
        raise ValueError(f"precision is {' or '.join(types)}; got {precision!r}")
    names = two_of_four(model)
    if not names:
        raise ValueError('no linear layer is masked 2:4; apply masks.n_of_m(score, 2, 4), or compress by support="2:4"')
    device = next(model.parameters()).device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < (8, 0):
        here = f"a GPU of compute capability {'.'.join(map(str, capability))}" if capability else f"a {device.type}"
        raise RuntimeError(
            f"2:4 weights are faster only on NVIDIA GPUs of compute capability 8.0 or newer, and the model is on "
            f"{here}: there its masked layers run as dense ones"
        )
    return _semi_structured(copy.deepcopy(model).to(types[precision]).eval(), names)


def _semi_structured(model, names):
    """model, with these parameters of it converted in place where the kernels take their shapes."""
    for name in names:
        layer, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        with contextlib.suppress(RuntimeError, NotImplementedError):  # of a shape that the kernels do not take
            packed = torch.sparse.to_sparse_semi_structured(getattr(layer, own))
            setattr(layer, own, nn.Parameter(packed, requires_grad=False))
    return model


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
