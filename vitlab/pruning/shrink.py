"""Make a model really smaller: remove units of every kind.

Every call returns a new model and leaves the one that it was given untouched.

Public: features_left, remove.
"""

import math
from collections import defaultdict

import torch
from timm.layers import RmsNorm, SimpleNorm
from torch import nn

from vitlab import models, names
from vitlab.models import _attention, _layers, _structure, anatomy
from vitlab.pruning import compensate

_NORMS = nn.LayerNorm, nn.RMSNorm, RmsNorm, SimpleNorm  # over the channels of each token


@torch.no_grad()
def remove(model, drop, *, means=None, grams=None, damping=1e-3):
    """Return a copy of model without some of its units.

    The copy computes what model computes with the same units masked to zero. A model that was cut
    before can be cut again.

    model: a ViT or Swin; it stays as it is.
    drop: {(where, kind): indices}, numbered as in model; kinds of anatomy.View.units, and "rows":
        (block, "heads"), (block, "neurons"): all of them are allowed.
        (block, "qk"), (block, "v"): dimensions of heads, numbered head * size + dimension; the
            same number from each head.
        (stage, "width"): channels of the residual stream. The mean in a LayerNorm is then that of
            the channels that stay; gains grow by the root of all channels over those that stay.
        (convolution, "filters"): filters of the stem.
        (layer, "rows"): rows with their biases.
        (block, "block"): [0], the whole block; not all blocks.
    means: {layer: [n]}, mean of each input of a layer. What is lost on average goes into the
        layer's bias (VBP).
    grams: {layer: [n, n]}, as from scores.grams. The inputs that stay take over what they can of
        those that go, by least squares (CORP); about the mean, if means has the layer, too.
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.

    Returns the smaller copy.
    Raises ValueError for unknown names (with the nearest) and for wrong indices. So it does for a
    drop that removes nothing, or all of something: rows, filters, channels or blocks.
    """
    removed = _checked_drop(models.view(model), drop)
    model = anatomy.copied(model)
    # With means or grams, the layers that read removed heads, v dimensions, neurons, channels or
    # filters make up for them in closed form, if means or grams has the layer.
    fill = compensate.Fill(means or {}, grams or {}, damping)
    # Indices mean the layers as they were, so the order of the table matters: rows of a layer go
    # before its inputs, and whole blocks last.
    for kinds, remover in _REMOVERS:
        for where, indices in removed.items():
            if indices.keys() & set(kinds):
                remover(model, where, indices, fill)
    return model


def features_left(model, drop):
    """Return which of a model's features `remove` leaves, as an ascending list of their numbers.

    model: the one that drop is of; its features are the channels of its last stage.
    drop: as for `remove`.
    """
    view = models.view(model)
    place = view.stages[-1], "width"
    gone = torch.as_tensor(drop.get(place, ())).tolist()
    return sorted({*range(view.units(["width"])[place])} - {*gone})


def _checked_drop(view, drop):
    """Return {where: {kind: set of indices}}, without empty entries, or raise ValueError."""
    asked_kinds = {kind for _, kind in drop}
    # View.units raises where the width cannot be cut, so ask for it only if it is to be cut.
    kinds = [kind for kind in anatomy.UNITS if kind != "width" or kind in asked_kinds]
    sizes = view.units(kinds)
    for name, layer in view.linears().items():
        sizes[name, "rows"] = layer.out_features
    removed = defaultdict(lambda: defaultdict(set))
    for key, indices in drop.items():
        names.check("units", key, sizes)
        size = sizes[key]
        indices = _checked_indices(key, indices, size)
        if not indices:
            continue
        where, kind = _as_neurons(view, *key)
        removed[where][kind] |= indices
        # Without heads or neurons the last bias stays, and of blocks others are left.
        if len(removed[where][kind]) == size and kind not in ("heads", "neurons", "block"):
            raise ValueError(
                f"{key}: all {size} would go; keep at least one (masks.keep_largest takes a floor)"
            )
    # A drop of nothing is a mistake, as it is for prune.apply.
    if not removed:
        raise ValueError("drop removes nothing; give indices of at least one unit")
    if all("block" in removed.get(block.name, ()) for block in view.blocks):
        raise ValueError("all blocks would go; keep at least one")
    return removed


def _checked_indices(key, indices, size):
    """Return the set of indices, or raise ValueError if they are not distinct and in [0, size)."""
    numbers = torch.as_tensor(indices).flatten().tolist()
    valid = {number for number in numbers if type(number) is int and 0 <= number < size}
    if len(valid) < len(numbers):
        raise ValueError(f"{key}: give distinct indices in [0, {size}) of what goes; got {numbers}")
    return valid


def _as_neurons(view, where, kind):
    """Return (block, "neurons") for rows of an fc1 whose activation maps 0 to 0, else the key."""
    # A row of fc1 that is zero gives act(0). If that is 0 its column of fc2 can go with it. Any
    # other layer computes the rows that stay, and leaves zeros in the place of the others.
    if kind == "rows" and view.role(where) == "fc1":
        block = view.block_of(where)
        if block.mlp.act(torch.zeros(1)).item() == 0:
            return block.name, "neurons"
    return where, kind


def _check_separable(block, part, kinds):
    """Raise ValueError if the units of attention or of an MLP depend on each other there."""
    if any(name.startswith(("norm.", "gate.")) for name, _ in part.named_parameters()):
        raise ValueError(
            f"{block.name}: {kinds} share a norm or gate, which vitlab cannot cut; "
            "mask them instead"
        )


def _complement(indices, size):
    """Return the sorted numbers in [0, size) that are not among the indices."""
    return torch.tensor(sorted({*range(size)} - indices), dtype=torch.long)


def _remove_rows(model, name, removed, fill):
    """Let a layer compute only the rows that stay, with zeros in the place of the others."""
    layer = model.get_submodule(name)
    keep = _complement(removed["rows"], layer.out_features)
    if isinstance(layer, _layers.RowLinear):
        keep = keep[torch.isin(keep, layer.rows.cpu())]  # an earlier cut has removed the others
    if not len(keep):
        raise ValueError(f"the rows of {name} that are left would all go; keep at least one")
    # The biases go with the rows. SwinV2 keeps those of q and v elsewhere, and they stay.
    kept = _layers.select(layer, rows=keep)
    new = _layers.RowLinear(layer.in_features, layer.out_features, rows=keep, kept=kept)
    _structure.put(model, name, new.to(layer.weight.device))


def _remove_from_attention(model, name, removed, fill):
    """Take heads, and dimensions of queries and keys or of values, out of a block's attention."""
    block = models.view(model).block(name)
    attn = block.attn
    _check_separable(block, attn, "heads")
    if removed["qk"] and block.normalises_queries:
        raise ValueError(f"{name}: queries and keys are normalised together; cut v, or whole heads")
    reader = f"{name}.attn.proj"
    heads = _complement(removed["heads"], block.num_heads)
    # Without heads attention gives its last bias at every token.
    if not len(heads):
        return _put_constant(model, block, "attn", fill)
    queries = _kept_dimensions(block, heads, removed, "qk", block.qk_dim)
    values = _kept_dimensions(block, heads, removed, "v", block.head_dim)
    if removed["qk"] or removed["v"]:
        _attention.allow_cuts(attn)
    # The rows of qkv are all queries, then all keys, then all values.
    size = block.num_heads * block.qk_dim
    _keep_outputs(attn, "qkv", torch.cat([queries, size + queries, 2 * size + values]))
    # SwinV2 holds these biases beside qkv.
    _structure.keep_entries(attn, "q_bias", queries)
    _structure.keep_entries(attn, "k_bias", queries)
    _structure.keep_entries(attn, "v_bias", values)
    # attn.proj reads the heads, side by side. `scale` stays what it was before the cut.
    fill.narrow(model, reader, values)
    _structure.set_heads(attn, heads)


def _kept_dimensions(block, heads, removed, kind, size):
    """Return the indices of the dimensions that stay in these heads: as many in each head."""
    keep = _complement(removed[kind], block.num_heads * size)
    # Dimensions are numbered head * size + dimension. Those of removed heads go with them.
    keep = keep[torch.isin(keep // size, heads)]
    by_head = torch.bincount(keep // size, minlength=block.num_heads)
    counts = by_head[heads].unique().tolist()
    if len(counts) > 1 or counts == [0]:
        raise ValueError(
            f"{block.name} {kind}: the heads would keep {counts} dimensions; "
            "take as many from each and leave some"
        )
    return keep


def _remove_neurons(model, name, removed, fill):
    """Take neurons out of a block's MLP."""
    block = models.view(model).block(name)
    _check_separable(block, block.mlp, "neurons")
    reader = f"{name}.mlp.fc2"
    keep = _complement(removed["neurons"], block.neurons)
    # Without neurons the MLP gives its last bias at every token.
    if not len(keep):
        return _put_constant(model, block, "mlp", fill)
    _keep_outputs(model, f"{name}.mlp.fc1", keep)
    fill.narrow(model, reader, keep)


def _put_constant(model, block, part, fill):
    """Replace a block's "attn" or "mlp", of which nothing is left, by its last bias."""
    inside = model.get_submodule(block.name)
    norm, reader = {"attn": ("norm1", "proj"), "mlp": ("norm2", "fc2")}[part]
    writers = models.view(model).residual_writers(block)
    # Nothing reads a norm before it any more, and several processes cannot train parameters
    # without gradients. A norm behind it still works on the bias.
    if inside.get_submodule(norm) not in writers:
        _structure.put(model, f"{block.name}.{norm}", _layers.Skip())
    fill.put_constant(model, f"{block.name}.{part}", f"{block.name}.{part}.{reader}")


def _remove_filters(model, name, removed, fill):
    """Take filters out of a convolution of the stem, up to the inputs of the next one."""
    norm = anatomy.norm_after(model, name)
    stem = dict(models.view(model).stem)
    if name not in stem:  # a factored convolution: the second of its parts gives the outputs
        name = f"{name}.1"
    keep = _complement(removed["filters"], stem[name].out_channels)
    _keep_outputs(model, name, keep)
    if norm is not None:
        _keep_outputs(model, norm, keep)
    # The batch norm loses the same channels. The next convolution of the stem reads the filters.
    order = list(stem)
    reader = order[order.index(name) + 1]
    fill.narrow(model, reader, keep)
    _merge_factors(model)


def _remove_channels(model, stage, removed, fill):
    """Take channels out of all that writes, carries and reads the residual stream of a stage."""
    stream = models.view(model).residual_stream(stage)
    size = len(stream[0][0].weight)
    keep = _complement(removed["width"], size)
    # Patch merging sees four tokens side by side, each with all channels.
    merged = (torch.arange(4)[:, None] * size + keep).flatten()
    named = [*model.named_modules(), *model.named_parameters()]
    name_of = {part: name for name, part in named}
    for thing, how in stream:
        name = name_of[thing]
        kept = merged if how == "merged" else keep
        # A norm then looks at the channels that stay.
        if how == "last":  # a parameter of the model itself, such as a class token
            _structure.keep_entries(model, name, kept, axis=-1)
        elif how == "columns" or (how == "merged" and hasattr(thing, "in_features")):
            # qkv, fc1, merging and the classifier read the channels.
            fill.narrow(model, name, kept)
        else:
            _keep_outputs(model, name, kept)
        if isinstance(thing, _NORMS) and thing.weight is not None:
            # Zeros would have counted in its mean square: what stays keeps the size that it had.
            model.get_submodule(name).weight *= math.sqrt(size / len(keep))
    _merge_factors(model)
    _structure.tell_width(model)


def _keep_outputs(model, name, keep):
    """Keep some outputs of a layer, or some channels of a norm or scale."""
    module = model.get_submodule(name)
    if hasattr(module, "in_features"):
        return _structure.put(model, name, _layers.select(module, rows=keep))
    # Each tensor of a convolution, norm or scale has an entry for each channel, except for a batch
    # norm's count of batches.
    for tensor_name, tensor in module.state_dict().items():
        if tensor.ndim:
            _structure.keep_entries(module, tensor_name, keep)
    if isinstance(module, _layers.Constant):
        module.out_features = len(keep)


def _merge_factors(model):
    """Merge the factors of a convolution where they no longer execute less than the whole."""
    for name, module in _structure.modules_of(model, _layers.FactoredConv2d).items():
        first, second = module
        # At the break-even rank both parts together execute as much as the whole.
        limit = _layers.break_even_rank(len(second.weight), first.weight[0].numel())
        if module.rank >= limit:
            _structure.put(model, name, _layers.merged_conv(module))


def _remove_block(model, name, removed, fill):
    """Let the residual stream pass where a block was."""
    _structure.put(model, name, _layers.Skip())


_REMOVERS = [  # kinds that are removed together, and the function that removes them
    (("rows",), _remove_rows),
    (("heads", "qk", "v"), _remove_from_attention),
    (("neurons",), _remove_neurons),
    (("filters",), _remove_filters),
    (("width",), _remove_channels),
    (("block",), _remove_block),
]
