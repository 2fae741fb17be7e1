"""Makes a model really smaller: removes units of every kind, and replaces linear layers by thinner ones.

A new model comes back and the one given is untouched. `structure` and `rebuild` are what a checkpoint needs
to make the same shapes again.
"""

import copy
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from . import attention, layers, lowrank, models

METHODS = ("svd+iht", "svd", "iht", "threshold", "random")
REFITS = ("least squares", "obs")
EVERY_ROLE = (*models.ROLES.values(), "head")


def remove(model, drop, *, means=None, grams=None, damping=1e-3):
    """A copy of model without these units; it computes what model does with the same units masked to zero.

    drop: {(where, kind): indices}, numbered as in model, for the kinds of models.View.units and "rows":

    - (block, "heads"), (block, "neurons"): all of them, too; the layer's last bias stays.
    - (block, "qk"), (block, "v"): dimensions of heads, head * size + dimension, as many from each head. `scale` stays.
    - (stage, "width"): channels of the residual stream. A norm then looks at the channels that stay, so that the
      masked model meant here is one whose norms leave dead channels out.
    - (convolution, "filters"): of the stem, with their batch norm and the next convolution's inputs.
    - (layer, "rows"): with their biases (SwinV2 keeps those of q and v elsewhere: they stay). Rows of fc1 are its
      MLP's neurons, if the activation maps 0 to 0; any other layer computes the rows that stay and leaves zeros in the
      place of the others.
    - (block, "block"): [0], the whole block; not all blocks.

    means, grams: closed-form compensation for what reads heads, v dimensions, neurons, channels and filters, for the
    layers found in them (attn.proj reads the heads, mlp.fc2 the neurons; qkv, fc1, merging and, if given, the
    classifier read channels; the next convolution of the stem reads filters). means {layer: [n]} of its inputs: what
    is lost on average goes into its bias (VBP). grams {layer: [n, n]}, as from scores.grams: the inputs that stay take
    over, by least squares, what they can of those that go (CORP); about the mean, if means has the layer, too.
    damping: see lowrank.damped.

    Works on models already cut. Raises ValueError for unknown names (with the nearest) and wrong indices, for
    a drop that removes nothing (a mistake, as for prune.apply; tests show that each cut, told to remove nothing, gives
    back a model whose logits are bit-equal), and for one that removes all rows, filters, channels or blocks.
    """
    gone = _checked_drop(models.view(model), drop)
    model = copy.deepcopy(model)
    fill = _Fill(means or {}, grams or {}, damping)
    for kinds, cut in CUTS:  # in this order: numbers are those of the layers before others go
        for where in dict.fromkeys(name for name, kind in gone if kind in kinds):
            cut(model, where, {kind: gone[where, kind] for kind in kinds if (where, kind) in gone}, fill)
    return model


@torch.no_grad()
def refit(model, keep, grams, *, method="least squares", damping=1e-3):
    """A copy of model whose masked weights are zero and whose other ones, layer by layer, make up for them.

    The weights of each linear layer and convolution are solved for anew on their support, between its outputs before
    and after, on calibration activations. No labels, no training. What has no gram (biases, norms) is masked only.
    method:

    - "least squares": lowrank.refit, the best end that an update can have for a given mask.
    - "obs": lowrank.obs_update, one sweep over the columns, as SparseGPT updates weights that stay by Optimal Brain
      Surgeon (Frantar and Alistarh 2023). Never better for the layer's output on those activations, for comparison.

    keep: {parameter: bool tensor}, True stays, as from masks.keep_largest. grams: {layer: [n, n]}, as from
    scores.grams. damping: see lowrank.damped. Raises ValueError for an unknown method or parameter, a mask or a gram
    that does not fit, and if no weight in keep has a gram.
    """
    if method not in REFITS:
        raise ValueError(f"unknown method {method!r}{models.nearest(method, REFITS)} Known are {', '.join(REFITS)}.")
    solve = lowrank.refit if method == "least squares" else lowrank.obs_update
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for name, mask in keep.items():
        if name not in parameters or mask.shape != parameters[name].shape:
            raise ValueError(f"no parameter {name!r} of shape {list(mask.shape)}{models.nearest(name, parameters)}")
    solved = [name for name in keep if name.endswith(".weight") and name.removesuffix(".weight") in grams]
    if not solved:
        raise ValueError("grams has none of the layers in keep: give scores.grams of them")
    for name, mask in keep.items():
        weight, mask = parameters[name], mask.to(parameters[name].device)
        if name in solved and mask.any():
            gram = _fitting(grams, name.removesuffix(".weight"), [weight[0].numel()] * 2)
            found = solve(weight.flatten(1), lowrank.damped(gram, damping), mask.flatten(1))
            weight.copy_(found.view_as(weight))
        else:
            weight.mul_(mask)
    return model


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
    """A copy of model whose linear layers keep 1 - ratio of their m n weights, and a report of what was lost.

    ratio: share cut, above 0 and below 1. roles: as in View.linears (None: all but the classifier). method:

    - "svd": two thin layers of the largest rank whose MACs are that share (lowrank.rank_for, with multiple).
    - "iht": sparse (lowrank.iht), on support "entries" (masked: no MACs saved) or on whole "rows" or "columns"
      (removed: MACs fall), or a pattern such as "2:4" (masked, for hardware that knows it), whose share ratio must be.
    - "svd+iht": low rank plus sparse (lowrank.low_rank_plus_sparse). The rank takes kappa, in (0, 1), of what is
      kept and S the rest, where an entry counts 1, a row n and a column m; beside a pattern it takes all that is
      left. On entries this executes more MACs than dense, on rows and columns no more than the share.
    - "threshold": the largest entries of a truncated SVD's product, a baseline (lowrank.threshold_product).
    - "random": as "svd", but of directions drawn from seed: what W makes of those inputs stays. The control.

    grams: {layer: [n, n]} of this very model, as from scores.grams. "iht" and "svd+iht" need them: without
    activations IHT is magnitude pruning. "svd" uses them unless whiten is False. damping: see lowrank.damped.
    rounds: of low rank and sparse in turns, at most. Layers that were replaced before are compressed anew.

    Returns (model, report), a DataFrame of layer, role, m, n, rank, count (of entries, rows or columns);
    objective_magnitude (of magnitude pruning with all of the share on that support), objective_start and
    objective (first and last of the fit; the others than iht start from the plain truncated SVD); macs_dense,
    macs and macs_ideal of one token. Raises ValueError for a ratio that is no share, changes nothing or leaves
    nothing of a layer, for unknown words, and for grams that are missing or of another model.
    """
    _check_request(ratio=ratio, method=method, support=support, grams=grams, kappa=kappa)
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    view = models.view(model)
    report = []
    for name, layer in view.linears(roles).items():
        inner = layer.kept if isinstance(layer, layers.RowLinear) else layer
        weight = inner.weight.detach()
        m, n = weight.shape
        gram = None if grams is None else lowrank.damped(_fitting(grams, name, (n, n)), damping)
        budget = int((1 - ratio) * m * n + 1e-6)  # 1 - 0.9 is a little less than 0.1
        rank, count = _plan(m, n, budget, method=method, support=support, kappa=kappa, multiple=multiple)
        if rank + count == 0:
            raise ValueError(f"ratio {ratio} leaves nothing of {name} [{m}, {n}] by {method!r}; give a lower one")
        options = {"method": method, "support": support, "whiten": whiten, "rounds": rounds, "generator": generator}
        fit = _fit(weight, gram, rank=rank, count=count, **options)
        if count:
            stored = "entries" if lowrank.neighbours(support) else support
            parts = {"sparse": fit.sparse, "mask": fit.mask, "support": stored}
            new = layers.low_rank_sparse(fit.u, fit.v, **parts, bias=inner.bias)
        else:
            new = layers.factored(fit.u, fit.v, bias=inner.bias)
        _put(model, name if inner is layer else f"{name}.kept", new)
        most = count if lowrank.neighbours(support) else budget // _price(m, n, support)
        whole = lowrank.project(weight, most, support=support)
        line = {"layer": name, "role": view.role(name), "m": m, "n": n, "rank": rank, "count": count}
        line |= {"objective_magnitude": lowrank.objective(weight, whole, gram)}
        line |= {"objective_start": fit.objectives[0], "objective": fit.objectives[-1], "macs_dense": m * n}
        report.append(line | {"macs": layers.macs(new), "macs_ideal": layers.macs(new, ideal=True)})
    return model, pd.DataFrame(report)


def spectra(model, grams=None, *, points=24, damping=1e-3):
    """Singular values of the linear layers but the classifier: a frame of layer, block, role, m, n, rank, sigma, energy
    and break_even.

    grams: {layer: [n, n]} of scores.grams, for values of W S as in the SVD of `compress`; None for those of W. points:
    about so many ranks of each layer, half in equal steps, half in steps of their logarithm, 1 to the last. sigma: the
    rank-th singular value. energy: share of the squares up to it, in [0, 1]; 1 at the end. break_even: the rank below
    which two thin layers execute fewer MACs (lowrank.break_even_rank). damping: see lowrank.damped.
    """
    view, rows = models.view(model), []
    for name, layer in view.linears().items():
        weight = layer.weight.detach()
        m, n = weight.shape
        gram = None if grams is None else lowrank.damped(_fitting(grams, name, (n, n)), damping)
        sigma, full = lowrank.spectrum(weight, gram), min(m, n)
        energy = sigma.square().cumsum(0)
        energy = (energy / energy[-1].clamp_min(lowrank.TINY)).tolist()
        block = view.block_of(name)
        about = (name, block and block.name, view.role(name), m, n)
        steps = [(i + 1) / (points // 2) for i in range(points // 2)]
        for rank in sorted({1, *(round(at) for step in steps for at in (full**step, full * step) if at >= 1)}):
            rows.append((*about, rank, sigma[rank - 1].item(), energy[rank - 1], lowrank.break_even_rank(m, n)))
    columns = ["layer", "block", "role", "m", "n", "rank", "sigma", "energy", "break_even"]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def factorise(model, ranks, *, grams=None, damping=1e-3):
    """A copy of model with these layers as two thin ones each, by truncated SVD (lowrank.svd).

    ranks: {layer: rank} of linear layers and of convolutions of the stem, as from budget.ranks. grams: {layer:
    [n, n]} of this very model, as from scores.grams: activation-weighted SVD for the layers in it, plain for others.
    damping: see lowrank.damped. Raises ValueError for no ranks, a layer that is not there or was factored before, a
    rank that saves no MACs, and grams of another model.
    """
    if not ranks:
        raise ValueError("ranks is empty: give {layer: rank} of at least one layer")
    model = copy.deepcopy(model)
    for name, rank in ranks.items():
        layer = _matrix_layer(model, name)
        weight = layer.weight.detach().flatten(1)
        m, n = weight.shape
        if not 1 <= rank < lowrank.break_even_rank(m, n):
            most = lowrank.break_even_rank(m, n)
            raise ValueError(f"{name} [{m}, {n}]: a rank in [1, {most:.1f}) saves MACs; got {rank}")
        gram = None if grams is None or name not in grams else lowrank.damped(_fitting(grams, name, (n, n)), damping)
        u, v = lowrank.svd(weight, rank, gram=gram)
        is_conv = isinstance(layer, nn.Conv2d)
        _put(model, name, layers.factored_conv(layer, u, v) if is_conv else layers.factored(u, v, bias=layer.bias))
    return model


def _matrix_layer(model, name):
    """The plain linear layer or convolution of the stem called name, or ValueError."""
    view = models.view(model)
    known = view.linears(EVERY_ROLE) | dict(view.stem)
    if name not in known:
        raise ValueError(f"there is no layer {name!r} to factorise{models.nearest(name, known)}")
    kind = type(model.get_submodule(name.rpartition(".")[0]) if models.is_factor(model, name) else known[name])
    if kind not in (nn.Linear, nn.Conv2d):
        raise ValueError(f"{name} is a {kind.__name__} already, or part of one; factorise plain layers")
    return known[name]


def structure(model):
    """What of model's shapes differs from models.create with its recipe, JSON-able, for `rebuild`.

    Returns {"heads": {block: how many}, "layers": {layer: config}} and, where there are some, "skipped": blocks that
    are gone, "constant": {attention or MLP without units: config}, "opened": attention with dimensions cut,
    "convolutions": {factored one: rank}, "sizes": {other parameter or buffer: shape}. Empty for a model that was not
    cut.
    Raises ValueError for a model without a recipe.
    """
    if not hasattr(model, "recipe"):
        raise ValueError("the model has no recipe to build it from: make it by models.create")
    recipe = {**model.recipe}
    options = recipe.pop("options", {})
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        whole = models.create(**recipe, **options)
    dense, modules = dict(whole.named_modules()), dict(model.named_modules())
    heads = {
        block.name: block.num_heads
        for block in models.view(model).blocks
        if block.num_heads not in (0, models.view(whole).block(block.name).num_heads)
    }
    configs = {name: layers.config(layer) for name, layer in models.view(model).linears(EVERY_ROLE).items()}
    configs = {name: config for name, config in configs.items() if config != layers.config(dense[name])}
    kinds = attention.OPEN.values()
    convolutions = {n: m.rank for n, m in modules.items() if isinstance(m, layers.FactoredConv2d)}
    for name, rank in convolutions.items():  # of their parts, too, the sizes are compared
        whole.set_submodule(name, layers.FactoredConv2d(dense[name], rank=rank))
    found = {
        "skipped": [name for name, module in modules.items() if isinstance(module, layers.Skip)],
        "constant": {n: m.config() for n, m in modules.items() if isinstance(m, layers.Constant)},
        "convolutions": convolutions,
        "opened": [n for n, m in modules.items() if type(m) in kinds and type(dense[n]) is not type(m)],
        "sizes": _other_sizes(model, whole, within=configs),
    }
    return {"heads": heads, "layers": configs} | {key: value for key, value in found.items() if value}


def _other_sizes(model, whole, *, within):
    """{parameter or buffer: shape} where model's differs from whole's, but for those of the layers in within."""
    before = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    inside = tuple(f"{name}." for name in within)
    return {
        name: list(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside) and tensor.shape != before.get(name, tensor.shape)
    }


def rebuild(model, structure):
    """Give a model fresh from models.create the shapes of structure, in place; returns it.

    load_state_dict(strict=True) of the model that structure was taken from then fits. Raises ValueError for
    blocks and layers that model does not have.
    """
    for name in structure.get("skipped", ()):
        model.set_submodule(name, layers.Skip())
    for name, config in structure.get("constant", {}).items():
        _put(model, name, layers.Constant(**config))
    for name, rank in structure.get("convolutions", {}).items():
        _put(model, name, layers.FactoredConv2d(model.get_submodule(name), rank=rank))
    for name in structure.get("opened", ()):
        attention.open_up(model.get_submodule(name))
    view = models.view(model)
    known = view.linears(EVERY_ROLE)
    for name, config in structure["layers"].items():
        if name not in known:
            raise ValueError(f"{type(model).__name__} has no linear layer {name!r}{models.nearest(name, known)}")
        weight = known[name].weight
        _put(model, name, layers.build(config, device=weight.device, dtype=weight.dtype))
    for name, shape in structure.get("sizes", {}).items():
        owner, _, own = name.rpartition(".")
        _resize(model.get_submodule(owner), own, torch.empty(shape))
    for name, count in structure["heads"].items():
        block = view.block(name)
        _set_heads(block.attn, torch.arange(count))
    if structure.get("sizes"):
        _tell_width(model)
    return model


def _put(model, name, new):
    """Set the layer called name, in the mode of the one that was there."""
    model.set_submodule(name, new.train(model.get_submodule(name).training))


def _complement(indices, size):
    keep = torch.ones(size, dtype=torch.bool)
    keep[indices] = False
    return keep.nonzero().flatten()


def _checked_drop(view, drop):
    """{key: indices}, rows of fc1 counted as neurons, empty entries left out; or ValueError."""
    sizes = {(name, "rows"): layer.out_features for name, layer in view.linears().items()}
    cheap = [kind for kind in models.UNITS if kind != "width"]  # whose asking raises where it cannot be cut
    sizes |= view.units(models.UNITS if any(kind == "width" for _, kind in drop) else cheap)
    gone = {}
    for key, indices in drop.items():
        if key not in sizes:
            raise ValueError(f"there is nothing to remove called {key!r}{models.nearest(key, sizes)}")
        indices = torch.as_tensor(indices).flatten()
        if not len(indices):
            continue
        integer = indices.dtype != torch.bool and not indices.is_floating_point()
        size = sizes[key]
        if not integer or indices.min() < 0 or indices.max() >= size or len(indices.unique()) < len(indices):
            raise ValueError(f"{key}: give distinct indices in [0, {size}) of what goes; got {indices.tolist()}")
        key = _as_neurons(view, key)
        gone[key] = torch.cat([gone.get(key, indices[:0]), indices]).cpu().long().unique()
        if len(gone[key]) == size and key[1] not in ("heads", "neurons", "block"):
            raise ValueError(f"{key}: all {size} would go; keep at least one (masks.keep_largest takes a floor)")
    if not gone:
        raise ValueError("drop removes nothing; give indices of at least one unit")
    if sum(kind == "block" for _, kind in gone) == len(view.blocks):
        raise ValueError("all blocks would go; keep at least one")
    for name, kind in gone:
        if kind in ("heads", "qk", "v", "neurons"):
            part = view.block(name).mlp if kind == "neurons" else view.block(name).attn
            if any(len(list(child.parameters())) for word, child in part.named_children() if word in ("norm", "gate")):
                raise ValueError(f"{name}: {kind} share a norm or gate, which vitlab cannot cut; mask them instead")
            if kind == "qk" and view.block(name).normalises_queries:
                raise ValueError(f"{name}: queries and keys are normalised together; cut v, or whole heads")
    return gone


def _as_neurons(view, key):
    """(block, "neurons") for the rows of an fc1 whose activation maps 0 to 0; any other key as it is."""
    if key[1] != "rows" or view.role(key[0]) != "fc1":
        return key
    block = view.block_of(key[0])
    return (block.name, "neurons") if block.mlp.act(torch.zeros(1)).item() == 0 else key


@dataclass(frozen=True)
class _Fill:
    """Closed-form compensation: {layer: means of its inputs [n]}, {layer: their grams [n, n]}, damping."""

    means: dict
    grams: dict
    damping: float

    def reading(self, model, name, columns):
        """The layer called name with only these inputs, made up for the others where there is something to do it by."""
        layer = model.get_submodule(name)
        new = layers.select(layer, columns=columns)
        mean, gram, n = self.means.get(name), self.grams.get(name), layer.in_features
        if (mean is not None and mean.shape != (n,)) or (gram is not None and gram.shape != (n, n)):
            raise ValueError(f"mean and gram of a layer with {n} inputs are [{n}] and [{n}, {n}]")
        if layer.bias is None:  # it cannot take up a mean
            mean = None
        if mean is None and gram is None:
            return new
        weight = layer.weight.detach()
        transfer, centre = self.transfer(mean, gram, columns, like=weight[0])
        if gram is not None:
            layers.recombine(new, layer, transfer.to(weight.dtype))
        if mean is not None:
            layers.shift(new, (weight.double() @ (centre - transfer @ centre[columns])).to(weight.dtype))
        return new

    def filters(self, model, name, keep):
        """Weight [O, kept, k, k] of a convolution that reads only these channels, made up for the others, and what is
        lost on average of each output, [O] or None."""
        weight = model.get_submodule(name).weight.detach()
        mean, gram, keep = self.means.get(name), self.grams.get(name), keep.to(weight.device)
        kept, n = weight.index_select(1, keep), weight[0].numel()
        if (mean is not None and mean.shape != (n,)) or (gram is not None and gram.shape != (n, n)):
            raise ValueError(f"mean and gram of a convolution that sees {n} values are [{n}] and [{n}, {n}]")
        if mean is None and gram is None:
            return kept, None
        size = weight[0, 0].numel()
        columns = (keep[:, None] * size + torch.arange(size, device=keep.device)).flatten()
        transfer, centre = self.transfer(mean, gram, columns, like=weight[0].flatten())
        flat = weight.flatten(1).double()
        lost = None if mean is None else (flat @ (centre - transfer @ centre[columns])).to(weight.dtype)
        return (flat @ transfer).to(weight.dtype).view_as(kept), lost

    def transfer(self, mean, gram, columns, *, like):
        """transfer [n, kept] and centre [n] with x about transfer (x[columns] - centre[columns]) + centre, float64."""
        n = len(like)
        centre = (like.new_zeros(n) if mean is None else mean).double().to(like.device)
        if gram is None:
            return torch.eye(n, dtype=torch.float64, device=like.device)[:, columns], centre
        gram = lowrank.damped(gram.to(like.device), self.damping)
        return lowrank.regression(gram - centre[:, None] * centre, columns), centre

    def constant(self, model, name):
        """What the layer called name gives if all its inputs are gone, [m], or None for nothing."""
        layer, mean = model.get_submodule(name), self.means.get(name)
        if layer.bias is None or mean is None:
            return layer.bias
        return layer.bias + (layer.weight.double() @ mean.double()).to(layer.bias.dtype)


def _cut_rows(model, name, gone, fill):
    """Put zeros in the place of these rows."""
    layer, indices = model.get_submodule(name), gone["rows"]
    keep = _complement(indices, layer.out_features)
    if isinstance(layer, layers.RowLinear):  # some are gone already
        keep = keep[torch.isin(keep, layer.rows.cpu())]
        if not len(keep):
            raise ValueError(f"rows {indices.tolist()} are the last of a layer; keep at least one")
    kept = layers.select(layer, rows=keep)
    shape = layer.in_features, layer.out_features
    _put(model, name, layers.RowLinear(*shape, rows=keep, kept=kept, device=layer.weight.device))


def _cut_attention(model, name, gone, fill):
    """Take heads, and dimensions of their queries and keys or values, out of all of a block's attention."""
    block = models.view(model).block(name)
    attn, reader, count = block.attn, f"{name}.attn.proj", block.num_heads
    heads = _complement(gone.get("heads", []), count)
    if not len(heads):
        return _put_constant(model, f"{name}.attn", reader, fill)
    grids = {
        kind: _kept_dimensions(
            gone.get(kind, []), heads, torch.arange(count * size).view(count, size), f"{name} {kind}"
        )
        for kind, size in (("qk", block.qk_dim), ("v", block.head_dim))
    }
    queries, values = count * block.qk_dim, grids["v"].flatten()
    rows = torch.cat([grids["qk"].flatten(), queries + grids["qk"].flatten(), 2 * queries + values])
    if {"qk", "v"} & set(gone):
        attention.open_up(attn)
    for word, kept in (("q_bias", grids["qk"].flatten()), ("k_bias", grids["qk"].flatten()), ("v_bias", values)):
        if getattr(attn, word, None) is not None:  # SwinV2's
            _resize(attn, word, getattr(attn, word).detach()[kept])
    _put(attn, "qkv", layers.select(attn.qkv, rows=rows))
    _put(model, reader, fill.reading(model, reader, values))
    _set_heads(attn, heads)


def _kept_dimensions(gone, heads, grid, what):
    """Indices [heads that stay, dimensions that stay in each] of grid [heads, dimensions]."""
    keep = torch.ones(grid.numel(), dtype=torch.bool)
    keep[gone] = False
    keep = keep.view(grid.shape)[heads]
    counts = keep.sum(1).unique().tolist()
    if len(counts) > 1 or counts == [0]:
        raise ValueError(f"{what}: the heads would keep {counts} dimensions; take as many from each and leave some")
    return grid[heads][keep].view(len(heads), -1)


def _set_heads(attn, keep):
    """Tell attention which heads it has, with all that there is one of for each. `scale` stays."""
    attn.num_heads = len(keep)
    if hasattr(attn, "attn_dim"):  # timm's ViT
        attn.attn_dim = attn.proj.in_features
    if hasattr(attn, "head_dim"):
        attn.head_dim = attn.proj.in_features // len(keep)
    for owner, word, axis in ((attn, "relative_position_bias_table", 1), (attn, "logit_scale", 0)):
        tensor = getattr(owner, word, None)
        if tensor is not None:  # Swin's: forgotten, it raises, or with one head left broadcasts in silence
            _resize(owner, word, tensor.detach().index_select(axis, keep.to(tensor.device)))
    if hasattr(attn, "cpb_mlp"):  # SwinV2's
        _resize(attn.cpb_mlp[2], "weight", attn.cpb_mlp[2].weight.detach()[keep])


def _cut_neurons(model, name, gone, fill):
    block, reader = models.view(model).block(name), f"{name}.mlp.fc2"
    columns = _complement(gone["neurons"], block.neurons)
    if not len(columns):
        return _put_constant(model, f"{name}.mlp", reader, fill)
    _put(model, f"{name}.mlp.fc1", layers.select(block.mlp.fc1, rows=columns))
    _put(model, reader, fill.reading(model, reader, columns))


def _put_constant(model, name, reader, fill):
    bias, like = fill.constant(model, reader), model.get_submodule(reader)
    options = {"device": like.weight.device, "dtype": like.weight.dtype}
    new = layers.Constant(like.out_features, bias=bias is not None, **options)
    if bias is not None:
        new.bias.data.copy_(bias.detach())
    _put(model, name, new)


def _cut_filters(model, name, gone, fill):
    """Take filters out of a convolution of the stem, up to the inputs of the next one."""
    own = f"{name}.1" if isinstance(model.get_submodule(name), layers.FactoredConv2d) else name
    modules = dict(model.patch_embed.named_modules(prefix="patch_embed"))
    names = list(modules)
    keep = _complement(gone["filters"], modules[own].out_channels)
    _narrow(model, own, "rows", keep)
    for later in names[names.index(own) + 1 :]:
        if isinstance(modules[later], nn.Conv2d):
            _narrow(model, later, "columns", keep, fill=fill)
            break
        if getattr(modules[later], "weight", None) is not None:
            _narrow(model, later, "channels", keep)
    _unfactor(model)


def _unfactor(model):
    """Put convolutions back into one whose two parts no longer execute less."""
    for name, module in list(model.named_modules()):
        if isinstance(module, layers.FactoredConv2d):
            first, second = module
            u, v = second.weight.detach().flatten(1), first.weight.detach().flatten(1)
            if len(v) * (len(u) + v.shape[1]) >= len(u) * v.shape[1]:
                _put(model, name, layers.merged_conv(module))


def _cut_width(model, stage, gone, fill):
    """Take channels out of all that writes, carries and reads the residual stream of a stage."""
    stream = models.view(model).stream(stage)
    size = len(stream[0][0].weight)
    keep = _complement(gone["width"], size)
    merged = (torch.arange(4)[:, None] * size + keep).flatten()
    names = {id(thing): name for name, thing in [*model.named_modules(), *model.named_parameters()]}
    for thing, how in stream:
        kept = merged if how == "merged" else keep
        if how == "merged":
            how = "columns" if hasattr(thing, "out_features") else "channels"
        _narrow(model, names[id(thing)], how, kept, fill=fill)
    _unfactor(model)
    _tell_width(model)


def _tell_width(model):
    """Set what timm's model says of its width, for a new classifier."""
    widths = list(models.view(model).units(["width"]).values())
    model.embed_dim, model.num_features, model.head_hidden_size = widths[0], widths[-1], widths[-1]


def _narrow(model, name, how, keep, *, fill=None):
    """Keep these rows (outputs) or columns (inputs) of a layer, channels of a norm, or the last of a parameter."""
    owner, _, own = name.rpartition(".")
    if how == "last":
        tensor = model.get_parameter(name).detach()
        return _resize(model.get_submodule(owner), own, tensor.index_select(-1, keep.to(tensor.device)))
    module = model.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        if how == "columns":
            weight, lost = fill.filters(model, name, keep)
            _resize(module, "weight", weight)
            return None if lost is None else _shift_conv(model, name, lost)
        _resize(module, "weight", module.weight.detach().index_select(0, keep.to(module.weight.device)))
        if module.bias is not None:
            _resize(module, "bias", module.bias.detach()[keep])
    elif how == "channels" or isinstance(module, layers.Constant):
        for word, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.ndim == 1:
                _resize(module, word, tensor.detach()[keep])
        if isinstance(module, layers.Constant):
            module.out_features = len(keep)
    elif how == "rows":
        _put(model, name, layers.select(module, rows=keep))
    else:
        _put(model, name, fill.reading(model, name, keep))


@torch.no_grad()
def _shift_conv(model, name, lost):
    """Give back what a convolution's outputs lost on average, [O]: by its bias, or by the batch norm behind it."""
    conv, norm = model.get_submodule(name), models.norm_after(model, name)
    if conv.bias is not None:
        conv.bias.add_(lost)
    elif norm is not None:
        model.get_submodule(norm).running_mean.sub_(lost)


def _resize(module, name, tensor):
    """Set a parameter or buffer to tensor, and what the module says of its size."""
    old = getattr(module, name)
    tensor = tensor.to(old.device, old.dtype).clone()
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        setattr(module, name, tensor)
    if name == "weight" and isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = tensor.shape[:2]
    elif name == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensor.shape
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(tensor.shape)
    elif isinstance(module, nn.BatchNorm2d) and tensor.ndim:
        module.num_features = len(tensor)


def _cut_block(model, name, gone, fill):
    _put(model, name, layers.Skip())


CUTS = [  # kinds that are cut together, and by what
    (("rows",), _cut_rows),
    (("heads", "qk", "v"), _cut_attention),
    (("neurons",), _cut_neurons),
    (("filters",), _cut_filters),
    (("width",), _cut_width),
    (("block",), _cut_block),
]


def _check_request(*, ratio, method, support, grams, kappa):
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share of weights cut, in [0, 1), not a percentage; got {ratio}")
    if ratio == 0:
        raise ValueError("ratio 0 changes no layer; give a share above 0, or keep the model as it is")
    for word, known in ((method, METHODS), (support, layers.SUPPORTS)):
        if word not in known and not (word is support and lowrank.neighbours(support)):
            raise ValueError(f"unknown {word!r}{models.nearest(word, known)}; known are {', '.join(known)}")
    if lowrank.neighbours(support) and "iht" not in method:
        raise ValueError(f"{support} is how a sparse part is stored, and {method} has none; give support='entries'")
    if method == "threshold" and support != "entries":
        raise ValueError(f"threshold keeps entries, not {support}; give support='entries' or another method")
    if not 0 < kappa < 1:
        raise ValueError(f"kappa is a share in (0, 1); got {kappa}. For the ends there are 'iht' and 'svd'.")
    if grams is None and "iht" in method:
        raise ValueError(f"{method} works from activations: give grams=scores.grams(model, batches)")


def _fitting(tensors, name, shape):
    """tensors[name] if it is there and of that shape, or ValueError."""
    if name not in tensors:
        raise ValueError(f"grams has nothing for {name!r}{models.nearest(name, tensors)}; scores.grams makes it")
    given = list(tensors[name].shape)
    if given != list(shape):
        raise ValueError(f"gram of {name} is {given}, not {list(shape)}: take scores.grams of the model as it is now")
    return tensors[name]


def _price(m, n, support):
    """Weights in one entry, row or column of an [m, n] matrix."""
    return {"rows": n, "columns": m}.get(support, 1)


def _plan(m, n, budget, *, method, support, kappa, multiple):
    """Rank and count (of entries, rows or columns) that budget, in weights, pays for; 0, 0 if it is too small."""
    if method in ("svd", "random"):
        return lowrank.rank_for(m, n, budget / (m * n), multiple=multiple), 0
    if pattern := lowrank.neighbours(support):
        few, of = pattern
        if n % of or not 0 < few < of:
            raise ValueError(f"{support} does not fit a [{m}, {n}] matrix: it divides rows into groups of {of}")
        count = m * n // of * few
        rank = 0 if method == "iht" else lowrank.rank_for(m, n, max(budget - count, 0) / (m * n), multiple=multiple)
        if (budget != count) if method == "iht" else not rank:
            need = "exactly" if method == "iht" else "less than"
            raise ValueError(
                f"{support} keeps {few / of:g} of a [{m}, {n}] matrix: give a ratio of {need} {1 - few / of:g}"
            )
        return rank, count
    rank = 0
    if method != "iht":
        share = budget / (m * n) * (kappa if method == "svd+iht" else 1)
        rank = lowrank.rank_for(m, n, share, multiple=multiple)
    if method == "svd+iht":
        rank = max(rank, 1)
        budget -= rank * (m + n)
    count = max(budget, 0) // _price(m, n, support)
    return (rank, count) if count and (rank or method == "iht") else (0, 0)


def _fit(weight, gram, *, rank, count, method, support, whiten, rounds, generator):
    """The lowrank.Fit of one layer; of svd and random with nothing sparse, of threshold with nothing of low rank."""
    if method == "iht":
        return lowrank.iht(weight, gram, count, support=support)
    if method == "svd+iht":
        return lowrank.low_rank_plus_sparse(weight, gram, rank, count, support=support, rounds=rounds)
    u, v = lowrank.svd(weight, rank)
    plain = lowrank.objective(weight, u @ v, gram)
    if method in ("svd", "random"):
        if method == "random":
            v = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=generator)).Q.T.to(weight)
            u = weight @ v.T
        elif whiten and gram is not None:
            u, v = lowrank.svd(weight, rank, gram=gram)
        sparse = torch.zeros_like(weight)
    else:
        sparse = lowrank.threshold_product(weight, rank, count)
        u, v = u[:, :0], v[:0]
    objectives = [plain, lowrank.objective(weight, u @ v + sparse, gram)]
    return lowrank.Fit(u, v, sparse, sparse != 0, plain, objectives)
