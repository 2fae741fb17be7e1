"""Removed equals masked, thinner models cost and lose what they report, and all can be rebuilt."""

import copy
import json

import pytest
import torch
from conftest import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath, RmsNorm
from torch import nn

from vitlab import models
from vitlab.evaluation import cost
from vitlab.models import _layers, _structure, anatomy, checkpoint
from vitlab.pruning import compensate, factor, lowrank, masks, scores, shrink


def heads_and_neurons(model):
    """Return a drop of different heads and neurons in each block; one block keeps a single head."""
    drop = {}
    for i, block in enumerate(models.view(model).blocks):
        gone = list(range(1, block.num_heads)) if i == 1 else [i % block.num_heads]
        drop[block.name, "heads"] = gone
        drop[block.name, "neurons"] = list(range(i, block.neurons, 2 + i))
    return drop


def some_rows(model):
    """Return a drop of every third row of each linear layer; rows of fc1 are neurons."""
    return {
        (name, "rows"): list(range(i % 3, layer.out_features, 3))
        for i, (name, layer) in enumerate(models.view(model).linears().items())
    }


def masked(model, drop):
    """Return a copy of model with the units zeroed where they act.

    Hooks do it, which know nothing of how weights are stored.
    """
    model = copy.deepcopy(model)
    view = models.view(model)
    for (name, kind), indices in drop.items():
        if kind == "rows":
            model.get_submodule(name).register_forward_hook(
                lambda m, args, y, i=indices: zeroed(y, i)
            )
            continue
        block = view.block(name)
        if kind == "heads":
            dim = block.head_dim
            indices = [head * dim + lane for head in indices for lane in range(dim)]
        reader = block.attn.proj if kind == "heads" else block.mlp.fc2
        reader.register_forward_pre_hook(lambda m, args, i=indices: (zeroed(args[0], i),))
    return model


def zeroed(x, indices):
    keep = torch.ones(x.shape[-1])
    keep[indices] = 0
    return x * keep


def error(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def without_drops(model):
    for module in model.modules():
        if isinstance(module, DropPath):  # SwinV2's
            module.drop_prob = 0.0
    return model


def input_gradient(model, batch):
    x = batch[0].clone().requires_grad_(True)
    return torch.autograd.grad(nn.functional.cross_entropy(model(x), batch[1]), x)[0]


def fuse(model, fused):
    for block in models.view(model).blocks:
        block.attn.fused_attn = fused
    return model


def grams(model, x):
    """Return {layer: mean of x x^T} and {layer: mean of x} for the inputs x of linear layers."""
    sums, hooks = {}, []

    def see(name):
        def hook(module, args):
            rows = args[0].detach().flatten(0, -2).double()
            sums[name] = (rows.T @ rows / len(rows), rows.mean(0))

        return hook

    for name, layer in models.view(model).linears(_structure._EVERY_ROLE).items():
        hooks.append(layer.register_forward_pre_hook(see(name)))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: gram for name, (gram, mean) in sums.items()}, {
        name: mean for name, (gram, mean) in sums.items()
    }


DROPS = {"heads and neurons": heads_and_neurons, "rows": some_rows}


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("fused", [False, True])
def test_removed_equals_masked(model, batch, drop, fused):
    drop = DROPS[drop](model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = fuse(shrink.remove(model, drop), fused)
    expected = fuse(masked(model, drop), fused)
    assert error(small(batch[0]), expected(batch[0])) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not small.training and not any(module.training for module in small.modules())


def every_kind(model):
    """Return {kind: a drop of some of its units everywhere}.

    All heads and all neurons of one block go, and one block.
    """
    view = models.view(model)
    drops = {}
    for kind in anatomy.UNITS:
        units = view.units([kind])
        drops[kind] = {
            key: list(range(i % 2, count, 3)) for i, (key, count) in enumerate(units.items())
        }
    for kind, size in (("qk", "qk_dim"), ("v", "head_dim")):
        sizes = {block.name: (block.num_heads, getattr(block, size)) for block in view.blocks}
        drops[kind] = {  # as many of each head, but others
            (name, kind): [h * d + (h + lane) % d for h in range(heads) for lane in range(d // 2)]
            for name, (heads, d) in sizes.items()
        }
    last = view.blocks[-1]
    drops["heads"][last.name, "heads"] = list(range(last.num_heads))
    drops["neurons"][last.name, "neurons"] = list(range(last.neurons))
    drops["block"] = {(view.blocks[0].name, "block"): [0]}
    if last.normalises_queries:
        del drops["qk"]
    return {kind: drop for kind, drop in drops.items() if drop}


def masked_as_well(model, drop):
    """Return a copy of model with units of every kind zeroed where they act, as `masked` does."""
    model = masked(
        model, {key: gone for key, gone in drop.items() if key[1] in ("heads", "neurons", "rows")}
    )
    view = models.view(model)
    for (name, kind), indices in drop.items():
        if kind == "qk":
            block = view.block(name)
            both = [*indices, *(block.num_heads * block.qk_dim + i for i in indices)]
            block.attn.qkv.register_forward_hook(lambda m, args, y, i=both: zeroed(y, i))
        elif kind == "v":
            view.block(name).attn.proj.register_forward_pre_hook(
                lambda m, args, i=indices: (zeroed(args[0], i),)
            )
        elif kind == "block":
            model.get_submodule(name).register_forward_hook(lambda m, args, y: args[0])
        elif kind == "filters":
            keep = [i for i in range(len(model.get_submodule(name).weight)) if i not in indices]
            norm = model.get_submodule(anatomy.norm_after(model, name))
            norm.register_forward_hook(
                lambda m, args, y, i=indices: zeroed(y.movedim(1, -1), i).movedim(-1, 1)
            )
            assert keep
        elif kind == "width":
            mask_stream(model, view.residual_stream(name), indices)
    return model


def mask_stream(model, stream, indices):
    """Zero channels wherever they are written; the mean of a norm is that of the others alone."""
    size = len(stream[0][0].weight)
    wide = [j * size + i for j in range(4) for i in indices]
    for thing, how in stream:
        gone = wide if how == "merged" else indices
        if how == "last":
            thing.data[..., gone] = 0
        elif isinstance(thing, (nn.Conv2d, nn.BatchNorm2d)):
            thing.register_forward_hook(
                lambda m, args, y, i=gone: zeroed(y.movedim(1, -1), i).movedim(-1, 1)
            )
        elif isinstance(thing, nn.LayerNorm):
            keep = [i for i in range(len(thing.weight)) if i not in gone]
            thing.register_forward_hook(lambda m, args, y, i=keep: norm_of(m, args[0], i))
        elif how == "rows":
            thing.register_forward_hook(lambda m, args, y, i=gone: zeroed(y, i))


def norm_of(norm, x, keep):
    """Return what a LayerNorm gives of some channels; its mean square counts zeros for the others."""
    centred = torch.zeros_like(x)
    centred[..., keep] = x[..., keep] - x[..., keep].mean(-1, keepdim=True)
    eps = norm.eps * len(keep) / x.shape[-1]
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias
    return zeroed(y, [i for i in range(x.shape[-1]) if i not in keep])


def test_a_narrowed_stream_under_root_mean_squares_answers_as_with_plain_zeros(batch):
    model = toy("conv_vit", embed_dim=32, depth=2, num_heads=4, norm_layer=RmsNorm)
    drop = {("stages.0", "width"): [0, 1, 7, 30]}
    assert isinstance(model.blocks[0].norm1, RmsNorm)
    expected, small = masked_as_well(model, drop), shrink.remove(model, drop)
    assert error(small(batch[0]), expected(batch[0])) < 1e-4


@pytest.mark.parametrize("kind", anatomy.UNITS)
def test_removed_equals_masked_for_every_kind_and_architecture(any_model, batch, kind):
    drop = every_kind(any_model).get(kind)
    if drop is None:
        pytest.skip(f"this model has no {kind} that can be cut")
    expected = masked_as_well(any_model, drop)
    small = shrink.remove(any_model, drop)
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in any_model.parameters()
    )
    assert error(small(batch[0]), expected(batch[0])) < 1e-5
    assert error(fuse(small, True)(batch[0]), expected(batch[0])) < 1e-5
    small, expected = (
        without_drops(network).train() for network in (copy.deepcopy(small), expected)
    )
    wanted = input_gradient(expected, batch)
    for fused in (False, True):
        assert error(input_gradient(fuse(small, fused), batch), wanted) < 1e-5
    small = fuse(shrink.remove(any_model, drop), False)
    same = _structure.rebuild(
        models.create(**recipe(small)), json.loads(json.dumps(_structure.structure(small)))
    ).eval()
    same.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(same(batch[0]), small(batch[0]))
    widths = list(models.view(small).units(["width"]).values())
    for model in (small, same):
        assert [model.embed_dim, model.num_features, model.head_hidden_size] == [
            widths[0],
            widths[-1],
            widths[-1],
        ]
    assert cost.macs(small) < cost.macs(any_model)
    assert cost.macs(same) == cost.macs(small) == cost.meters(small)["macs_torch"]


NOTHING = [row for row in shrink._REMOVERS if row[0] != ("block",)]  # a block goes or it stays


@pytest.mark.parametrize("kinds, remover", NOTHING, ids=["+".join(kinds) for kinds, _ in NOTHING])
@torch.no_grad()
def test_a_removal_of_nothing_is_bit_equal(any_model, batch, kinds, remover):
    """`remove` refuses it as a mistake; here each remover puts new layers that compute the same."""
    logits = any_model(batch[0])
    view = models.view(any_model)
    names = list(view.linears())
    if kinds != ("rows",):
        names = dict.fromkeys(name for name, _ in view.units(kinds))
    second_moments, means = grams(any_model, batch[0])
    for fill in (compensate.Fill({}, {}, 1e-3), compensate.Fill(means, second_moments, 1e-3)):
        model = copy.deepcopy(any_model)
        for name in names:
            remover(model, name, {kind: set() for kind in kinds}, fill)
        assert torch.equal(model(batch[0]), logits)
    same = _structure.rebuild(
        models.create(**recipe(any_model)), _structure.structure(any_model)
    ).eval()
    same.load_state_dict(any_model.state_dict(), strict=True)
    assert torch.equal(same(batch[0]), logits)
    magnitudes = {name: parameter.abs() for name, parameter in any_model.named_parameters()}
    assert all(mask.all() for mask in masks.keep_largest(magnitudes, sparsity=0).values())


@settings(max_examples=60, deadline=None)
@given(drawn=st.data())
def test_two_removals_are_one(drawn):
    model, x = toy("conv_vit", embed_dim=16, depth=2, num_heads=4), torch.randn(2, 3, 16, 16)
    counts = models.view(model).units(["heads", "neurons", "filters", "width"])
    counts |= {("blocks.1.attn.proj", "rows"): 16, ("blocks.0.mlp.fc2", "rows"): 16}
    parts = [{}, {}]
    keys = drawn.draw(
        st.lists(st.sampled_from(sorted(counts)), min_size=1, max_size=4, unique=True)
    )
    if ("stages.0", "width") in keys:  # these rows are its channels, which are numbered anew
        keys = [key for key in keys if key[1] != "rows"]
    for key in keys:
        total = counts[key]
        gone = drawn.draw(
            st.lists(st.integers(0, total - 1), unique=True, min_size=1, max_size=min(6, total - 1))
        )
        early = drawn.draw(st.integers(0, len(gone)))
        left = [i for i in range(total) if i not in gone[:early]]
        parts[0][key] = gone[
            :early
        ]  # what is left is numbered anew, but for rows, of which zeros stay in the place
        parts[1][key] = [i if key[1] == "rows" else left.index(i) for i in gone[early:]]
        counts[key] = gone
    once, twice = shrink.remove(model, {key: counts[key] for key in keys}), model
    for drop in parts:
        twice = shrink.remove(twice, drop) if any(drop.values()) else twice
    assert error(twice(x), once(x)) < 1e-5
    assert {n: p.shape for n, p in twice.named_parameters()} == {
        n: p.shape for n, p in once.named_parameters()
    }


def test_a_block_without_heads_and_biases_gets_narrower_too(any_model, batch):
    block = models.view(any_model).blocks[0]
    drop = {(block.name, "heads"): range(block.num_heads), ("stages.0", "width"): [2, 3]}
    expected = masked_as_well(any_model, drop)(batch[0])
    assert error(shrink.remove(any_model, drop)(batch[0]), expected) < 1e-5


def test_all_kinds_together_and_once_more(any_model, batch):
    drops = every_kind(any_model)
    small = any_model
    for drop in drops.values():  # numbered anew after each, so only what is still there
        left = models.view(small).units([next(iter(drop))[1]])
        drop = {
            key: [i for i in gone if i < left.get(key, 0)]
            for key, gone in drop.items()
            if key in left
        }
        if next(iter(drop))[1] in ("qk", "v"):
            drop = {key: every_kind(small)[key[1]][key] for key in drop}
        expected = masked_as_well(small, drop)(batch[0])
        small = shrink.remove(small, drop)
        assert error(small(batch[0]), expected) < 1e-5
    means = {name: mean.float() for name, mean in grams(small, batch[0])[1].items()}
    again = shrink.remove(
        small, {("stages.0", "width"): [1]}, grams=grams(small, batch[0])[0], means=means
    )
    assert again(batch[0]).isfinite().all()
    same = _structure.rebuild(
        models.create(**recipe(again)), json.loads(json.dumps(_structure.structure(again)))
    ).eval()
    same.load_state_dict(again.state_dict(), strict=True)
    assert torch.equal(same(batch[0]), again(batch[0]))


OTHER_VITS = {
    "normed queries and keys, LayerScale": {"qk_norm": True, "init_values": 0.5},
    "class token, registers": {"class_token": True, "reg_tokens": 2, "global_pool": "token"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
}


@pytest.mark.parametrize("options", OTHER_VITS)
@pytest.mark.parametrize("drop", DROPS)
def test_removed_equals_masked_on_other_vits(batch, options, drop):
    torch.manual_seed(0)
    options = {"image_size": 16, "embed_dim": 32, "depth": 2, **OTHER_VITS[options]}
    model = models.create("conv_vit", num_classes=3, **options).eval()
    drop = DROPS[drop](model)
    assert error(shrink.remove(model, drop)(batch[0]), masked(model, drop)(batch[0])) < 1e-5
    assert shrink.remove(model, drop, grams=grams(model, batch[0])[0])(batch[0]).isfinite().all()


@pytest.mark.parametrize(
    "option, key", [("scale_attn_norm", "heads"), ("scale_mlp_norm", "neurons")]
)
def test_units_under_a_norm_of_their_own_are_refused(option, key):
    model = models.create(
        "conv_vit", num_classes=3, image_size=16, embed_dim=32, depth=2, **{option: True}
    )
    with pytest.raises(ValueError, match=f"{key} share a norm or gate"):
        shrink.remove(model, {("blocks.0", key): [0]})


def test_kept_weights_get_the_gradients_of_the_masked_model(model, batch):
    drop = heads_and_neurons(model)
    small, whole = shrink.remove(model, drop).train(), masked(model, drop).train()
    for network in (small, whole):
        nn.functional.cross_entropy(network(batch[0]), batch[1]).backward()
    mine, theirs = (
        {k: p.grad for k, p in network.named_parameters()} for network in (small, whole)
    )
    assert mine.keys() == theirs.keys()
    for block in models.view(model).blocks:
        gone = drop[block.name, "neurons"]
        keep = [i for i in range(block.neurons) if i not in gone]
        for name, index in (
            ("mlp.fc1.weight", (keep,)),
            ("mlp.fc1.bias", (keep,)),
            ("mlp.fc2.weight", (slice(None), keep)),
        ):
            name = f"{block.name}.{name}"
            assert error(mine[name], theirs[name][index]) < 1e-4
    for name in mine:
        if mine[name].shape == theirs[name].shape:
            assert (mine[name] - theirs[name]).abs().max() < 1e-4 * max(
                theirs[name].abs().max(), 1e-2
            ), name


def test_without_all_heads_or_neurons_the_mean_of_what_they_gave_is_left(model, batch):
    means = {name: mean.float() for name, mean in grams(model, batch[0])[1].items()}
    for block in models.view(model).blocks:
        for kind, owner, reader, count in (
            ("heads", "attn", "proj", block.num_heads),
            ("neurons", "mlp", "fc2", block.neurons),
        ):
            small = shrink.remove(model, {(block.name, kind): range(count)}, means=means)
            whole, left = (
                model.get_submodule(f"{block.name}.{owner}.{reader}"),
                small.get_submodule(f"{block.name}.{owner}"),
            )
            expected = whole(means[f"{block.name}.{owner}.{reader}"])
            assert (
                isinstance(left, _layers.Constant)
                and error(left(torch.zeros(2, 5, 7))[1, 2], expected) < 1e-5
            )
            assert (block.name, kind) not in models.view(small).units()


def test_narrower_streams_are_refitted_where_their_readers_can(model, batch):
    name = "stages.0"
    second_moments, _ = grams(model, batch[0])
    plain = shrink.remove(model, {(name, "width"): [0, 5]})
    fitted = shrink.remove(model, {(name, "width"): [0, 5]}, grams=second_moments)
    reader = f"{models.view(model).blocks[0].name}.mlp.fc1"
    weight, gram = model.get_submodule(reader).weight, second_moments[reader]
    keep = [i for i in range(weight.shape[1]) if i not in (0, 5)]

    def lost(small):
        whole = torch.zeros_like(weight)
        whole[:, keep] = small.get_submodule(reader).weight.detach()
        return lowrank.objective(weight, whole, gram)

    assert lost(fitted) < lost(plain)


def test_filters_that_say_the_same_can_stand_in_for_each_other(model, batch):
    """One of two equal filters goes: with grams nothing is lost, without grams a lot."""
    first, second = list(dict(models.view(model).stem))[:2]
    norm = model.get_submodule(anatomy.norm_after(model, first))
    with torch.no_grad():
        for tensor in (
            model.get_submodule(first).weight,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
        ):
            tensor[5] = tensor[2]
    second_moments = scores.grams(model, [batch], layers=[second])
    drop = {(first, "filters"): [5]}
    fitted = shrink.remove(model, drop, grams=second_moments, damping=1e-9)
    assert (
        error(fitted(batch[0]), model(batch[0]))
        < 1e-4
        < 1e-2
        < error(shrink.remove(model, drop)(batch[0]), model(batch[0]))
    )
    with pytest.raises(ValueError, match=rf"gram of {second} is \[3, 3\], not "):
        shrink.remove(model, drop, grams={second: torch.eye(3)})


def test_factors_of_the_stem_and_linear_layers(any_model, batch):
    """A matrix of low rank computes the same in factors, which cost rank (m + n) a position."""
    view = models.view(any_model)
    ranks = {
        name: min(3, int(_layers.break_even_rank(*m.weight.flatten(1).shape)))
        for name, m in view.matrices.items()
    }
    with torch.no_grad():
        for name, rank in ranks.items():
            weight = any_model.get_submodule(name).weight
            u, v = lowrank.svd(weight.flatten(1), rank)
            weight.copy_((u @ v).view_as(weight))
    thin = factor.factorise(
        any_model, ranks, grams=scores.grams(any_model, [batch], layers=list(ranks))
    )
    assert error(thin(batch[0]), any_model(batch[0])) < 1e-4
    before, after = (cost.breakdown(m).groupby("layer").macs.sum() for m in (any_model, thin))
    for name, rank in ranks.items():
        m, n = any_model.get_submodule(name).weight.flatten(1).shape
        executed = sum(macs for layer, macs in after.items() if f"{layer}.".startswith(f"{name}."))
        assert executed * m * n == before[name] * rank * (m + n)
    same = _structure.rebuild(
        models.create(**recipe(thin)), json.loads(json.dumps(_structure.structure(thin)))
    ).eval()
    same.load_state_dict(thin.state_dict(), strict=True)
    assert torch.equal(same(batch[0]), thin(batch[0]))
    less = shrink.remove(thin, {("stages.0", "width"): [1], (view.blocks[0].name, "neurons"): [0]})
    assert less(batch[0]).isfinite().all() and cost.macs(less) < cost.macs(thin)


def test_a_filter_that_hardly_varies_leaves_its_mean(model, batch):
    """A filter that is nearly constant goes: its mean stays in the norm or bias behind."""
    first, second = list(dict(models.view(model).stem))[:2]
    norm = model.get_submodule(anatomy.norm_after(model, first))
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 0, 3
    second_moments = scores.grams(model, [batch], layers=[second], affine=True)[second]
    drop, mean = {(first, "filters"): [5]}, {second: second_moments[-1, :-1]}
    lost = error(shrink.remove(model, drop)(batch[0]), model(batch[0]))
    centred = error(shrink.remove(model, drop, means=mean)(batch[0]), model(batch[0]))
    assert centred < 0.5 * lost  # not zero: at the rim the padding is no constant
    both = shrink.remove(model, drop, means=mean, grams={second: second_moments[:-1, :-1]})
    assert error(both(batch[0]), model(batch[0])) < 0.5 * lost


def test_a_factored_stem_loses_filters_and_its_factors_where_they_cost_more(model, batch):
    """Filters are outputs of both factors together; where these cost more, they are merged."""
    first, second, last = list(dict(models.view(model).stem))
    counts = models.view(model).units(["filters"])
    thin = factor.factorise(model, {first: 3, second: 8, last: 8})
    assert models.view(thin).units(["filters"]) == counts
    assert set(models.view(thin).matrices) == set(models.view(thin).linears())
    scores_by_units = scores.units(thin, [batch], criteria=["fisher"], kinds=["filters"])["fisher"]
    assert {key: len(score) for key, score in scores_by_units.items()} == counts
    drop = {(second, "filters"): range(counts[second, "filters"] - 4)}
    expected = copy.deepcopy(thin)
    behind = expected.get_submodule(anatomy.norm_after(expected, second))
    behind.register_forward_hook(
        lambda m, args, y: zeroed(y.movedim(1, -1), drop[second, "filters"]).movedim(-1, 1)
    )
    small = shrink.remove(thin, drop)
    assert error(small(batch[0]), expected(batch[0])) < 1e-5
    stem = dict(models.view(small).stem)
    assert isinstance(small.get_submodule(first), _layers.FactoredConv2d)
    assert isinstance(small.get_submodule(second), nn.Conv2d) and stem[second].out_channels == 4
    same = _structure.rebuild(
        models.create(**recipe(small)), json.loads(json.dumps(_structure.structure(small)))
    ).eval()
    same.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(same(batch[0]), small(batch[0]))


def test_errors_of_factorising(vit):
    with pytest.raises(ValueError, match="ranks is empty"):
        factor.factorise(vit, {})
    with pytest.raises(ValueError, match="did you mean 'blocks.0.mlp.fc1'"):
        factor.factorise(vit, {"block.0.mlp.fc1": 3})
    for rank in (0, 22):
        with pytest.raises(ValueError, match=r"fc1 \[64, 32\]: a rank in \[1, 21.3\) saves MACs"):
            factor.factorise(vit, {"blocks.0.mlp.fc1": rank})
    thin = factor.factorise(vit, {"blocks.0.mlp.fc1": 3})
    with pytest.raises(ValueError, match="is a FactoredLinear already"):
        factor.factorise(thin, {"blocks.0.mlp.fc1": 2})
    thin = factor.factorise(vit, {"patch_embed.steps.4": 8})
    with pytest.raises(ValueError, match="unknown layer 'patch_embed.steps.4.0'"):
        factor.factorise(thin, {"patch_embed.steps.4.0": 2})
    with pytest.raises(ValueError, match="give one of 1 group"):
        _layers.FactoredConv2d(nn.Conv2d(4, 4, 3, groups=2), rank=2)


def test_what_stays_makes_up_for_masked_weights(model, batch):
    second_moments, _ = grams(model, batch[0])
    generator = torch.Generator().manual_seed(0)
    layers_ = models.view(model).linears()
    keep = {
        f"{n}.weight": torch.rand(m.weight.shape, generator=generator) < 0.4
        for n, m in layers_.items()
    }
    stem = models.view(model).stem[1][0]
    second_moments |= scores.grams(model, [batch], layers=[stem])
    keep[f"{stem}.weight"] = (
        torch.rand(model.get_submodule(stem).weight.shape, generator=generator) < 0.4
    )
    norm = f"{models.view(model).blocks[0].name}.norm1.weight"
    keep[norm] = torch.arange(len(model.get_parameter(norm))) > 2
    fitted = compensate.refit(model, keep, second_moments)
    for name, mask in keep.items():
        weight, new = model.get_parameter(name), fitted.get_parameter(name)
        assert new[~mask].count_nonzero() == 0
        if name == norm:
            assert torch.equal(new, weight * mask)
            continue
        gram = lowrank.damped(second_moments[name.removesuffix(".weight")])
        weight, new, mask = (tensor.flatten(1) for tensor in (weight, new, mask))
        assert lowrank.objective(weight, new, gram) < lowrank.objective(weight, weight * mask, gram)
    assert fitted(batch[0]).isfinite().all() and not torch.equal(model.get_parameter(name), new)
    swept = compensate.refit(model, keep, second_moments, method="obs")
    for name, mask in keep.items():
        weight, best, new = (network.get_parameter(name) for network in (model, fitted, swept))
        if name == norm:
            assert torch.equal(new, weight * mask)
            continue
        gram = lowrank.damped(second_moments[name.removesuffix(".weight")])
        weight, best, new, mask = (tensor.flatten(1) for tensor in (weight, best, new, mask))
        assert torch.equal(new, lowrank.obs_update(weight, gram, mask))
        assert lowrank.objective(weight, best, gram) <= lowrank.objective(weight, new, gram)
    with pytest.raises(ValueError, match="unknown method 'obd', did you mean 'obs'"):
        compensate.refit(model, keep, second_moments, method="obd")
    with pytest.raises(ValueError, match="unknown parameter 'norm.weigth'"):
        compensate.refit(model, {"norm.weigth": keep[norm]}, second_moments)
    with pytest.raises(ValueError, match="none of the layers in keep"):
        compensate.refit(model, {norm: keep[norm]}, second_moments)


def test_all_that_a_head_has_goes_with_it(swin):
    block = models.view(swin).blocks[1].name
    small = shrink.remove(swin, {(block, "heads"): [1]})
    attn, whole = (network.get_submodule(f"{block}.attn") for network in (small, swin))
    assert attn.num_heads == 2 and attn.scale == whole.scale
    assert attn.qkv.weight.shape == (3 * 16, 24) and attn.proj.weight.shape == (24, 16)
    assert torch.equal(
        attn.relative_position_bias_table, whole.relative_position_bias_table[:, [0, 2]]
    )
    assert torch.equal(attn.qkv.bias, whole.qkv.bias.view(3, 3, 8)[:, [0, 2]].flatten())
    assert torch.equal(attn.proj.bias, whole.proj.bias)


def test_a_forgotten_bias_table_is_caught(swin, batch):
    """The laws would see it: with one head left, Swin broadcasts a whole table in silence."""
    drop = heads_and_neurons(swin)
    small = shrink.remove(swin, drop)
    block = models.view(swin).blocks[0].name
    table = swin.get_submodule(f"{block}.attn").relative_position_bias_table
    small.get_submodule(f"{block}.attn").relative_position_bias_table = nn.Parameter(
        table.roll(1, 1)[:, :-1]
    )
    assert error(small(batch[0]), masked(swin, drop)(batch[0])) > 1e-4


def test_fc1_rows_are_neurons_and_other_rows_leave_zeros(vit, batch):
    small = shrink.remove(
        vit, {("blocks.0.mlp.fc1", "rows"): [3, 4], ("blocks.0", "neurons"): [4, 9]}
    )
    assert models.view(small).units()["blocks.0", "neurons"] == 61
    small = shrink.remove(small, {("blocks.0.attn.proj", "rows"): [0, 7]})
    proj = small.blocks[0].attn.proj
    assert isinstance(proj, _layers.RowLinear) and proj.macs == 30 * 32
    y = proj(torch.randn(2, 32))
    assert y[:, [0, 7]].count_nonzero() == 0 and y.count_nonzero() == 60
    small = shrink.remove(
        small, {("blocks.0.attn.proj", "rows"): [7, 8], ("blocks.0", "heads"): [0]}
    )
    assert small.blocks[0].attn.proj.macs == 29 * 24 and small(batch[0]).isfinite().all()


def test_an_activation_that_is_not_zero_at_zero_keeps_its_neurons(vit, batch):
    vit.blocks[0].mlp.act = nn.Sigmoid()
    drop = {("blocks.0.mlp.fc1", "rows"): [0, 5]}
    small = shrink.remove(vit, drop)
    assert models.view(small).units()["blocks.0", "neurons"] == 64
    assert error(small(batch[0]), masked(vit, drop)(batch[0])) < 1e-5


def test_removal_repeats_in_any_order(model, batch):
    first = {
        ("heads" if "heads" in key else "neurons", key): value
        for key, value in heads_and_neurons(model).items()
    }
    heads = {key: value for (kind, key), value in first.items() if kind == "heads"}
    neurons = {key: value for (kind, key), value in first.items() if kind == "neurons"}
    together = shrink.remove(model, heads | neurons)(batch[0])
    assert error(shrink.remove(shrink.remove(model, heads), neurons)(batch[0]), together) < 1e-5
    assert error(shrink.remove(shrink.remove(model, neurons), heads)(batch[0]), together) < 1e-5
    rows = some_rows(model)
    left = {
        key: [i for i in range(0, 6) if i not in rows[key]] for key in rows if "fc1" not in key[0]
    }
    both = {key: sorted(rows[key] + left[key]) for key in left}
    once = shrink.remove(model, both)(batch[0])
    twice = shrink.remove(shrink.remove(model, {key: rows[key] for key in left}), left)(batch[0])
    assert error(twice, once) < 1e-5


@pytest.mark.parametrize("support", _layers.SUPPORTS)
def test_heads_then_neurons_then_ranks_then_again(model, batch, support):
    x = batch[0]
    model = shrink.remove(model, some_rows(model))
    thin, _ = factor.compress(model, ratio=0.3, support=support, grams=grams(model, x)[0], rounds=1)
    drop = heads_and_neurons(thin)
    small = shrink.remove(thin, drop)
    assert error(small(x), masked(thin, drop)(x)) < 1e-5
    again, report = factor.compress(
        small, ratio=0.6, method="svd", grams=grams(small, x)[0], multiple=1
    )
    assert (report.macs <= 0.4 * report.macs_dense).all() and again(x).isfinite().all()
    same = _structure.rebuild(
        models.create(**recipe(again)), json.loads(json.dumps(_structure.structure(again)))
    )
    same.load_state_dict(again.state_dict(), strict=True)
    assert torch.equal(same.eval()(x), again(x))


def recipe(model):
    return {**model.recipe["options"], **{k: v for k, v in model.recipe.items() if k != "options"}}


def test_means_and_least_squares_make_up_for_what_goes(model, batch):
    x = batch[0]
    gram, mean = grams(model, x)
    block = models.view(model).blocks[0]
    drop = {(block.name, "neurons"): list(range(0, block.neurons, 3)), (block.name, "heads"): [0]}
    for reader, whole in (
        (f"{block.name}.mlp.fc2", block.mlp.fc2),
        (f"{block.name}.attn.proj", block.attn.proj),
    ):
        drop_one = {
            key: value
            for key, value in drop.items()
            if (key[1] == "heads") == reader.endswith("proj")
        }
        records = []
        hook = whole.register_forward_hook(
            lambda m, args, y, records=records: records.append((args[0], y))
        )
        model(x)
        hook.remove()
        inputs, outputs = records[0]
        gone = drop_one.popitem()
        width = block.head_dim if gone[0][1] == "heads" else 1
        keep = [i for i in range(whole.in_features) if i // width not in gone[1]]
        losses = []
        for statistics in ({}, {"means": mean}, {"grams": gram}, {"grams": gram, "means": mean}):
            small = shrink.remove(model, dict([gone]), **statistics).get_submodule(reader)
            assert small.in_features == len(keep)
            losses.append((small(inputs[..., keep]) - outputs).square().mean().item())
        plain, centred, fitted, both = losses
        assert plain > centred > both and plain > fitted > both


def test_compensation_works_on_factors(vit, batch):
    gram, mean = grams(vit, batch[0])
    thin, _ = factor.compress(vit, ratio=0.5, method="svd", grams=gram, multiple=1)
    gram, mean = grams(thin, batch[0])
    drop = {("blocks.1", "neurons"): list(range(20))}
    dense = vit.get_submodule("blocks.1.mlp.fc2")
    small = shrink.remove(thin, drop, grams=gram, means=mean).blocks[1].mlp.fc2
    assert isinstance(small, _layers.FactoredLinear) and small.in_features == dense.in_features - 20
    with pytest.raises(ValueError, match="no place"):
        sparse, _ = factor.compress(vit, ratio=0.5, method="iht", grams=grams(vit, batch[0])[0])
        shrink.remove(sparse, drop, grams=gram)


@pytest.mark.parametrize("method", ["svd+iht", "iht"])
@pytest.mark.parametrize("ratio, support", [(0.1, "columns"), (0.5, "entries"), (0.8, "rows")])
def test_compressed_models_cost_and_lose_what_the_report_says(model, batch, ratio, method, support):
    gram, _ = grams(model, batch[0])
    options = {"ratio": ratio, "method": method, "support": support, "grams": gram, "rounds": 3}
    thin, report = factor.compress(model, **options)
    assert list(report.layer) == list(models.view(model).linears())
    dense = report.m * report.n
    assert (report.macs_dense == dense).all() and (
        report.macs_ideal <= (1 - ratio) * dense + 1e-6
    ).all()
    assert (report.objective <= report.objective_start).all()
    assert (report.objective < report.objective_magnitude).all() or support == "rows"
    for line in report.itertuples():
        layer = thin.get_submodule(line.layer)
        low = line.rank * (line.m + line.n)
        assert isinstance(layer, _layers.LowRankSparseLinear) and layer.rank == line.rank == (
            line.rank if "svd" in method else 0
        )
        if support == "entries":
            assert line.macs_ideal == low + line.count == int((1 - ratio) * line.m * line.n + 1e-6)
            assert layer.sparse.count_nonzero() == line.count and line.macs == line.m * line.n
        else:
            assert (
                line.macs
                == line.macs_ideal
                == low + line.count * (line.n if support == "rows" else line.m)
            )
        weight = model.get_submodule(line.layer).weight
        loss = lowrank.objective(weight, layer.weight, lowrank.damped(gram[line.layer]))
        assert loss == pytest.approx(line.objective, rel=1e-2, abs=1e-6 * line.objective_magnitude)
    assert thin(batch[0]).isfinite().all()


def test_patterns_are_masked_and_leave_the_rest_to_the_rank(vit, batch):
    gram, _ = grams(vit, batch[0])
    alone, report = factor.compress(vit, ratio=0.5, method="iht", support="2:4", grams=gram)
    assert (report["count"] * 2 == report.m * report.n).all() and (
        report.objective < report.objective_magnitude
    ).all()
    for name in report.layer:
        layer = alone.get_submodule(name)
        assert (
            layer.mask.view(len(layer.mask), -1, 4).sum(-1) == 2
        ).all() and layer.macs == layer.weight.numel()
    both, report = factor.compress(
        vit, ratio=0.25, method="svd+iht", support="2:4", grams=gram, multiple=1, rounds=2
    )
    assert (report["rank"] == (report.m * report.n // 4) // (report.m + report.n)).all()
    for ratio, method, words in ((0.4, "iht", "exactly 0.5"), (0.5, "svd+iht", "less than 0.5")):
        with pytest.raises(ValueError, match=f"2:4 keeps 0.5 .* give a ratio of {words}"):
            factor.compress(vit, ratio=ratio, method=method, support="2:4", grams=gram)
    with pytest.raises(ValueError, match="svd has no sparse part to store as 2:4"):
        factor.compress(vit, ratio=0.5, method="svd", support="2:4")
    with pytest.raises(ValueError, match="it divides rows into groups of 5"):
        factor.compress(vit, ratio=0.5, method="iht", support="2:5", grams=gram)


def test_svd_is_two_thin_layers_within_the_share(model, batch):
    gram, _ = grams(model, batch[0])
    plain, one = factor.compress(model, ratio=0.4, method="svd", multiple=1)
    unwhitened, two = factor.compress(
        model, ratio=0.4, method="svd", multiple=1, grams=gram, whiten=False
    )
    white, three = factor.compress(model, ratio=0.4, method="svd", multiple=1, grams=gram)
    assert torch.equal(plain(batch[0]), unwhitened(batch[0]))
    assert (three.objective <= two.objective).all() and (
        three.objective_start == two.objective
    ).all()
    for report in (one, two, three):
        assert (report.macs == report["rank"] * (report.m + report.n)).all() and (
            report["count"] == 0
        ).all()
        assert (report.macs <= 0.6 * report.macs_dense).all()
    assert all(
        isinstance(layer, _layers.FactoredLinear) for layer in models.view(white).linears().values()
    )


def test_random_directions_cost_as_svd_and_lose_more(model, batch):
    gram, _ = grams(model, batch[0])
    options = {"ratio": 0.4, "multiple": 1, "grams": gram}
    _, best = factor.compress(model, method="svd", **options)
    thin, report = factor.compress(model, method="random", seed=1, **options)
    assert (report["rank"] == best["rank"]).all() and (report.macs == best.macs).all()
    assert (report.objective > best.objective).all()
    for line in report.itertuples():  # what W makes of the inputs along these directions stays
        layer, whole = thin.get_submodule(line.layer), model.get_submodule(line.layer)
        along = layer.first.weight
        torch.testing.assert_close(along @ along.T, torch.eye(line.rank), rtol=1e-4, atol=1e-5)
        assert error(layer(along), whole(along)) < 1e-4
    again, other = (
        factor.compress(model, method="random", seed=s, **options)[0](batch[0]) for s in (1, 2)
    )
    assert torch.equal(again, thin(batch[0])) and not torch.equal(other, again)


def test_the_thresholded_product_is_masked_only(model):
    thin, report = factor.compress(model, ratio=0.5, method="threshold")
    assert (report["count"] == report.macs_dense // 2).all() and (
        report.macs == report.macs_dense
    ).all()
    for line in report.itertuples():
        assert thin.get_submodule(line.layer).weight.count_nonzero() == line.count
    assert (report.objective > report.objective_magnitude).all()


def test_only_the_roles_asked_for_change(vit, batch):
    thin, report = factor.compress(vit, ratio=0.5, method="svd", roles=["fc1", "fc2"])
    assert set(report.role) == {"fc1", "fc2"} and isinstance(thin.blocks[0].attn.qkv, nn.Linear)
    assert isinstance(thin.head, nn.Linear)
    thin, report = factor.compress(vit, ratio=0.5, method="svd", roles=["head"], multiple=1)
    assert isinstance(thin.head, _layers.FactoredLinear) and thin(batch[0]).shape == (6, 3)


def test_compressing_anew_starts_from_what_is_there(vit, batch):
    x = batch[0]
    model = vit
    for ratio in (0.1, 0.2, 0.4):
        options = {"ratio": ratio, "support": "columns", "grams": grams(model, x)[0], "rounds": 1}
        model, report = factor.compress(model, **options)
        assert list(report.macs_dense) == [96 * 32, 32 * 32, 64 * 32, 32 * 64] * 2
        assert (report.macs <= (1 - ratio) * report.macs_dense).all()


@pytest.mark.parametrize("cut", [lambda m: m, lambda m: shrink.remove(m, heads_and_neurons(m))])
def test_structure_says_only_what_differs_and_rebuilds_it(model, batch, cut):
    small = cut(model)
    described = json.loads(json.dumps(_structure.structure(small)))
    if small is model:
        assert described == {"heads": {}, "layers": {}}
    before = torch.get_rng_state()
    _structure.structure(small)
    assert torch.equal(torch.get_rng_state(), before)
    same = _structure.rebuild(models.create(**recipe(model)), described)
    same.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(same.eval()(batch[0]), small(batch[0]))
    assert _structure.structure(same) == described


def test_errors_of_removal_name_what_is_known(vit):
    remove = shrink.remove
    with pytest.raises(ValueError, match=r"did you mean .*blocks.1.*heads"):
        remove(vit, {("block.1", "heads"): [0]})
    with pytest.raises(ValueError, match=r"did you mean .*blocks.0.*neurons"):
        remove(vit, {("blocks.0", "neuron"): [0]})
    with pytest.raises(ValueError, match=r"did you mean .*blocks.0.mlp.fc2"):
        remove(vit, {("blocks.0.mlp.fc", "rows"): [0]})
    for indices in ([4], [-1], [1, 1], [0.5], torch.tensor([True, False, True, True])):
        with pytest.raises(ValueError, match=r"distinct indices in \[0, 4\)"):
            remove(vit, {("blocks.0", "heads"): indices})
    for key, size in (
        (("stages.0", "width"), 32),
        (("patch_embed.steps.0", "filters"), 32),
        (("blocks.0.attn.proj", "rows"), 32),
    ):
        with pytest.raises(ValueError, match=f"all {size} would go; keep at least one"):
            remove(vit, {key: range(size)})
    with pytest.raises(ValueError, match="all blocks would go"):
        remove(vit, {("blocks.0", "block"): [0], ("blocks.1", "block"): [0]})
    with pytest.raises(ValueError, match=r"blocks.0 v: the heads would keep \[7, 8\] dimensions"):
        remove(vit, {("blocks.0", "v"): [3]})
    for drop in ({}, {("blocks.0", "heads"): []}):
        with pytest.raises(ValueError, match="removes nothing"):
            remove(vit, drop)
    assert remove(
        vit, {("blocks.0", "heads"): [], ("blocks.0", "neurons"): [1]}
    )  # one of several may be empty
    with pytest.raises(ValueError, match=r"mean of blocks.0.mlp.fc2 is \[3\], not \[64\]"):
        remove(vit, {("blocks.0", "neurons"): [1]}, means={"blocks.0.mlp.fc2": torch.zeros(3)})
    last = remove(vit, {("blocks.0.attn.proj", "rows"): range(31)})
    with pytest.raises(ValueError, match="keep at least one"):
        remove(last, {("blocks.0.attn.proj", "rows"): [31]})


def test_errors_of_compression_name_what_is_allowed(vit, batch):
    gram, _ = grams(vit, batch[0])

    def fails(match, **options):
        with pytest.raises(ValueError, match=match):
            factor.compress(vit, **{"ratio": 0.5, "grams": gram} | options)

    for ratio in (-0.1, 1, 40):
        fails("not a percentage", ratio=ratio)
    fails("changes no layer", ratio=0)
    fails("leaves nothing of blocks.0", ratio=0.999)
    fails(r"did you mean 'svd\+iht'", method="svd+ith")
    fails("did you mean 'columns'", support="column")
    fails("no sparse part to store as rows", method="threshold", support="rows")
    fails("kappa is a share", kappa=1)
    fails("give grams=scores.grams", grams=None)
    fails("unknown role", roles=["qvk"])
    fails(
        "in grams .* 'blocks.0.attn.qkv', did you mean 'blocks.1.attn.qkv'",
        grams={"blocks.1.attn.qkv": torch.eye(32)},
    )
    small = shrink.remove(vit, {("blocks.0", "neurons"): [0]})
    with pytest.raises(ValueError, match=r"gram of blocks.0.mlp.fc2 is \[64, 64\], not \[63, 63\]"):
        factor.compress(small, ratio=0.5, grams=gram)


def test_errors_of_rebuilding(vit):
    with pytest.raises(ValueError, match="no recipe"):
        del vit.recipe
        _structure.structure(vit)
    config = _layers.config(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="did you mean 'blocks.0.mlp.fc1'"):
        _structure.rebuild(vit, {"heads": {}, "layers": {"block.0.mlp.fc1": config}})
    with pytest.raises(ValueError, match="no block 'blocks.7'"):
        _structure.rebuild(vit, {"heads": {"blocks.7": 1}, "layers": {}})


@pytest.mark.parametrize("part, kind", [("attn", "heads"), ("mlp", "neurons")])
def test_the_norm_goes_that_nothing_reads_any_more(any_model, part, kind, batch):
    view = models.view(any_model)
    block = view.blocks[-1]
    size = view.units([kind])[block.name, kind]
    norm = f"{block.name}.norm{1 if kind == 'heads' else 2}."
    small = shrink.remove(any_model, {(block.name, kind): range(size)})
    inside = any_model.get_submodule(block.name)
    comes_last = inside.norm1 in view.residual_writers(block)  # it works on the last bias
    assert any(name.startswith(norm) for name, _ in small.named_parameters()) == comes_last
    small.train()(batch[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.parametrize(
    ("name", "filters"),
    [
        ("vit_tiny_r_s16_p8_224", []),  # standardised weights, which no filter leaves alone
        ("vit_small_resnet26d_224", ["conv1.0", "conv1.3"]),
    ],
)
@torch.no_grad()
def test_filters_of_hybrid_stems_are_offered_where_they_can_go(name, filters):
    options = {"patch_size": 1} if "r_s16" in name else {}
    model = models.create(name, num_classes=3, image_size=32, depth=1, **options).eval()
    units = models.view(model).units(["filters"])
    keys = [(f"patch_embed.backbone.{name}", "filters") for name in filters]
    assert list(units) == keys
    x = torch.randn(2, 3, 32, 32)
    for key in keys:
        dead, norm = copy.deepcopy(model), anatomy.norm_after(model, key[0])
        for part in (f"{key[0]}.weight", f"{norm}.weight", f"{norm}.bias"):
            dead.get_parameter(part)[:5] = 0
        torch.testing.assert_close(shrink.remove(model, {key: range(5)})(x), dead(x))
    shrink.remove(model, {("blocks.0", "heads"): [0]})(x)


@pytest.mark.parametrize("kind", ["qk", "v"])
def test_the_fused_kernel_of_cpus_takes_dimensions_that_were_cut_alone(vit, batch, kind):
    halves = [head * 8 + number for head in range(4) for number in range(4)]
    small = shrink.remove(vit, {(block.name, kind): halves for block in models.view(vit).blocks})
    expected = fuse(small, False)(batch[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.testing.assert_close(fuse(small, True)(batch[0]), expected)
    calls = {event.key for event in profile.key_averages()}
    assert any("flash_attention_for_cpu" in call for call in calls), calls


@pytest.mark.parametrize("of_proj", [None, 3])
def test_heads_have_no_more_dimensions_than_their_qkv_has_ranks(
    any_model, batch, tmp_path, of_proj
):
    view = models.view(any_model)
    rank = 3
    ranks = dict.fromkeys(view.linears(["qkv"]), rank)
    if of_proj:
        ranks |= dict.fromkeys(view.linears(["proj"]), of_proj)
    thin = factor.factorise(any_model, ranks)
    small = factor.narrow_heads(thin)
    torch.testing.assert_close(small(batch[0]), thin(batch[0]), rtol=1e-4, atol=1e-5)
    for block in models.view(small).blocks:
        before = models.view(thin).block(block.name)
        can_turn = not before.normalises_queries
        takes = getattr(before.attn, "v_bias", None) is None and before.attn.proj.bias is not None
        assert block.qk_dim == (rank if can_turn else before.qk_dim)
        assert block.head_dim == (rank if takes else before.head_dim)
        assert block.attn.scale == before.attn.scale if hasattr(before.attn, "scale") else True
        assert not can_turn or block.attn.qkv.first.weight.equal(before.attn.qkv.first.weight)
    table = cost.breakdown(small).groupby("role").macs.sum()
    whole = cost.breakdown(thin).groupby("role").macs.sum()
    if all(not each.normalises_queries for each in models.view(thin).blocks):
        # Products of attention fall as their vectors do.
        sizes = {block.qk_dim for block in models.view(thin).blocks}
        assert len(sizes) > 1 or table["qk"] == whole["qk"] * rank / sizes.pop()
    assert cost.macs(small) == cost._torch(small, batch[0][:1])
    checkpoint.save(small, tmp_path / "small")
    assert checkpoint.load(tmp_path / "small")(batch[0]).equal(small(batch[0]))


def test_heads_of_a_plain_or_wide_qkv_stay_as_they_are(vit, batch):
    wide = factor.factorise(vit, {"blocks.0.attn.qkv": models.view(vit).blocks[0].head_dim})
    for model in (vit, wide):
        assert factor.narrow_heads(model)(batch[0]).equal(model(batch[0]))
        assert cost.macs(factor.narrow_heads(model)) == cost.macs(model)
