"""Export a model, cut or whole, to other runtimes: torch.export and ONNX, for any number of images.

An ONNX file is checked against torch before it is kept. Weights with 2:4 zeros can become torch's
semi-structured tensors, which newer GPUs multiply faster.

Public: TOLERANCE, cancellation, difference, opened, openvino_package, random_images,
runtime_session, semi_structured, session, to_onnx.
"""

import functools
import importlib
import json
import sys
import warnings
from contextlib import suppress
from importlib.util import find_spec

import torch
from torch import nn

from vitlab import files
from vitlab.evaluation import cost, evaluate
from vitlab.models import _absorb, _attention, _layers, _windows, anatomy

TOLERANCE = 1e-4  # for the error of a file's logits
_GROUPS = {"openvino": "runtimes", "nncf": "runtimes"}  # of pyproject.toml; "export" for others
_SPARSE = [(nn.Linear, "weight"), (_layers.LowRankSparseLinear, "sparse")]  # may be 2:4


def opened(model):
    """Return a copy of a model that other runtimes' converters read, on the CPU, in eval mode.

    It computes the same in float32, without tensors of five dimensions or more, which timm's own
    attention and Swin's windows have. Low rank plus entries is one constant matrix there, and rows
    that are gone leave narrower heads or zeros in a matrix.

    model: a masked model keeps its zeros; make a cut real by `shrink.remove` first
    """
    copied = _absorb.absorb(_layers.merge(_on_cpu(model)))
    for module in copied.modules():
        _attention.allow_cuts(module)
        _windows.allow_few_dimensions(module)
    return copied


def _program(model):
    """Return a model, opened, as a torch.export.ExportedProgram.

    Its one input is [images, channels, height, width]: 1 to 4096 images of the model's own size.
    torch.export.save writes it to a file that torch.export.load opens without vitlab or timm.
    """
    count = torch.export.Dim("images", min=1, max=4096)
    with torch.no_grad():  # no masks that only training needs
        return torch.export.export(
            opened(model),
            (random_images(model, 2),),
            dynamic_shapes=({0: count},),
            strict=False,  # twice as fast as to read the bytecode
        )


def to_onnx(model, path):
    """Write a model in float32 as one ONNX file, with input "images" and output "logits".

    model: a model, whole or cut. Zeros of a masked one are stored, so that its file is as large as
        a dense one's; checkpoint.save leaves them out.
    path: the file; one that is already there is replaced only by one that passes the check

    The file's metadata has, as JSON, mean and std by which the model expects images normalised, and
    the names of its classes, where these are known.

    Returns the error of its logits, a share of the largest one.
    Raises ValueError for an error above 1e-4, and ModuleNotFoundError, which says what to install,
    without the packages.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    exported = _program(model)
    with warnings.catch_warnings(action="ignore"):
        onnx = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),  # the name that the axis has in the file
            verbose=False,
        )
    written = onnx.model_proto
    graph = written.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")  # traces of calls, with paths of this machine
    # Whoever runs the file reads there how to normalise images, and what its answers are called.
    mean, std = getattr(model, "normalise", None) or (None, None)
    said = {"mean": mean, "std": std, "classes": getattr(model, "class_names", None)}
    for name, value in said.items():
        if value is not None:
            written.metadata_props.add(key=name, value=json.dumps(value))
    content = written.SerializeToString()
    # The error is the largest difference between onnxruntime's and torch's logits over the largest
    # logit, for batches of 1, 2 and 5 random images.
    error = _error(model, session(content))
    if not error <= TOLERANCE:  # nan is no small error
        raise ValueError(
            f"{path} was not written: its logits differ by {error:.1e} of the largest "
            f"(at most {TOLERANCE:.0e}){cancellation(model, random_images(model, 2))}"
        )
    files.write_atomic(path, content)
    return error


def session(model, runtime="onnxruntime", *, bf16=False):
    """Return an exported model as a function, run on as many CPU threads as torch.

    The function takes float32 images [B, C, H, W] and returns logits [B, classes].

    model: an ONNX file, or its bytes; for OpenVINO an ONNX file or one that ends in .xml
    runtime: "onnxruntime" or "openvino"
    bf16: whether OpenVINO computes in bf16 what a file has in float32
    Raises ModuleNotFoundError, which says what to install, without the runtime.
    """
    return _in_openvino(model, bf16) if runtime == "openvino" else _in_onnxruntime(model)


def _in_onnxruntime(model):
    runtime = runtime_session(model)

    def logits_of(images):
        (logits,) = runtime.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return logits_of


def runtime_session(model):
    """Return onnxruntime's own session of an ONNX file or its bytes, on as many threads as torch.

    Raises ModuleNotFoundError, which says what to install, without onnxruntime.
    """
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # between calls its threads would spin on the cores that others are timed on
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # one pool of memory for all: each would keep what its largest batch took, which can be
    # gigabytes
    _share_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _in_openvino(path, bf16):
    openvino = openvino_package()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Unless it is told, processors with bf16 take it for float32.
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
    }
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file may change once it is read
    compiled = core.compile_model(str(path), "CPU", options)

    def logits_of(images):
        (logits,) = compiled(images.numpy()).values()
        return torch.from_numpy(logits.copy())  # the next call writes to the same memory

    return logits_of


def openvino_package(name="openvino"):
    """Import and return openvino, or another package of the group `runtimes`, of this name.

    Raises ModuleNotFoundError, which says what to install, where it is missing.
    """
    _need(name)
    # Each import would tell Google Analytics of it; without this package nothing is sent.
    sys.modules.setdefault("openvino_telemetry", None)
    return importlib.import_module(name)


@functools.cache
def _share_memory():
    """Make one pool of CPU memory for all sessions of this process."""
    import onnxruntime as ort

    arena = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    cpu = ort.OrtMemoryInfo("Cpu", arena, 0, ort.OrtMemType.DEFAULT)
    as_each_has_by_default = ort.OrtArenaCfg(0, -1, -1, -1)
    ort.create_and_register_allocator(cpu, as_each_has_by_default)


def _is_two_of_four(weight):
    """Return whether a weight [m, n] has 2:4 zeros."""
    # Of each 4 neighbours along a row at most 2 may differ from zero, and somewhere one must. Rows
    # whose length is no multiple of 4 have no such groups.
    if weight.shape[1] % 4:
        return False
    counts = (weight != 0).unflatten(1, (-1, 4)).sum(-1)
    return 0 < int(counts.max()) <= 2


def _two_of_four(model):
    """Return the names of the parameters with 2:4 zeros that can be semi-structured."""
    # They are weights of linear layers, and sparse parts, alone or beside a low-rank one
    # (factor.compress with support "2:4").
    names = []
    for name, parameter in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        kind = type(model.get_submodule(path))
        if (kind, own_name) in _SPARSE and _is_two_of_four(parameter):
            names.append(name)
    return names


def semi_structured(model):
    """Return a copy of a model in bf16 with semi-structured sparse weights, where they are 2:4.

    The copy is for inference only (torch.inference_mode). Layers whose shape the kernels refuse
    stay dense.

    model: on the GPU, with 2:4 masks applied (masks.n_of_m, or factor.compress with support "2:4")
    Raises RuntimeError where there is no such GPU (compute capability 8.0 or newer).
    Raises ValueError for a model without a 2:4 layer.
    """
    names = _two_of_four(model)
    if not names:
        raise ValueError(
            "no linear layer is masked 2:4; apply masks.n_of_m(score, 2, 4), or compress by "
            'support="2:4"'
        )
    # The tensor cores of newer GPUs multiply such weights at up to twice the rate (Mishra et al.
    # 2021). Older ones and CPUs do not.
    device = evaluate.device_of(model)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError(
            "2:4 weights are faster only on NVIDIA GPUs of compute capability 8.0 or newer, and "
            f"the model is on {device}: there its masked layers run as dense ones"
        )
    # Autograd and checkpoint.save do not know such tensors.
    converted = anatomy.copied(model).bfloat16().eval()  # a precision that these kernels want
    return _semi_structured(converted, names)


def _semi_structured(model, names):
    """Convert parameters in place where the kernels take their shapes, and return the model."""
    for name in names:
        path, _, own_name = name.rpartition(".")
        with suppress(RuntimeError, NotImplementedError):  # of a shape that the kernels do not take
            sparse = torch.sparse.to_sparse_semi_structured(model.get_parameter(name))
            parameter = nn.Parameter(sparse, requires_grad=False)
            setattr(model.get_submodule(path), own_name, parameter)
    return model


def _need(*packages):
    """Raise ModuleNotFoundError, which says what to install, if a package is missing."""
    for package in packages:
        if find_spec(package) is None:
            group = _GROUPS.get(package, "export")
            advice = f'{package} is missing: pip install "vitlab[{group}]"'
            raise ModuleNotFoundError(advice, name=package)


def _on_cpu(model):
    return anatomy.copied(model).cpu().float().eval()


def random_images(model, count):
    """Return images of a model's own size, float32 [count, C, H, W], the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *cost.input_shape(model), generator=generator)


def _error(model, session):
    """Return the largest error of a session's logits over some batch sizes."""
    model = _on_cpu(model)
    return max(difference(model, session, random_images(model, count)) for count in (1, 2, 5))


@torch.inference_mode()
def difference(model, session, images):
    """Return how far a session's logits are from a model's, a share of the largest logit.

    model: in eval mode and float32, on the CPU
    session: what `session` returns
    images: float32 [B, C, H, W], as the model expects them
    """
    return _off(session(images), model(images))


@torch.inference_mode()
def cancellation(model, images):
    """Return why a session may differ from torch where torch itself differs from float64, or "".

    model, images: as for `difference`
    """
    model = _on_cpu(model)
    found = model(images)
    error = _off(found, model.double()(images.double()))
    if not error > TOLERANCE / 10:
        return ""
    return (
        f"; torch itself differs by {error:.1e} from float64: large terms cancel, as they do in a "
        "classifier of large weights, which was fitted on features that hardly differ"
    )


def _off(found, expected):
    """Return the largest difference, as a share of the largest that is expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
