"""Laws of pruning: sparsity is exact and stays, masked units are units times zero, schedules have ends."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import swa_utils

from vitlab import models
from vitlab.pruning import masks, prune, scores, shrink
from vitlab.report import inside


def magnitudes(model):
    return {f"{n}.weight": m.weight.detach().abs() for n, m in models.view(model).linears().items()}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("per", ["global", "layer", "row"])
def test_sparsity_is_exact(model, sparsity, per):
    keep = masks.keep_largest(magnitudes(model), sparsity=sparsity, per=per)
    before = copy.deepcopy(model.state_dict())
    dropped = sum(int((~mask).sum()) for mask in keep.values())
    total = sum(mask.numel() for mask in keep.values())
    prune.apply(model, keep)
    assert prune.sparsity(model, keep) == dropped / total
    if per == "global":
        assert dropped == round(sparsity * total)
    for (
        name,
        value,
    ) in model.state_dict().items():  # what stays is bit-equal, what was not named too
        assert value.equal(before[name] * keep[name] if name in keep else before[name])


def test_sparsity_counts_zeros_by_hand():
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    keep = {"weight": layer.weight > 1}
    assert prune.sparsity(layer, keep) == 1 / 8
    prune.apply(layer, keep)
    assert prune.sparsity(layer, keep) == 0.25


def test_a_masked_model_is_a_copy_with_zeros(model):
    keep = masks.keep_largest(magnitudes(model), sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    cut = prune.masked(model, keep)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    prune.apply(model, keep)
    assert all(value.equal(model.state_dict()[name]) for name, value in cut.state_dict().items())
    assert prune.sparsity(cut, keep) == prune.sparsity(model, keep) > 0.49
    assert cut.recipe == model.recipe
    with pytest.raises(ValueError, match="a cut of nothing"):
        prune.masked(model, {name: mask | True for name, mask in keep.items()})


def test_apply_refuses_what_does_not_fit(vit):
    name = "blocks.0.mlp.fc1.weight"
    shape = vit.get_parameter(name).shape
    half = torch.arange(shape.numel()).view(shape) % 2 == 0
    for wrong, message in (
        ({name.replace("fc1", "fc0"): half}, "did you mean 'blocks.0.mlp.fc"),
        ({name: half.T}, f"{name} must be bool of shape"),
        ({name: half.float()}, "got torch.float32"),
        ({name: half | True}, "a cut of nothing"),
        ({name: half & False}, "a cut of everything"),
        ({}, "a cut of everything"),
    ):
        before = copy.deepcopy(vit.state_dict())
        with pytest.raises(ValueError, match=message):
            prune.apply(vit, wrong)
        assert all(before[name].equal(value) for name, value in vit.state_dict().items())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def train(model, optimizer, batch, *, steps, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_holder_keeps_zeros_through_training(model, batch, make):
    optimizer = make(model.parameters())
    train(model, optimizer, batch, steps=2)  # moments of weights that die now
    keep = masks.keep_largest(magnitudes(model), sparsity=0.5)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    holder = prune.MaskHolder(model, keep, optimizer)
    for name, mask in keep.items():
        for moment in optimizer.state[model.get_parameter(name)].values():
            if moment.shape == mask.shape:
                assert not moment[~mask].any() and moment[mask].any()

    def after():
        average.update_parameters(model)
        holder.step(average.module)
        holder.check(average.module)

    exact = prune.sparsity(model, keep)
    alive = {name: model.get_parameter(name)[mask].clone() for name, mask in keep.items()}
    train(model, optimizer, batch, steps=5, after=after)
    assert prune.sparsity(model, keep) == prune.sparsity(average.module, keep) == exact
    assert all(
        not model.get_parameter(name)[mask].equal(alive[name]) for name, mask in keep.items()
    )


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masked_gradients_alone_lose_the_sparsity(vit, batch, make):
    """Why MaskHolder zeroes weights after each step: moments from before the cut revive dead weights."""
    optimizer = make(vit.parameters())
    train(vit, optimizer, batch, steps=2)
    keep = masks.keep_largest(magnitudes(vit), sparsity=0.5)
    prune.apply(vit, keep)
    for name, mask in keep.items():
        vit.get_parameter(name).register_hook(lambda gradient, mask=mask: gradient * mask)
    train(vit, optimizer, batch, steps=5)
    assert prune.sparsity(vit, keep) < 0.01


def test_check_names_the_parameter(vit):
    keep = masks.keep_largest(magnitudes(vit), sparsity=0.5)
    holder = prune.MaskHolder(vit, keep, torch.optim.SGD(vit.parameters()))
    holder.check()
    name = "blocks.1.attn.proj.weight"
    with torch.no_grad():
        vit.get_parameter(name)[~keep[name]] = 1
    with pytest.raises(RuntimeError, match=f"pruned weights of {name} are not zero"):
        holder.check()
    holder.step()
    holder.check()
    other = copy.deepcopy(vit)
    with torch.no_grad():
        other.get_parameter(name)[~keep[name]] = (
            torch.nan
        )  # NaN times zero is no zero: step cannot hide it
    holder.step(other)
    with pytest.raises(RuntimeError, match=name):
        holder.check(other)


def scaled(model, layer, factors, x, *, output=False):
    """Logits with the layer's input (or output) features multiplied by factors."""
    if output:
        handle = layer.register_forward_hook(lambda _, arguments, result: result * factors)
    else:
        handle = layer.register_forward_pre_hook(lambda _, arguments: arguments[0] * factors)
    with torch.no_grad():
        logits = model(x)
    handle.remove()
    return logits


def masked_logits(model, keep, x):
    with torch.no_grad():
        return prune.masked(model, keep)(x)


def test_masked_rows_are_rows_times_zero(model, batch):
    """With the bias: a masked fc1 row that kept it would still emit GELU(b)."""
    for name, layer in models.view(model).linears().items():
        keep = torch.arange(layer.out_features) % 3 > 0
        mask = prune.rows_to_masks(model, {name: keep})
        assert set(mask) == {f"{name}.{part}" for part, _ in layer.named_parameters()}
        expected = scaled(model, layer, keep, batch[0], output=True)
        torch.testing.assert_close(masked_logits(model, mask, batch[0]), expected)
        assert not torch.allclose(expected, model(batch[0]))


@pytest.mark.parametrize(
    ("convolution", "norm"), [(0, 2), (4, 6), (8, 9)]
)  # the first two pool in between
def test_masked_filters_take_their_batch_norm_with_them(model, batch, convolution, norm):
    assert isinstance(model.patch_embed.steps[convolution], nn.Conv2d)
    norm = model.patch_embed.steps[norm]
    norm.running_mean.fill_(0.3)
    keep = torch.arange(norm.num_features) % 3 > 0
    mask = prune.rows_to_masks(model, {f"patch_embed.steps.{convolution}": keep})
    expected = scaled(model, norm, keep[:, None, None], batch[0], output=True)
    torch.testing.assert_close(masked_logits(model, mask, batch[0]), expected)


@pytest.mark.parametrize("dropped", [[0], [2], [0, 1]])
def test_masked_units_are_units_times_zero(model, batch, dropped):
    for block in models.view(model).blocks:
        kept = torch.ones(block.num_heads)
        kept[dropped] = 0
        mask = prune.units_to_masks(model, {(block.name, "heads"): dropped})
        expected = scaled(model, block.attn.proj, kept.repeat_interleave(block.head_dim), batch[0])
        torch.testing.assert_close(masked_logits(model, mask, batch[0]), expected)
        kept = torch.ones(block.neurons)
        kept[dropped] = 0
        mask = prune.units_to_masks(model, {(block.name, "neurons"): torch.tensor(dropped)})
        torch.testing.assert_close(
            masked_logits(model, mask, batch[0]), scaled(model, block.mlp.fc2, kept, batch[0])
        )


@pytest.mark.parametrize("dropped", [[0], [2, 5], [1, 8, 9, 17]])
def test_masked_head_dimensions_are_dimensions_times_zero(model, batch, dropped):
    for block in models.view(model).blocks:
        size = block.num_heads * block.head_dim
        kept = torch.ones(3, size)
        kept[2, dropped] = 0
        mask = prune.units_to_masks(model, {(block.name, "v"): dropped})
        assert set(mask) == {
            f"{block.name}.attn.{part}" for part in ("qkv.weight", "qkv.bias", "proj.weight")
        }
        found = masked_logits(model, mask, batch[0])
        torch.testing.assert_close(found, scaled(model, block.attn.proj, kept[2], batch[0]))
        torch.testing.assert_close(
            found, scaled(model, block.attn.qkv, kept.flatten(), batch[0], output=True)
        )
        mask = prune.units_to_masks(model, {(block.name, "qk"): torch.tensor(dropped)})
        assert set(mask) == {f"{block.name}.attn.{part}" for part in ("qkv.weight", "qkv.bias")}
        found = masked_logits(model, mask, batch[0])
        for gone in ([0], [1], [0, 1]):  # of a product, one factor's zero is enough
            kept = torch.ones(3, size)
            kept[torch.tensor(gone)[:, None], dropped] = 0
            expected = scaled(model, block.attn.qkv, kept.flatten(), batch[0], output=True)
            torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, model(batch[0]))


def test_all_dimensions_of_a_head_are_the_head(model):
    block = models.view(model).blocks[1]
    whole = prune.units_to_masks(model, {(block.name, "heads"): [1]})
    dims = range(block.head_dim, 2 * block.head_dim)
    parts = prune.units_to_masks(model, {(block.name, "qk"): dims, (block.name, "v"): dims})
    assert (
        all(whole[name].equal(mask) for name, mask in parts.items())
        and whole.keys() == parts.keys()
    )


def test_queries_and_values_may_differ_in_size(vit):
    attn = vit.blocks[0].attn  # 4 heads with 3 dimensions of q and k, 8 of v
    attn.qkv = nn.Linear(32, 12 + 12 + 32)
    mask = prune.units_to_masks(vit, {("blocks.0", "qk"): [4], ("blocks.0", "v"): [31]})
    assert (~mask["blocks.0.attn.qkv.bias"]).nonzero().flatten().tolist() == [4, 12 + 4, 24 + 31]
    mask = prune.units_to_masks(vit, {("blocks.0", "heads"): [1]})
    gone = [*range(3, 6), *range(15, 18), *range(32, 40)]
    assert (~mask["blocks.0.attn.qkv.bias"]).nonzero().flatten().tolist() == gone
    assert (~mask["blocks.0.attn.proj.weight"]).any(0).nonzero().flatten().tolist() == list(
        range(8, 16)
    )


def test_all_units_of_a_block_can_go_beside_others(model, batch):
    first, second = models.view(model).blocks[:2]
    drop = {(first.name, "heads"): range(first.num_heads), (second.name, "heads"): [0]}
    found = masked_logits(model, prune.units_to_masks(model, drop), batch[0])
    handle = first.attn.proj.register_forward_pre_hook(lambda _, arguments: arguments[0] * 0)
    kept = torch.ones(second.num_heads)
    kept[0] = 0
    expected = scaled(model, second.attn.proj, kept.repeat_interleave(second.head_dim), batch[0])
    handle.remove()
    torch.testing.assert_close(found, expected)


def test_units_compose_and_count_by_hand(vit):
    # Width 32, 4 heads of 8, 64 neurons.
    drop = {
        ("blocks.0", "heads"): [1],
        ("blocks.0", "neurons"): [0, 5],
        ("blocks.0.mlp.fc2", "rows"): [3],
    }
    mask = prune.units_to_masks(vit, drop)
    zeros = {name.removeprefix("blocks.0."): int((~keep).sum()) for name, keep in mask.items()}
    assert zeros == {
        "attn.qkv.weight": 3 * 8 * 32,
        "attn.qkv.bias": 3 * 8,
        "attn.proj.weight": 32 * 8,
        "mlp.fc1.weight": 2 * 32,
        "mlp.fc1.bias": 2,
        "mlp.fc2.weight": 2 * 32 + 64 - 2,  # two columns and a row cross in two weights
        "mlp.fc2.bias": 1,
    }
    assert not mask["blocks.0.attn.qkv.bias"].view(3, 4, 8)[:, 1].any()
    chosen = masks.keep_largest(
        {("blocks.0", "heads"): torch.tensor([3.0, 1.0, 2.0, 4.0])}, count=1
    )
    again = prune.units_to_masks(vit, masks.dropped(chosen))
    assert again["blocks.0.attn.proj.weight"].equal(mask["blocks.0.attn.proj.weight"])


def test_units_and_rows_refuse_what_is_not_there(vit):
    for drop, message in (
        ({("blocks.7", "heads"): [0]}, "no block 'blocks.7' in this model, did you mean"),
        ({("blocks.0", "head"): [0]}, "unknown kind of unit 'head', did you mean 'heads'"),
        (
            {("blocks.0", "heads"): [4]},
            r"there are 4 heads of blocks.0, numbered from 0; got \[4\]",
        ),
        ({("blocks.0", "neurons"): [-1]}, "there are 64 neurons of blocks.0"),
        ({("blocks.0", "qk"): [32]}, "there are 32 qk of blocks.0"),
        ({("blocks.1", "v"): [-1]}, "there are 32 v of blocks.1"),
        ({("blocks.0.mlp.fc3", "rows"): [0]}, "unknown layer 'blocks.0.mlp.fc3'"),
    ):
        with pytest.raises(ValueError, match=message):
            prune.units_to_masks(vit, drop)
    for rows, message in (
        ({"blocks.0.mlp.fc1": torch.ones(3) > 0}, "needs a bool mask of its 64 rows"),
        (
            {"blocks.0.mlp.fc1": torch.ones(64)},
            "needs a bool mask of its 64 rows; got torch.float32",
        ),
        ({"blocks.0.mlp": torch.ones(64) > 0}, "is not one weight and a bias"),
    ):
        with pytest.raises(ValueError, match=message):
            prune.rows_to_masks(vit, rows)


@pytest.mark.parametrize("kind", ["heads", "qk", "v"])
def test_a_block_whose_heads_are_gone_has_none_to_mask(vit, kind):
    small = shrink.remove(vit, {("blocks.0", "heads"): range(4)})
    with pytest.raises(ValueError, match=f"there are 0 {kind} of blocks.0"):
        prune.units_to_masks(small, {("blocks.0", kind): [0]})


def test_cubic_schedule():
    path = prune.shares("cubic", 10, final=0.8, initial=0.4)
    assert path[4] == pytest.approx(0.8 - 0.4 / 8)  # half way, by hand
    assert path[-1] == 0.8
    path = [0.1, *prune.shares("cubic", 20, final=0.9, initial=0.1)]
    steps = [b - a for a, b in zip(path, path[1:], strict=False)]
    assert all(a > b > 0 for a, b in zip(steps, steps[1:], strict=False))  # rises ever more slowly
    with pytest.raises(ValueError, match="shares .* not percentages; got 0.0 and 90"):
        prune.shares("cubic", 10, final=90)
    with pytest.raises(ValueError, match="at least one step"):
        prune.shares("cubic", 0, final=0.9)


def test_shares_of_a_schedule():
    assert prune.shares("cubic", 4, final=0.8) == pytest.approx(
        [0.8 * (1 - x**3) for x in (0.75, 0.5, 0.25, 0)]
    )
    assert prune.shares("iterative", 3, final=0.875) == pytest.approx(
        [0.5, 0.75, 0.875]
    )  # each takes half of the rest
    assert prune.shares("one-shot", 4, final=0.7) == [0.7]
    for kind in ("cubic", "iterative"):
        assert prune.shares(kind, 1, final=0.7) == [0.7]  # one-shot
        path = prune.shares(kind, 9, final=0.7, initial=0.1)
        assert path == sorted(set(path)) and path[0] > 0.1 and path[-1] == 0.7 and len(path) == 9
        for wrong, message in (
            (dict(steps=0, final=0.5), "at least one step"),
            (dict(steps=2, final=50), "percentages"),
        ):
            with pytest.raises(ValueError, match=message):
                prune.shares(kind, **wrong)
    with pytest.raises(ValueError, match="'cubed', did you mean 'cubic'"):
        prune.shares("cubed", 3, final=0.5)


@pytest.mark.parametrize("per", ["global", "layer", "row"])
def test_going_further_keeps_the_dead_dead(model, per):
    parameters, dead = dict(model.named_parameters()), None
    for sparsity in (0.25, 0.5, 0.875):
        generator = torch.Generator().manual_seed(int(100 * sparsity))
        saliency = {
            name: torch.rand(score.shape, generator=generator)
            for name, score in magnitudes(model).items()
        }
        keep = prune.keep_more_zero(model, saliency, sparsity=sparsity, per=per)
        fresh = masks.keep_largest(saliency, sparsity=sparsity, per=per)
        count = [sum(int(mask.sum()) for mask in found.values()) for found in (keep, fresh)]
        assert count[0] == count[1]  # exact, whatever was dead
        if dead is None:
            assert all(
                keep[name].equal(mask) for name, mask in fresh.items()
            )  # nothing dead: the same as afresh
        else:
            assert not any((mask & dead[name]).any() for name, mask in keep.items())
        prune.apply(model, keep)
        dead = {name: parameters[name] == 0 for name in keep}
    with pytest.raises(
        ValueError,
        match="would come back: ask for a higher sparsity than before",
    ):
        prune.keep_more_zero(model, saliency, sparsity=0.5, per=per)


def test_further_refuses_scores_of_another_model(vit, swin):
    with pytest.raises(ValueError, match="unknown parameter 'layers.0"):
        prune.keep_more_zero(vit, magnitudes(swin), sparsity=0.5)


def test_rows_go_step_by_step_until_as_many_are_left(model, batch):
    total, before = sum(m.out_features for m in models.view(model).linears().values()), model
    for share in (0.3, 0.6, 0.9):
        left = total - round(share * total)
        for criterion in ("fisher", "random"):  # random does not know which rows are gone
            found = scores.rows(before, [batch], criteria=criterion)[criterion]
            small = shrink.remove(before, prune.keep_fewer_rows(before, found, left=left))
            layers = models.view(small).linears().values()
            assert sum(len(getattr(m, "rows", range(m.out_features))) for m in layers) == left
            assert min(len(getattr(m, "rows", range(m.out_features))) for m in layers) >= 1
        before = small
    with pytest.raises(
        ValueError, match=f"{left} rows are left already; ask for fewer than {left}"
    ):
        prune.keep_fewer_rows(small, scores.rows(small, criteria="random")["random"], left=left)
    with pytest.raises(ValueError, match="rows; got .* scores of another model"):
        prune.keep_fewer_rows(small, scores.rows(model, criteria="random")["random"], left=9)
    flat = {"blocks.0.mlp.fc1": torch.arange(64.0)}
    vit = models.create("conv_vit", num_classes=3, embed_dim=32, depth=1)
    assert prune.keep_fewer_rows(vit, flat, left=61) == {("blocks.0.mlp.fc1", "rows"): [0, 1, 2]}


def test_histogram_counts_every_weight_once_and_zeros_apart(model):
    keep = {
        f"{name}.weight": torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0))
        > 0.5
        for name, layer in models.view(model).linears().items()
    }
    cut = copy.deepcopy(model)
    prune.apply(cut, keep)
    table = inside.weights({"unpruned": model, "pruned": cut}, keep, bins=21)
    total = sum(mask.numel() for mask in keep.values())
    dead = sum(int((~mask).sum()) for mask in keep.values())
    for stage, zeros in (("unpruned", 0), ("pruned", dead)):
        whole = table[(table.stage == stage) & (table.role == "all")]
        assert whole.zeros.unique().tolist() == [zeros] and whole["count"].sum() == total - zeros
        roles = table[(table.stage == stage) & (table.role != "all")]
        assert roles["count"].sum() == total - zeros
        assert roles.drop_duplicates("role").zeros.sum() == zeros
    assert table.left.min() == -table.right.max()
