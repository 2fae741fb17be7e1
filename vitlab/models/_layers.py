"""Layers that a cut leaves behind: each stands where an nn.Linear stood and says what it costs.

All of them map x [..., in_features] to [..., out_features], and all have these attributes:

    weight [out_features, in_features] and bias [out_features] (or None) of the dense layer that
        computes the same; differentiable
    macs        multiply-accumulates of one token, as executed
    macs_ideal  multiply-accumulates of one token, as if zeros were free

Indices and masks are buffers, so that `build(config)` and the state dict restore everything.

Public: COMPRESSED_LAYERS, Constant, FactoredConv2d, FactoredLinear, LowRankSparseLinear, RowLinear,
SUPPORTS, Skip, break_even_rank, build, config, factored, factored_conv, linear, low_rank_sparse,
merge, merged_conv, recombine, select, shift.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vitlab import names

SUPPORTS = ("entries", "rows", "columns")


class _Layer(nn.Module):
    """Hold what the layers of this file have in common."""

    options = ()  # names of the attributes that `config` lists beside the shape

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    @property
    def _matrices(self):
        return [p for p in self.parameters() if p.ndim == 2]  # without the bias

    @property
    def macs(self):
        return sum(matrix.numel() for matrix in self._matrices)

    @property
    def macs_ideal(self):
        return sum(int(matrix.count_nonzero()) for matrix in self._matrices)


class FactoredLinear(_Layer):
    """Compute y = second(first(x)): two thin layers, [rank, in_features] and [out_features, rank].

    rank: at least 1
    Raises ValueError for a rank below 1.
    """

    # Below rank m n / (m + n) these are fewer multiply-accumulates. That is not yet less time: two
    # calls move more than one. What makes factoring faster is a limit on each rank: measure it by
    # bench.rank_speed and bench.break_even, and give it to budget.plan(most=...). The same share
    # of every layer (factor.compress by "svd") is a baseline.

    options = ("rank",)

    def __init__(self, in_features, out_features, *, rank, bias=True, **like):
        super().__init__(in_features, out_features)
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}")
        self.rank = rank
        self.first = nn.Linear(in_features, rank, bias=False, **like)
        self.second = nn.Linear(rank, out_features, bias=bias, **like)

    def forward(self, x):
        return self.second(self.first(x))

    @property
    def factors(self):
        """Return U [m, rank] and V [rank, n]."""
        return self.second.weight, self.first.weight

    @property
    def weight(self):
        return self.second.weight @ self.first.weight

    @property
    def bias(self):
        return self.second.bias

    def select(self, rows, columns):
        u, v = self.factors
        small = factored(u[rows], v[:, columns], bias=_bias_of(self, rows))
        return _if_cheaper(small, rows, columns)

    def recombine(self, whole, transfer):
        self.first.weight.copy_(whole.first.weight @ transfer)


class FactoredConv2d(nn.Sequential):
    """Stand for a convolution: one like it to rank channels, without bias, then one of 1 x 1.

    Source: Zhang et al. 2016.

    conv: nn.Conv2d of one group. Its shapes are taken over, not its values (see `factored_conv`).
    rank: at least 1
    Raises ValueError for several groups and for a rank below 1.
    """

    # It executes rank (C k k + O) multiply-accumulates at each output position. Both parts are
    # convolutions of the stem like any other.

    def __init__(self, conv, *, rank):
        if conv.groups != 1 or rank < 1:
            raise ValueError(
                f"a convolution of {conv.groups} groups at rank {rank}: "
                "give one of 1 group and rank >= 1"
            )
        first = _conv_like(conv, rank, bias=False)
        has_bias = conv.bias is not None
        second = nn.Conv2d(rank, conv.out_channels, 1, bias=has_bias, **_like(conv.weight))
        super().__init__(first, second)
        self.rank = rank


class LowRankSparseLinear(_Layer):
    """Compute y = (L + S) x + bias with L = U V of low rank and S sparse, on a fixed support.

    support: where S may differ from zero: "entries" anywhere, whole "rows" or whole "columns"
    rank: r, rank of L; 0 for no L
    count: how many entries, rows or columns

    A new layer is zero: give it values by `low_rank_sparse` or a state dict.
    Raises ValueError for an unknown support, for neither rank nor count, and for a count beyond
    the matrix.
    """

    # How S is stored, and what a token costs:
    #     "entries": `sparse` [m, n], dense with zeros outside of `mask` [m, n]. Executes the one
    #         matrix U V + S: m n, as many as dense; ideally r (m + n) + count.
    #     "rows": under V in `first` [r + count, n], at `index` [count]. Executes
    #         r (m + n) + count n.
    #     "columns": beside U in `second` [m, r + count], at `index` [count]. Executes
    #         r (m + n) + count m.
    # So rows and columns cost two matrix products, like the low-rank part alone.
    # U V + S takes r m n more, once a call, which pays above m n / (m + n) tokens. Calls of fewer
    # take three products. `merge` does it once for all calls.
    options = ("rank", "support", "count")

    def __init__(self, in_features, out_features, *, rank, support, count, bias=True, **like):
        super().__init__(in_features, out_features)
        m, n = out_features, in_features
        names.check("support", support, SUPPORTS)
        most = {"entries": m * n, "rows": m, "columns": n}[support]
        if rank < 0 or not 0 <= count <= most or rank + count == 0:
            raise ValueError(
                f"count {count}, rank {rank}: a [{m}, {n}] matrix has {most} {support}; "
                "give no more than these, no negative rank, and at least 1 of either"
            )
        self.rank, self.support, self.count = rank, support, count
        counts = {support: count}
        self.first = _zeros(rank + counts.get("rows", 0), n, **like)
        self.second = _zeros(m, rank + counts.get("columns", 0), **like)
        self.sparse = _zeros(m, n, **like) if support == "entries" else None
        self.bias = _zeros(m, **like) if bias else None
        device = like.get("device")
        if support == "entries":
            mask = torch.zeros(m, n, dtype=torch.bool, device=device)
            self.register_buffer("mask", mask)
        else:
            self.register_buffer("index", torch.arange(count, device=device))

    def forward(self, x):
        if self.support == "entries":
            sparse = self.sparse
            if torch.is_grad_enabled() and sparse.requires_grad:
                # Gradients are wanted, and training cannot leave the support. Inference takes the
                # zeros as they are stored.
                sparse = sparse * self.mask
            if not self.rank:
                return F.linear(x, sparse, self.bias)
            # Kernels of 2:4 weights are worth more than one product.
            is_plain = not isinstance(sparse, torch.sparse.SparseSemiStructuredTensor)
            if is_plain and self._pays_to_merge(x):
                return F.linear(x, self.second @ self.first + sparse, self.bias)
            hidden = F.linear(x, self.first)
            return F.linear(hidden, self.second, self.bias) + F.linear(x, sparse)
        if self.support == "columns":
            hidden = x.index_select(-1, self.index)
            if self.rank:
                hidden = torch.cat([F.linear(x, self.first), hidden], dim=-1)
            return F.linear(hidden, self.second, self.bias)
        # Rows: one product gives the inputs of U and the outputs of the rows of S.
        both = F.linear(x, self.first)
        hidden, outputs = both.split([self.rank, self.count], dim=-1)
        y = F.linear(hidden, self.factors[0], self.bias)  # of rank 0: the bias alone
        return y.index_add_(-1, self.index, outputs)  # in place is safe: no backward needs y

    def _pays_to_merge(self, x):
        if torch.compiler.is_compiling():
            return True  # a graph that asks for the number of tokens serves only some of them
        return x.numel() // self.in_features > break_even_rank(*self.sparse.shape)

    @property
    def factors(self):
        """Return U [m, r] and V [r, n] of the low-rank part."""
        if self.rank:
            return self.second[:, : self.rank], self.first[: self.rank]
        like = next(self.parameters())
        return like.new_zeros(self.out_features, 0), like.new_zeros(0, self.in_features)

    @property
    def sparse_weight(self):
        """Return S as a dense matrix [m, n]."""
        if self.support == "entries":
            return self.sparse * self.mask
        if self.support == "rows":
            axis = 0
            values = self.first[self.rank :]
        else:
            axis = 1
            values = self.second[:, self.rank :]
        zeros = values.new_zeros(self.out_features, self.in_features)
        return zeros.index_copy(axis, self.index, values)

    @property
    def support_mask(self):
        """Return bool [m, n], True where S may differ from zero."""
        if self.support == "entries":
            return self.mask
        mask = self.index.new_zeros(self.out_features, self.in_features, dtype=torch.bool)
        return mask.index_fill(0 if self.support == "rows" else 1, self.index, True)

    @property
    def weight(self):
        u, v = self.factors
        return u @ v + self.sparse_weight

    @property
    def macs(self):
        return self.mask.numel() if self.support == "entries" else super().macs

    @property
    def macs_ideal(self):
        if self.support != "entries":
            return self.macs
        return super().macs - self.mask.numel() + self.count

    def select(self, rows, columns):
        u, v = self.factors
        u, v = u[rows], v[:, columns]
        bias = _bias_of(self, rows)
        mask = self.support_mask[rows][:, columns]
        if mask.any():
            sparse = self.sparse_weight[rows][:, columns]
            options = {"mask": mask, "support": self.support, "bias": bias}
            small = low_rank_sparse(u, v, sparse=sparse, **options)
            if self.support == "entries":  # executes as much as dense from the start
                return small
        elif self.rank:
            small = factored(u, v, bias=bias)
        else:
            return None
        return _if_cheaper(small, rows, columns)

    def recombine(self, whole, transfer):
        if self.support != "rows":
            raise ValueError(f"a sparse layer on {self.support} has no place for recombined inputs")
        self.first.copy_(whole.first @ transfer)


class RowLinear(_Layer):
    """Compute some rows of a layer and give zero for the rows that are gone, their biases too.

    `weight` and `bias` are full size, zero where rows are gone.

    rows: indices of the rows that are computed, sorted, at least one
    kept: the layer that computes them, one output a row; None for a new nn.Linear
    Raises ValueError for other indices.
    """

    def __init__(self, in_features, out_features, *, rows, bias=True, kept=None, **like):
        super().__init__(in_features, out_features)
        numbers = torch.as_tensor(rows, dtype=torch.int64, device="cpu").tolist()
        if not numbers or numbers != sorted({*numbers} & {*range(out_features)}):
            raise ValueError(
                f"rows must be sorted and distinct in [0, {out_features}), at least one; "
                f"got {numbers}"
            )
        self.kept = kept or nn.Linear(in_features, len(rows), bias=bias, **like)
        rows = torch.tensor(numbers, device=like.get("device"))
        self.register_buffer("rows", rows)

    def forward(self, x):
        return self._spread(self.kept(x), -1)

    def _spread(self, values, axis):
        """Return values with zeros where rows are gone, along an axis."""
        shape = list(values.shape)
        shape[axis] = self.out_features
        return values.new_zeros(shape).index_copy(axis, self.rows, values)

    @property
    def weight(self):
        return self._spread(self.kept.weight, 0)

    @property
    def bias(self):
        bias = self.kept.bias
        return None if bias is None else self._spread(bias, 0)

    def select(self, rows, columns):
        stays = torch.isin(self.rows, rows)
        if not stays.any():
            return None
        own_rows = stays.nonzero().flatten()
        kept = select(self.kept, rows=own_rows, columns=columns)
        if kept.out_features == len(rows):
            return kept
        places = torch.searchsorted(rows, self.rows[stays])
        sizes = len(columns), len(rows)
        return RowLinear(*sizes, rows=places, kept=kept, device=rows.device)

    def recombine(self, whole, transfer):
        recombine(self.kept, whole.kept, transfer)


class Constant(nn.Module):
    """Stand for attention or an MLP without heads or neurons: give its last bias at every token.

    It maps x [..., tokens, any] to [..., tokens, out_features], without multiply-accumulates.
    """

    def __init__(self, out_features, *, bias=True, **like):
        super().__init__()
        self.out_features = out_features
        self.bias = _zeros(out_features, **like) if bias else None

    def forward(self, x, *_, **__):
        y = x.new_zeros(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def config(self):
        return {"out_features": self.out_features, "bias": self.bias is not None}


class Skip(nn.Identity):
    """Stand for a whole block that is gone, or a norm that nothing reads: pass tokens on."""

    def forward(self, x, *_, **__):
        return x


COMPRESSED_LAYERS = (FactoredLinear, LowRankSparseLinear, RowLinear)


def _zeros(*shape, **like):
    """Return a parameter of zeros, or None for a shape without entries."""
    if not math.prod(shape):
        return None
    return nn.Parameter(torch.zeros(shape, **like))


def _like(tensor):
    return {"device": tensor.device, "dtype": tensor.dtype}


def _conv_like(conv, out_channels, *, bias):
    """Return a new convolution that looks at the inputs as conv does."""
    geometry = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    options = {name: getattr(conv, name) for name in geometry}
    like = _like(conv.weight)
    return nn.Conv2d(conv.in_channels, out_channels, **options, bias=bias, **like)


def config(module):
    """Return a JSON-able description of an nn.Linear or a layer of this file, for `build`."""
    described = {
        "type": type(module).__name__,
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
    }
    for name in getattr(module, "options", ()):
        described[name] = getattr(module, name)
    if isinstance(module, RowLinear):
        described["rows"] = module.rows.tolist()
        described["kept"] = config(module.kept)
    return described


def build(config, **like):
    """Return the layer that config describes, for load_state_dict to fill.

    config: dict, as from `config`
    like: device and dtype of its tensors
    Raises ValueError for an unknown type.
    """
    config = dict(config)
    classes = {layer.__name__: layer for layer in (nn.Linear, *COMPRESSED_LAYERS)}
    name = config.pop("type", None)
    names.check("type of layer", name, classes)
    if "kept" in config:
        config["kept"] = build(config["kept"], **like)
    return classes[name](**config, **like)


def linear(weight, bias=None):
    """Return an nn.Linear with a copy of weight [m, n] and bias [m]."""
    m, n = weight.shape
    options = {"bias": bias is not None, **_like(weight)}
    layer = nn.utils.skip_init(nn.Linear, n, m, **options)
    return _fill(layer, weight=weight, bias=bias)


def factored(u, v, *, bias=None):
    """Return a FactoredLinear of the product u [m, rank] v [rank, n] with bias [m]."""
    rank, n = v.shape
    options = {"bias": bias is not None, **_like(u)}
    layer = FactoredLinear(n, len(u), rank=rank, **options)
    layer.first = linear(v)
    layer.second = linear(u, bias)
    return layer


def factored_conv(conv, u, v):
    """Return a FactoredConv2d of the product u [O, rank] v [rank, C * k * k], with conv's bias.

    The product stands for conv's flattened filters.
    """
    new = FactoredConv2d(conv, rank=len(v))
    first, second = new
    _fill(first, weight=v.view_as(first.weight))
    _fill(second, weight=u.view_as(second.weight), bias=conv.bias)
    return new


@torch.no_grad()
def merged_conv(module):
    """Return the one nn.Conv2d that computes what a FactoredConv2d does."""
    first, second = module
    new = _conv_like(first, second.out_channels, bias=second.bias is not None)
    product = second.weight.flatten(1) @ first.weight.flatten(1)
    return _fill(new, weight=product.view_as(new.weight), bias=second.bias)


@torch.no_grad()
def merge(model):
    """Put one nn.Linear in the place of each layer of low rank plus entries, for inference.

    It has the weight U V + S: the same function, in one product at any number of tokens.

    model: a model or a module that holds such layers; it is changed and returned
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankSparseLinear) and module.support == "entries":
            model.set_submodule(name, linear(module.weight, module.bias))
    return model


def low_rank_sparse(u, v, *, sparse, mask, support, bias=None):
    """Return a LowRankSparseLinear of u [m, r] v [r, n] plus sparse [m, n], with bias [m].

    mask: bool [m, n], True where sparse counts; whole rows or columns if that is the support
    support: one of SUPPORTS
    """
    values = {"first": v, "second": u, "bias": bias}
    if support == "entries":
        values |= {"mask": mask, "sparse": sparse * mask}
        count = int(mask.sum())
    else:
        axis = 1 if support == "rows" else 0
        index = mask.any(axis).nonzero().flatten()
        values["index"] = index
        count = len(index)
    if support == "rows":
        values["first"] = torch.cat([v, sparse[index]])
    elif support == "columns":
        values["second"] = torch.cat([u, sparse[:, index]], dim=1)
    m, n = sparse.shape
    options = {"bias": bias is not None, **_like(sparse)}
    layer = LowRankSparseLinear(n, m, rank=u.shape[1], support=support, count=count, **options)
    return _fill(layer, **values)


@torch.no_grad()
def _fill(layer, **values):
    """Copy values into the parameters and buffers that layer has, and return it."""
    for name, value in values.items():
        tensor = getattr(layer, name)
        if tensor is not None:
            tensor.copy_(value)
    return layer


@torch.no_grad()
def select(module, *, rows=None, columns=None):
    """Return a new layer with only these outputs and inputs of a layer.

    module: an nn.Linear or a layer of this file
    rows, columns: sorted indices of outputs and inputs; None: all
    """
    rows = _indices(rows, module.out_features, module)
    columns = _indices(columns, module.in_features, module)
    if isinstance(module, COMPRESSED_LAYERS):
        # Factors keep their rank, and sparse parts what is left of their support. A layer of low
        # rank, whole rows or whole columns that no longer costs less than a dense one becomes an
        # nn.Linear of the same function, and so does a layer of which only zeros are left.
        small = module.select(rows, columns)
        if small is not None:
            return small
    weight = module.weight[rows][:, columns]
    return linear(weight, _bias_of(module, rows))


def _indices(indices, count, module):
    """Return indices as a tensor on module's device; None stands for all of count."""
    if indices is None:
        indices = torch.arange(count)
    return torch.as_tensor(indices).to(module.weight.device)


def _bias_of(module, rows):
    return None if module.bias is None else module.bias[rows]


def _if_cheaper(small, rows, columns):
    """Return small, or None where a dense layer of these rows and columns costs no more."""
    return small if small.macs < len(rows) * len(columns) else None


@torch.no_grad()
def recombine(module, whole, transfer):
    """Give module whole's weight times transfer, for layers in which one matrix reads all inputs.

    module: what `select` took from whole by columns: nn.Linear, factors or whole rows; changed
    transfer: [whole's inputs, module's inputs]
    Raises ValueError for another layer.
    """
    if isinstance(module, COMPRESSED_LAYERS):
        module.recombine(whole, transfer)
    else:
        module.weight.copy_(whole.weight @ transfer)


@torch.no_grad()
def shift(module, offset):
    """Add offset [out_features] to the bias, where there are rows.

    Raises ValueError for a layer without bias.
    """
    if isinstance(module, RowLinear):
        return shift(module.kept, offset[module.rows])
    if module.bias is None:
        raise ValueError("the layer has no bias that could take up a mean")
    module.bias.add_(offset)


# -- Low rank


def break_even_rank(m, n):
    """Return m n / (m + n), a float: below this rank two thin layers save MACs of one [m, n]."""
    return m * n / (m + n)
