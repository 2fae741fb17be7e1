"""Make a model really smaller: remove units of every kind, or replace layers by thinner ones.

Every call returns a new model and leaves the model it was given untouched. `structure` and
`rebuild` are what a checkpoint needs to make the same shapes again.

Public: remove, compress, factorise, refit, structure, rebuild, spectra, METHODS, REFITS,
EVERY_ROLE.
"""

import copy
import reprlib
from collections import defaultdict
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from . import attention, layers, lowrank, models

# ---- Removal of units ----


@torch.no_grad()
def remove(model, drop, *, means=None, grams=None, damping=1e-3):
    """Return a copy of model without some of its units.

    The copy computes what model computes with the same units masked to zero. A model that was cut
    before can be cut again. With means or grams, the layers that read removed heads, v dimensions,
    neurons, channels or filters make up for them in closed form, if means or grams has the layer.
    attn.proj reads the heads and mlp.fc2 the neurons. qkv, fc1, merging and the classifier read
    the channels. The next convolution of the stem reads the filters.

    drop: {(where, kind): indices}, numbered as in model; kinds of models.View.units, and "rows":
        (block, "heads"), (block, "neurons"): all of them are allowed; the layer's last bias stays.
        (block, "qk"), (block, "v"): dimensions of heads, numbered head * size + dimension; the
            same number from each head. `scale` stays.
        (stage, "width"): channels of the residual stream. A norm then looks at the channels that
            stay. The masked model meant here is therefore one whose norms leave dead channels out.
        (convolution, "filters"): filters of the stem, with their batch norm and the inputs of the
            next convolution.
        (layer, "rows"): rows with their biases (SwinV2 keeps those of q and v elsewhere, and they
            stay). Rows of fc1 are the neurons of its MLP, if the activation maps 0 to 0. Any other
            layer computes the rows that stay, and leaves zeros in the place of the others.
        (block, "block"): [0], the whole block; not all blocks.
    means: {layer: [n]}, mean of each input of a layer. What is lost on average goes into the
        layer's bias (VBP).
    grams: {layer: [n, n]}, as from scores.grams. The inputs that stay take over what they can of
        those that go, by least squares (CORP); about the mean, if means has the layer, too.
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.

    Returns the smaller copy.
    Raises ValueError for unknown names (with the nearest), for wrong indices, for a drop that
    removes nothing, and for a drop that removes all rows, filters, channels or blocks.
    """
    removed = _checked_drop(models.view(model), drop)
    model = copy.deepcopy(model)
    fill = _Fill(means or {}, grams or {}, damping)
    # Indices mean the layers as they were, so the order of the table matters: rows of a layer go
    # before its inputs, and whole blocks last.
    for kinds, remover in _REMOVERS:
        for where, indices in removed.items():
            if indices.keys() & set(kinds):
                remover(model, where, indices, fill)
    return model


def _checked_drop(view, drop):
    """Return {where: {kind: set of indices}}, without empty entries, or raise ValueError."""
    asked_kinds = {kind for _, kind in drop}
    # View.units raises where the width cannot be cut, so ask for it only if it is to be cut.
    kinds = [kind for kind in models.UNITS if kind != "width" or kind in asked_kinds]
    sizes = view.units(kinds)
    for name, layer in view.linears().items():
        sizes[name, "rows"] = layer.out_features
    removed = defaultdict(lambda: defaultdict(set))
    for key, indices in drop.items():
        _check_known("units", key, sizes)
        size = sizes[key]
        indices = _checked_indices(key, indices, size)
        if not indices:
            continue
        where, kind = _as_neurons(view, *key)
        removed[where][kind] |= indices
        if len(removed[where][kind]) == size and kind not in ("heads", "neurons", "block"):
            raise ValueError(
                f"{key}: all {size} would go; keep at least one (masks.keep_largest takes a floor)"
            )
    # A drop of nothing is a mistake, as it is for prune.apply.
    if not removed:
        raise ValueError("drop removes nothing; give indices of at least one unit")
    if all("block" in removed.get(block.name, ()) for block in view.blocks):
        raise ValueError("all blocks would go; keep at least one")
    for block in view.blocks:
        for kind in removed.get(block.name, ()):
            _check_separable(block, kind)
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
    if kind == "rows" and view.role(where) == "fc1":
        block = view.block_of(where)
        if block.mlp.act(torch.zeros(1)).item() == 0:
            return block.name, "neurons"
    return where, kind


def _check_separable(block, kind):
    """Raise ValueError if units of this kind depend on each other inside their block."""
    if kind == "block":
        return
    part = block.mlp if kind == "neurons" else block.attn
    if any(name.startswith(("norm.", "gate.")) for name, _ in part.named_parameters()):
        raise ValueError(
            f"{block.name}: {kind} share a norm or gate, which vitlab cannot cut; mask them instead"
        )
    if kind == "qk" and block.normalises_queries:
        raise ValueError(
            f"{block.name}: queries and keys are normalised together; cut v, or whole heads"
        )


def _complement(indices, size):
    """Return the sorted numbers in [0, size) that are not among the indices."""
    return torch.tensor([i for i in range(size) if i not in indices], dtype=torch.long)


def _remove_rows(model, name, removed, fill):
    """Let a layer compute only the rows that stay, with zeros in the place of the others."""
    layer = model.get_submodule(name)
    rows = range(layer.out_features)
    if isinstance(layer, layers.RowLinear):
        rows = layer.rows.tolist()  # an earlier cut has removed the others
    keep = [row for row in rows if row not in removed["rows"]]
    if not keep:
        raise ValueError(f"the rows of {name} that are left would all go; keep at least one")
    kept = layers.select(layer, rows=keep)
    new = layers.RowLinear(layer.in_features, layer.out_features, rows=keep, kept=kept)
    _put(model, name, new.to(layer.weight.device))


def _remove_from_attention(model, name, removed, fill):
    """Take heads, and dimensions of queries and keys or of values, out of a block's attention."""
    block = models.view(model).block(name)
    attn = block.attn
    reader = f"{name}.attn.proj"
    heads = _complement(removed["heads"], block.num_heads)
    if not len(heads):
        return fill.put_constant(model, f"{name}.attn", reader)
    queries = _kept_dimensions(block, heads, removed, "qk", block.qk_dim)
    values = _kept_dimensions(block, heads, removed, "v", block.head_dim)
    if removed["qk"] or removed["v"]:
        attention.open_up(attn)
    # The rows of qkv are all queries, then all keys, then all values.
    size = block.num_heads * block.qk_dim
    _keep_outputs(attn, "qkv", torch.cat([queries, size + queries, 2 * size + values]))
    # SwinV2 holds these biases beside qkv.
    _keep_entries(attn, "q_bias", queries)
    _keep_entries(attn, "k_bias", queries)
    _keep_entries(attn, "v_bias", values)
    fill.narrow(model, reader, values)
    _set_heads(attn, heads)


def _kept_dimensions(block, heads, removed, kind, size):
    """Return the indices of the dimensions that stay in these heads: as many in each head."""
    keep = _complement(removed[kind], block.num_heads * size)
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
    reader = f"{name}.mlp.fc2"
    keep = _complement(removed["neurons"], models.view(model).block(name).neurons)
    if not len(keep):
        return fill.put_constant(model, f"{name}.mlp", reader)
    _keep_outputs(model, f"{name}.mlp.fc1", keep)
    fill.narrow(model, reader, keep)


def _remove_filters(model, name, removed, fill):
    """Take filters out of a convolution of the stem, up to the inputs of the next one."""
    norm = models.norm_after(model, name)
    stem = dict(models.view(model).stem)
    if name not in stem:  # a factored convolution: the second of its parts gives the outputs
        name = f"{name}.1"
    keep = _complement(removed["filters"], stem[name].out_channels)
    names = list(stem)
    reader = names[names.index(name) + 1]
    _keep_outputs(model, name, keep)
    if norm is not None:
        _keep_outputs(model, norm, keep)
    fill.narrow(model, reader, keep)
    _merge_factors(model)


def _remove_channels(model, stage, removed, fill):
    """Take channels out of all that writes, carries and reads the residual stream of a stage."""
    stream = models.view(model).stream(stage)
    size = len(stream[0][0].weight)
    keep = _complement(removed["width"], size)
    # Patch merging sees four tokens side by side, each with all channels.
    merged = (torch.arange(4)[:, None] * size + keep).flatten()
    named = [*model.named_modules(), *model.named_parameters()]
    names = {id(thing): name for name, thing in named}
    for thing, how in stream:
        name = names[id(thing)]
        kept = merged if how == "merged" else keep
        if how == "last":  # a parameter of the model itself, such as a class token
            _keep_entries(model, name, kept, axis=-1)
        elif how == "columns" or (how == "merged" and hasattr(thing, "in_features")):
            fill.narrow(model, name, kept)
        else:
            _keep_outputs(model, name, kept)
    _merge_factors(model)
    _tell_width(model)


def _keep_outputs(model, name, keep):
    """Keep some outputs of a layer, or some channels of a norm or scale."""
    module = model.get_submodule(name)
    if hasattr(module, "in_features"):
        return _put(model, name, layers.select(module, rows=keep))
    # Each tensor of a convolution, norm or scale has an entry for each channel, except for a batch
    # norm's count of batches.
    for tensor_name, tensor in module.state_dict().items():
        if tensor.ndim:
            _keep_entries(module, tensor_name, keep)
    if isinstance(module, layers.Constant):
        module.out_features = len(keep)


def _merge_factors(model):
    """Merge the factors of a convolution where they no longer execute less than the whole."""
    for name, module in _modules_of(model, layers.FactoredConv2d).items():
        first, second = module
        limit = lowrank.break_even_rank(len(second.weight), first.weight[0].numel())
        if module.rank >= limit:
            _put(model, name, layers.merged_conv(module))


def _remove_block(model, name, removed, fill):
    """Let the residual stream pass where a block was."""
    _put(model, name, layers.Skip())


_REMOVERS = [  # kinds that are removed together, and the function that removes them
    (("rows",), _remove_rows),
    (("heads", "qk", "v"), _remove_from_attention),
    (("neurons",), _remove_neurons),
    (("filters",), _remove_filters),
    (("width",), _remove_channels),
    (("block",), _remove_block),
]

# ---- Low rank and sparse layers ----

METHODS = ("svd+iht", "svd", "iht", "threshold", "random")


def compress(
    model,
    *,
    ratio,
    method="svd+iht",
    support="entries",
    grams=None,
    roles=None,
    kappa=0.3,
    multiple=8,
    whiten=True,
    rounds=20,
    damping=1e-3,
    seed=0,
):
    """Return a copy of model whose linear layers hold fewer weights, and a report of the losses.

    A layer [m, n] keeps 1 - ratio of its m n weights. A layer that was replaced before is
    compressed anew.

    ratio: share of the weights that goes, above 0 and below 1.
    method: how the weights of a layer are chosen:
        "svd": two thin layers, of the largest rank whose MACs are that share (lowrank.rank_for).
        "iht": a sparse matrix (lowrank.iht).
        "svd+iht": low rank plus sparse (lowrank.low_rank_plus_sparse).
        "threshold": the largest entries of a truncated SVD's product (lowrank.threshold_product);
            a baseline.
        "random": two thin layers as by "svd", but of directions drawn from seed. What W makes of
            the inputs along them stays. The control.
    support: what the sparse part consists of:
        "entries": single entries. They are masked, and no MACs are saved.
        "rows" or "columns": whole ones. The others are removed, and MACs fall.
        a pattern such as "2:4": masked, for hardware that knows it. ratio must be its share.
    grams: {layer: [n, n]} of this very model, as from scores.grams. "iht" and "svd+iht" need them:
        without activations IHT is magnitude pruning. "svd" uses them unless whiten is False.
    roles: roles of layers, as in View.linears. None means all but the classifier.
    kappa: share in (0, 1) of the kept weights that the rank takes by "svd+iht"; the sparse part
        takes the rest. There an entry counts 1, a row n and a column m. Beside a pattern the rank
        takes all that is left. On entries more MACs are executed than by the dense layer, on rows
        and columns no more than the share.
    multiple: ranks are multiples of it, see lowrank.rank_for.
    whiten: whether "svd" is weighted by activations.
    rounds: largest number of turns between low rank and sparse.
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.
    seed: seed of the random directions.

    Returns (model, report). report is a DataFrame with a row for each layer:
        layer, role, m, n, rank, count (of entries, rows or columns),
        objective_magnitude: objective of magnitude pruning with all of the share on that support,
        objective_start, objective: first and last of the fit; methods other than "iht" and
            "svd+iht" start from the plain truncated SVD,
        macs_dense, macs, macs_ideal: MACs of one token.
    Raises ValueError for a ratio that is no share, changes nothing or leaves nothing of a layer,
    for unknown words, and for grams that are missing or of another model.
    """
    _check_request(ratio, method, support, kappa, grams)
    model = copy.deepcopy(model)
    view = models.view(model)
    generator = torch.Generator().manual_seed(seed)
    report = []
    for name, layer in view.linears(roles).items():
        # A layer that computes only some rows holds them in a layer of its own.
        path = f"{name}.kept" if isinstance(layer, layers.RowLinear) else name
        layer = model.get_submodule(path)
        weight = layer.weight.detach()
        m, n = weight.shape
        gram = _fitting(grams, name, n, damping)
        budget = int((1 - ratio) * m * n + 1e-6)  # 1 - 0.9 is a little less than 0.1
        rank, count = _plan(m, n, budget, method, support, kappa, multiple)
        if rank + count == 0:
            raise ValueError(f"ratio {ratio} leaves nothing of {name} by {method}; lower it")
        fit = _fit(weight, gram, rank, count, method, support, whiten, rounds, generator)
        new = _layer_of(fit, support, layer.bias)
        _put(model, path, new)
        shape = {"m": m, "n": n, "rank": rank, "count": count}
        losses = _losses(weight, gram, budget, count, support, fit)
        costs = {"macs_dense": m * n, "macs": layers.macs(new)}
        costs["macs_ideal"] = layers.macs(new, ideal=True)
        report.append({"layer": name, "role": view.role(name), **shape, **losses, **costs})
    return model, pd.DataFrame(report)


def _check_request(ratio, method, support, kappa, grams):
    """Raise ValueError for settings of `compress` that no layer can be compressed by."""
    if not 0 < ratio < 1:
        raise ValueError(
            "ratio is the share of weights cut, not a percentage: "
            f"above 0, which changes no layer, and below 1; got {ratio}"
        )
    _check_known("method", method, METHODS)
    if not lowrank.neighbours(support):
        _check_known("support", support, layers.SUPPORTS)
    elif "iht" not in method:
        raise ValueError(
            f"{support} is how a sparse part is stored, and {method} has none; "
            "give support='entries'"
        )
    if method == "threshold" and support != "entries":
        raise ValueError(
            f"threshold keeps entries, not {support}; give support='entries' or another method"
        )
    if not 0 < kappa < 1:
        raise ValueError(
            f"kappa is a share in (0, 1); got {kappa}. For the ends there are 'iht' and 'svd'."
        )
    if grams is None and "iht" in method:
        raise ValueError(
            f"{method} works from activations: give grams=scores.grams(model, batches)"
        )


def _price(m, n, support):
    """Return the number of weights in one entry, row or column of an [m, n] matrix."""
    return {"rows": n, "columns": m}.get(support, 1)


def _plan(m, n, budget, method, support, kappa, multiple):
    """Return the rank and the count of entries, rows or columns that a budget of weights pays for.

    Both are 0 if the budget is too small for the method.
    """
    if lowrank.neighbours(support):
        return _plan_pattern(m, n, budget, method, support, multiple)
    share = budget / (m * n)  # of the dense layer's MACs
    if method == "iht":
        return 0, budget // _price(m, n, support)
    if method == "svd+iht":
        # The rank takes kappa of the budget, and the sparse part what is left.
        rank = max(lowrank.rank_for(m, n, share * kappa, multiple=multiple), 1)
        left = max(budget - rank * (m + n), 0)
        count = left // _price(m, n, support)
        return (rank, count) if count else (0, 0)
    rank = lowrank.rank_for(m, n, share, multiple=multiple)
    if method == "threshold" and rank:
        # The product of that rank keeps as many entries as the budget has weights.
        return rank, budget
    return rank, 0


def _plan_pattern(m, n, budget, method, support, multiple):
    """Return the rank beside a pattern, and the count of entries that the pattern keeps."""
    few, of = lowrank.neighbours(support)  # few of each group of neighbours stay
    if n % of or not 0 < few < of:
        raise ValueError(
            f"{support} does not fit a [{m}, {n}] matrix: it divides rows into groups of {of}"
        )
    count = m * n // of * few
    left = max(budget - count, 0)
    rank = lowrank.rank_for(m, n, left / (m * n), multiple=multiple)
    fits = budget == count if method == "iht" else rank > 0
    if not fits:
        need = "exactly" if method == "iht" else "less than"
        raise ValueError(
            f"{support} keeps {few / of:g} of a [{m}, {n}] matrix: "
            f"give a ratio of {need} {1 - few / of:g}"
        )
    return rank, count


def _fit(weight, gram, rank, count, method, support, whiten, rounds, generator):
    """Return the lowrank.Fit of one layer.

    "svd" and "random" leave the sparse part zero, "threshold" leaves no low rank.
    """
    if method == "iht":
        return lowrank.iht(weight, gram, count, support=support)
    if method == "svd+iht":
        return lowrank.low_rank_plus_sparse(
            weight, gram, rank, count, support=support, rounds=rounds
        )
    # The other methods start from the plain truncated SVD.
    u, v = lowrank.svd(weight, rank)
    start = lowrank.objective(weight, u @ v, gram)
    sparse = torch.zeros_like(weight)
    if method == "svd" and whiten:
        u, v = lowrank.svd(weight, rank, gram=gram)
    elif method == "random":
        drawn = torch.randn(weight.shape[1], rank, generator=generator)
        v = torch.linalg.qr(drawn).Q.T.to(weight)  # orthonormal directions of the inputs
        u = weight @ v.T
    elif method == "threshold":
        sparse = lowrank.threshold_product(weight, rank, count)
        u = u[:, :0]
        v = v[:0]
    objectives = [start, lowrank.objective(weight, u @ v + sparse, gram)]
    return lowrank.Fit(u, v, sparse, sparse != 0, start, objectives)


def _layer_of(fit, support, bias):
    """Return the layer that stores a fit."""
    if not fit.mask.any():
        return layers.factored(fit.u, fit.v, bias=bias)
    return layers.low_rank_sparse(
        fit.u,
        fit.v,
        sparse=fit.sparse,
        mask=fit.mask,
        support="entries" if lowrank.neighbours(support) else support,
        bias=bias,
    )


def _losses(weight, gram, budget, count, support, fit):
    """Return the objectives of a fit, and of magnitude pruning with all of its budget."""
    if not lowrank.neighbours(support):
        count = budget // _price(*weight.shape, support)
    pruned = lowrank.project(weight, count, support=support)
    return {
        "objective_magnitude": lowrank.objective(weight, pruned, gram),
        "objective_start": fit.objectives[0],
        "objective": fit.objectives[-1],
    }


@torch.no_grad()
def factorise(model, ranks, *, grams=None, damping=1e-3):
    """Return a copy of model with some layers as two thin ones each, by truncated SVD.

    ranks: {layer: rank} of linear layers and of convolutions of the stem, as from budget.ranks.
    grams: {layer: [n, n]} of this very model, as from scores.grams. A layer in it gets the
        activation-weighted SVD (lowrank.svd), the others the plain one.
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.

    Raises ValueError for no ranks, for a layer that is not there or was factored before, for a
    rank that saves no MACs, and for grams of another model.
    """
    if not ranks:
        raise ValueError("ranks is empty: give {layer: rank} of at least one layer")
    model = copy.deepcopy(model)
    for name, rank in ranks.items():
        layer = _matrix_layer(model, name)
        weight = layer.weight.flatten(1)
        m, n = weight.shape
        limit = lowrank.break_even_rank(m, n)
        if not 1 <= rank < limit:
            raise ValueError(
                f"{name} [{m}, {n}]: a rank in [1, {limit:.1f}) saves MACs; got {rank}"
            )
        gram = _fitting(grams, name, n, damping, partial=True)
        u, v = lowrank.svd(weight, rank, gram=gram)
        if isinstance(layer, nn.Conv2d):
            new = layers.factored_conv(layer, u, v)
        else:
            new = layers.factored(u, v, bias=layer.bias)
        _put(model, name, new)
    return model


def _matrix_layer(model, name):
    """Return the plain linear layer or convolution of the stem called name, or raise ValueError."""
    view = models.view(model)
    layers_by_name = view.linears(EVERY_ROLE) | dict(view.stem)
    _check_known("layer", name, layers_by_name)
    whole = layer = layers_by_name[name]
    if models.is_factor(model, name):
        whole = model.get_submodule(name.rpartition(".")[0])
    if type(whole) not in (nn.Linear, nn.Conv2d):
        raise ValueError(
            f"{name} is a {type(whole).__name__} already, or part of one; factorise plain layers"
        )
    return layer


# ---- Compensation in closed form ----

REFITS = {"least squares": lowrank.refit, "obs": lowrank.obs_update}


@torch.no_grad()
def refit(model, keep, grams, *, method="least squares", damping=1e-3):
    """Return a copy of model whose masked weights are zero and made up for by the others.

    The weights of each linear layer and convolution are solved for anew on their support, so that
    its outputs on calibration activations come near to those before. No labels and no training
    are needed. What has no gram (biases, norms) is only masked.

    keep: {parameter: bool tensor}, True stays, as from masks.keep_largest.
    grams: {layer: [n, n]}, as from scores.grams.
    method: how the weights that stay are solved for:
        "least squares": lowrank.refit, the best end that an update can have for a given mask.
        "obs": lowrank.obs_update, one sweep over the columns, as SparseGPT updates weights that
            stay by Optimal Brain Surgeon (Frantar and Alistarh 2023). Never better for the
            layer's output on those activations; for comparison.
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.

    Raises ValueError for an unknown method or parameter, for a mask or a gram that does not fit,
    and if no weight in keep has a gram.
    """
    _check_known("method", method, REFITS)
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for name, mask in keep.items():
        _check_known("parameter", name, parameters)
        if mask.shape != parameters[name].shape:
            shape = list(parameters[name].shape)
            raise ValueError(f"the mask of {name} must be {shape}; got {list(mask.shape)}")
    if not {name.removesuffix(".weight") for name in keep} & grams.keys():
        raise ValueError("grams has none of the layers in keep: give scores.grams of them")
    for name, mask in keep.items():
        weight = parameters[name]
        mask = mask.to(weight.device)
        layer = name.removesuffix(".weight")
        gram = _fitting(grams, layer, weight[0].numel(), damping, partial=True)
        if gram is None or not mask.any():
            weight.mul_(mask)
            continue
        solution = REFITS[method](weight.flatten(1), gram, mask.flatten(1))
        weight.copy_(solution.view_as(weight))
    return model


@dataclass(frozen=True)
class _Fill:
    """Make up in closed form for the inputs that layers lose.

    means: {layer: mean of its inputs [n]}.
    grams: {layer: gram of its inputs [n, n]}.
    damping: see lowrank.damped.
    """

    means: dict
    grams: dict
    damping: float

    def narrow(self, model, name, keep):
        """Let a linear layer or convolution read only these inputs, made up for the others."""
        layer = model.get_submodule(name)
        weight = layer.weight
        # A filter sees a kernel of values in each channel, a linear layer one value.
        size = weight[0, 0].numel()
        columns = (keep[:, None] * size + torch.arange(size)).flatten()
        transfer, lost = self._solve(layer, name, columns)
        if isinstance(layer, nn.Conv2d):
            flat = weight.flatten(1)
            new = flat[:, columns]
            if transfer is not None:
                new = (flat.double() @ transfer).to(flat.dtype)
            _resize(layer, "weight", new.unflatten(1, (-1, *weight.shape[2:])))
        else:
            new = layers.select(layer, columns=columns)
            if transfer is not None:
                layers.recombine(new, layer, transfer.to(weight.dtype))
            _put(model, name, new)
        if lost is None:
            return
        # What the outputs lost on average goes into the bias, or into the batch norm behind.
        norm = models.norm_after(model, name)
        if layer.bias is not None:
            layers.shift(model.get_submodule(name), lost)
        elif norm is not None:
            model.get_submodule(norm).running_mean.sub_(lost)

    def put_constant(self, model, name, reader):
        """Replace attention or an MLP by what its last layer, the reader, gives without inputs."""
        layer = model.get_submodule(reader)
        bias = layer.bias
        _, lost = self._solve(layer, reader, torch.arange(0))
        if lost is not None:
            bias = bias + lost
        new = layers.Constant(layer.out_features, bias=False)
        if bias is not None:
            new.bias = nn.Parameter(bias)
        _put(model, name, new)

    def _solve(self, layer, name, columns):
        """Return what makes up for the inputs of a layer that are not in columns.

        Inputs x are about transfer (x[columns] - centre[columns]) + centre, where centre is their
        mean, or zero without means.

        Returns transfer [n, kept], float64, or None without a gram; and what each output loses on
        average, [m], or None without a mean or a place for it.
        """
        weight = layer.weight.flatten(1)
        n = weight.shape[1]
        gram = _fitting(self.grams, name, n, self.damping, partial=True)
        mean = self.means.get(name)
        if mean is not None and mean.shape != (n,):
            raise ValueError(
                f"mean of {name} is {list(mean.shape)}, not {[n]}: wrong layer or model"
            )
        if layer.bias is None and not isinstance(layer, nn.Conv2d):
            mean = None  # a linear layer without bias cannot take it up
        centre = weight.new_zeros(n) if mean is None else mean
        centre = centre.to(weight.device, torch.float64)
        columns = columns.to(weight.device)
        transfer = None
        # Without a gram, what the outputs lose on average is what the removed inputs gave them.
        unexplained = centre.index_fill(0, columns, 0)
        if gram is not None:
            # With a gram, the inputs that stay predict the removed ones, about the mean.
            covariance = gram.to(weight.device) - centre[:, None] * centre
            transfer = lowrank.regression(covariance, columns)
            unexplained = centre - transfer @ centre[columns]
        if mean is None:
            return transfer, None
        return transfer, (weight.double() @ unexplained).to(weight.dtype)


# ---- Checks that several groups share ----


def _fitting(grams, name, n, damping, *, partial=False):
    """Return the damped gram [n, n] of a layer with n inputs, or None without grams.

    partial: whether grams may lack the layer; None is then returned for it.
    Raises ValueError for a layer without gram and for a gram of another shape.
    """
    if grams is None or (partial and name not in grams):
        return None
    _check_known("layer in grams (scores.grams makes them)", name, grams)
    shape = list(grams[name].shape)
    if shape != [n, n]:
        raise ValueError(
            f"gram of {name} is {shape}, not {[n, n]}: take scores.grams of the model as it is now"
        )
    return lowrank.damped(grams[name], damping)


def _check_known(kind, word, known):
    """Raise ValueError, with the nearest and some of the known words, if word is none of them."""
    if word not in known:
        hint = models.nearest(word, known)
        raise ValueError(f"unknown {kind} {word!r}{hint} Known are {reprlib.repr(list(known))}.")


# ---- Structure: what a checkpoint says about the shapes of a model ----

EVERY_ROLE = (*models.ROLES.values(), "head")


def structure(model):
    """Return how a model's shapes differ from those of models.create with its recipe.

    The result can be stored as JSON and is what `rebuild` takes. For a model that was not cut,
    both of its first two entries are empty and the others are absent:
        "heads": {block: number of heads}
        "layers": {layer: config}
        "skipped": blocks that are gone
        "constant": {attention or MLP without units: config}
        "convolutions": {factored convolution: rank}
        "opened": attention with dimensions cut
        "sizes": {other parameter or buffer: shape}

    Raises ValueError for a model without a recipe.
    """
    if not hasattr(model, "recipe"):
        raise ValueError("the model has no recipe to build it from: make it by models.create")
    recipe = dict(model.recipe)
    options = recipe.pop("options", {})
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        dense = models.create(**recipe, **options)
    view = models.view(model)
    heads = {}
    opened = []
    for block in view.blocks:
        dense_attn = dense.get_submodule(f"{block.name}.attn")
        if block.num_heads not in (0, dense_attn.num_heads):
            heads[block.name] = block.num_heads
        if type(block.attn) is attention.OPEN.get(type(dense_attn)):
            opened.append(f"{block.name}.attn")
    configs = {}
    for name, layer in view.linears(EVERY_ROLE).items():
        config = layers.config(layer)
        if config != layers.config(dense.get_submodule(name)):
            configs[name] = config
    constants = _modules_of(model, layers.Constant)
    convolutions = _modules_of(model, layers.FactoredConv2d)
    for name, module in convolutions.items():
        # Sizes are compared for the two parts of a factored convolution, too.
        _put(dense, name, layers.FactoredConv2d(dense.get_submodule(name), rank=module.rank))
    others = {
        "skipped": list(_modules_of(model, layers.Skip)),
        "constant": {name: module.config() for name, module in constants.items()},
        "convolutions": {name: module.rank for name, module in convolutions.items()},
        "opened": opened,
        "sizes": _other_sizes(model, dense, without=configs),
    }
    others = {key: value for key, value in others.items() if value}
    return {"heads": heads, "layers": configs, **others}


def _modules_of(model, kind):
    """Return {name: module} of the modules of a class."""
    return {name: part for name, part in model.named_modules() if isinstance(part, kind)}


def _other_sizes(model, dense, without):
    """Return {parameter or buffer: shape} of what is not as in dense nor inside these layers."""
    dense_state = dense.state_dict()
    prefixes = tuple(f"{name}." for name in without)
    sizes = {}
    for name, tensor in model.state_dict().items():
        differs = tensor.shape != dense_state.get(name, tensor).shape
        if differs and not name.startswith(prefixes):
            sizes[name] = list(tensor.shape)
    return sizes


def rebuild(model, structure):
    """Give a model fresh from models.create the shapes of a structure, in place, and return it.

    The state dict of the model that the structure was taken from then fits
    load_state_dict(strict=True).

    Raises ValueError for blocks and layers that model does not have.
    """
    structure = defaultdict(dict, structure)  # entries without content may be absent
    for name in structure["skipped"]:
        _put(model, name, layers.Skip())
    for name, config in structure["constant"].items():
        _put(model, name, layers.Constant(**config))
    for name, rank in structure["convolutions"].items():
        _put(model, name, layers.FactoredConv2d(model.get_submodule(name), rank=rank))
    for name in structure["opened"]:
        attention.open_up(model.get_submodule(name))
    view = models.view(model)
    layers_by_name = view.linears(EVERY_ROLE)
    for name, config in structure["layers"].items():
        _check_known("linear layer", name, layers_by_name)
        weight = layers_by_name[name].weight
        _put(model, name, layers.build(config, device=weight.device, dtype=weight.dtype))
    for name, shape in structure["sizes"].items():
        owner, _, tensor_name = name.rpartition(".")
        _resize(model.get_submodule(owner), tensor_name, torch.empty(shape))
    for name, count in structure["heads"].items():
        _set_heads(view.block(name).attn, torch.arange(count))
    if structure["sizes"]:
        _tell_width(model)
    return model


def _put(model, name, new):
    """Put a module in the place of the one called name, in the same mode."""
    model.set_submodule(name, new.train(model.get_submodule(name).training))


def _set_heads(attn, heads):
    """Keep these heads wherever attention holds an entry for each head. `scale` stays."""
    attn.num_heads = len(heads)
    if hasattr(attn, "attn_dim"):  # timm's ViT
        attn.attn_dim = attn.proj.in_features
    if hasattr(attn, "head_dim"):
        attn.head_dim = attn.proj.in_features // len(heads)
    # Swin's table: if it were forgotten, attention with one head left would broadcast in silence.
    _keep_entries(attn, "relative_position_bias_table", heads, axis=1)
    _keep_entries(attn, "logit_scale", heads)
    if hasattr(attn, "cpb_mlp"):  # SwinV2's
        _keep_entries(attn.cpb_mlp[2], "weight", heads)


def _tell_width(model):
    """Set what timm's model says about its width, for a new classifier."""
    widths = list(models.view(model).units(["width"]).values())
    model.embed_dim = widths[0]
    model.num_features = model.head_hidden_size = widths[-1]


def _keep_entries(module, name, keep, axis=0):
    """Keep these entries of a parameter or buffer along an axis, if the module has it."""
    tensor = getattr(module, name, None)
    if tensor is not None:
        _resize(module, name, tensor.index_select(axis, keep.to(tensor.device)))


def _resize(module, name, tensor):
    """Set a parameter or buffer to tensor, and what the module says about its size."""
    old = getattr(module, name)
    tensor = tensor.detach().to(old).clone()
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, old.requires_grad)
    setattr(module, name, tensor)
    if name != "weight":
        return
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = tensor.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensor.shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(tensor)
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(tensor.shape)


# ---- Singular values, to be drawn ----


def spectra(model, grams=None, *, points=24, damping=1e-3):
    """Return the singular values of the linear layers but the classifier, as a DataFrame.

    grams: {layer: [n, n]} of scores.grams, for the values of W S as in the SVD of `compress`; None
        for those of W.
    points: about how many ranks of each layer to show, from 1 to the last: half of them in equal
        steps, half in equal steps of their logarithm.
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.

    Returns a row for each layer and rank:
        layer, block, role, m, n, rank,
        sigma: the singular value of that rank,
        energy: share of the squares up to it, in [0, 1]; 1 at the last rank,
        break_even: rank below which two thin layers execute fewer MACs (lowrank.break_even_rank).
    """
    view = models.view(model)
    rows = []
    for name, layer in view.linears().items():
        weight = layer.weight.detach()
        m, n = weight.shape
        block = view.block_of(name)
        sigma = lowrank.spectrum(weight, _fitting(grams, name, n, damping))
        energy = sigma.square().cumsum(0)
        energy = energy / energy[-1].clamp_min(lowrank.TINY)
        for rank in _spread_ranks(min(m, n), points):
            rows.append(
                {
                    "layer": name,
                    "block": block and block.name,
                    "role": view.role(name),
                    "m": m,
                    "n": n,
                    "rank": rank,
                    "sigma": sigma[rank - 1].item(),
                    "energy": energy[rank - 1].item(),
                    "break_even": lowrank.break_even_rank(m, n),
                }
            )
    return pd.DataFrame(rows)


def _spread_ranks(largest, points):
    """Return distinct ranks from 1 to the largest, half linearly, half logarithmically spaced."""
    steps = [(i + 1) / (points // 2) for i in range(points // 2)]
    ranks = {round(largest * step) for step in steps}
    ranks |= {round(largest**step) for step in steps}
    return sorted((ranks | {1}) - {0})
