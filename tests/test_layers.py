"""Layers of a cut model compute the dense layer of their weight and bias, at their MACs."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models import _layers

M, N = 12, 8


def macs(layer, *, ideal=False):
    """Return the multiply-accumulates of one token; an nn.Linear's are those of its weight."""
    if isinstance(layer, nn.Linear):
        return layer.weight.numel()
    return layer.macs_ideal if ideal else layer.macs


def sparse(support, rank, *, bias=True):
    """Return a [12, 8] layer of low rank plus 20 entries, 3 rows or 3 columns."""
    mask = torch.zeros(M, N, dtype=torch.bool)
    if support == "entries":
        mask.view(-1)[torch.randperm(M * N)[:20]] = True
    elif support == "rows":
        mask[[1, 4, 11]] = True
    else:
        mask[:, [0, 3, 7]] = True
    parts = {"sparse": torch.randn(M, N), "mask": mask, "support": support}
    u, v = torch.randn(M, rank), torch.randn(rank, N)
    return _layers.low_rank_sparse(u, v, **parts, bias=torch.randn(M) if bias else None)


def factored(bias=True):
    return _layers.factored(
        torch.randn(M, 3), torch.randn(3, N), bias=torch.randn(M) if bias else None
    )


def some_rows(kept):
    return _layers.RowLinear(N, 2 * M, rows=range(1, 2 * M, 2), kept=kept)


KINDS = {
    "dense": lambda: nn.Linear(N, M),
    "factored": factored,
    "factored without bias": lambda: factored(bias=False),
    "rows": lambda: _layers.RowLinear(N, M, rows=[0, 3, 10]),
    "rows without bias": lambda: _layers.RowLinear(N, M, rows=[0, 3, 10], bias=False),
    "rows of factored": lambda: some_rows(factored()),
    "rows of rows": lambda: some_rows(_layers.RowLinear(N, M, rows=[2, 5])),
}
for support in _layers.SUPPORTS:
    for rank in (0, 2):
        KINDS[f"{support}, rank {rank}"] = partial(sparse, support, rank)
        KINDS[f"{support}, rank {rank}, without bias"] = partial(sparse, support, rank, bias=False)


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    return KINDS[request.param]()


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 2, 2)])
def test_computes_the_dense_layer_of_its_weight_and_bias(layer, lead):
    x = torch.randn(*lead, N)
    assert layer.weight.shape == (layer.out_features, layer.in_features)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_gradients_are_those_of_the_dense_layer(layer):
    x = torch.randn(5, N)
    through = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    dense = torch.autograd.grad(
        F.linear(x, layer.weight, layer.bias).square().sum(), list(layer.parameters())
    )
    for one, other in zip(through, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_hooks_see_what_they_saw_on_the_dense_layer(layer):
    calls = []
    layer.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    x = torch.randn(4, N)
    y = layer(x)
    assert calls[0][0] is x and calls[0][1] is y and y.shape == (4, layer.out_features)


def three_products(layer, x):
    """Return what low rank plus entries gives, each part multiplied by itself."""
    u, v = layer.factors
    y = x @ v.T @ u.T + x @ (layer.sparse * layer.mask).T
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("shape", [(4,), (5,), (2, 2), (3, 5, 7)])  # [12, 8] breaks even at 4.8
@pytest.mark.parametrize("rank", [0, 1, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_one_matrix_of_low_rank_and_entries_is_its_three_products(shape, rank, bias):
    torch.manual_seed(0)
    layer = sparse("entries", rank, bias=bias).double()
    x = torch.randn(*shape, N, dtype=torch.float64, requires_grad=True)
    through = [layer(x)]
    parts = [three_products(layer, x)]
    wanted = [x, *layer.parameters()]
    for ways in (through, parts):
        ways += torch.autograd.grad(ways[0].sin().sum(), wanted)
    for one, other in zip(through, parts, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()
    single, x = layer.float(), x.detach().float()
    with torch.no_grad():
        y, expected = single(x), three_products(single, x)
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("tokens, products", [(4, 2 * (12 + 8) + 12 * 8), (5, 12 * 8)])
def test_low_rank_and_entries_are_merged_where_it_pays(tokens, products):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sparse("entries", 2)(torch.randn(tokens, N))
    once = 12 * 2 * 8 if tokens == 5 else 0  # U V, which 4 tokens would not earn back
    assert counter.get_total_flops() // 2 == tokens * products + once


def test_kernels_of_two_of_four_weights_keep_their_product(monkeypatch):
    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensor", nn.Parameter)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sparse("entries", 2)(torch.randn(5, N))
    assert counter.get_total_flops() // 2 == 5 * (2 * (12 + 8) + 12 * 8)


def test_one_graph_of_low_rank_and_entries_serves_any_number_of_tokens():
    layer, x = sparse("entries", 2), torch.randn(7, N)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(nn.Sequential(layer), (x,), dynamic_shapes=({0: tokens},))
    for count in (1, 4, 5, 100):
        x = torch.randn(count, N)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_merging_leaves_one_linear_layer_for_each_on_entries():
    layers = {name.replace(".", ""): make() for name, make in KINDS.items()}
    layers["inside"] = some_rows(sparse("entries", 2))
    model = nn.ModuleDict(layers)
    x = torch.randn(5, N)
    before = {name: layer(x) for name, layer in model.items()}
    assert _layers.merge(model) is model
    for name, layer in model.items():
        torch.testing.assert_close(layer(x), before[name])
        inner = layer.kept if name == "inside" else layer
        is_merged = "entries" in name or name == "inside"
        assert type(inner) is nn.Linear if is_merged else layer is layers[name]
        assert macs(layer) == macs(layers[name])


def test_macs_are_what_torch_counts(layer):
    model = _layers.merge(nn.Sequential(layer))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(7, N))
    assert 7 * macs(layer) == counter.get_total_flops() // 2


def test_json_and_state_dict_restore_everything(layer):
    again = _layers.build(json.loads(json.dumps(_layers.config(layer))))
    again.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(4, N)
    assert torch.equal(again(x), layer(x))
    assert _layers.config(again) == _layers.config(layer)
    assert macs(again) == macs(layer)
    assert macs(again, ideal=True) == macs(layer, ideal=True)


@pytest.mark.parametrize("rows", [None, [0], [1, 3], [3, 4, 10], list(range(11))])
@pytest.mark.parametrize("columns", [None, [2], [0, 7], [1, 2, 4, 5, 6]])
def test_selecting_is_slicing_the_dense_layer(layer, rows, columns):
    small = _layers.select(layer, rows=rows, columns=columns)
    take = slice(None) if rows is None else rows
    torch.testing.assert_close(
        small.weight, layer.weight[take][:, slice(None) if columns is None else columns]
    )
    if layer.bias is None:
        assert small.bias is None
    else:
        torch.testing.assert_close(small.bias, layer.bias[take])
    x = torch.randn(3, small.in_features)
    torch.testing.assert_close(small(x), F.linear(x, small.weight, small.bias))


def test_selecting_densifies_what_saves_nothing():
    layer = factored()  # rank 3 of [12, 8]: 60 MACs of 96
    assert isinstance(_layers.select(layer, rows=range(8)), _layers.FactoredLinear)  # 48 of 64
    assert isinstance(_layers.select(layer, rows=range(4)), nn.Linear)  # 36 of 32
    assert isinstance(
        _layers.select(sparse("entries", 2), rows=range(4)), _layers.LowRankSparseLinear
    )  # masked


def test_macs_by_hand():
    assert macs(factored()) == 3 * (12 + 8)
    assert macs(sparse("entries", 0)) == macs(sparse("entries", 2)) == 12 * 8
    assert macs(sparse("entries", 2), ideal=True) == 2 * (12 + 8) + 20
    assert macs(sparse("rows", 2)) == macs(sparse("rows", 2), ideal=True) == 2 * (12 + 8) + 3 * 8
    assert macs(sparse("columns", 0)) == 3 * 12
    assert macs(_layers.RowLinear(8, 12, rows=[0, 3, 10])) == 3 * 8


def test_training_cannot_leave_the_support():
    torch.manual_seed(0)
    layer = sparse("entries", 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    before = layer.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(4, N)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert layer.sparse.count_nonzero() == layer.count == 20
    assert layer.sparse[~layer.mask].count_nonzero() == 0


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("tokens", [4, 5])
def test_inference_takes_the_entries_as_they_are_stored(rank, tokens):
    layer, x = sparse("entries", rank), torch.randn(tokens, N)
    trained = layer(x)
    trained.sum().backward()
    assert (layer.sparse.grad != 0).equal(layer.mask)  # nowhere else, in eval mode either
    layer.eval()(x).sum().backward()
    assert not layer.sparse.grad[~layer.mask].any()
    with torch.no_grad():
        assert torch.equal(layer.train()(x), trained) and torch.equal(layer.eval()(x), trained)
        layer.mask.zero_()
        assert torch.equal(layer(x), trained)


def test_autocast_gives_one_dtype(layer):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, N)).dtype == torch.bfloat16


def test_recombined_inputs(layer):
    if isinstance(layer, _layers.LowRankSparseLinear) and layer.support != "rows":
        pytest.skip("no one matrix reads all inputs")
    columns = [0, 1, 2, 4, 5, 6, 7]
    transfer = torch.randn(N, len(columns))
    small = _layers.select(layer, columns=columns)
    _layers.recombine(small, layer, transfer)
    torch.testing.assert_close(small.weight, layer.weight @ transfer, rtol=1e-4, atol=1e-4)


def test_errors_say_what_is_allowed():
    with pytest.raises(
        ValueError, match="unknown support 'blocks'. Known are entries, rows, columns"
    ):
        _layers.LowRankSparseLinear(N, M, rank=1, support="blocks", count=1)
    with pytest.raises(ValueError, match="12 rows"):
        _layers.LowRankSparseLinear(N, M, rank=1, support="rows", count=13)
    with pytest.raises(ValueError, match="at least 1"):
        _layers.LowRankSparseLinear(N, M, rank=0, support="rows", count=0)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        _layers.FactoredLinear(N, M, rank=0)
    for rows in ([], [1, 1], [2, 1], [12], [-1]):
        with pytest.raises(ValueError, match="sorted and distinct"):
            _layers.RowLinear(N, M, rows=rows)
    with pytest.raises(ValueError, match="unknown type of layer 'Conv2d'. Known are Linear"):
        _layers.build({"type": "Conv2d", "in_features": 1, "out_features": 1})
    with pytest.raises(ValueError, match="no bias"):
        _layers.shift(nn.Linear(2, 2, bias=False), torch.ones(2))
    with pytest.raises(ValueError, match="no place for recombined inputs"):
        _layers.recombine(sparse("columns", 2), sparse("columns", 2), torch.eye(N))
