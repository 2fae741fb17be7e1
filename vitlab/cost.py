"""Costs: parameters, non-zeros, bytes, multiply-accumulates in closed form, and named meters beside it.

One MAC is one multiply-accumulate, two FLOPs. All counts are for one forward pass of one image.
"""

import contextlib
import copy
import ctypes
import math
import re
import sys
import warnings
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import layers, models, packed

ROLES = ("qkv", "proj", "fc1", "fc2", "merge", "head")


def macs(model, *, image_size=None, ideal=False):
    """Multiply-accumulates of one image, an int, in closed form from the architecture as it is now.

    Convolutions, linear layers (as executed: masked zeros cost as much as any weight), query x key and
    attention x value count; biases, norms, softmax and pooling do not. ideal: zeros in convolution and linear
    weights are free, as a perfect sparse engine would have it; the two attention products stay as they are.
    See `breakdown` for image_size and errors.
    """
    table = breakdown(model, image_size=image_size)
    return int(table["macs_ideal" if ideal else "macs"].sum())


def breakdown(model, *, image_size=None):
    """Costs by layer in forward order: a frame of layer, block, role, macs, macs_ideal, params, nonzero.

    role: stem, qkv, qk (query x key), av (attention x value), position, proj, fc1, fc2, merge, head, and one last row
    "rest" for parameters without MACs (norms, position tables, tokens), so that every column sums to the
    model's. image_size: side in pixels, None for the size that the model was built for.
    Raises ValueError for a size that the model cannot run at, TypeError for a model with layers that the
    closed form does not know.
    """
    view = models.view(model)
    _, *grid = input_shape(model, image_size)
    table = []
    for name, conv, size in _stem(model.patch_embed, grid):
        grid = size
        if conv is not None:
            table.append(_row(f"patch_embed.{name}", conv, None, "stem", positions=math.prod(grid)))
    for name, layer in view.linears(ROLES).items():
        role, block = view.role(name), view.block_of(name)
        if role == "merge":
            grid = [math.ceil(side / 2) for side in grid]
        tokens, padded, keys = _tokens(view, block, grid)
        positions = {"head": 1, "qkv": padded, "proj": padded}.get(role, tokens)
        table.append(_row(name, layer, block and block.name, role, positions=positions))
        if role == "qkv":
            values = block.attn.proj.in_features  # all heads together; queries and keys share the rest of qkv
            for product, width in (("qk", (layer.out_features - values) // 2), ("av", values)):
                layer_name = name.removesuffix("qkv") + product
                cost = padded * keys * width
                table.append((layer_name, block.name, product, cost, cost, 0, 0))
            table += _position_mlp(block)
    _refuse_unknown(model, [row[0] for row in table])
    columns = ["layer", "block", "role", "macs", "macs_ideal", "params", "nonzero"]
    rest = [total - sum(row[i] for row in table) for i, total in ((5, _params(model)), (6, _nonzero(model)))]
    return pd.DataFrame([*table, ("rest", None, "rest", 0, 0, *rest)], columns=columns)


def _row(name, layer, block, role, *, positions):
    """One line of the breakdown: a layer applied at so many positions (output pixels, tokens)."""
    dense = layer.weight.numel() if isinstance(layer, nn.Conv2d) else layers.macs(layer)
    ideal = sum(int(p.count_nonzero()) for p in layer.parameters() if p.ndim > 1)  # factors' zeros, too
    return name, block, role, positions * dense, positions * ideal, _params(layer), _nonzero(layer)


def _position_mlp(block):
    """Lines of SwinV2's position bias: an MLP over the distances in a window, once for all its images."""
    if not hasattr(block.attn, "cpb_mlp"):
        return []
    distances = math.prod(2 * side - 1 for side in block.attn.window_size)
    named = [(f"{block.name}.attn.cpb_mlp.{i}", block.attn.cpb_mlp[i]) for i in (0, 2)]
    return [_row(name, layer, block.name, "position", positions=distances) for name, layer in named]


def _tokens(view, block, grid):
    """Tokens after the stem, tokens that attention runs on, and keys that each query sees."""
    tokens = math.prod(grid) + getattr(view.model, "num_prefix_tokens", 0)
    if view.kind == "vit" or block is None:
        return tokens, tokens, tokens
    window = getattr(block.attn, "window_size", None)
    if window is None:  # attention without heads
        return tokens, tokens, tokens
    # Swin pads to whole windows, for qkv and proj too, but not for the MLP
    padded = math.prod(math.ceil(side / w) * w for side, w in zip(grid, window, strict=True))
    return tokens, padded, math.prod(window)


def _stem(embed, size):
    """Yields (name, convolution or None for pooling, [height, width] after it) along the patch embedding."""
    if getattr(embed, "dynamic_img_pad", False):
        size = [math.ceil(side / patch) * patch for side, patch in zip(size, embed.patch_size, strict=True)]
    image = size
    for name, module in embed.named_modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            kernel, stride, padding, dilation = (
                value if isinstance(value, tuple) else (value, value)
                for value in (module.kernel_size, module.stride, module.padding, module.dilation)
            )
            size = [
                (side + 2 * p - d * (k - 1) - 1) // s + 1
                for side, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
            ]
            yield name, module if isinstance(module, nn.Conv2d) else None, size
    if tuple(size) != tuple(embed.dynamic_feat_size(image)):
        raise TypeError(f"no closed form for the stem {type(embed).__name__}: it is no chain of convolutions")


def _refuse_unknown(model, known):
    """Raise TypeError if a layer that multiplies is in none of the known ones."""
    for name, module in model.named_modules():
        multiplies = hasattr(module, "macs") or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        if multiplies and not any(f"{name}.".startswith(f"{layer}.") for layer in known):
            raise TypeError(f"no closed form for {name} ({type(module).__name__}) of {type(model).__name__}")


def _params(module):
    return sum(p.numel() for p in module.parameters())


def _nonzero(module):
    return sum(int(p.count_nonzero()) for p in module.parameters())


def input_shape(model, image_size=None):
    """(channels, height, width) of one image. image_size: side in pixels, None for the model's own.

    Raises ValueError for a size that the model was not built for (unless it was built with dynamic_img_size).
    """
    own = model.patch_embed.img_size
    size = tuple(own) if image_size is None else (image_size, image_size)
    if size != tuple(own) and not getattr(model, "dynamic_img_size", False):
        raise ValueError(
            f"the model was built for {own[0]} x {own[1]} pixels and cannot run at {image_size}: leave "
            f"image_size out, or build it with models.create(..., image_size={image_size})"
        )
    return model.in_chans, *size


def meters(model, *, image_size=None):
    """MACs of one image by three public counters: {macs_torch, macs_torchprofile, macs_thop, meter_note}.

    All run on a copy in eval mode with fused attention off: torch's counter cannot see inside the fused
    kernel on a CPU. torch (FlopCounterMode / 2) counts convolutions and matrix products, as `macs` does.
    torchprofile adds norms and elementwise products: 0.2 % of a model at 224 px; norms do not shrink with ranks, so of
    the committed small models with a quarter of their MACs by ranks it is 1.01 %. thop adds norms and leaves out
    attention's two products. A meter that fails gives None, and meter_note, otherwise "", says why.
    """
    shape = input_shape(model, image_size)
    subject = copy.deepcopy(model).cpu().float().eval()
    for module in subject.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    results, reasons = {}, []
    for name, meter in (("torch", _torch), ("torchprofile", _torchprofile), ("thop", _thop)):
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                results[f"macs_{name}"] = int(meter(subject, torch.zeros(1, *shape)))
        except Exception as error:  # other people's tracers may raise anything
            results[f"macs_{name}"] = None
            reasons.append(f"{name}: {type(error).__name__}: {error}")
    return results | {"meter_note": "; ".join(reasons)}


def _torch(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def _torchprofile(model, x):
    import torchprofile

    return torchprofile.profile_macs(model, x)


def _thop(model, x):
    import thop  # here, as its import warns on every Python that still has distutils

    def count(layer, inputs, output):
        layer.total_ops += output[..., 0].numel() * layer.macs

    # thop takes layers that it has no rule for as free; it leaves buffers behind: last on its copy
    rules = {layers.LowRankSparseLinear: count}
    return thop.profile(model, (x,), custom_ops=rules, verbose=False)[0]


def bytes_memory(model):
    """Bytes of the parameters and buffers as they are held."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def bytes_disk(model, *, folder=None):
    """Bytes of the weights on disk: of the checkpoint in folder, or of model as checkpoint.save writes it in float32,
    zeros left out where that is smaller."""
    if folder is not None:
        return (Path(folder) / "model.safetensors").stat().st_size
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return len(safetensors.torch.save(packed.pack(tensors)[0]))


def summary(model, *, image_size=None, folder=None):
    """What a model costs: the cost columns of a results row, as a dict.

    params, nonzero; macs and macs_ideal in closed form, flops = 2 * macs; macs_torch, macs_torchprofile,
    macs_thop and meter_note (see `meters`); bytes_memory and bytes_disk. folder: the model's checkpoint, if
    it has one.
    """
    totals = breakdown(model, image_size=image_size)[["params", "nonzero", "macs", "macs_ideal"]].sum()
    counts = {name: int(value) for name, value in totals.items()}
    return (
        counts
        | {"flops": 2 * counts["macs"]}
        | meters(model, image_size=image_size)
        | {"bytes_memory": bytes_memory(model), "bytes_disk": bytes_disk(model, folder=folder)}
    )


def reset_peak_memory():
    """Forget the peaks so far, that `peak_memory_mb` is of what follows (Linux and CUDA; elsewhere of all before)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def release_memory():
    """With glibc, give memory that was freed back to the system, which it may keep otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def own_memory_mb(device, *, peak=False):
    """Memory in MB (10^6 bytes) that is held now, or at most since `reset_peak_memory`: on a GPU by torch's tensors, on
    a CPU by this process but for files mapped into it (libraries, decoded images), which come in as they are touched.

    The files are those mapped by now, so that a peak is at least this much. nan on a CPU without Linux's /proc.
    """
    if torch.device(device).type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 1e6
    with contextlib.suppress(OSError, KeyError):
        status = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
        return 1024 * (int(status["VmHWM" if peak else "VmRSS"]) - int(status["RssFile"])) / 1e6
    return math.nan


def peak_memory_mb(device):
    """Highest memory since `reset_peak_memory`, in MB (10^6 bytes): on a GPU what torch held there, on a CPU the
    resident memory of this whole process, with all that was imported and loaded."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")  # ru_maxrss would start from the peak of the process that started this one
    if status.exists() and (line := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(line[1]) / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
