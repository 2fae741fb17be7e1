"""recover: least squares against the dense model, by hand and on every architecture."""

import pytest
import torch
from conftest import toy

from vitlab import models
from vitlab.models import _layers, anatomy
from vitlab.pruning import (
    _sweep,
    budget,
    compensate,
    factor,
    masks,
    prune,
    recover,
    scores,
    shrink,
)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(32, 3, 16, 16, generator=generator), torch.arange(32) % 3) for _ in range(4)
    ]


def cut(model, batches, macs=0.75):
    """Return a model without some units of every kind, with factored layers, and its drops."""
    kinds = ["heads", "neurons", "filters", "width", "v"]
    unit_scores = scores.units(model, batches, criteria=["fisher"], kinds=kinds)["fisher"]
    plan = budget.plan(model, unit_scores, macs=macs, kinds=kinds, multiple=2)
    small = shrink.remove(model, plan.drop)
    found = budget.candidates(small, batches, kinds=["ranks"])
    thin = budget.plan(small, **found, kinds=["ranks"], macs=0.8)
    return budget.cut(small, thin, batches)[0], [plan.drop]


@torch.no_grad()
def gap(model, dense, batches):
    """Return the mean squared difference of the logits."""
    return torch.cat([model(x) - dense(x) for x, _ in batches]).square().mean().item()


def inputs(model, name, x):
    """Return what goes into a module, [positions, channels]."""
    recorded = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: recorded.append(arguments[0])
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return recorded[0].flatten(0, -2)


@pytest.mark.parametrize("tokens", [64, 5])
def test_what_was_not_cut_stays_as_it_is(any_model, batches, tokens):
    """Also with few positions: they must be the same ones in the dense and the small model."""
    new = recover.reconstruct(any_model, any_model, batches, tokens=tokens, drops={})
    x = batches[0][0]
    torch.testing.assert_close(new(x), any_model(x), rtol=1e-3, atol=1e-3)


def test_the_logits_come_nearer_to_those_of_the_dense_model(any_model, batches):
    small, drops = cut(any_model, batches)
    before, shapes = (
        gap(small, any_model, batches),
        {n: p.shape for n, p in small.state_dict().items()},
    )
    tensors_before = {
        name: tensor.clone() for m in (small, any_model) for name, tensor in m.state_dict().items()
    }
    new = recover.reconstruct(small.train(), any_model, batches, drops=drops)
    assert gap(new.eval(), any_model, batches) < 0.7 * before
    assert {n: p.shape for n, p in new.state_dict().items()} == shapes
    assert (
        small.training and not any_model.training and all(p.requires_grad for p in new.parameters())
    )
    tensors_after = {
        name: tensor for m in (small, any_model) for name, tensor in m.state_dict().items()
    }
    assert all(
        torch.equal(tensor, tensors_after[name]) for name, tensor in tensors_before.items()
    )  # neither is touched
    small.eval()
    assert gap(small, any_model, batches) == pytest.approx(before)


def least_squares(x, y):
    """Return weight and bias of the affine map from x [N, n] to y [N, m], by torch in float64."""
    x = torch.nn.functional.pad(x.double(), (0, 1), value=1)
    solved = torch.linalg.lstsq(x, y.double()).solution.T
    return solved[:, :-1], solved[:, -1]


def test_fc2_and_classifier_are_least_squares_by_hand(vit, batches):
    """fc2 makes up for the heads and neurons of its block, the classifier for the rest."""
    drop = {("blocks.1", "neurons"): range(0, 64, 3), ("blocks.1", "heads"): [1]}
    small = shrink.remove(vit, drop)
    new = recover.reconstruct(small, vit, batches, drops=drop, damping=1e-9)
    x = torch.cat([x for x, _ in batches])
    wanted = inputs(vit, "norm", x) - inputs(new, "blocks.1.norm2", x)
    weight, bias = least_squares(inputs(new, "blocks.1.mlp.fc2", x), wanted)
    torch.testing.assert_close(new.blocks[1].mlp.fc2.weight.double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(new.blocks[1].mlp.fc2.bias.double(), bias, rtol=1e-3, atol=1e-4)
    weight, bias = least_squares(inputs(new, "head", x), vit(x).detach())
    best = (
        inputs(new, "head", x).double() @ weight.T + bias
    )  # a norm ties its outputs together: weights are not unique
    torch.testing.assert_close(new(x).detach().double(), best, rtol=1e-3, atol=1e-3)


def test_positions_count_as_they_are_weighted(batches):
    """By hand: weights of 5 and 1 are rows of least squares times their roots."""
    vit = toy("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, patch_size=4)
    drop = {("blocks.1", "neurons"): range(0, 64, 3)}
    weights = torch.ones(17, dtype=torch.float64)
    weights[0] = 5
    small = shrink.remove(vit, drop)
    how = {"drops": drop, "damping": 1e-12, "weights": {"blocks.1.mlp.fc2": weights}}
    new = recover.reconstruct(small, vit, batches, **how)
    x = torch.cat([x for x, _ in batches])
    wanted = inputs(vit, "norm", x) - inputs(new, "blocks.1.norm2", x)
    seen = inputs(new, "blocks.1.mlp.fc2", x)
    roots = weights.sqrt().repeat(len(x))[:, None]
    seen = torch.nn.functional.pad(seen.double(), (0, 1), value=1)
    solved = torch.linalg.lstsq(roots * seen, roots * wanted.double()).solution.T
    fc2 = new.blocks[1].mlp.fc2
    torch.testing.assert_close(fc2.weight.double(), solved[:, :-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fc2.bias.double(), solved[:, -1], rtol=1e-3, atol=1e-4)


def test_tokens_before_the_patches_are_always_looked_at():
    """And each patch that is looked at stands for those that are not."""
    given = torch.tensor([2.0, 1.0, 0.75, 0.75, 0.5])
    positions = _sweep.Positions(3, given, prefix=1)
    assert given.tolist() == [2.0, 1.0, 0.75, 0.75, 0.5]  # the caller's stay as they are
    each = torch.arange(5.0).repeat(4)[:, None]
    seen = positions(each, 7, 4)
    assert len(seen) == 12 and (seen == 0).sum() == 4
    assert positions.weights.tolist() == pytest.approx([1.2, 1.2, 0.9, 0.9, 0.6])
    weights = positions.weights_of(seen, 7, 4)
    assert weights.equal(positions.weights.float()[seen[:, 0].long(), None])
    with pytest.raises(ValueError, match="tokens=1 leaves no patch beside 1 other tokens"):
        _sweep.Positions(1, given, prefix=1)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1e-3), (30.0, 10.0)])
def test_the_damping_is_the_one_that_serves_images_held_out(vit, noise, expected):
    """By hand: without noise the least one, with noise alone the one that keeps most weights."""
    generator = torch.Generator().manual_seed(0)
    layer = vit.blocks[0].mlp.fc1
    kept = layer.weight.detach().double().clone()

    def moments(count):
        x = torch.randn(count, layer.in_features, generator=generator).double()
        wanted = kept + (0 if noise else 0.5)
        y = x @ wanted.T + noise * torch.randn(count, len(kept), generator=generator)
        x = torch.nn.functional.pad(x, (0, 1), value=1)
        return recover._Moments(x.T @ x, y.T @ x, count)

    place = recover._Place("blocks.0.mlp.fc1", None, layer, None, slice(None))
    assert recover._chosen(place, moments(120), moments(120)) == expected


def test_too_few_batches_to_hold_one_out_are_refused(vit, batches):
    with pytest.raises(ValueError, match="needs 4 batches or more, got 1"):
        recover.reconstruct(vit, vit, batches[:1], damping="held out")


def test_a_factored_layer_gets_the_best_map_of_its_rank(vit, batches):
    """The best map has the leading directions of the outputs that least squares fits."""
    small = factor.factorise(vit, {"blocks.0.mlp.fc1": 5})
    new = recover.reconstruct(small, vit, batches, damping=1e-12)
    x = torch.cat([x for x, _ in batches])
    features = inputs(new, "blocks.0.mlp.fc1", x).double()
    target = torch.nn.functional.linear(
        inputs(vit, "blocks.0.mlp.fc1", x).double(), vit.blocks[0].mlp.fc1.weight.double()
    )
    features, target = features - features.mean(0), target - target.mean(0)
    fitted = features @ torch.linalg.lstsq(features, target).solution
    sigma = torch.linalg.svdvals(fitted)
    best = (target - fitted).square().sum() + sigma[5:].square().sum()
    layer = new.blocks[0].mlp.fc1
    assert isinstance(layer, _layers.FactoredLinear) and layer.rank == 5
    assert (target - features @ layer.weight.double().T).square().sum().item() == pytest.approx(
        best.item(), rel=1e-4
    )


@pytest.mark.parametrize("layer", ["blocks.0.mlp.fc1", "blocks.1.mlp.fc2"])
def test_a_factored_layer_errs_where_the_loss_feels_least(vit, batches, layer):
    """And a plain layer, which is solved for each output apart, is the same."""
    small = factor.factorise(vit, {layer: 5})
    felt = scores.gradient_grams(vit, batches, labels="model")
    plain, weighted = (
        recover.reconstruct(small, vit, batches, damping=1e-9, gradients=gradients)
        for gradients in (None, felt)
    )
    seen = torch.cat([inputs(plain, layer, x) for x, _ in batches])
    dense = vit.get_submodule(layer)

    def felt_error(model):
        own = model.get_submodule(layer)
        weight, bias = own.weight - dense.weight, own.bias - dense.bias
        errors = (seen @ weight.T + bias).double()
        return torch.einsum("pi,ij,pj->", errors, felt[layer], errors).item()

    assert felt_error(weighted) < 0.999 * felt_error(plain)
    alike = {name: torch.eye(len(gram)).double() for name, gram in felt.items()}
    same = recover.reconstruct(small, vit, batches, damping=1e-9, gradients=alike)
    x = batches[0][0]
    torch.testing.assert_close(same(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weighted.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)


def test_removed_in_two_steps_as_in_one(model, batches):
    block = models.view(model).blocks[1].name
    first = {(block, "neurons"): [3, 5, 8], ("stages.0", "width"): [0, 7]}
    second = {
        (block, "neurons"): [0, 3],
        ("stages.0", "width"): [6],
        (block, "heads"): [0],
    }  # once 0, 4 and 8
    whole = {
        (block, "neurons"): [0, 3, 4, 5, 8],
        ("stages.0", "width"): [0, 7, 8],
        (block, "heads"): [0],
    }
    small = shrink.remove(shrink.remove(model, first), second)
    steps = recover.reconstruct(small, model, batches, drops=[first, second])
    once = recover.reconstruct(shrink.remove(model, whole), model, batches, drops=whole)
    x = batches[0][0]
    torch.testing.assert_close(steps(x), once(x), rtol=1e-4, atol=1e-4)


def test_masked_layers_keep_their_support(model, batches):
    row_scores = scores.rows(model, batches, criteria=["fisher"])["fisher"]
    keep = prune.rows_to_masks(model, masks.keep_largest(row_scores, sparsity=0.2, floor=1))
    single = scores.weights(model, criteria=["magnitude"])["magnitude"]
    single = masks.keep_largest(
        {name: s for name, s in single.items() if "qkv" not in name}, sparsity=0.6
    )
    keep |= {name: mask & keep[name] for name, mask in single.items()}
    sparse = compensate.refit(model, keep, scores.grams(model, batches))
    new = recover.reconstruct(sparse, model, batches, keep=keep)
    parameters = dict(new.named_parameters())
    assert all((parameters[name][~mask] == 0).all() for name, mask in keep.items())
    assert any(name.endswith("bias") for name in keep)
    assert gap(new, model, batches) < 0.7 * gap(sparse, model, batches)


def test_masks_of_rows_computed_alone_and_of_biases(vit, batches):
    name = "blocks.1.mlp.fc2"
    drop = {(name, "rows"): [1, 4], ("blocks.1", "heads"): [2]}
    small = shrink.remove(vit, drop)
    generator = torch.Generator().manual_seed(0)
    masked = {f"{name}.kept.weight": torch.rand(30, 64, generator=generator) < 0.5}
    masked |= {
        "head.bias": torch.tensor([True, False, True]),
        "blocks.0.norm1.weight": torch.arange(32) > 0,
    }
    prune.apply(small, masked)
    new = recover.reconstruct(small, vit, batches, drops=drop, keep=masked)
    parameters = dict(new.named_parameters())
    assert all(
        (parameters[key][~mask] == 0).all() and parameters[key][mask].any()
        for key, mask in masked.items()
    )
    assert gap(new, vit, batches) < 0.5 * gap(small, vit, batches)
    for key, word in [
        ("no.such", "unknown parameter 'no.such'"),
        ("blocks.0.mlp.fc1.first.weight", "factored layer"),
    ]:
        thin = factor.factorise(vit, {"blocks.0.mlp.fc1": 5})
        shape = dict(thin.named_parameters()).get(key, torch.zeros(1)).shape
        with pytest.raises(ValueError, match=word):
            recover.reconstruct(thin, vit, batches, keep={key: torch.ones(shape, dtype=torch.bool)})


def test_a_row_without_its_bias_goes_through_the_origin(vit, batches):
    """The class of the classifier whose bias is masked is fitted without a constant, by hand."""
    drop = {("blocks.1", "neurons"): range(0, 64, 3)}
    keep = {"head.bias": torch.tensor([True, False, True])}
    small = shrink.remove(vit, drop)
    prune.apply(small, keep)
    new = recover.reconstruct(small, vit, batches, drops=drop, keep=keep, damping=1e-12)
    x = torch.cat([x for x, _ in batches])
    features, wanted = inputs(new, "head", x).double(), vit(x).detach().double()
    weight, bias = least_squares(features, wanted)
    best = features @ weight.T + bias
    best[:, 1] = features @ torch.linalg.lstsq(features, wanted[:, 1:2]).solution[:, 0]
    torch.testing.assert_close(new(x).detach().double(), best, rtol=1e-3, atol=1e-3)


def error_behind(small, dense, batches, name):
    """Return the mean squared difference of what comes out of a module."""
    outputs = []
    for model in (small, dense):
        handle = model.get_submodule(name).register_forward_hook(lambda *a: outputs.append(a[2]))
        with torch.no_grad():
            model(torch.cat([x for x, _ in batches]))
        handle.remove()
    return (outputs[0] - outputs[1]).square().mean().item()


def test_what_compensation_put_into_a_batch_norm_is_not_counted_twice(vit, batches):
    shifted = [(x + 2, y) for x, y in batches]
    first, second = [name for name, _ in models.view(vit).stem][:2]
    count = models.view(vit).units(["filters"])[first, "filters"]
    drop, means = {(first, "filters"): range(0, count, 2)}, {}
    for name in (first, second):
        layer = vit.get_submodule(name)
        means[name] = scores.grams(vit, shifted, layers=[name], affine=True)[name][-1, :-1]
        assert layer.bias is None and anatomy.norm_after(vit, name)
    small = shrink.remove(vit, drop, means=means)
    new = recover.reconstruct(small, vit, shifted, drops=drop)
    norm = anatomy.norm_after(vit, second)
    assert not torch.equal(
        small.get_submodule(norm).running_mean, vit.get_submodule(norm).running_mean
    )
    assert error_behind(new, vit, shifted, norm) < 0.8 * error_behind(small, vit, shifted, norm)


@pytest.mark.parametrize("factor", [1.5, 0.0, 1e-6])
def test_layer_scale_of_its_own(batches, factor):
    """A LayerScale unlike that of dense is taken as it is; a channel that is too faint stays."""
    dense = toy("conv_vit", embed_dim=24, depth=2, num_heads=3, init_values=0.5)
    drop = {("blocks.0", "heads"): [1]}
    small = shrink.remove(dense, drop)
    with torch.no_grad():
        small.blocks[0].ls2.gamma.mul_(factor)
    new = recover.reconstruct(small, dense, batches, drops=drop)
    largest = [model.blocks[0].mlp.fc2.weight.abs().max() for model in (small, new)]
    assert 0 < largest[1] < 4 * largest[0]
    before, after = (error_behind(model, dense, batches, "blocks.0") for model in (small, new))
    assert after < 0.5 * before if factor == 1.5 else after < 1.01 * before
    assert gap(new, dense, batches) < 0.5 * gap(small, dense, batches)


def test_queries_whole_attention_and_blocks_of_a_swin(swin, batches):
    first, second = "layers.0.blocks.0", "layers.1.blocks.0"
    drops = [
        {(first, "qk"): [0, 8, 16], (second, "block"): [0]},
        {("layers.0.blocks.1", "heads"): range(3)},
    ]
    small = shrink.remove(shrink.remove(swin, drops[0]), drops[1])
    new = recover.reconstruct(small, swin, batches, drops=drops)
    assert gap(new, swin, batches) < 0.5 * gap(small, swin, batches)


@pytest.mark.parametrize("mean", [0, 100])
def test_inputs_that_vary_little_about_a_large_mean_do_not_blow_up_rounding(vit, batches, mean):
    """Nothing was cut, so the weights are the answer; products about 0 moved one 7 times as far."""
    new = recover.reconstruct(vit, vit, [(x + mean, y) for x, y in batches])
    for name, parameter in new.named_parameters():
        before = vit.get_parameter(name)
        if parameter.dim() > 1:
            assert (parameter - before).abs().max() < 0.05 * before.abs().max() + 1e-6, name


def test_images_that_do_not_vary_and_layers_that_see_too_little(vit, batches):
    """Rounding must not become weights, and weights that nothing determines stay."""
    drop = {("blocks.1", "neurons"): [0, 1]}
    small = shrink.remove(vit, drop)
    same = [(torch.ones_like(x), y) for x, y in batches]
    new = recover.reconstruct(small, vit, same, drops=drop)
    for name, parameter in new.named_parameters():
        assert parameter.abs().max() < 10 * small.get_parameter(name).abs().max() + 1, name
    few = [
        (x[:15], y[:15]) for x, y in batches[:4]
    ]  # 60 images for 32 features and a classifier's 64 at least
    new = recover.reconstruct(small, vit, few, drops=drop)
    assert torch.equal(new.head.weight, small.head.weight)
    assert not torch.equal(new.blocks[1].mlp.fc2.weight, small.blocks[1].mlp.fc2.weight)


def test_layers_that_compute_some_rows_and_blocks_without_layers(vit, batches):
    drop = {
        ("blocks.0.attn.proj", "rows"): [1, 4],
        ("blocks.0", "neurons"): range(64),
        ("stages.0", "width"): [2],
    }
    drop["blocks.1.mlp.fc2", "rows"] = [0, 9]
    small = shrink.remove(vit, drop)
    new = recover.reconstruct(small, vit, batches, drops=drop)
    assert isinstance(new.blocks[0].attn.proj, _layers.RowLinear) and isinstance(
        new.blocks[0].mlp, _layers.Constant
    )
    assert gap(new, vit, batches) < 0.5 * gap(small, vit, batches)
    without = shrink.remove(vit, {("blocks.0", "block"): [0]})
    new = recover.reconstruct(without, vit, batches, drops={("blocks.0", "block"): [0]})
    assert gap(new, vit, batches) < 0.5 * gap(without, vit, batches)


def test_what_does_not_fit_is_said(vit, batches):
    drop = {("blocks.0", "neurons"): [0, 1]}
    small = shrink.remove(vit, drop)
    with pytest.raises(ValueError, match="no batches"):
        recover.reconstruct(small, vit, [], drops=drop)
    with pytest.raises(
        ValueError, match="model has 62 outputs of blocks.0.mlp.fc1, dense without drops 64"
    ):
        recover.reconstruct(small, vit, batches)
    without = {("blocks.0", "block"): [0]}
    with pytest.raises(ValueError, match="model has no outputs of blocks.0.attn.qkv"):
        recover.reconstruct(shrink.remove(vit, without), vit, batches)
    with pytest.raises(
        ValueError, match="model has 96 outputs of blocks.0.attn.qkv, dense without drops none"
    ):
        recover.reconstruct(vit, vit, batches, drops=without)
    stem = models.view(vit).stem[0][0]
    with pytest.raises(ValueError, match=f"outputs of {stem}"):
        recover.reconstruct(shrink.remove(vit, {(stem, "filters"): [0]}), vit, batches)
    narrow = factor.factorise(small, {"blocks.0.mlp.fc1": 5})
    with pytest.raises(ValueError, match="model has 62 outputs"):
        recover.reconstruct(narrow, vit, batches)
    thin = factor.factorise(vit, {"blocks.0.mlp.fc1": 5})
    with pytest.raises(
        ValueError, match="dense must be the model before the cuts; its blocks.0.mlp.fc1 was"
    ):
        recover.reconstruct(thin, thin, batches)
    vit.train()
    with pytest.raises(ValueError, match="not finite"):
        recover.reconstruct(small, vit, [(batches[0][0] * float("nan"), batches[0][1])], drops=drop)
    assert vit.training and all(p.requires_grad for p in vit.parameters())
    assert not any(module._forward_hooks for module in vit.modules())
