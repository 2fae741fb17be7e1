"""Tests of what an export makes of rows that are gone: the same function, without places to fill."""

import pytest
import torch

from vitlab import models
from vitlab.models import _absorb, _layers, anatomy
from vitlab.pruning import factor, shrink


def without_rows(model, share):
    """Return the model without a share of the rows of each linear layer, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    drop = {}
    for name, layer in models.view(model).linears().items():
        count = int(share * layer.out_features)
        drop[name, "rows"] = torch.randperm(layer.out_features, generator=generator)[:count]
    return shrink.remove(model, drop)


def kinds_of(model):
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_logits_stay_and_no_row_is_put_back(any_model, batch, share):
    thin = without_rows(any_model, share).eval()
    plain = _absorb.absorb(anatomy.copied(thin))
    assert _layers.RowLinear in kinds_of(thin) and _layers.RowLinear not in kinds_of(plain)
    with torch.inference_mode():
        torch.testing.assert_close(plain(batch[0]), thin(batch[0]), rtol=1e-4, atol=1e-5)


def test_dimensions_go_where_all_heads_have_lost_as_many(vit, batch):
    """Of each head one query row and another key row go, and of the first head alone a value row."""
    block = models.view(vit).blocks[0]
    heads, size = block.num_heads, block.head_dim
    query = [head * size for head in range(heads)]
    key = [heads * size + head * size + 1 for head in range(heads)]
    drop = {(f"{block.name}.attn.qkv", "rows"): [*query, *key, 2 * heads * size]}
    thin = shrink.remove(vit, drop).eval()
    plain = _absorb.absorb(anatomy.copied(thin))
    narrow = models.view(plain).blocks[0]
    assert (narrow.qk_dim, narrow.head_dim) == (size - 2, size)
    with torch.inference_mode():
        torch.testing.assert_close(plain(batch[0]), thin(batch[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "kind"), [(1, _layers.FactoredLinear), (11, torch.nn.Linear)], ids=["few", "many"]
)
def test_whatever_multiplies_less(kept, kind):
    """Of 12 rows of 12 numbers, at break-even 6, few are two products and many one with zeros."""
    layer = _layers.RowLinear(12, 12, rows=range(kept))
    plain = _absorb._plain(layer)
    assert type(plain) is kind
    x = torch.randn(5, 12)
    torch.testing.assert_close(plain(x), layer(x))


def test_low_rank_plus_rows_is_two_products_or_one(model, batch):
    grams = {name: torch.eye(layer.in_features) for name, layer in models.view(model).linears().items()}  # fmt: skip
    how = {"method": "svd+iht", "support": "rows", "grams": grams}
    thin, _ = factor.compress(model, ratio=0.5, **how)
    plain = _absorb.absorb(anatomy.copied(thin.eval()))
    assert _layers.LowRankSparseLinear in kinds_of(thin)
    assert _layers.LowRankSparseLinear not in kinds_of(plain)
    with torch.inference_mode():
        torch.testing.assert_close(plain(batch[0]), thin(batch[0]), rtol=1e-4, atol=1e-5)
