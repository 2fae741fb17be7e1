"""Tests of cost: the closed form against torch's own counter, counts by hand, and other meters."""

import copy
import sys

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils import flop_counter

from vitlab import files, models
from vitlab.evaluation import cost, memory
from vitlab.models import _layers, checkpoint
from vitlab.pruning import budget, factor, ranks, shrink


def macs_by_torch(model, image_size):
    """Count MACs by torch."""
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("vit_tiny_patch16_224", 10, 1_253_493_120),
        ("swin_tiny_patch4_window7_224", 1000, 4_490_566_656),
        pytest.param("vit_small_patch16_224", 1000, 4_598_882_304, marks=pytest.mark.long),
        pytest.param("vit_base_patch16_224", 1000, 17_563_828_224, marks=pytest.mark.long),
    ],
)
def test_macs_of_the_reference_models(name, classes, expected):
    model = models.create(name, num_classes=classes)
    assert cost.macs(model) == macs_by_torch(model, 224) == expected


@pytest.mark.parametrize(
    ("name", "image_size", "options"),
    [
        ("conv_vit", 32, {}),
        ("conv_vit", 96, {"patch_size": 8, "class_token": True}),
        ("conv_swin", 32, {}),
        ("conv_swin", 96, {"patch_size": 8}),  # a grid of 6 x 6 is padded to windows of 4
        ("conv_swin", 20, {"window_size": 2}),  # 5 x 5 is padded for windows and for merging
        ("conv_swin", 28, {"window_size": 3, "head_dim": 8}),
        ("vit_tiny_patch16_224", 48, {"depth": 2, "reg_tokens": 3}),
        ("deit_tiny_distilled_patch16_224", 32, {"depth": 1}),  # two more tokens, two heads
        ("swin_tiny_patch4_window7_224", 64, {"depths": (1, 2, 1, 1), "always_partition": True}),
        ("vit_tiny_patch16_224", 64, {"depth": 1, "global_pool": "prr"}),
        ("conv_vit", 32, {"depth": 1, "global_pool": "prr"}),
        ("conv_vit", 32, {"depth": 1, "global_pool": "", "class_token": True}),
        ("conv_swin", 20, {"window_size": 2, "global_pool": ""}),
    ],
)
def test_macs_equal_torchs_own_counter(name, image_size, options):
    model = models.create(name, num_classes=10, image_size=image_size, **options)
    assert cost.macs(model) == macs_by_torch(model, image_size)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's resampling
@torch.no_grad()
def test_two_ways_to_another_image_size_of_a_swin():
    name = "swin_tiny_patch4_window7_224"
    padded = models.create(name, num_classes=1000, image_size=256)
    scaled = models.create(name, num_classes=1000, image_size=256, window_size=8).eval()
    timms = models.create(name, num_classes=1000).eval()
    timms.set_input_size((256, 256))
    assert cost.macs(padded) == 7_345_441_536
    assert cost.macs(scaled) == cost.macs(timms) == 5_921_028_096
    assert cost.input_shape(timms) == (3, 256, 256)
    scaled.load_state_dict(timms.state_dict())
    x = torch.randn(1, 3, 256, 256)
    assert torch.equal(scaled(x), timms(x))


KINDS = [
    {"type": "FactoredLinear", "rank": 3},
    {"type": "LowRankSparseLinear", "rank": 2, "support": "entries", "count": 40},
    {"type": "LowRankSparseLinear", "rank": 2, "support": "rows", "count": 4},
    {"type": "LowRankSparseLinear", "rank": 0, "support": "rows", "count": 4},
    {"type": "LowRankSparseLinear", "rank": 2, "support": "columns", "count": 4},
    {"type": "RowLinear", "rows": [0, 3, 20]},
]


def cut(layer, kind):
    """Return a layer of the kind that a cut leaves, in the shape of layer."""
    shape = {"in_features": layer.in_features, "out_features": layer.out_features}
    return _layers.build(shape | {"bias": layer.bias is not None} | kind)


@pytest.mark.parametrize("kind", KINDS)
def test_macs_of_models_with_cut_layers(model, kind):
    for role in ("fc2", "qkv", "merge", "fc1", "proj"):  # each step leaves another mix of layers
        before = cost.macs(model)
        for name, layer in models.view(model).linears([role]).items():
            model.set_submodule(name, cut(layer, kind))
            assert cost.breakdown(model).set_index("layer").macs[name] % cut(layer, kind).macs == 0
        assert cost.macs(model) == macs_by_torch(_layers.merge(copy.deepcopy(model)), 16)
        if kind.get("support") == "entries":  # one matrix of the dense size
            assert cost.macs(model) == before


def test_breakdown_by_hand(vit):
    table = cost.breakdown(vit)
    first = table[table.block.isin(["blocks.0"])].set_index("role").macs
    assert table[table.role == "stem"].macs.tolist() == [
        9 * 3 * 32 * 256,
        9 * 32 * 64 * 64,
        9 * 64 * 32 * 16,
    ]
    assert first.to_dict() == {
        "qkv": 16 * 32 * 96,
        "qk": 16 * 16 * 32,
        "av": 16 * 16 * 32,
        "proj": 16 * 32 * 32,
        "fc1": 16 * 32 * 64,
        "fc2": 16 * 64 * 32,
    }
    assert table[table.role == "head"].macs.tolist() == [32 * 3]


def test_breakdown_sums_to_the_model(model):
    table = cost.breakdown(model)
    assert table.macs.sum() == cost.macs(model)
    assert table.macs_ideal.sum() == cost.macs(model, ideal=True)
    assert table.params.sum() == cost.params(model) == sum(p.numel() for p in model.parameters())
    assert table.nonzero.sum() == sum(int(p.count_nonzero()) for p in model.parameters())
    assert table.layer.is_unique


@torch.no_grad()
def test_ideal_macs_leave_out_zeros(model):
    for parameter in model.parameters():
        parameter.fill_(1)
    assert cost.macs(model, ideal=True) == cost.macs(model)  # nothing is zero
    layers_of = {
        role: module
        for role in ("fc1", "head")
        for module in models.view(model).linears([role]).values()
    }
    layers_of["fc1"].weight.flatten()[:7] = (
        0  # the last block's: 16 tokens in the ViT, 2 x 2 in the Swin
    )
    layers_of["head"].weight[0, 0] = 0
    tokens = 16 if models.view(model).kind == "vit" else 4
    assert cost.macs(model) - cost.macs(model, ideal=True) == 7 * tokens + 1
    for parameter in model.parameters():
        parameter.zero_()
    products = cost.breakdown(model).query("role in ('qk', 'av')").macs.sum()
    assert cost.macs(model, ideal=True) == products > 0  # products of activations have no weights


def test_ideal_macs_of_cut_layers_are_the_layers_own(vit):
    name, layer = next(iter(models.view(vit).linears(["fc1"]).items()))
    mask = torch.zeros(64, 32, dtype=torch.bool)
    mask.flatten()[:40] = True
    new = _layers.low_rank_sparse(
        torch.ones(64, 2), torch.ones(2, 32), sparse=mask.float(), mask=mask, support="entries"
    )
    vit.set_submodule(name, new)
    row = cost.breakdown(vit).set_index("layer").loc[name]
    assert (row.macs, row.macs_ideal) == (16 * new.macs, 16 * new.macs_ideal)
    with torch.no_grad():  # masked factors are free, too
        new.first[0] = 0
    assert cost.breakdown(vit).set_index("layer").loc[name].macs_ideal == 16 * (new.macs_ideal - 32)


def test_summary_puts_named_meters_beside_the_closed_form(model):
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    row = cost.summary(model)
    assert row["flops"] == 2 * row["macs"] == 2 * row["macs_torch"]
    assert (
        row["macs"] < row["macs_torchprofile"] < 1.05 * row["macs"]
    )  # norms weigh more in so small a model
    assert 0.9 * row["macs"] < row["macs_thop"] != row["macs"]
    assert row["meter_note"] == ""
    assert (
        row["params"] >= row["nonzero"] == sum(int(p.count_nonzero()) for p in model.parameters())
    )
    assert 4 * row["params"] < row["bytes_memory"]
    # the meters leave nothing behind: thop's buffers, modes, flags
    assert model.state_dict().keys() == state.keys() and model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any("total_" in name for name, _ in model.named_buffers())
    assert [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")] == fused


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        pytest.param("vit_small_patch16_224", marks=pytest.mark.long),
        pytest.param("vit_base_patch16_224", marks=pytest.mark.long),
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.long),
    ],
)
def test_torchprofile_agrees_on_real_models_whole_and_cut(name):
    model = models.create(name, num_classes=1000)
    row = cost.meters(model)
    assert abs(row["macs_torchprofile"] / cost.macs(model) - 1) < 0.002
    assert row["macs_thop"] < 0.98 * cost.macs(
        model
    )  # without the products of attention, 14 % of ViT-Ti
    halves = {key: range(count // 2) for key, count in models.view(model).units().items()}
    small = shrink.remove(model, halves)
    thin = factor.factorise(small, dict.fromkeys(models.view(small).linears(["fc1", "fc2"]), 32))
    for cut_model in (small, thin):
        row = cost.meters(cut_model)
        assert row["macs_torch"] == cost.macs(cut_model)
        assert abs(row["macs_torchprofile"] / cost.macs(cut_model) - 1) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_meters_see_cut_layers(model, kind):
    before = cost.meters(model)
    norms = before["macs_torchprofile"] - cost.macs(model)
    for name, layer in models.view(model).linears().items():
        model.set_submodule(name, cut(layer, kind))
    row, macs = cost.meters(model), cost.macs(model)
    assert row["macs_torch"] == macs
    assert (
        row["macs_torchprofile"] == macs + norms
    )  # to the last one: what is stored is multiplied, or the one matrix of it, and nothing else
    assert 0.9 * macs < row["macs_thop"]
    if kind.get("support") == "entries":
        assert macs == before["macs_torch"] and row == before


@pytest.mark.parametrize(
    "rank", [0, 16]
)  # what IHT and thresholding, or SVD + IHT on entries leave
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_torchprofile_agrees_on_the_committed_models_on_entries(name, rank):
    model = checkpoint.load(files.repository() / "checkpoints" / "cifar10-small" / name)
    for layer, module in models.view(model).linears().items():
        count = module.weight.numel() // 2
        kind = {"type": "LowRankSparseLinear", "rank": rank, "support": "entries", "count": count}
        model.set_submodule(layer, cut(module, kind))
    row, macs = cost.meters(model), cost.macs(model)
    assert row["macs_torch"] == macs and macs < row["macs_torchprofile"] < 1.003 * macs


def test_a_meter_that_fails_says_why_and_the_others_go_on(vit, monkeypatch):
    def broken(model, x):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(cost, "_thop", broken)
    row = cost.meters(vit)
    assert row["macs_thop"] is None and row["macs_torch"] == cost.macs(vit)
    assert row["meter_note"] == "thop: RuntimeError: no such operator"


def test_parameters_by_hand():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # buffers are no parameters
    assert cost.params(module) == cost.params(module.requires_grad_(False)) == 3 * 4 + 4 + 4 + 4


def test_bytes_in_memory_by_hand():
    module = nn.BatchNorm1d(
        5
    )  # weight, bias, running mean and variance in float32, a counter in int64
    assert cost.bytes_memory(module) == 4 * 5 * 4 + 8
    assert cost.bytes_memory(module.half()) == 4 * 5 * 2 + 8


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_counter_sees_fused_attention(fused):
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if fused and kernel not in flop_counter.flop_registry:
        pytest.skip("the counter of this older torch does not know it")
    model = models.create("vit_tiny_patch16_224", num_classes=10, image_size=64)
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert macs_by_torch(model, 64) == cost.macs(model)


class Fewer(Block):
    """As token merging does: 8 tokens less from each block on."""

    def forward(self, x, **options):
        x = super().forward(x, **options)
        return torch.cat([x[:, :-16], (x[:, -16:-8] + x[:, -8:]) / 2], 1)


def merging(model):
    for block in model.blocks:
        block.__class__ = Fewer


def hooked(model):
    model.blocks[1].register_forward_hook(lambda block, x, y: y[:, :-8])


def patched(model):
    whole = model.blocks[1].forward
    model.blocks[1].forward = lambda x, **_: whole(x[:, :-8])


def early(model):
    model.blocks[3].forward = lambda x, **_: x


@pytest.mark.parametrize("change", [merging, hooked, patched, early])
def test_a_forward_pass_of_its_own_is_said_and_no_budget_is_planned(change):
    sizes = dict(patch_size=4, embed_dim=48, depth=4, num_heads=3)
    model = models.create("vit_tiny_patch16_224", num_classes=10, image_size=32, **sizes).eval()
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    change(model)
    row = cost.summary(model)
    measured = macs_by_torch(model, 32)
    assert row["macs_torch"] == measured < row["macs"]
    assert (
        f"torch counts {measured:,} MACs and the closed form {row['macs']:,}" in row["meter_note"]
    )
    for refused in (
        lambda: budget.plan(model, {}, kinds=["heads"], macs=0.5),
        lambda: budget.reach(model, batches, macs=0.5),
        lambda: ranks.uniform(model, batches, macs=0.5),
    ):
        with pytest.raises(ValueError, match="torch counts .* a share of MACs cannot be planned"):
            refused()
    if change is merging:
        assert (row["macs"], measured) == (8_958_816, 7_118_688)


def test_models_without_a_closed_form():
    model = models.create(
        "vit_tiny_patch16_224", num_classes=3, image_size=32, depth=1, global_pool="map"
    )
    with pytest.raises(TypeError, match=r"no closed form for attn_pool\.q \(Linear\)"):
        cost.macs(model)
    model = models.create("conv_vit", num_classes=3, depth=1)
    model.patch_embed.steps.append(nn.MaxPool2d(2))
    with pytest.raises(TypeError, match="no closed form for the stem ConvStem"):
        cost.macs(model)
    model = models.create("vit_small_r26_s32_224", num_classes=3, image_size=64, depth=1)
    with pytest.raises(TypeError, match="no closed form for the stem HybridEmbed"):
        cost.macs(model)


def test_peak_memory_is_of_what_came_since_the_reset():
    memory.reset_peak_memory()
    before = memory.peak_memory_mb("cpu")
    held = torch.ones(
        400_000_000 // 4
    )  # 400 MB, written to; some may be memory that was held before
    assert memory.peak_memory_mb("cpu") - before >= 200
    del held


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_own_memory_is_without_mapped_files_and_what_was_freed(tmp_path):
    np.ones(100_000_000, dtype=np.uint8).tofile(tmp_path / "images")
    memory.release_memory()
    before = memory.own_memory_mb("cpu")
    mapped = np.memmap(tmp_path / "images", mode="r")
    assert (
        mapped.sum() == 100_000_000 and abs(memory.own_memory_mb("cpu") - before) < 20
    )  # 100 MB came in
    memory.reset_peak_memory()
    held = [
        torch.ones(25_000) for _ in range(1000)
    ]  # 100 MB in pieces that glibc keeps when they are freed
    assert memory.own_memory_mb("cpu") - before > 80
    del held
    memory.release_memory()
    assert (
        memory.own_memory_mb("cpu") - before < 20
        and memory.own_memory_mb("cpu", peak=True) - before > 80
    )
