"""Models by name, their weights, and the view of them."""

import copy

import pytest
import timm
import torch
import torch.nn.utils.prune  # torch itself does not import it
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from vitlab import models
from vitlab.evaluation import cost, export
from vitlab.models import anatomy, build, checkpoint
from vitlab.pruning import factor, prune, scores, shrink


@pytest.mark.parametrize(
    ("name", "options", "blocks", "heads"),
    [
        ("vit_tiny_patch16_224", {}, 12, 3),
        ("deit_tiny_patch16_224", {}, 12, 3),
        ("deit3_small_patch16_224", {"depth": 2}, 2, 6),  # LayerScale
        ("vit_small_patch14_reg4_dinov2", {"depth": 2}, 2, 6),  # registers
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)}, 5, 3),
        ("conv_vit", {}, 6, 4),
        ("conv_swin", {}, 6, 3),
    ],
)
def test_view_sees_every_block_and_linear_layer(name, options, blocks, heads):
    model = models.create(name, num_classes=7, **options)
    view = models.view(model)
    assert len(view.blocks) == blocks and view.blocks[0].num_heads == heads
    layers = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(view.linears()) == layers - set(
        view.classifiers
    )  # the classifier is protected unless asked for
    assert set(view.linears(["head"])) == set(view.classifiers)
    for block in view.blocks:
        assert block.num_heads * block.head_dim == block.attn.qkv.out_features // 3
        assert block.neurons == block.mlp.fc1.out_features
        assert view.block(block.name) is block and view.block_of(block.name + ".mlp.fc1") is block


def test_layers_are_chosen_by_role_in_forward_order():
    view = models.view(models.create("conv_swin", num_classes=3, image_size=16, window_size=2))
    linears = view.linears()
    attention, mlp = view.linears(["qkv", "proj"]), view.linears(["fc2", "fc1"])
    assert list(mlp) == [name for name in linears if ".mlp." in name]  # whatever the order of roles
    assert set(attention) == {name for name in linears if ".attn." in name}
    assert {*attention, *mlp} == {name for name in linears if view.role(name) != "merge"}
    assert list(view.linears(["head"])) == view.classifiers


def test_layers_parameters_and_blocks_are_found_by_name(vit):
    view = models.view(vit)
    assert all(view.layer(name) is module for name, module in vit.named_modules())
    assert all(view.parameter(name) is parameter for name, parameter in vit.named_parameters())
    for find, name, near in (
        (
            view.layer,
            "blocks.0.mlp.fc3",
            "layer 'blocks.0.mlp.fc3' in this model, did you mean 'blocks.0.mlp.fc2'",
        ),
        (
            view.parameter,
            "blocks.0.attn.qvk.bias",
            "parameter 'blocks.0.attn.qvk.bias' in .* mean 'blocks.0.attn.qkv.bias'",
        ),
        (view.block, "blocks.2", "block 'blocks.2' in this model, did you mean 'blocks.1'"),
        (view.residual_stream, "stage.0", "unknown stage 'stage.0', did you mean 'stages.0'"),
        (view.layer, "nothing like it", r"no layer 'nothing like it' in this model\."),
    ):
        with pytest.raises(ValueError, match=near):
            find(name)


def test_units_are_counted_per_block(vit):
    assert models.view(vit).units() == {
        ("blocks.0", "heads"): 4, ("blocks.0", "neurons"): 64,
        ("blocks.1", "heads"): 4, ("blocks.1", "neurons"): 64,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *("eva02_tiny_patch14_224", "resnet18", "swinv2_tiny_window8_256", "maxvit_tiny_tf_224"),
        "vit_giant_patch14_dinov2",  # a VisionTransformer, with SwiGLU for an MLP
    ],
)
def test_a_model_it_cannot_see_into_is_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match="cannot see into .*supported are timm's VisionTransformer"):
        models.view(model)


def test_a_model_of_another_library_is_named_with_its_module():
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    words = r"torchvision\.models\.vision_transformer\.VisionTransformer.*models\.create as weights"
    with pytest.raises(TypeError, match=words):
        models.view(model)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(
        ValueError,
        match="unknown model 'swin_tiny_patch4_windw7_224', did you mean 'swin_tiny_patch4_window7",
    ):
        models.create("swin_tiny_patch4_windw7_224", num_classes=2)
    view = models.view(models.create("conv_vit", num_classes=2, depth=1))
    with pytest.raises(ValueError, match="unknown role 'fc3', did you mean 'fc"):
        view.linears(["fc3"])
    with pytest.raises(
        ValueError, match="no block 'blocks.1' in this model, did you mean 'blocks.0'"
    ):
        view.block("blocks.1")


@pytest.mark.parametrize("theirs", build._OF_TORCHVISION)
def test_a_name_of_torchvision_leads_to_timms(theirs):
    ours = build._OF_TORCHVISION[theirs]
    assert timm.is_model(ours)
    with pytest.raises(ValueError, match=f"unknown model '{theirs}', did you mean '{ours}'"):
        models.create(theirs, num_classes=2)


def test_a_model_that_is_no_vit_or_swin_is_refused_by_its_class():
    with pytest.raises(ValueError, match="resnet18 is no ViT or Swin: it is timm's ResNet, and kn"):
        models.create("resnet18", num_classes=2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_pixels_at_the_edge_that_no_patch_holds_are_told(name):
    few = {"depth": 1} if "vit" in name else {"depths": (1,), "num_heads": (1,)}
    options = {"num_classes": 2, "embed_dim": 24, "patch_size": 8, **few}
    words = "image_size 30 is no multiple of the patch size 8: the last 6 pixels"
    with pytest.warns(UserWarning, match=words):
        model = models.create(name, image_size=30, **options)
    seen = torch.rand(1, 3, 30, 30)
    other = seen.clone()
    other[..., 24:] = 0
    assert torch.equal(model.eval()(seen), model(other))


@pytest.mark.parametrize("name", ["conv_vit", "conv_swin"])
def test_local_weights_move_to_another_size_and_other_classes(name, tmp_path):
    torch.manual_seed(0)
    small = models.create(name, num_classes=3, image_size=32)
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="the head is left out and starts new with 5 classes"):
        large = models.create(name, num_classes=5, image_size=64, patch_size=8, weights=tmp_path)
    old, new = small.state_dict(), large.state_dict()
    heads = anatomy.classifier_names(large)
    for key in old:
        if key.rsplit(".", 1)[0] not in heads:
            assert torch.equal(old[key], new[key]), key
    assert large(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    with pytest.warns(UserWarning, match="the head is left out$"):
        models.create(name, num_classes=0, image_size=32, weights=tmp_path)  # features alone
    again = models.create(
        name, num_classes=3, image_size=32, weights=tmp_path / "model.safetensors"
    ).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), small.eval()(x))


def test_timm_weights_of_a_file_load_into_another_number_of_classes(tmp_path):
    torch.manual_seed(0)
    source = models.create("swin_tiny_patch4_window7_224", num_classes=11, depths=(1, 1, 1, 1))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match="the head is left out"):
        model = models.create(
            "swin_tiny_patch4_window7_224",
            num_classes=4,
            depths=(1, 1, 1, 1),
            weights=tmp_path / "weights.pth",
        )
    assert torch.equal(
        model.layers[2].blocks[0].attn.qkv.weight, source.layers[2].blocks[0].attn.qkv.weight
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "conv_vit",
            {"embed_dimm": 32},
            "unknown option 'embed_dimm', did you mean 'embed_dim'",
        ),
        ("conv_vit", {"stem_width": (8, 16)}, "did you mean 'stem_widths'"),
        ("conv_swin", {"window_sise": 4}, "did you mean 'window_size'"),
        ("swin_tiny_patch4_window7_224", {"depthss": (1, 1)}, "did you mean 'depths'"),
        (
            "deit_tiny_patch16_224",
            {"pretraind": True},
            "did you mean 'pretrained'.* Known are img_size, ",
        ),
        ("conv_vit", {"depth": "3"}, "conv_vit cannot be built with {'depth': '3'}: "),
        (
            "conv_vit",
            {"embed_dim": 30, "num_heads": 4},
            "cannot be built with .*divisible by num_heads",
        ),
        ("conv_vit", {"act_layer": "gellu"}, "cannot be built with .*KeyError: 'gellu'"),
        ("conv_vit", {"num_heads": 0}, "cannot be built with {'num_heads': 0}: ZeroDivision"),
        ("conv_vit", {"mlp_ratio": -1.0}, "cannot be built with .*negative dimension"),
    ],
)
def test_options_that_cannot_be_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, num_classes=2, **options)


@pytest.mark.parametrize("kind", [LocalEntryNotFoundError, ConnectionError])
def test_weights_that_cannot_be_downloaded_are_told_in_one_sentence(kind, monkeypatch):
    def fails(*arguments, **options):
        try:
            raise TimeoutError("no such host")
        except TimeoutError as error:
            raise kind("Check your connection.\nMore of it.") from error

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", fails)
    words = (
        r"^timm's weights of vit_tiny_patch16_224 are not on this machine .*"
        rf"\({kind.__name__}: Check your connection\.\); .* give weights= the path of a file that"
        r" holds them, instead of pretrained=True$"
    )
    with pytest.raises(ConnectionError, match=words) as caught:
        models.create("vit_tiny_patch16_224", num_classes=3, pretrained=True, depth=1)
    assert caught.value.__suppress_context__, "the long way to the first error would be printed"


def test_weights_of_a_checkpoint_that_is_stored_without_its_zeros(vit, tmp_path):
    with torch.no_grad():
        for layer in models.view(vit).linears().values():
            layer.weight[torch.rand_like(layer.weight) < 0.9] = 0
    record = checkpoint.save(vit, tmp_path)
    assert record["packed"]
    options = dict(num_classes=3, image_size=16, **vit.recipe["options"])
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        same = models.create("conv_vit", weights=weights, **options).state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in vit.state_dict().items())
    (tmp_path / "model.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="without its zeros and can be read only beside its model.json"
    ):
        models.create("conv_vit", weights=tmp_path, **options)


def test_wrong_weights_are_refused(tmp_path):
    save_file(models.create("conv_swin", num_classes=3).state_dict(), tmp_path / "swin.safetensors")
    with pytest.raises(ValueError, match="holds another architecture than VisionTransformer"):
        models.create("conv_vit", num_classes=3, weights=tmp_path / "swin.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        models.create("conv_vit", num_classes=3, weights=tmp_path / "nothing")
    with pytest.raises(ValueError, match="either pretrained=True"):
        models.create("conv_vit", num_classes=3, weights=tmp_path, pretrained=True)
    with pytest.raises(ValueError, match="patch_size must be a multiple of 4"):
        models.create("conv_vit", num_classes=3, image_size=30)


# --- weights that are not parameters of one layer


def pruned(layer):
    torch.nn.utils.prune.l1_unstructured(layer, "weight", amount=0.9)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (pruned, "prune.remove"),
        (torch.nn.utils.weight_norm, "remove_weight_norm"),
        (torch.nn.utils.spectral_norm, "remove_spectral_norm"),
        (torch.nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
        (torch.nn.utils.parametrizations.orthogonal, "remove_parametrizations"),
    ],
)
def test_weights_that_torch_computes_are_refused_with_what_to_call(
    vit, batch, change, cure, tmp_path
):
    calls = {
        "view": models.view,
        "breakdown": cost.breakdown,
        "macs": cost.macs,
        "summary": cost.summary,
        "meters": cost.meters,
        "bytes": cost.bytes_disk,
        "save": lambda m: checkpoint.save(m, tmp_path / "here"),
        "scores": lambda m: scores.weights(m, criteria=["magnitude"]),
        "remove": lambda m: shrink.remove(m, {("blocks.0", "neurons"): [0]}),
        "compress": lambda m: factor.compress(m, ratio=0.5, method="svd"),
        "mask": lambda m: prune.masked(m, {"head.weight": torch.zeros(3, 32, dtype=torch.bool)}),
        "export": lambda m: export._program(m),
    }
    before = cost.macs(vit)
    change(vit.blocks[1].mlp.fc2)
    vit(batch[0])
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"blocks\.1\.mlp\.fc2 is computed anew.*{cure}"):
            call(vit)
            pytest.fail(name)
    assert not (tmp_path / "here").exists()
    if change is pruned:  # and what the message says helps
        torch.nn.utils.prune.remove(vit.blocks[1].mlp.fc2, "weight")
        fc2 = cost.breakdown(vit).set_index("layer").loc["blocks.1.mlp.fc2"]
        assert fc2.nonzero - 32 == fc2.macs_ideal / 16 == round(0.1 * 32 * 64)
        assert cost.macs(vit) == before


def test_a_layer_in_two_places_is_refused_and_a_shared_weight_is_counted_once(vit, swin):
    swin.layers[0].blocks[1] = swin.layers[0].blocks[0]
    with pytest.raises(
        ValueError, match=r"layers\.0\.blocks\.0.* and layers\.0\.blocks\.1.* are one"
    ):
        cost.macs(swin)
    macs, params = cost.macs(vit), cost.breakdown(vit)[["params", "nonzero"]].sum()
    vit.blocks[1].mlp.fc1.weight = vit.blocks[0].mlp.fc1.weight
    assert cost.macs(vit) == macs == cost.meters(vit)["macs_torch"]
    shared = cost.breakdown(vit)[["params", "nonzero"]].sum()
    assert (params - shared).tolist() == [32 * 64, 32 * 64]
    apart = copy.deepcopy(vit)
    apart.blocks[1].mlp.fc1.weight = torch.nn.Parameter(vit.blocks[0].mlp.fc1.weight.detach())
    on_disk = cost.bytes_disk(apart)  # a checkpoint stores both
    assert cost.summary(vit)["bytes_disk"] == cost.bytes_disk(vit) == on_disk
