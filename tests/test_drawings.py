import copy
import io
import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import toy
from timm.models.swin_transformer import window_partition
from torch.nn.functional import pad

from vitlab import models
from vitlab.evaluation import bench
from vitlab.models import _layers
from vitlab.pruning import factor, lowrank, masks, prune, scores, shrink
from vitlab.report import drawings, inside, plots
from vitlab.training import data

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    matplotlib.pyplot.close("all")


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def cells(frame):
    return "".join(frame.cells)


@pytest.fixture
def split():
    """A data.Split of nine images of noise, 16 px."""
    store = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    return data.Split(
        store, np.arange(3, 12), torch.arange(9) % 3, 16, 16, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)
    )


# -- what a cut leaves of a layer


@pytest.mark.parametrize("m, n, sparsity", [(1, 1, 0), (5, 7, 0.5), (130, 140, 0.9)])
def test_a_picture_counts_what_the_mask_keeps(m, n, sparsity):
    weight = torch.randn(m, n)
    weight.view(-1)[0] = 0  # kept by the mask, whatever its value
    keep = masks.keep_largest(torch.rand(m, n), sparsity=sparsity)
    told = inside.layers(_layers.linear(weight), keep=keep)
    shown = keep[:128, :128]
    assert (told.part == "W").all() and told.row.tolist() == list(range(min(m, 128)))
    assert len(cells(told).replace(".", "")) == shown.sum() and len(cells(told)) == shown.numel()
    assert [[letter != "." for letter in line] for line in told.cells] == shown.tolist()
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(told.to_csv(index=False))), told)


def test_a_picture_by_hand():
    layer = _layers.linear(torch.tensor([[0.08, -0.9], [0.0, 0.45]]))
    assert inside.layers(layer).cells.tolist() == [
        "bi",
        ".i",
    ]  # of the 99th percentile, which of four is the third
    wide = inside.layers(layer, rows=(3, [0, 2]), columns=(4, [1, 3]))
    assert wide.cells.tolist() == ["xbxi", "xxxx", "x.xi"]
    rows = _layers.RowLinear(2, 3, rows=[1])
    assert [set(line) == {"x"} for line in inside.layers(rows).cells] == [True, False, True]


@pytest.mark.parametrize("support, count", [("entries", 9), ("columns", 2), ("rows", 3)])
def test_a_picture_shows_every_part(support, count):
    weight, gram = torch.randn(8, 6), torch.eye(6) + torch.ones(6, 6)
    fit = lowrank.low_rank_plus_sparse(weight, gram, 2, count, support=support)
    both = _layers.low_rank_sparse(fit.u, fit.v, sparse=fit.sparse, mask=fit.mask, support=support)
    told = dict(
        list(inside.layers(both, columns=(7, [0, 1, 2, 3, 4, 6])).groupby("part", sort=False))
    )
    assert list(told) == ["U", "V", "S"] and [len(part) for part in told.values()] == [8, 2, 8]
    assert len(cells(told["S"]).replace(".", "").replace("x", "")) == fit.mask.sum()
    assert [part.cells.map(len).unique().tolist() for part in told.values()] == [[2], [7], [7]]
    assert all(line[5] == "x" for part in ("V", "S") for line in told[part].cells)
    thin = _layers.factored(fit.u, fit.v)
    assert inside.layers(thin).part.unique().tolist() == ["U", "V"]


def test_cuts_are_drawn_cell_by_cell():
    plain = _layers.linear(torch.randn(40, 30))
    keep = torch.zeros(40, 30, dtype=torch.bool)
    keep[:, 3:8] = True
    masked = inside.layers(plain, keep=keep).assign(
        method="unstructured", target=0.9, layer="a.fc1"
    )
    gone = inside.layers(plain, rows=(60, [*range(20), *range(40, 60)])).assign(
        method="rows", layer="a.fc1"
    )
    thin = inside.layers(_layers.factored(torch.randn(40, 4), torch.randn(4, 30))).assign(
        method="svd", layer="b.fc1"
    )
    figure = drawings.layers(pd.concat([masked, gone, thin]))
    (ax,) = figure.axes
    pictures = [image.get_array() for image in ax.images]
    assert [picture.shape[:2] for picture in pictures] == [(40, 30), (60, 30), (40, 4), (4, 30)]
    assert (pictures[0][..., :3] < 1).any(-1).sum() == keep.sum()
    crossed = [patch for patch in ax.patches if patch.get_hatch()]
    assert [(patch.get_y(), patch.get_height()) for patch in crossed] == [(20, 20)]
    words = [text.get_text() for text in ax.texts]
    assert {"weights, 90%", "rows", "SVD, equal shares", "×", "U, 40 × 4"} <= set(words)
    with pytest.raises(ValueError, match="no layer to draw"):
        drawings.layers(masked.head(0))


def test_units_left_are_those_of_the_whole_model(model, batch):
    found = scores.units(model, [batch], criteria=["magnitude"], kinds=["heads"])["magnitude"]
    alive, small = {unit: list(range(len(score))) for unit, score in found.items()}, model
    for _ in range(2):  # the second cut counts what the first has left
        now = scores.units(small, [batch], criteria=["magnitude"], kinds=["heads"])["magnitude"]
        gone = masks.dropped(masks.keep_largest(now, count=2, floor=1))
        small, alive = shrink.remove(small, gone), masks.remaining(alive, gone)
    table = inside.units(found, alive)
    assert (~table.kept).sum() == 4
    for block in models.view(small).blocks:
        own = table[(table.block == block.name) & table.kept]
        whole = models.view(model).block(block.name)
        assert len(own) == block.num_heads
        columns = [unit * whole.head_dim + i for unit in own.unit for i in range(whole.head_dim)]
        assert torch.equal(block.attn.proj.weight, whole.attn.proj.weight[:, columns])
    ax = drawings.heads(table.rename(columns={"unit": "head"}))
    assert len(ax.lines) == 4, "a cross each"
    with pytest.raises(ValueError, match="heads of .* are 0 to .*; got"):
        inside.units(found, {unit: [9] for unit in found})


# -- distributions


def test_what_survives_is_counted_apart_and_magnitude_has_its_threshold(model):
    whole = {
        f"{name}.weight": layer.weight.detach()
        for name, layer in models.view(model).linears().items()
    }
    cut, sizes = copy.deepcopy(model), {name: weight.abs() for name, weight in whole.items()}
    keep = masks.keep_largest(sizes, sparsity=0.7)
    prune.apply(cut, keep)
    by_role = inside.weights({"unpruned": model, "pruned": cut}, keep)
    by_layer = inside.weights({"unpruned": model, "pruned": cut}, keep, by="layer")
    kept = sum(int(mask.sum()) for mask in keep.values())
    for frame in (by_role[by_role.role == "all"], by_layer):
        assert (
            frame[frame.stage == "unpruned"].survivors.sum()
            == kept
            == frame[frame.stage == "pruned"]["count"].sum()
        )
        assert frame.threshold.nunique() == 1
        alive = torch.cat([sizes[name][keep[name]] for name in keep])
        assert (
            alive.min()
            > frame.threshold.iloc[0]
            == max(sizes[name][~keep[name]].max() for name in keep)
        )
    pruned = by_layer[by_layer.stage == "pruned"].groupby("layer", sort=False)
    totals = pruned.agg(count=("count", "sum"), zeros=("zeros", "first"))
    assert totals["count"].tolist() == [int(mask.sum()) for mask in keep.values()]
    assert totals.sum(axis=1).tolist() == [mask.numel() for mask in keep.values()]
    with pytest.raises(ValueError, match="unknown by 'block'"):
        inside.weights({"unpruned": model}, keep, by="block")
    figure = drawings.weight_violins(by_layer.assign(method="unstructured"))
    view = models.view(model)
    roles = [role for role in ("qkv", "proj", "fc1", "fc2") if role in set(by_layer.role)]
    assert [ax.get_ylabel() for ax in figure.axes] == roles
    assert [len(ax.collections) for ax in figure.axes] == [2 * len(view.blocks)] * len(roles)
    assert all(len(ax.lines) == 2 for ax in figure.axes)
    whole_model = by_role[by_role.role == "all"].assign(method="unstructured", target=0.7)
    lines = [line for ax in drawings.weight_histograms(whole_model).axes for line in ax.lines]
    assert sorted({round(line.get_xdata()[0], 6) for line in lines}) == pytest.approx(
        [-by_role.threshold[0], by_role.threshold[0]], abs=1e-5
    )


# -- spectra


@pytest.mark.parametrize("m, n", [(1, 1), (4, 9), (9, 4), (6, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_singular_values_are_torchs_and_say_what_an_svd_loses(m, n, weighted):
    torch.manual_seed(m)
    weight, root = (
        torch.randn(m, n, dtype=torch.float64),
        torch.randn(n, 2 * n, dtype=torch.float64),
    )
    gram = root @ root.T if weighted else None
    found = lowrank.spectrum(weight, gram)
    seen = weight @ torch.linalg.cholesky(gram) if weighted else weight
    torch.testing.assert_close(found, torch.linalg.svdvals(seen))
    rank = max(1, min(m, n) // 2)
    u, v = lowrank.svd(weight, rank, gram=gram)
    assert lowrank.objective(weight, u @ v, gram) == pytest.approx(
        found[rank:].square().sum().item(), abs=1e-8
    )


def test_energy_ends_at_one_and_break_even_is_the_closed_form(model, batch):
    frame = inside.spectra(model, scores.grams(model, [batch]))
    linears = models.view(model).linears()
    assert frame.layer.unique().tolist() == list(linears)
    for name, own in frame.groupby("layer", sort=False):
        m, n = linears[name].weight.shape
        assert (
            own["rank"].iloc[0] == 1 and own["rank"].iloc[-1] == min(m, n) and own["rank"].is_unique
        )
        assert own.energy.iloc[-1] == pytest.approx(1) and own.energy.is_monotonic_increasing
        assert own.sigma.is_monotonic_decreasing and own.break_even.unique().tolist() == [
            m * n / (m + n)
        ]
    speed = frame.assign(speedup_q1=np.where(frame["rank"] <= 4, 1.2, 0.9))
    measured = frame.assign(faster=frame.layer.map(bench.break_even(speed)))
    figure = drawings.spectra(measured)
    roles = sorted(frame.role.unique(), key=["merge", "qkv", "proj", "fc1", "fc2"].index)
    assert titles(figure) == roles
    assert {text.get_text() for text in figure.axes[-1].texts} == {"first block", "last block"}
    for role, ax in zip(roles, figure.axes, strict=True):
        own = frame[frame.role == role]
        marks = [line for line in ax.lines if line.get_marker() == "o"]
        dashed = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
        assert len(marks) == min(own.layer.nunique(), 2)
        assert len(ax.collections) == (own.layer.nunique() > 1)  # the band of all
        assert dashed == pytest.approx(
            sorted(set((own.break_even / own[["m", "n"]].min(axis=1)).round(6))), abs=1e-5
        )
    assert figure.axes[0].get_yscale() == "log"


# -- kept width


def test_kept_width_is_the_models_own(model, batch):
    view = models.view(model)
    whole = inside.widths(model, model)
    assert (whole.kept == whole.whole).all() and not whole.kind.str.startswith("rank").any()
    block = view.blocks[-1]
    small = shrink.remove(model, {(block.name, "heads"): [0], (block.name, "neurons"): [0, 1, 2]})
    small = factor.factorise(small, {f"{block.name}.mlp.fc1": 3})
    table = inside.widths(model, small).set_index(["where", "kind"])
    after = models.view(small)
    for each in after.blocks:
        assert (
            table.kept[each.name, "heads"] == each.num_heads
            and table.kept[each.name, "neurons"] == each.neurons
        )
        assert (
            table.kept[each.name, "v"] == each.head_dim
            and table.kept[each.name, "qk"] == each.qk_dim
        )
    assert table.kept[block.name, "rank of fc1"] == 3
    assert table.kept[block.name, "rank of fc2"] == min(
        after.block(block.name).mlp.fc2.weight.shape
    )
    for (where, kind), count in after.units(["width", "filters"]).items():
        assert table.kept[where, kind] == count == table.whole[where, kind]
    names = list(dict.fromkeys(where for where, _ in table.index))
    order = [name for name in names if name in {each.name for each in view.blocks}]
    assert order == [each.name for each in view.blocks]
    without = shrink.remove(model, {(block.name, "block"): [0]})
    left = inside.widths(model, without).set_index(["where", "kind"]).kept
    assert left[block.name, "heads"] == left[block.name, "neurons"] == 0
    ax = drawings.widths(table.reset_index())
    kinds = [tick.get_text() for tick in ax.get_xticklabels()]
    assert {"heads", "neurons", "rank of fc1"} <= set(kinds) and "width" not in kinds
    share = 100 * (block.num_heads - 1) / block.num_heads
    assert f"{share:.0f}" in [text.get_text() for text in ax.texts]


# -- attention


def test_attention_sums_to_one_and_is_what_the_model_computes(any_model, batch):
    x, _ = batch
    any_model.train()
    found = inside._attention_weights(any_model, x)
    assert any_model.training and list(found) == [
        block.name for block in models.view(any_model).blocks
    ]
    seen, hooks = {}, []
    for block in models.view(any_model).blocks:
        weights = found[block.name]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        hooks.append(
            block.attn.qkv.register_forward_hook(lambda m, i, y, n=block.name: seen.update({n: y}))
        )
        hooks.append(
            block.attn.proj.register_forward_pre_hook(
                lambda m, i, n=block.name: seen.update({n + "y": i[0]})
            )
        )
    any_model.eval()(x)
    for block in models.view(any_model).blocks:
        if getattr(block.attn, "v_bias", None) is not None:
            continue  # SwinV2 shifts values outside of qkv
        values = (
            seen[block.name].chunk(3, -1)[2].unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
        )
        torch.testing.assert_close(
            (found[block.name] @ values).transpose(1, 2).flatten(2), seen[block.name + "y"]
        )


def test_attention_maps_lie_on_the_image(any_model, batch):
    x, _ = batch
    grid = any_model.patch_embed.grid_size
    for name, seen in inside._attention_maps(any_model, x).items():
        stage = models.view(any_model).block(name).stage
        assert seen.shape == (len(x), *(side >> stage for side in grid)), name
        if getattr(any_model, "num_prefix_tokens", 0) == 0:  # all that is given is received
            torch.testing.assert_close(seen.mean((1, 2)), torch.ones(len(x)))


@pytest.mark.parametrize("side", [4, 5])  # of its own size, and of another, padded to windows
def test_windows_are_put_back_where_they_were(monkeypatch, side):
    swin = toy("conv_swin", embed_dim=24, depths=(2,), num_heads=(3,), window_size=2)
    name = "layers.0.blocks.1"
    (h, w), shift = swin.get_submodule(name).window_size, swin.get_submodule(name).shift_size
    assert any(shift)
    known = torch.rand(5, side, side)
    shifted = pad(known.roll([-s for s in shift], (1, 2)), (0, -side % w, 0, -side % h))
    parts = window_partition(shifted[..., None], (h, w)).view(-1, 1, 1, h * w)
    weights = (parts / (h * w)).expand(-1, 3, h * w, -1)  # all tokens look so
    monkeypatch.setattr(inside, "_attention_weights", lambda model, x: {name: weights})
    x = torch.zeros(5, 3, 4 * side, 4 * side)
    torch.testing.assert_close(inside._attention_maps(swin, x)[name], known)


@pytest.mark.parametrize(
    ("name", "options", "grids"),
    [
        (
            "vit_tiny_patch16_224",
            {"depth": 2, "num_heads": 3, "patch_size": 4, "dynamic_img_size": True},
            [[5, 5], [5, 5]],
        ),
        ("conv_swin", {"depths": (1, 1), "num_heads": (3, 6), "window_size": 2}, [[5, 5], [3, 3]]),
    ],
)
def test_attention_maps_at_another_size(name, options, grids):
    model = toy(name, embed_dim=24, **options)
    seen = inside._attention_maps(model, torch.randn(2, 3, 20, 20))
    assert [list(each.shape[1:]) for each in seen.values()] == grids


def test_a_class_token_is_asked_where_it_looks(batch):
    vit = toy("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, patch_size=4)
    weights = inside._attention_weights(vit, batch[0])["blocks.1"]
    seen = inside._attention_maps(vit, batch[0])["blocks.1"]
    torch.testing.assert_close(
        seen.flatten(1), 17 * weights.mean(1)[:, 0, 1:]
    )  # 16 patches and the token


def test_attention_before_and_after(model, split):
    blocks = models.view(model).blocks
    small = shrink.remove(model, {(blocks[0].name, "heads"): [0], (blocks[-1].name, "block"): [0]})
    frame = inside.attention_maps(model, small, split, [7, 2])
    last = blocks[-2].name
    assert frame.block.iloc[-1] == last and frame.image.unique().tolist() == [7, 2]
    x, _ = next(split.take(np.array([7, 2])).batches(2))
    for when, each in (("before", model), ("after", small)):
        known = inside._attention_maps(each, x)[last]
        own = frame[frame.block == last]
        assert own[when].tolist() == pytest.approx(known.flatten().tolist(), abs=6e-4)
        assert own[["row", "column"]].iloc[:2].values.tolist() == [[0, 0], [0, 1]]
    same = inside.attention_maps(model, model, split, [0])
    assert (same.before == same.after).all()
    for places in ([], [9], [-1]):
        with pytest.raises(ValueError, match="places of images in a split of 9, got"):
            inside.attention_maps(model, small, split, places)


def test_attention_is_drawn_for_each_image_before_and_after(model, split):
    frame = inside.attention_maps(model, model, split, [4, 0, 8]).assign(label="ring")
    figure = drawings.attention_maps(frame, split)
    shown = [image.get_array() for ax in figure.axes for image in ax.images]
    assert len(shown) == 3 * 5 and titles(figure) == ["image", "dense", "cut"]
    assert (shown[0] == split.images[4]).all()  # the photograph, alone and below both maps
    last = frame[(frame.image == 4) & (frame.block == frame.block.iloc[-1])]
    assert np.asarray(shown[2]).ravel().tolist() == last.before.tolist()
    assert np.asarray(shown[4]).ravel().tolist() == last.after.tolist()
    assert len(drawings.attention_maps(frame, split, most=1).axes) == 3 + 1


def test_the_same_drawing_is_the_same_bytes(swin, split, tmp_path):
    picture = inside.layers(models.view(swin).blocks[0].attn.proj).assign(
        method="dense", layer="proj"
    )
    gone = picture.assign(method="gone", cells=["x" * len(line) for line in picture.cells])
    maps = inside.attention_maps(swin, swin, split, [0])
    makers = {
        "cuts": lambda: drawings.layers(pd.concat([picture, gone])),
        "spectra": lambda: drawings.spectra(inside.spectra(swin)),
        "kept": lambda: drawings.widths(inside.widths(swin, swin)),
        "attention": lambda: drawings.attention_maps(maps, split),
    }
    for (name, make), number in itertools.product(makers.items(), (1, 2)):
        plots.save(make(), tmp_path / f"{name}{number}")
    for name, ending in itertools.product(makers, ("svg", "pdf", "png")):
        assert (tmp_path / f"{name}1.{ending}").read_bytes() == (
            tmp_path / f"{name}2.{ending}"
        ).read_bytes()


# -- how the pool works


def test_the_pool_takes_the_cheapest_of_units_and_ranks_until_its_line():
    may_go, queue, _ = drawings.pool().axes
    bars = [bar for container in queue.containers for bar in container]
    heights = [bar.get_height() for bar in bars]
    assert heights == sorted(heights) and len(set(heights)) == len(heights)
    (line,) = queue.lines
    gone = [bar.get_x() < line.get_xdata()[0] for bar in bars]
    assert [bool(bar.get_hatch()) for bar in bars] == gone and 0 < sum(gone) < len(gone)
    kinds = {bar.get_edgecolor() for bar, goes in zip(bars, gone, strict=True) if goes}
    assert len(kinds) == 2  # both kinds go
    assert {"a unit", "a rank"} <= {text.get_text() for text in may_go.texts}
