"""Layers that a cut leaves behind: each stands where an nn.Linear stood and says what it costs.

All map x [..., in_features] to [..., out_features]. `weight` [out_features, in_features] and `bias`
[out_features] are those of the dense layer that computes the same (differentiable); `macs` and `macs_ideal`
count the MACs of one token, as executed and as if zeros were free. Indices and masks are buffers, so that
`build(config)` and the state dict restore everything.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

SUPPORTS = ("entries", "rows", "columns")


class FactoredLinear(nn.Module):
    """y = second(first(x)): two thin layers with weights [rank, in_features] and [out_features, rank].

    Below rank m n / (m + n) these are fewer multiply-accumulates, which is not yet less time: two calls move more than
    one. What makes factoring faster is a limit on each rank, measured by bench.rank_speed and bench.break_even, given
    to budget.ranks(most=...). The same share of every layer (shrink.compress by "svd") is a baseline.
    """

    def __init__(self, in_features, out_features, *, rank, bias=True, device=None, dtype=None):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x):
        return self.second(self.first(x))

    @property
    def weight(self):
        return self.second.weight @ self.first.weight

    @property
    def bias(self):
        return self.second.bias

    @property
    def macs(self):
        return self.rank * (self.in_features + self.out_features)

    @property
    def macs_ideal(self):
        return macs(self.first, ideal=True) + macs(self.second, ideal=True)

    def config(self):
        return _shape(self) | {"rank": self.rank}

    def extra_repr(self):
        return f"rank={self.rank}"


class FactoredConv2d(nn.Sequential):
    """In the place of a convolution: one like it to rank channels, without bias, then one of 1 x 1 (Zhang et al. 2016).

    Executes rank (C k k + O) multiply-accumulates at each output position. conv: the nn.Conv2d, of one group, whose
    shapes are taken over, not its values (see `factored_conv`). Both parts are convolutions of the stem like any other.
    """

    def __init__(self, conv, *, rank):
        if conv.groups != 1 or rank < 1:
            raise ValueError(f"a convolution of {conv.groups} groups at rank {rank}: give one of 1 group and rank >= 1")
        shape, like = _conv_options(conv)
        first = nn.Conv2d(conv.in_channels, rank, **shape, bias=False, **like)
        super().__init__(first, nn.Conv2d(rank, conv.out_channels, 1, bias=conv.bias is not None, **like))

    @property
    def rank(self):
        return self[0].out_channels


class LowRankSparseLinear(nn.Module):
    """y = (L + S) x + bias with L = U V of the given rank r (0: none) and S sparse, of a fixed support:

    "entries": count entries anywhere, stored dense with zeros elsewhere. `mask` [m, n] is applied wherever gradients
        are wanted, so that training cannot leave the support; inference takes the zeros as they are stored.
        Executes r (m + n) + m n multiply-accumulates, more than dense; ideally r (m + n) + count.
    "rows": count whole rows, `index` [count]. Executes r (m + n) + count n.
    "columns": count whole columns, `index` [count]. Executes r (m + n) + count m.

    Rows of S are stored under V in `first` [r + count, n], columns of S beside U in `second` [m, r + count],
    so that either costs two matrix products. A new layer is zero: give it values by `low_rank_sparse` or a
    state dict. Raises ValueError for an unknown support, for neither rank nor count, and for a count beyond
    the matrix.
    """

    def __init__(self, in_features, out_features, *, rank, support, count, bias=True, device=None, dtype=None):
        super().__init__()
        m, n = out_features, in_features
        most = dict(zip(SUPPORTS, (m * n, m, n), strict=True))
        if support not in most:
            raise ValueError(f"unknown support {support!r}; supports are {', '.join(SUPPORTS)}")
        if rank < 0 or not 0 <= count <= most[support] or rank + count == 0:
            raise ValueError(
                f"count {count}, rank {rank}: a [{m}, {n}] matrix has {most[support]} {support}; "
                "give no more than these, no negative rank, and at least 1 of either"
            )
        self.in_features, self.out_features, self.rank = n, m, rank
        self.support, self.count = support, count
        rows, columns = (rank + count * (support == kind) for kind in ("rows", "columns"))
        shapes = {"first": (rows, n), "second": (m, columns), "sparse": (m, n), "bias": (m,)}
        absent = {"sparse": support != "entries", "bias": not bias}
        for name, shape in shapes.items():
            values = torch.zeros(shape, device=device, dtype=dtype)
            empty = absent.get(name) or not values.numel()
            self.register_parameter(name, None if empty else nn.Parameter(values))
        if support == "entries":
            self.register_buffer("mask", torch.zeros(m, n, dtype=torch.bool, device=device))
        else:
            self.register_buffer("index", torch.arange(count, device=device))

    def forward(self, x):
        if self.support == "columns":
            taken = x.index_select(-1, self.index)
            hidden = torch.cat([F.linear(x, self.first), taken], dim=-1) if self.rank else taken
            return F.linear(hidden, self.second, self.bias)
        if self.support == "entries":
            train = torch.is_grad_enabled() and self.sparse.requires_grad
            sparse = self.sparse * self.mask if train else self.sparse
            if not self.rank:
                return F.linear(x, sparse, self.bias)
            return F.linear(F.linear(x, self.first), self.second, self.bias) + F.linear(x, sparse)
        hidden, kept = F.linear(x, self.first).split([self.rank, self.count], dim=-1)
        if self.rank:
            y = F.linear(hidden, self.second, self.bias)
        else:
            y = kept.new_zeros(*kept.shape[:-1], self.out_features)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.index_add_(-1, self.index, kept)  # in place is safe: no backward needs y

    @property
    def factors(self):
        """U [m, r] and V [r, n] of the low-rank part."""
        if self.rank:
            return self.second[:, : self.rank], self.first[: self.rank]
        some = next(self.parameters())
        return some.new_zeros(self.out_features, 0), some.new_zeros(0, self.in_features)

    @property
    def sparse_weight(self):
        """S as a dense matrix [m, n]."""
        if self.support == "entries":
            return self.sparse * self.mask
        kept = self.first[self.rank :] if self.support == "rows" else self.second[:, self.rank :]
        zeros = kept.new_zeros(self.out_features, self.in_features)
        return zeros.index_copy(int(self.support == "columns"), self.index, kept)

    @property
    def support_mask(self):
        """True [m, n] where S may differ from zero."""
        if self.support == "entries":
            return self.mask
        mask = torch.zeros(self.out_features, self.in_features, dtype=torch.bool, device=self.index.device)
        return mask.index_fill(int(self.support == "columns"), self.index, True)

    @property
    def weight(self):
        u, v = self.factors
        return u @ v + self.sparse_weight

    @property
    def macs(self):
        m, n = self.out_features, self.in_features
        sparse = {"entries": m * n, "rows": self.count * n, "columns": self.count * m}
        return self.rank * (m + n) + sparse[self.support]

    @property
    def macs_ideal(self):
        if self.support == "entries":
            return self.rank * (self.in_features + self.out_features) + self.count
        return self.macs

    def config(self):
        return _shape(self) | {"rank": self.rank, "support": self.support, "count": self.count}

    def extra_repr(self):
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, rank={self.rank}, support={self.support}, count={self.count}"


class RowLinear(nn.Module):
    """Computes only the kept rows and gives zero elsewhere: a layer of which rows are gone, their biases too.

    rows: indices of the kept rows, sorted, at least one. kept: any layer with one output per kept row (None:
    a new nn.Linear). `weight` and `bias` are full size, zero where rows are gone. Raises ValueError for other
    indices.
    """

    def __init__(self, in_features, out_features, *, rows, bias=True, kept=None, device=None, dtype=None):
        super().__init__()
        rows = torch.as_tensor(rows, dtype=torch.int64, device=device)
        if not len(rows) or rows[0] < 0 or rows[-1] >= out_features or (rows.diff() <= 0).any():
            raise ValueError(
                f"rows must be sorted and distinct in [0, {out_features}), at least one; got {rows.tolist()}"
            )
        self.in_features, self.out_features = in_features, out_features
        if kept is None:
            kept = nn.Linear(in_features, len(rows), bias=bias, device=device, dtype=dtype)
        self.kept = kept
        self.register_buffer("rows", rows)

    def forward(self, x):
        y = self.kept(x)
        return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.rows, y)

    @property
    def weight(self):
        weight = self.kept.weight
        return weight.new_zeros(self.out_features, self.in_features).index_copy(0, self.rows, weight)

    @property
    def bias(self):
        bias = self.kept.bias
        return None if bias is None else bias.new_zeros(self.out_features).index_copy(0, self.rows, bias)

    @property
    def macs(self):
        return macs(self.kept)

    @property
    def macs_ideal(self):
        return macs(self.kept, ideal=True)

    def config(self):
        return _shape(self) | {"rows": self.rows.tolist(), "kept": config(self.kept)}

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Constant(nn.Module):
    """What is left of attention or an MLP without heads or neurons: its last bias at every token.

    x [..., tokens, any] to [..., tokens, out_features]; no multiply-accumulates.
    """

    def __init__(self, out_features, *, bias=True, device=None, dtype=None):
        super().__init__()
        self.out_features = out_features
        values = torch.zeros(out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(values) if bias else None

    def forward(self, x, *_, **__):
        y = x.new_zeros(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def config(self):
        return {"out_features": self.out_features, "bias": self.bias is not None}

    def extra_repr(self):
        return f"out_features={self.out_features}"


class Skip(nn.Identity):
    """Stands where a whole block was: the residual stream passes."""

    def forward(self, x, *_, **__):
        return x


CUT = (FactoredLinear, LowRankSparseLinear, RowLinear)


def _shape(module):
    shape = {"type": type(module).__name__, "in_features": module.in_features}
    return shape | {"out_features": module.out_features, "bias": module.bias is not None}


def _conv_options(conv):
    """How a convolution looks at its inputs, and where its weight is: arguments for another one that does the same."""
    shape = {k: getattr(conv, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    return shape, {"device": conv.weight.device, "dtype": conv.weight.dtype}


def config(module):
    """JSON-able description of an nn.Linear or a layer of this file, for `build`."""
    return module.config() if isinstance(module, CUT) else _shape(module)


def build(config, *, device=None, dtype=None):
    """The layer that config describes, for load_state_dict to fill. Raises ValueError for an unknown type."""
    config = dict(config)
    kinds = {kind.__name__: kind for kind in (nn.Linear, *CUT)}
    name = config.pop("type", None)
    if name not in kinds:
        raise ValueError(f"unknown type of layer {name!r}; types are {', '.join(kinds)}")
    if "kept" in config:
        config["kept"] = build(config["kept"], device=device, dtype=dtype)
    return kinds[name](**config, device=device, dtype=dtype)


@torch.no_grad()
def picture(module, *, keep=None, rows=None, columns=None, most=128):
    """What is left of a linear layer, to be drawn: a frame of part, row and cells, one line per row of each matrix.

    part: "W" of a plain layer, "U", "V" and "S" of low rank and sparse ones. cells: a letter for each column: a to i
    for the size of the weight, in ninths of the part's 99th percentile of |w|; a dot for one that is zero; x for one of
    a row or column that is not there any more. keep: bool [m, n], what is called zero instead. rows, columns: (how many
    the layer once had, those that this one has, in their order); None: all that it has, and of RowLinear its own rows.
    most: at most so many rows and columns are told, the first ones.
    """
    if isinstance(module, RowLinear):
        rows, module = (module.out_features, module.rows.tolist()), module.kept
    u, v = (None, None) if isinstance(module, nn.Linear) else _factors(module)
    parts = {"W": module.weight} if u is None else {"U": u, "V": v} if u.shape[1] else {}
    if isinstance(module, LowRankSparseLinear):
        parts["S"] = module.sparse_weight
        keep = module.support_mask
    lines = []
    for part, matrix in parts.items():
        alive = matrix != 0 if keep is None or part not in ("W", "S") else keep
        largest = torch.sort(matrix.abs().flatten()).values[int(0.99 * (matrix.numel() - 1))].clamp_min(1e-30)
        letters = (9 * matrix.abs() / largest).ceil().clamp(1, 9) * alive.to(matrix.device)
        letters = np.array(list(".abcdefghi"))[letters.int().cpu().numpy()]  # no digits: csv would read them as numbers
        for way, whole in ((0, rows if part != "V" else None), (1, columns if part != "U" else None)):
            if whole is not None:
                count, own = whole
                wide = np.full((count, letters.shape[1]) if way == 0 else (letters.shape[0], count), "x")
                wide[own if way == 0 else (slice(None), own)] = letters
                letters = wide
        lines += [(part, i, "".join(line[:most])) for i, line in enumerate(letters[:most])]
    return pd.DataFrame(lines, columns=["part", "row", "cells"])


def _factors(module):
    return module.factors if isinstance(module, LowRankSparseLinear) else (module.second.weight, module.first.weight)


def macs(module, *, ideal=False):
    """Multiply-accumulates of one token, without the bias, for an nn.Linear or a layer of this file.

    ideal: as if zeros were free (an nn.Linear's too).
    """
    if isinstance(module, CUT):
        return module.macs_ideal if ideal else module.macs
    return int(module.weight.count_nonzero()) if ideal else module.in_features * module.out_features


def linear(weight, bias=None):
    """nn.Linear with a copy of weight [m, n] and bias [m]."""
    options = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], **options)
    return _fill(layer, weight=weight, bias=bias)


def factored(u, v, *, bias=None):
    """FactoredLinear of the product u [m, rank] v [rank, n] with bias [m]."""
    options = {"device": u.device, "dtype": u.dtype}
    layer = FactoredLinear(v.shape[1], u.shape[0], rank=u.shape[1], bias=bias is not None, **options)
    layer.first, layer.second = linear(v), linear(u, bias)
    return layer


@torch.no_grad()
def factored_conv(conv, u, v):
    """FactoredConv2d of the product u [O, rank] v [rank, C * k * k] of flattened filters, with conv's bias."""
    new = FactoredConv2d(conv, rank=len(v))
    new[0].weight.copy_(v.view_as(new[0].weight))
    new[1].weight.copy_(u.view_as(new[1].weight))
    if conv.bias is not None:
        new[1].bias.copy_(conv.bias)
    return new


@torch.no_grad()
def merged_conv(module):
    """The one nn.Conv2d that computes what a FactoredConv2d does."""
    first, second = module
    shape, like = _conv_options(first)
    new = nn.Conv2d(first.in_channels, second.out_channels, **shape, bias=second.bias is not None, **like)
    new.weight.copy_((second.weight.flatten(1) @ first.weight.flatten(1)).view_as(new.weight))
    if second.bias is not None:
        new.bias.copy_(second.bias)
    return new


def low_rank_sparse(u, v, *, sparse, mask, support, bias=None):
    """LowRankSparseLinear of u [m, r] v [r, n] plus sparse [m, n] where mask [m, n] is True, with bias [m].

    mask must consist of whole rows or columns if that is the support.
    """
    m, n = sparse.shape
    count = int(mask.sum()) // {"entries": 1, "rows": n, "columns": m}[support]
    options = {"bias": bias is not None, "device": sparse.device, "dtype": sparse.dtype}
    layer = LowRankSparseLinear(n, m, rank=u.shape[1], support=support, count=count, **options)
    if support == "entries":
        layer.mask.copy_(mask)
        return _fill(layer, first=v, second=u, sparse=sparse * mask, bias=bias)
    layer.index.copy_(mask.any(int(support == "rows")).nonzero().flatten())
    if support == "rows":
        return _fill(layer, first=torch.cat([v, sparse[layer.index]]), second=u, bias=bias)
    return _fill(layer, first=v, second=torch.cat([u, sparse[:, layer.index]], dim=1), bias=bias)


@torch.no_grad()
def _fill(layer, **values):
    for name, value in values.items():
        own = getattr(layer, name)
        if own is not None:
            own.copy_(value)
    return layer


@torch.no_grad()
def select(module, *, rows=None, columns=None):
    """A new layer with only these outputs and inputs (sorted indices; None: all) of any layer `macs` takes.

    Factors keep their rank and sparse parts what is left of their support. A layer of low rank, whole rows or
    whole columns that no longer costs less than a dense one becomes an nn.Linear of the same function.
    """
    device = module.weight.device
    rows = torch.arange(module.out_features) if rows is None else torch.as_tensor(rows)
    columns = torch.arange(module.in_features) if columns is None else torch.as_tensor(columns)
    rows, columns = rows.to(device), columns.to(device)
    dense = module.weight[rows][:, columns]
    bias = None if module.bias is None else module.bias[rows]
    if isinstance(module, RowLinear):
        stays = torch.isin(module.rows, rows)
        if stays.any():
            kept = select(module.kept, rows=stays.nonzero().flatten(), columns=columns)
            if stays.sum() == len(rows):
                return kept
            rows = torch.searchsorted(rows, module.rows[stays])
            return RowLinear(*dense.T.shape, rows=rows, kept=kept, device=device)
    new = None
    if isinstance(module, FactoredLinear):
        new = factored(module.second.weight[rows], module.first.weight[:, columns], bias=bias)
    elif isinstance(module, LowRankSparseLinear):
        u, v = module.factors[0][rows], module.factors[1][:, columns]
        sparse, mask = (part[rows][:, columns] for part in (module.sparse_weight, module.support_mask))
        if mask.any():
            new = low_rank_sparse(u, v, sparse=sparse, mask=mask, support=module.support, bias=bias)
        elif module.rank:
            new = factored(u, v, bias=bias)
    masked = isinstance(new, LowRankSparseLinear) and new.support == "entries"
    return new if new is not None and (masked or new.macs < dense.numel()) else linear(dense, bias)


@torch.no_grad()
def recombine(module, whole, transfer):
    """Give module, selected from whole by columns, whole's weight times transfer [whole's inputs, module's
    inputs].

    For layers in which one matrix reads all inputs: nn.Linear, factors, whole rows. ValueError for others.
    """
    if isinstance(module, RowLinear):
        recombine(module.kept, whole.kept, transfer)
    elif isinstance(module, FactoredLinear):
        module.first.weight.copy_(whole.first.weight @ transfer)
    elif isinstance(module, LowRankSparseLinear):
        if module.support != "rows":
            raise ValueError(f"a sparse layer on {module.support} has no place for recombined inputs")
        module.first.copy_(whole.first @ transfer)
    else:
        module.weight.copy_(whole.weight @ transfer)


@torch.no_grad()
def shift(module, offset):
    """Add offset [out_features] to the bias, where there are rows. Raises ValueError for a layer without
    bias."""
    if isinstance(module, RowLinear):
        return shift(module.kept, offset[module.rows])
    if module.bias is None:
        raise ValueError("the layer has no bias that could take up a mean")
    module.bias.add_(offset)
