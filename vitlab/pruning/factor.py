"""Replace layers of a model by layers of low rank, or by low rank plus sparse.

Every call returns a new model and leaves the one that it was given untouched.

Public: METHODS, compress, factorise, narrow_heads, narrowable.
"""

import pandas as pd
import torch
from torch import nn

from vitlab import files, models, names
from vitlab.models import _attention, _layers, _structure, anatomy
from vitlab.pruning import _sweep, lowrank

# "svd": two thin layers, of the largest rank whose MACs are the share (lowrank.rank_for).
# "iht": a sparse matrix (lowrank.iht).
# "svd+iht": low rank plus sparse (lowrank.low_rank_plus_sparse).
# "threshold": the largest entries of a truncated SVD's product (lowrank.threshold_product), a
# baseline.
# "random": two thin layers as by "svd", but of directions drawn from seed. The control.
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

    model: a ViT or Swin; it stays as it is.
    ratio: share of the weights that goes, above 0 and below 1.
    method: one of METHODS, how the weights of a layer are chosen.
    support: what the sparse part consists of: "entries", "rows", "columns" or a pattern such as
        "2:4", of which ratio must be the share. Methods without "iht" take "entries" alone.
    grams: {layer: [n, n]} of this very model, as from scores.grams. "iht" and "svd+iht" need them.
        "svd" uses them unless whiten is False.
    roles: roles of layers, as in View.linears. None means all but the classifier.
    kappa: share in (0, 1) of the kept weights that the rank takes by "svd+iht"; the sparse part
        takes the rest. Beside a pattern the rank takes all that is left.
    multiple: ranks are multiples of it, see lowrank.rank_for.
    whiten: whether "svd" is weighted by activations.
    rounds: largest number of turns between low rank and sparse.
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.
    seed: seed of the random directions.

    Returns (model, report). report is a DataFrame with a row for each layer:
        layer, role, m, n, rank, count (of entries, rows or columns),
        objective_magnitude: objective of magnitude pruning with all of the share on that support,
        objective_start, objective: first and last of the fit,
        macs_dense, macs, macs_ideal: MACs of one token.
    Raises ValueError for a ratio that is no share, changes nothing or leaves nothing of a layer.
    So it does for unknown words, and for grams that are missing or of another model.
    """
    _check_request(ratio, method, support, kappa, grams)
    model = anatomy.copied(model)
    view = models.view(model)
    generator = torch.Generator().manual_seed(seed)
    report = []
    for name, layer in files.progress(view.linears(roles).items(), "compressing"):
        # A layer that computes only some rows holds them in a layer of its own.
        path = f"{name}.kept" if isinstance(layer, _layers.RowLinear) else name
        layer = model.get_submodule(path)
        weight = layer.weight.detach()
        m, n = weight.shape
        gram = _sweep.fitting_gram(grams, name, n, damping)
        # The budget is in weights. 1 - 0.9 is a little less than 0.1, hence 1e-6.
        budget = int((1 - ratio) * m * n + 1e-6)
        rank, count = _plan(m, n, budget, method, support, kappa, multiple)
        if rank + count == 0:
            raise ValueError(f"ratio {ratio} leaves nothing of {name} by {method}; lower it")
        fit = _fit(weight, gram, rank, count, method, support, whiten, rounds, generator)
        new = _layer_of(fit, support, layer.bias)
        _structure.put(model, path, new)
        # What magnitude pruning would lose with all of the budget, to compare the fit with.
        alone = lowrank.project(weight, _affordable(m, n, budget, support), support=support)
        row = {"layer": name, "role": view.role(name)}
        row |= {"m": m, "n": n, "rank": rank, "count": count}
        row |= {"objective_magnitude": lowrank.objective(weight, alone, gram)}
        row |= {"objective_start": fit.objectives[0], "objective": fit.objectives[-1]}
        row |= {"macs_dense": m * n, "macs": new.macs}
        report.append(row | {"macs_ideal": new.macs_ideal})
    return model, pd.DataFrame(report)


def _check_request(ratio, method, support, kappa, grams):
    """Raise ValueError for settings of `compress` that no layer can be compressed by."""
    if not 0 < ratio < 1:
        raise ValueError(
            "ratio is the share of weights cut, not a percentage: "
            f"above 0, which changes no layer, and below 1; got {ratio}"
        )
    names.check("method", method, METHODS)
    if not lowrank.neighbours(support):
        names.check("support", support, _layers.SUPPORTS)
    if support != "entries" and "iht" not in method:
        raise ValueError(
            f"{method} has no sparse part to store as {support}; give support='entries'"
        )
    if not 0 < kappa < 1:
        raise ValueError(
            f"kappa is a share in (0, 1); got {kappa}. For the ends there are 'iht' and 'svd'."
        )
    # Without activations IHT is magnitude pruning.
    if grams is None and "iht" in method:
        raise ValueError(
            f"{method} works from activations: give grams=scores.grams(model, batches)"
        )


def _affordable(m, n, budget, support):
    """Return how many entries, rows or columns of an [m, n] matrix a budget of weights pays for."""
    if pattern := lowrank.neighbours(support):
        few, of = pattern
        return m * n // of * few  # whatever the budget: few of each group of neighbours stay
    # Of the kept weights an entry counts 1, a row n and a column m.
    price = {"rows": n, "columns": m}.get(support, 1)
    return budget // price


def _plan(m, n, budget, method, support, kappa, multiple):
    """Return the rank and the count of entries, rows or columns that a budget of weights pays for.

    Both are 0 if the budget is too small for the method.
    """
    # First the weights of the rank: kappa of the budget beside a sparse part, else none or all.
    room = {"iht": 0, "svd+iht": kappa * budget}.get(method, budget)
    pattern = lowrank.neighbours(support)
    if pattern:
        _check_pattern(m, n, budget, method, support)
        room = budget - _affordable(m, n, budget, support)
    rank = lowrank.rank_for(m, n, room / (m * n), multiple=multiple)
    if "iht" not in method:
        # By "threshold" the product of that rank keeps as many entries as the budget has weights.
        return rank, budget if method == "threshold" and rank else 0
    if method == "svd+iht":
        rank = max(rank, 1)
    # Then the sparse part, which gets what is left. On entries as many MACs are executed as by the
    # dense layer, on rows and columns no more than the share.
    left = max(budget - rank * (m + n), 0)
    count = _affordable(m, n, left, support)
    return (rank, count) if count else (0, 0)


def _check_pattern(m, n, budget, method, support):
    """Raise ValueError if a pattern does not fit a matrix, or its count does not fit the budget."""
    few, of = lowrank.neighbours(support)
    if n % of or not 0 < few < of:
        raise ValueError(
            f"{support} does not fit a [{m}, {n}] matrix: it divides rows into groups of {of}"
        )
    left = budget - _affordable(m, n, budget, support)
    # Without a rank nothing may be left, with a rank at least one direction.
    has_rank = method != "iht"
    is_missed = left < m + n if has_rank else left != 0
    if is_missed:
        need = "less than" if has_rank else "exactly"
        raise ValueError(
            f"{support} keeps {few / of:g} of a [{m}, {n}] matrix: "
            f"give a ratio of {need} {1 - few / of:g}"
        )


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
        # What W makes of the inputs along them stays.
        u = weight @ v.T
    elif method == "threshold":
        sparse = lowrank.threshold_product(weight, rank, count)
        u = u[:, :0]
        v = v[:0]
    objectives = [start, lowrank.objective(weight, u @ v + sparse, gram)]
    return lowrank.Fit(u, v, sparse, sparse != 0, objectives)


def _layer_of(fit, support, bias):
    """Return the layer that stores a fit."""
    # Rows and columns that are not in the support are removed, and MACs fall. Entries and patterns
    # are masked, and no MACs are saved, but there is hardware that knows patterns.
    if not fit.mask.any():
        return _layers.factored(fit.u, fit.v, bias=bias)
    return _layers.low_rank_sparse(
        fit.u,
        fit.v,
        sparse=fit.sparse,
        mask=fit.mask,
        support="entries" if lowrank.neighbours(support) else support,
        bias=bias,
    )


@torch.no_grad()
def factorise(model, ranks, *, grams=None, damping=1e-3):
    """Return a copy of model with some layers as two thin ones each, by truncated SVD.

    model: a ViT or Swin; it stays as it is.
    ranks: {layer: rank} of linear layers and of convolutions of the stem, as a Plan has them.
    grams: {layer: [n, n]} of this very model, as from scores.grams. A layer in it gets the
        activation-weighted SVD (lowrank.svd), the others the plain one.
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.

    Raises ValueError for no ranks, a rank that saves no MACs, and grams of another model. So it
    does for a layer that is not there or was factored before.
    """
    if not ranks:
        raise ValueError("ranks is empty: give {layer: rank} of at least one layer")
    model = anatomy.copied(model)
    view = models.view(model)
    matrices = view.matrices | view.linears(["head"])
    for name, rank in files.progress(ranks.items(), "factoring"):
        names.check("layer", name, matrices)
        layer = matrices[name]
        # A layer that was cut into rows or factors has no plain weight to decompose.
        if type(layer) not in (nn.Linear, nn.Conv2d):
            raise ValueError(f"{name} is a {type(layer).__name__} already; factorise plain layers")
        weight = layer.weight.flatten(1)
        m, n = weight.shape
        # Two thin layers execute rank (m + n) MACs a position, which must be less than m n.
        limit = _layers.break_even_rank(m, n)
        if not 1 <= rank < limit:
            raise ValueError(
                f"{name} [{m}, {n}]: a rank in [1, {limit:.1f}) saves MACs; got {rank}"
            )
        gram = _sweep.fitting_gram(grams, name, n, damping, partial=True)
        u, v = lowrank.svd(weight, rank, gram=gram)
        if isinstance(layer, nn.Conv2d):
            new = _layers.factored_conv(layer, u, v)
        else:
            new = _layers.factored(u, v, bias=layer.bias)
        _structure.put(model, name, new)
    return model


@torch.no_grad()
def narrow_heads(model, *, keep=()):
    """Return a copy whose heads have no more dimensions than their factored qkv has ranks.

    It computes the same, with smaller products of attention and a smaller proj.

    model: a ViT or Swin; it stays as it is. Where qkv is plain, or of a rank at or above the size
        of a head, nothing changes. Queries and keys that are normalised keep their size, and so do
        values that anything but a plain or factored proj reads.
    keep: names of layers that stay as they are; values that such a proj reads keep their size.
    """
    model = anatomy.copied(model)
    for block in models.view(model).blocks:
        if isinstance(getattr(block.attn, "qkv", None), _layers.FactoredLinear):
            _narrow(block, narrowable(block, keep))
    return model


def _narrow(block, kinds):
    """Give the heads of a block no more dimensions of kinds than its qkv has ranks, in place."""
    attn, qkv, heads = block.attn, block.attn.qkv, block.num_heads
    # A head sees an image through z = first(x) [r]: its queries are Q z + b, its keys K z + c.
    sizes = [heads * block.qk_dim, heads * block.qk_dim, heads * block.head_dim]
    weight = torch.cat([qkv.second.weight, _bias_column(qkv)], 1).double()
    q, k, v = [part.unflatten(0, (heads, -1)) for part in weight.split(sizes)]  # [heads, d, r + 1]
    if qkv.rank < block.qk_dim and "qk" in kinds:
        # Softmax ignores what all keys have alike. So (K z)^T (Q z + b) is all that counts: r
        # queries K^T (Q z + b), and z as the keys.
        q = k[..., :-1].mT @ q
        k = torch.eye(qkv.rank, qkv.rank + 1).to(q).expand(heads, -1, -1)
        balance = (q.norm() / k.norm()).sqrt().clamp_min(lowrank.TINY)
        q, k = q / balance, k * balance
    if qkv.rank < block.head_dim and "v" in kinds:
        # Shares of attention sum to 1: the bias of the values goes straight through, into proj's.
        basis, values = torch.linalg.qr(v[..., :-1])  # [heads, d, r], [heads, r, r]
        proj = _layers.select(attn.proj, columns=torch.arange(heads * qkv.rank))
        _layers.recombine(proj, attn.proj, torch.block_diag(*basis).to(proj.weight))
        _layers.shift(proj, attn.proj.weight @ v[..., -1].flatten().to(proj.weight))
        v = nn.functional.pad(values, (0, 1))
        attn.proj = proj
    new = torch.cat([part.flatten(0, 1) for part in (q, k, v)]).to(qkv.first.weight)
    if len(new) < qkv.out_features:
        has_bias = qkv.bias is not None or new[:, -1].any()
        bias = new[:, -1] if has_bias else None
        attn.qkv = _layers.factored(new[:, :-1], qkv.first.weight, bias=bias)
        _attention.allow_cuts(attn)
        _structure.set_heads(attn, torch.arange(heads))


def _bias_column(layer):
    """Return the bias of a factored layer as a column [m, 1], zeros without one."""
    second = layer.second.weight
    return second.new_zeros(len(second), 1) if layer.bias is None else layer.bias[:, None]


def narrowable(block, keep=()):
    """Return which dimensions `narrow_heads` can take from the heads of a block: "qk", "v".

    keep: as for `narrow_heads`.
    """
    attn = block.attn
    proj = getattr(attn, "proj", None)
    has_own_biases = getattr(attn, "v_bias", None) is not None  # SwinV2's
    # proj has to read the values as attention gives them, and to take up their bias.
    is_normed = not isinstance(getattr(attn, "norm", None), nn.Identity | None)
    takes_values = isinstance(proj, nn.Linear | _layers.FactoredLinear) and proj.bias is not None
    kinds = []
    if not block.normalises_queries:
        kinds.append("qk")
    is_kept = f"{block.name}.attn.proj" in keep
    if takes_values and not (is_normed or has_own_biases or is_kept):
        kinds.append("v")
    return kinds
