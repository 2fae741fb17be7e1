"""Make a cut model plain for the runtimes that it is exported to: the same function, faster there.

Public: absorb.
"""

import torch

from vitlab.models import _attention, _layers, _structure, anatomy


@torch.no_grad()
def absorb(model):
    """Let no layer put rows back at their places among zeros, in place.

    Runtimes scatter or gather single numbers more slowly than they multiply: with half of its rows
    gone, or low rank plus rows, a model was slower than dense there. So the zeros go where the
    layer that reads them needs none: dimensions of heads. Elsewhere zeros are multiplied.

    model: a ViT or Swin, for inference only
    Returns the model, which gives the same logits up to rounding.
    """
    for block in anatomy.view(model).blocks:
        if isinstance(getattr(block.attn, "qkv", None), _layers.RowLinear):
            _narrow_heads(model, block)
    for name, module in list(model.named_modules()):
        is_low_rank = isinstance(module, _layers.LowRankSparseLinear)
        if isinstance(module, _layers.RowLinear) or is_low_rank and module.support == "rows":
            _structure.put(model, name, _plain(module))
    return model


def _narrow_heads(model, block):
    """Take dimensions of heads out that are zero for all tokens."""
    attn = block.attn
    has_own_biases = getattr(attn, "q_bias", None) is not None  # SwinV2's, which stay
    # What is normalised, gated or biased over all dimensions of a head reads its zeros.
    shared = [name for name, _ in attn.named_parameters() if name.startswith(("norm.", "gate."))]
    if has_own_biases or shared or block.normalises_queries:
        return
    alive = torch.zeros(attn.qkv.out_features, dtype=torch.bool)
    alive[attn.qkv.rows] = True
    size = block.num_heads * block.qk_dim
    q, k, v = alive.split([size, size, block.num_heads * block.head_dim])
    # A product of query and key is zero where either is.
    queries = _largest(q & k, block.num_heads)
    values = _largest(v, block.num_heads)
    if len(queries) == len(q) and len(values) == len(v):
        return
    _attention.allow_cuts(attn)
    rows = torch.cat([queries, size + queries, 2 * size + values])
    attn.qkv = _layers.select(attn.qkv, rows=rows)
    attn.proj = _layers.select(attn.proj, columns=values)
    _structure.set_heads(attn, torch.arange(block.num_heads))


def _largest(alive, heads):
    """Return the indices to keep: of each head as many as the fullest one has alive, at least 1."""
    by_head = alive.view(heads, -1).int()
    most = max(1, int(by_head.sum(1).max()))
    order = by_head.argsort(dim=1, descending=True, stable=True)[:, :most].sort(dim=1).values
    return (order + torch.arange(heads)[:, None] * by_head.shape[1]).flatten()


def _plain(layer):
    """Return an nn.Linear or two in a row, whichever multiplies less, that compute what layer does."""
    u, v = _factors(layer)
    bias = layer.bias
    if len(v) < _layers.break_even_rank(*layer.weight.shape):
        return _layers.factored(u, v, bias=bias)
    return _layers.linear(layer.weight, bias)


def _factors(layer):
    """Return U [m, r] and V [r, n] of a layer's weight; rows are put at their places by ones in U."""
    if isinstance(layer, _layers.RowLinear):
        u, v = _factors(layer.kept)
        return u.new_zeros(layer.out_features, u.shape[1]).index_copy(0, layer.rows, u), v
    if isinstance(layer, _layers.FactoredLinear):
        return layer.factors
    if isinstance(layer, _layers.LowRankSparseLinear) and layer.support == "rows":
        ones = torch.eye(layer.out_features)[:, layer.index]
        return torch.cat([layer.factors[0], ones], dim=1), layer.first
    return torch.eye(layer.out_features), layer.weight
