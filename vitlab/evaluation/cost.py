"""Count what a model costs: parameters, non-zeros, bytes, and multiply-accumulates in closed form.

Other people's counters of multiply-accumulates stand beside the closed form, with their names. One
MAC is one multiply-accumulate, two FLOPs. All counts are for one forward pass of one image.

Public: breakdown, bytes_disk, bytes_memory, check_forward, input_shape, macs, meters, params,
summary.
"""

import math
import warnings
from collections import namedtuple
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitlab import models
from vitlab.models import _layers, _packed, anatomy

_MULTIPLY = (nn.Linear, nn.modules.conv._ConvNd, *_layers.COMPRESSED_LAYERS)


def params(model):
    """Return the number of parameters of a model or a layer, zeros included."""
    return sum(parameter.numel() for parameter in model.parameters())


def _nonzero(tensors):
    return sum(int(tensor.count_nonzero()) for tensor in tensors)


def macs(model, *, ideal=False):
    """Count the multiply-accumulates of one image in closed form, from the architecture as it is.

    ideal: whether zeros in the weights of convolutions and linear layers are free, as in a perfect
        sparse engine
    Returns an int. Raises what `breakdown` raises.
    """
    # Convolutions, linear layers, query x key and attention x value count. Biases, norms, softmax
    # and pooling do not. A linear layer counts as it is executed: masked zeros cost as much as
    # other weights. Ideally they cost nothing, but the two products of attention stay as they are.
    column = "macs_ideal" if ideal else "macs"
    return int(breakdown(model)[column].sum())


_Row = namedtuple("Row", "layer block role macs macs_ideal params nonzero", defaults=[0, 0, 0, 0])


def breakdown(model):
    """Return the costs of each layer in forward order, as a frame whose columns sum to the model's.

    Columns:
        layer: name of the layer
        block: name of its block, None outside of blocks
        role: stem, qkv, qk (query x key), av (attention x value), position, proj, fc1, fc2, merge,
            head, rest
        macs, macs_ideal: multiply-accumulates as executed, and as if zeros were free
        params, nonzero: parameters, and those that are not zero
    Raises TypeError for a model with layers that the closed form does not know.
    """
    view = models.view(model)
    _, *image = input_shape(model)
    pooling = anatomy.pooling(model)
    rows = []
    # The sides of the grid of tokens are those after the last layer of the stem.
    for name, layer, grid in _stem(model.patch_embed, image):
        if isinstance(layer, nn.Conv2d):
            rows.append(_row(f"patch_embed.{name}", layer, None, "stem", math.prod(grid)))
    for name, layer in view.linears([*anatomy.ROLES.values(), "head"]).items():
        role = view.role(name)
        block = view.block_of(name)
        if role == "merge":
            grid = [math.ceil(side / 2) for side in grid]
        tokens, padded, keys = _tokens(model, block, grid)
        pooled = 1 if pooling else tokens  # a classifier without pooling sees every token
        positions = {"head": pooled, "qkv": padded, "proj": padded}.get(role, tokens)
        rows.append(_row(name, layer, block, role, positions))
        if role == "qkv":
            rows += _attention_rows(block, layer, padded * keys)
    if pooling == "prr":  # attention without weights, from every token to every other
        pairs, _, _ = _tokens(model, None, grid)
        products = 2 * pairs**2 * model.embed_dim
        rows.append(_Row("attn_pool", None, "rest", products, products))
    _refuse_unknown(model, rows)
    # The last row has the parameters without MACs: norms, position tables, tokens. What layers share
    # is taken off there, so that the sum counts it once.
    rest_params = params(model) - sum(row.params for row in rows)
    rest_nonzero = _nonzero(model.parameters()) - sum(row.nonzero for row in rows)
    rows.append(_Row("rest", None, "rest", params=rest_params, nonzero=rest_nonzero))
    return pd.DataFrame(rows)


def _row(name, layer, block, role, positions):
    """Return the line of a layer that is applied at so many positions (output pixels, tokens)."""
    dense = layer.macs if hasattr(layer, "macs") else layer.weight.numel()
    matrices = [parameter for parameter in layer.parameters() if parameter.ndim > 1]
    return _Row(
        name,
        block and block.name,
        role,
        macs=positions * dense,
        macs_ideal=positions * _nonzero(matrices),  # those of factors, too; without biases
        params=params(layer),
        nonzero=_nonzero(layer.parameters()),
    )


def _attention_rows(block, qkv, pairs):
    """Return the lines of an attention's products, for so many pairs of a query and a key."""
    attention = block.attn
    values = attention.proj.in_features  # of all heads together
    queries = (qkv.out_features - values) // 2  # queries and keys share what else qkv gives
    rows = []
    for product, width in (("qk", queries), ("av", values)):
        name = f"{block.name}.attn.{product}"
        rows.append(_Row(name, block.name, product, pairs * width, pairs * width))
    # SwinV2's position bias: an MLP over the distances in a window, once for all windows
    for i, layer in enumerate(getattr(attention, "cpb_mlp", ())):
        if isinstance(layer, nn.Linear):
            distances = math.prod(2 * side - 1 for side in attention.window_size)
            name = f"{block.name}.attn.cpb_mlp.{i}"
            rows.append(_row(name, layer, block, "position", distances))
    return rows


def _tokens(model, block, grid):
    """Return how many tokens there are, how many attention runs on, and keys that a query sees."""
    tokens = math.prod(grid) + getattr(model, "num_prefix_tokens", 0)
    # neither a ViT's attention nor one without heads has windows
    window = getattr(block and block.attn, "window_size", None)
    if window is None:
        return tokens, tokens, tokens
    # Swin pads to whole windows, for qkv and proj too, but not for the MLP
    keys = math.prod(window)
    windows = [math.ceil(side / step) for side, step in zip(grid, window, strict=True)]
    return tokens, keys * math.prod(windows), keys


def _stem(embed, size):
    """Return (name, layer, [height, width] after it) of the patch embedding, in forward order.

    embed: the patch embedding, a chain of convolutions and max pooling
    size: [height, width] of the image
    Raises TypeError where the sizes do not end at that of the model's tokens.
    """
    image = size
    found = []
    try:
        for name, layer in embed.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
                size = _output_size(layer, size)
                found.append((name, layer, size))
    except RuntimeError:  # nothing of the image is left
        size = ()
    if tuple(size) != tuple(embed.dynamic_feat_size(image)):
        raise TypeError(
            f"no closed form for the stem {type(embed).__name__}: it is no chain of convolutions"
        )
    return found


def _output_size(layer, size):
    """Return [height, width] after a convolution or pooling."""
    image = torch.empty(1, *size, device="meta")  # has a shape, but no values
    options = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return nn.functional.max_pool2d(image, *options).shape[1:]  # a convolution has the same formula


def _refuse_unknown(model, rows):
    """Raise TypeError if a layer that multiplies lies in none of the layers that rows count."""
    counted = tuple(f"{row.layer}." for row in rows)
    for name, module in model.named_modules():
        if isinstance(module, _MULTIPLY) and not f"{name}.".startswith(counted):
            raise TypeError(
                f"no closed form for {name} ({type(module).__name__}) of {type(model).__name__}"
            )


def input_shape(model):
    """Return (channels, height, width) of one image of the size that a model was built for."""
    return model.in_chans, *model.patch_embed.img_size


def meters(model):
    """Count the MACs of one image by three public counters.

    Returns a dict of macs_torch, macs_torchprofile, macs_thop and meter_note. A meter that fails
    gives None, and meter_note, otherwise "", says why.
    """
    subject, x = _metered(model)
    counts = {}
    reasons = []
    for name, meter in (("torch", _torch), ("torchprofile", _torchprofile), ("thop", _thop)):
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                counts[f"macs_{name}"] = int(meter(subject, x))
        except Exception as error:  # other people's tracers may raise anything
            counts[f"macs_{name}"] = None
            reasons.append(f"{name}: {type(error).__name__}: {error}")
    return counts | {"meter_note": "; ".join(reasons)}


def _metered(model):
    """Return a copy of a model for the meters, which leave traces in it, and one image."""
    # The weight of low rank plus entries is one matrix. To make it is no cost of an image.
    subject = _layers.merge(anatomy.copied(model).cpu().float().eval())
    for module in subject.modules():
        if hasattr(module, "fused_attn"):
            # torch's counter gives the same for the fused kernel, but that of an older torch does
            # not know it. The other two leave out what it does beside the two products.
            module.fused_attn = False
    return subject, torch.zeros(1, *input_shape(model))


def check_forward(model):
    """Raise ValueError unless torch counts the MACs of the closed form in one forward pass."""
    if note := _difference(macs(model), _torch(*_metered(model))):
        raise ValueError(
            f"{note}, and a share of MACs cannot be planned. Take off what merges or drops tokens, "
            "leaves early or hooks in, cut, and put it on again; or plan for latency"
        )


def _difference(closed, counted):
    """Return in words that two counts of a model's MACs differ, "" where they do not."""
    if counted in (None, closed):
        return ""
    return (
        f"torch counts {counted:,} MACs and the closed form {closed:,}: "
        "the forward pass is not that of timm's layers"
    )


@torch.no_grad()
def _torch(model, x):
    # torch's own counter counts convolutions and matrix products, as the closed form does, but in
    # FLOPs.
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def _torchprofile(model, x):
    # torchprofile adds norms and elementwise products. These are 0.2 % of a model at 224 px. Norms
    # do not shrink with ranks: of the committed small models with a quarter of their MACs by ranks
    # it is 1.01 %.
    import torchprofile

    return torchprofile.profile_macs(model, x)


def _thop(model, x):
    # thop adds norms and leaves out the two products of attention.
    import thop  # here, as its import warns on every Python that still has distutils

    def count(layer, inputs, output):
        layer.total_ops += output[..., 0].numel() * layer.macs

    # thop takes layers that it has no rule for as free; it leaves buffers behind: last on its copy
    rules = {_layers.LowRankSparseLinear: count}
    return thop.profile(model, (x,), custom_ops=rules, verbose=False)[0]


def bytes_memory(model):
    """Return the bytes of the parameters and buffers of a model as they are stored in memory."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def bytes_disk(model, *, folder=None):
    """Return the bytes of the weights on disk.

    model: counted as checkpoint.save writes it, in float32 and without zeros where that is smaller
    folder: the model's checkpoint, whose file is counted instead
    """
    if folder is not None:
        return (Path(folder) / "model.safetensors").stat().st_size
    anatomy.check_weights(model)  # as checkpoint.save does
    tensors = model.state_dict()
    for name in tensors:
        # Copies: safetensors stores no tensors that share memory, such as tied weights.
        tensors[name] = tensors[name].detach().cpu().contiguous().clone()
    without_zeros, _ = _packed.pack(tensors)
    return len(safetensors.torch.save(without_zeros))


def summary(model, *, folder=None):
    """Return what a model costs: the cost columns of a result, as a dict.

    folder: the model's checkpoint, if it has one
    Keys: params, nonzero; macs and macs_ideal in closed form, flops = 2 * macs; macs_torch,
    macs_torchprofile, macs_thop and meter_note (see `meters`), which also says where torch's count
    is not the closed form's; bytes_memory and bytes_disk.
    Raises TypeError as `breakdown` does, and FileNotFoundError for a folder without a checkpoint.
    """
    columns = ["params", "nonzero", "macs", "macs_ideal"]
    counts = breakdown(model)[columns].sum().to_dict()
    counts["flops"] = 2 * counts["macs"]
    counts |= meters(model)
    notes = [counts["meter_note"], _difference(counts["macs"], counts["macs_torch"])]
    counts["meter_note"] = "; ".join(filter(None, notes))
    return {
        **counts,
        "bytes_memory": bytes_memory(model),
        "bytes_disk": bytes_disk(model, folder=folder),
    }
