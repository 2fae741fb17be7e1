"""Makes a model really smaller: removes heads, neurons and rows, and replaces linear layers by thinner ones.

A new model comes back and the one given is untouched. `structure` and `rebuild` are what a checkpoint needs
to make the same shapes again.
"""

import copy

import pandas as pd
import torch
from torch import nn

from . import layers, lowrank, models

METHODS = ("svd+iht", "svd", "iht", "threshold")
EVERY_ROLE = (*models.ROLES.values(), "head")


def remove(model, drop, *, means=None, grams=None, damping=1e-3):
    """A copy of model without these units; it computes what model does with the same units masked to zero.

    drop: {(block, "heads"): indices, (block, "neurons"): indices, (layer, "rows"): indices}, numbered as in
    model. Rows go with their biases. Rows of fc1 are its MLP's neurons, if the activation maps 0 to 0; any
    other layer computes the rows that stay and leaves zeros in the place of the others.

    means, grams: closed-form compensation for heads and neurons, for the layers found in them (attn.proj
    reads the heads, mlp.fc2 the neurons). means {layer: [n]} of its inputs: what is lost on average goes into
    its bias (VBP). grams {layer: [n, n]}, as from scores.grams: the inputs that stay take over, by least
    squares, what they can of those that go (CORP); about the mean, if means has the layer, too. damping: see
    lowrank.damped.

    Works on models already cut. Raises ValueError for unknown names (with the nearest) and wrong indices, for
    a drop that removes nothing, and for one that removes all heads, neurons or rows of a block or layer.
    """
    gone = _checked_drop(models.view(model), drop)
    model = copy.deepcopy(model)
    view = models.view(model)
    for (name, kind), indices in gone.items():
        if kind == "rows":  # first, see _checked_drop: their numbers are those of the layer before heads go
            _put(model, name, _without_rows(model.get_submodule(name), indices))
            continue
        block = view.block(name)
        if kind == "heads":
            reader, columns = f"{name}.attn.proj", _keep_heads(block, indices)
        else:
            reader, columns = f"{name}.mlp.fc2", _complement(indices, block.neurons)
            _put(model, f"{name}.mlp.fc1", layers.select(block.mlp.fc1, rows=columns))
        known = {"mean": (means or {}).get(reader), "gram": (grams or {}).get(reader), "damping": damping}
        _put(model, reader, _reading(model.get_submodule(reader), columns, **known))
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
):
    """A copy of model whose linear layers keep 1 - ratio of their m n weights, and a report of what was lost.

    ratio: share cut, above 0 and below 1. roles: as in View.linears (None: all but the classifier). method:

    - "svd": two thin layers of the largest rank whose MACs are that share (lowrank.rank_for, with multiple).
    - "iht": sparse (lowrank.iht), on support "entries" (masked: no MACs saved) or on whole "rows" or "columns"
      (removed: MACs fall).
    - "svd+iht": low rank plus sparse (lowrank.low_rank_plus_sparse). The rank takes kappa, in (0, 1), of what is
      kept and S the rest, where an entry counts 1, a row n and a column m. On entries this executes more MACs
      than dense, on rows and columns no more than the share.
    - "threshold": the largest entries of a truncated SVD's product, a baseline (lowrank.threshold_product).

    grams: {layer: [n, n]} of this very model, as from scores.grams. "iht" and "svd+iht" need them: without
    activations IHT is magnitude pruning. "svd" uses them unless whiten is False. damping: see lowrank.damped.
    rounds: of low rank and sparse in turns, at most. Layers that were replaced before are compressed anew.

    Returns (model, report), a DataFrame of layer, role, m, n, rank, count (of entries, rows or columns);
    objective_magnitude (of magnitude pruning with all of the share on that support), objective_start and
    objective (first and last of the fit; svd and threshold start from the plain truncated SVD); macs_dense,
    macs and macs_ideal of one token. Raises ValueError for a ratio that is no share, changes nothing or leaves
    nothing of a layer, for unknown words, and for grams that are missing or of another model.
    """
    _check_request(ratio=ratio, method=method, support=support, grams=grams, kappa=kappa)
    model = copy.deepcopy(model)
    view = models.view(model)
    report = []
    for name, layer in view.linears(roles).items():
        inner = layer.kept if isinstance(layer, layers.RowLinear) else layer
        weight = layers.effective_weight(inner).detach()
        m, n = weight.shape
        gram = None if grams is None else lowrank.damped(_fitting(grams, name, (n, n)), damping)
        budget = int((1 - ratio) * m * n + 1e-6)  # 1 - 0.9 is a little less than 0.1
        rank, count = _plan(m, n, budget, method=method, support=support, kappa=kappa, multiple=multiple)
        if rank + count == 0:
            raise ValueError(f"ratio {ratio} leaves nothing of {name} [{m}, {n}] by {method!r}; give a lower one")
        options = {"method": method, "support": support, "whiten": whiten, "rounds": rounds}
        fit = _fit(weight, gram, rank=rank, count=count, **options)
        if count:
            parts = {"sparse": fit.sparse, "mask": fit.mask, "support": support}
            new = layers.low_rank_sparse(fit.u, fit.v, **parts, bias=inner.bias)
        else:
            new = layers.factored(fit.u, fit.v, bias=inner.bias)
        _put(model, name if inner is layer else f"{name}.kept", new)
        whole = lowrank.project(weight, budget // _price(m, n, support), support=support)
        line = {"layer": name, "role": view.role(name), "m": m, "n": n, "rank": rank, "count": count}
        line |= {"objective_magnitude": lowrank.objective(weight, whole, gram)}
        line |= {"objective_start": fit.objectives[0], "objective": fit.objectives[-1], "macs_dense": m * n}
        report.append(line | {"macs": layers.macs(new), "macs_ideal": layers.macs(new, ideal=True)})
    return model, pd.DataFrame(report)


def structure(model):
    """What of model's shapes differs from models.create with its recipe, JSON-able, for `rebuild`.

    Returns {"heads": {block: how many}, "layers": {layer: config}}, both empty for a model that was not cut.
    Raises ValueError for a model without a recipe.
    """
    if not hasattr(model, "recipe"):
        raise ValueError("the model has no recipe to build it from: make it by models.create")
    recipe = {**model.recipe}
    options = recipe.pop("options", {})
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        whole = models.view(models.create(**recipe, **options))
    view = models.view(model)
    pairs = zip(view.blocks, whole.blocks, strict=True)
    heads = {block.name: block.num_heads for block, dense in pairs if block.num_heads != dense.num_heads}
    dense = whole.linears(EVERY_ROLE)
    configs = {name: layers.config(layer) for name, layer in view.linears(EVERY_ROLE).items()}
    return {"heads": heads, "layers": {k: v for k, v in configs.items() if v != layers.config(dense[k])}}


def rebuild(model, structure):
    """Give a model fresh from models.create the shapes of structure, in place; returns it.

    load_state_dict(strict=True) of the model that structure was taken from then fits. Raises ValueError for
    blocks and layers that model does not have.
    """
    view = models.view(model)
    for name, count in structure["heads"].items():
        block = view.block(name)
        _set_heads(block.attn, torch.arange(count), dim=block.head_dim)
    known = view.linears(EVERY_ROLE)
    for name, config in structure["layers"].items():
        if name not in known:
            raise ValueError(f"{type(model).__name__} has no linear layer {name!r}{models.nearest(name, known)}")
        weight = known[name].weight
        _put(model, name, layers.build(config, device=weight.device, dtype=weight.dtype))
    return model


def _put(model, name, new):
    """Set the layer called name, in the mode of the one that was there."""
    model.set_submodule(name, new.train(model.get_submodule(name).training))


def _complement(indices, size):
    keep = torch.ones(size, dtype=torch.bool)
    keep[indices] = False
    return keep.nonzero().flatten()


def _checked_drop(view, drop):
    """{key: indices}, rows first, rows of fc1 counted as neurons, empty entries left out; or ValueError."""
    sizes = {(name, "rows"): layer.out_features for name, layer in view.linears().items()} | view.units()
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
        if len(gone[key]) == size:
            raise ValueError(f"{key}: all {size} would go; keep at least one (masks.keep_largest takes a floor)")
    if not gone:
        raise ValueError("drop removes nothing; give indices of at least one unit")
    for name, kind in gone:
        if kind != "rows":
            part = view.block(name).attn if kind == "heads" else view.block(name).mlp
            if any(len(list(child.parameters())) for word, child in part.named_children() if word in ("norm", "gate")):
                raise ValueError(f"{name}: {kind} share a norm or gate, which vitlab cannot cut; mask them instead")
    return dict(sorted(gone.items(), key=lambda item: item[0][1] != "rows"))


def _as_neurons(view, key):
    """(block, "neurons") for the rows of an fc1 whose activation maps 0 to 0; any other key as it is."""
    if key[1] != "rows" or view.role(key[0]) != "fc1":
        return key
    block = view.block_of(key[0])
    return (block.name, "neurons") if block.mlp.act(torch.zeros(1)).item() == 0 else key


def _without_rows(layer, indices):
    """layer with zeros in the place of these rows."""
    keep = _complement(indices, layer.out_features)
    if isinstance(layer, layers.RowLinear):  # some are gone already
        keep = keep[torch.isin(keep, layer.rows.cpu())]
        if not len(keep):
            raise ValueError(f"rows {indices.tolist()} are the last of a layer; keep at least one")
    kept = layers.select(layer, rows=keep)
    shape = layer.in_features, layer.out_features
    return layers.RowLinear(*shape, rows=keep, kept=kept, device=layer.weight.device)


def _keep_heads(block, gone):
    """Take heads out of all of attention but proj; returns the columns that proj keeps."""
    heads, dim = block.num_heads, block.head_dim
    keep = _complement(gone, heads)
    columns = (keep[:, None] * dim + torch.arange(dim)).flatten()
    qkv = [part * heads * dim + columns for part in range(3)]
    _put(block.attn, "qkv", layers.select(block.attn.qkv, rows=torch.cat(qkv)))
    _set_heads(block.attn, keep, dim=dim)
    return columns


def _set_heads(attn, keep, *, dim):
    """Tell attention which heads it has. `scale` stays, as the size of a head does."""
    attn.num_heads = len(keep)
    if hasattr(attn, "attn_dim"):  # timm's ViT
        attn.attn_dim = len(keep) * dim
    table = getattr(attn, "relative_position_bias_table", None)
    if table is not None:  # Swin's: forgotten, it raises, or with one head left broadcasts in silence
        attn.relative_position_bias_table = nn.Parameter(table.detach()[:, keep.to(table.device)].clone())


def _reading(layer, columns, *, mean, gram, damping):
    """layer with only these inputs; mean [n] and gram [n, n], or None, make up for the others: see `remove`."""
    new = layers.select(layer, columns=columns)
    if mean is None and gram is None:
        return new
    n = layer.in_features
    weight = layers.effective_weight(layer).detach()
    centre = weight.new_zeros(n) if mean is None else mean
    if centre.shape != (n,) or (gram is not None and gram.shape != (n, n)):
        raise ValueError(f"mean and gram of a layer with {n} inputs are [{n}] and [{n}, {n}]")
    centre = centre.double().to(weight.device)
    transfer = torch.eye(n, dtype=torch.float64, device=weight.device)[:, columns]  # x ~ transfer x[columns]
    if gram is not None:
        gram = lowrank.damped(gram.to(weight.device), damping)
        transfer = lowrank.regression(gram - centre[:, None] * centre, columns)
        layers.recombine(new, layer, transfer.to(weight.dtype))
    if mean is not None:
        layers.shift(new, (weight.double() @ (centre - transfer @ centre[columns])).to(weight.dtype))
    return new


def _check_request(*, ratio, method, support, grams, kappa):
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share of weights cut, in [0, 1), not a percentage; got {ratio}")
    if ratio == 0:
        raise ValueError("ratio 0 changes no layer; give a share above 0, or keep the model as it is")
    for word, known in ((method, METHODS), (support, layers.SUPPORTS)):
        if word not in known:
            raise ValueError(f"unknown {word!r}{models.nearest(word, known)}; known are {', '.join(known)}")
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
    return {"entries": 1, "rows": n, "columns": m}[support]


def _plan(m, n, budget, *, method, support, kappa, multiple):
    """Rank and count (of entries, rows or columns) that budget, in weights, pays for; 0, 0 if it is too small."""
    share = budget / (m * n) * (kappa if method == "svd+iht" else 1)
    rank = 0 if method == "iht" else lowrank.rank_for(m, n, share, multiple=multiple)
    if method == "svd":
        return rank, 0
    if method == "svd+iht":
        rank = max(rank, 1)
        budget -= rank * (m + n)
    count = max(budget, 0) // _price(m, n, support)
    return (rank, count) if count and (rank or method == "iht") else (0, 0)


def _fit(weight, gram, *, rank, count, method, support, whiten, rounds):
    """The lowrank.Fit of one layer; of svd with nothing sparse, of threshold with nothing of low rank."""
    if method == "iht":
        return lowrank.iht(weight, gram, count, support=support)
    if method == "svd+iht":
        return lowrank.low_rank_plus_sparse(weight, gram, rank, count, support=support, rounds=rounds)
    u, v = lowrank.svd(weight, rank)
    plain = lowrank.objective(weight, u @ v, gram)
    if method == "svd":
        if whiten and gram is not None:
            u, v = lowrank.svd(weight, rank, gram=gram)
        sparse = torch.zeros_like(weight)
    else:
        sparse = lowrank.threshold_product(weight, rank, count)
        u, v = u[:, :0], v[:0]
    objectives = [plain, lowrank.objective(weight, u @ v + sparse, gram)]
    return lowrank.Fit(u, v, sparse, sparse != 0, plain, objectives)
