"""Weights that people bring: whose names they have, what they are wrapped in, and what is said of them."""

import argparse
import json
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

from vitlab import models
from vitlab.models import checkpoint
from vitlab.pruning import shrink

VIT = dict(embed_dim=48, depth=2, num_heads=3, patch_size=8, mlp_ratio=2.0)
SWIN = dict(embed_dim=24, depths=(1, 2), num_heads=(2, 4), patch_size=2, window_size=4)
NAMES = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
}


def create(kind, weights=None, *, num_classes=5, image_size=32, **options):
    """Return one of three small models of timm, in eval mode."""
    name, sizes = NAMES.get(kind, (kind, VIT))
    options = {**sizes, **options}
    model = models.create(
        name, num_classes=num_classes, image_size=image_size, weights=weights, **options
    )
    return model.eval()


@torch.no_grad()
def drawn(model):
    """Give every parameter values that matter, and return model in eval mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@torch.no_grad()
def largest_difference(ours, theirs, size=32):
    x = torch.rand(2, 3, size, size)
    return (ours(x) - theirs(x)).abs().max().item()


# ---- Hugging Face ----

HF_VIT = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=96,
    mlp_ratio=2,
    patch_size=8,
)
HF_SWIN = dict(embed_dim=24, depths=[1, 2], num_heads=[2, 4], patch_size=2, window_size=4)


def hugging_face(kind, head="ForImageClassification"):
    """Return a small model of transformers with drawn weights."""
    transformers = pytest.importorskip("transformers")
    sizes = HF_SWIN if kind.startswith("Swin") else HF_VIT
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=32, num_labels=5)
    return drawn(getattr(transformers, kind + head)(config))


@pytest.mark.parametrize(
    ("theirs", "head", "ours", "options"),
    [
        ("ViT", "ForImageClassification", "vit", {}),
        ("DeiT", "ForImageClassificationWithTeacher", "deit_tiny_distilled_patch16_224", {}),
        ("DeiT", "ForImageClassification", "deit_tiny_patch16_224", {"reg_tokens": 1}),
        ("Swin", "ForImageClassification", "swin", {}),
        ("Swinv2", "ForImageClassification", "swinv2", {}),
    ],
)
def test_hugging_face_classifiers_give_the_same_logits(
    theirs, head, ours, options, tmp_path, capsys
):
    original = hugging_face(theirs, head)
    original.save_pretrained(tmp_path)
    torch.save(
        {"state_dict": {f"model.{k}": t for k, t in original.state_dict().items()}},
        tmp_path / "a.ckpt",
    )
    for weights in (tmp_path, tmp_path / "model.safetensors", tmp_path / "a.ckpt"):
        model = create(ours, weights, **options)
        assert "names of Hugging Face" in capsys.readouterr().out
        assert largest_difference(model, lambda x: original(x).logits) < 1e-5


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Dinov2", "vit_small_patch14_dinov2.lvd142m"),
        ("Dinov2WithRegisters", "vit_small_patch14_reg4_dinov2.lvd142m"),
    ],
)
def test_hugging_face_dinov2_gives_the_same_features(theirs, ours, tmp_path):
    original = hugging_face(theirs, "Model")
    original.save_pretrained(tmp_path)
    model = create(ours, tmp_path, num_classes=0)
    assert largest_difference(model, lambda x: original(x).last_hidden_state[:, 0]) < 1e-5
    # Its classifier reads the mean of the patches, too, which timm's class does not.
    hugging_face(theirs).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="Hugging Face.*the head is left out and starts new with 5"
    ):
        create(ours, tmp_path)


def test_what_no_tensor_tells_is_read_from_the_config(tmp_path):
    original = hugging_face("ViT")
    original.save_pretrained(tmp_path)
    assert create("vit", tmp_path).recipe["options"]["norm_eps"] == 1e-12
    checkpoint.save(create("vit", tmp_path), tmp_path / "own")
    loaded = checkpoint.load(tmp_path / "own")
    assert loaded.blocks[0].norm1.eps == 1e-12
    assert largest_difference(loaded, lambda x: original(x).logits) < 1e-5
    with pytest.raises(
        ValueError, match=r"num_heads 3 \(the model 4\); what fits it is num_heads=3"
    ):
        create("vit", tmp_path, num_heads=4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_new"}))
    with pytest.raises(ValueError, match="what fits it is act_layer='gelu_tanh'"):
        create("vit", tmp_path)
    create("vit", tmp_path, act_layer="gelu_tanh")


NAMED = ["owl", "cat", "dog", "bee", "ant"]


def label(folder, names):
    """Write names into the config of a folder of Hugging Face's, and return the images' side."""
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(names))
    (folder / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(classes=sorted(names))


def test_a_kept_head_knows_its_classes_by_the_config(tmp_path):
    hugging_face("ViT").save_pretrained(tmp_path)
    assert not hasattr(create("vit", tmp_path), "class_names")  # LABEL_0, LABEL_1, ...
    images = label(tmp_path, NAMED)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        model = create("vit", weights)
        assert model.class_names == NAMED and not model.is_head_new
        with pytest.raises(ValueError, match="another order: label 0 is 'owl' .* new_head: true"):
            models.check_classes(model, images)
    checkpoint.save(model, tmp_path / "own")
    assert create("vit", tmp_path / "own").class_names == NAMED
    for options in ({"num_classes": 4}, {"new_head": True}):
        for weights in (tmp_path, tmp_path / "own"):
            with pytest.warns(UserWarning, match="the head is left out and starts new"):
                again = create("vit", weights, **options)
            assert not hasattr(again, "class_names") and again.is_head_new
            assert not torch.equal(again.head.weight[:4], model.head.weight[:4])


def test_a_number_of_heads_that_no_tensor_tells_is_said_with_its_source(tmp_path, capsys):
    torch.save(drawn(create("vit")).state_dict(), tmp_path / "a.pth")
    sizes = {key: value for key, value in VIT.items() if key != "num_heads"}
    said = "a.pth: num_heads=3 is that of vit_tiny_patch16_224: no tensor tells it"
    for options, expected in ((sizes, said), (VIT, "")):
        models.create(
            NAMES["vit"][0], num_classes=5, image_size=32, weights=tmp_path / "a.pth", **options
        )
        assert capsys.readouterr().out.strip() == expected
    hugging_face("ViT").save_pretrained(tmp_path)
    create("vit", tmp_path)
    assert "num_heads" not in capsys.readouterr().out


# ---- torchvision ----


def torchvision_model(kind):
    if kind == "vit":
        return drawn(VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5))
    v2 = (
        dict(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
        if kind == "swinv2"
        else {}
    )
    return drawn(SwinTransformer([2, 2], 24, [1, 2], [2, 4], [4, 4], num_classes=5, **v2))


@pytest.mark.parametrize("kind", NAMES)
def test_torchvision_models_give_the_same_logits(kind, tmp_path, capsys):
    original = torchvision_model(kind)
    state = original.state_dict()
    torch.save(state, tmp_path / "a.pth")
    assert largest_difference(create(kind, tmp_path / "a.pth"), original) < 1e-5
    # As the published files of 2021 name the layers of an MLP.
    older = {
        k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t
        for k, t in state.items()
    }
    if kind == "vit":
        state = older
    torch.save(
        {"epoch": 3, "model": {f"module.{k}": t for k, t in state.items()}}, tmp_path / "b.pth"
    )
    assert largest_difference(create(kind, tmp_path / "b.pth"), original) < 1e-5
    assert "names of torchvision, behind 'model.module.'" in capsys.readouterr().out


def test_a_head_behind_a_layer_that_timm_has_not_is_left_out(tmp_path):
    original = VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5, representation_size=48)
    torch.save(original.state_dict(), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="the head is left out"):
        create("vit", tmp_path / "a.pth")


# ---- Wrappers and original releases ----


def behind(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "ddp": lambda s: behind("module.", s),
    "compiled": lambda s: {
        "model": behind("module._orig_mod.", s),
        "args": argparse.Namespace(a=1),
    },
    "compiled blocks": lambda s: {k.replace("s.0.", "s.0._orig_mod."): t for k, t in s.items()},
    "lightning": lambda s: {"state_dict": behind("model.", s) | {"loss.weight": torch.ones(5)}},
    "lightning of lightning": lambda s: {"state_dict": behind("net.timm_model.module.", s)},
    "recipe": lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "net": lambda s: {"net": s, "acc": 0.5},
    "averaged": lambda s: {"module": s, "n_averaged": torch.tensor(3)},
    "deep": lambda s: {"a": {"b": {"c.d": behind("e.", s)}}},
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_same_weights_under_any_wrapping_give_the_same_logits(wrap, kind, tmp_path):
    original = drawn(create(kind))
    torch.save(wrap(original.state_dict()), tmp_path / "a.ckpt")
    assert largest_difference(create(kind, tmp_path / "a.ckpt"), original) == 0


def test_a_head_of_ones_own_beside_the_backbone_is_taken(tmp_path):
    original = drawn(create("swin"))
    state = behind("backbone.", original.state_dict())
    for part in ("weight", "bias"):
        state[f"classifier.{part}"] = state.pop(f"backbone.head.fc.{part}")
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    assert largest_difference(create("swin", tmp_path / "a.ckpt"), original) == 0
    del state["classifier.bias"]
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="the head is left out and starts new with 5 classes"):
        create("swin", tmp_path / "a.ckpt")
    del state["classifier.weight"]
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="it has no head, which starts new with 5 classes"):
        create("swin", tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create("swin", tmp_path / "a.ckpt", num_classes=0)


@pytest.mark.parametrize(
    ("backbone", "head", "beside", "is_taken"),
    [
        ("0.", "1.", [], True),
        ("backbone.", "head.1.", [], True),  # behind drop-out
        ("model.backbone.", "model.classifier.0.", ["loss.weight"], True),
        ("0.", "2.", ["1.weight"], False),  # behind a norm or another layer
        ("backbone.", "head.3.", ["head.0.weight", "head.0.bias"], False),
        ("backbone.", "head.1.", ["head.0.running_mean"], False),
    ],
)
def test_a_numbered_head_is_taken_if_it_is_the_only_layer(
    backbone, head, beside, is_taken, tmp_path
):
    original = drawn(create("vit"))
    state = behind(backbone, original.state_dict())
    for part in ("weight", "bias"):
        state[head + part] = state.pop(f"{backbone}head.{part}")
    torch.save(state | {name: torch.ones(5) for name in beside}, tmp_path / "a.ckpt")
    if is_taken:
        assert largest_difference(create("vit", tmp_path / "a.ckpt"), original) == 0
        return
    with pytest.warns(UserWarning, match="the head is left out and starts new with 5 classes"):
        create("vit", tmp_path / "a.ckpt")


OPENCLIP = [  # timm's names, and its own
    (r"^patch_embed\.proj", "conv1"),
    (r"^norm_pre", "ln_pre"),
    (r"^norm\.", "ln_post."),
    (r"^blocks", "transformer.resblocks"),
    (r"\.norm(\d)", r".ln_\1"),
    (r"qkv\.", "in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
]


@pytest.mark.parametrize("prefix", ["", "model.", "state_dict.module."])
def test_openclips_images_tower_under_any_prefix(prefix, tmp_path):
    """Its names are timm's to know, and its projection becomes the head."""
    original = drawn(create("vit", pre_norm=True))
    torch.nn.init.zeros_(original.head.bias)  # it has none
    state = {}
    for name, tensor in original.state_dict().items():
        for ours, theirs in OPENCLIP:
            name = re.sub(ours, theirs, name)
        state[name] = tensor
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["positional_embedding"] = state.pop("pos_embed")[0]
    state["proj"] = state.pop("head.weight").T.contiguous()
    del state["head.bias"]
    torch.save(behind(f"{prefix}visual.", state), tmp_path / "a.pt")
    model = create("vit", tmp_path / "a.pt", pre_norm=True)
    assert largest_difference(model, original) == 0
    with pytest.warns(UserWarning, match="the head is left out and starts new with 7 classes"):
        create("vit", tmp_path / "a.pt", pre_norm=True, num_classes=7)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("model", "model_ema"), "model_ema"),
        (("state_dict", "state_dict_ema"), "state_dict_ema"),
        (("student", "teacher"), "teacher"),
        (("state_dict.net", "state_dict.ema_model.module"), "state_dict.ema_model.module"),
    ],
)
def test_averaged_weights_are_taken_before_others_and_that_is_said(names, taken, tmp_path):
    states = {}
    for number, name in enumerate(names):
        torch.manual_seed(number)
        states[name] = create("vit").state_dict()
    torch.save(states, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=f"behind '{taken}.'; taken rather than '{names[0]}.'"):
        model = create("vit", tmp_path / "a.pth")
    assert torch.equal(model.head.weight, states[taken]["head.weight"])


def test_of_several_models_the_one_that_fits_is_taken_and_two_are_refused(tmp_path):
    small, large = drawn(create("vit")), create("vit", depth=3)
    # As in distillation, where the teacher is larger.
    torch.save({"student": small.state_dict(), "teacher": large.state_dict()}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="behind 'student.'; taken rather than 'teacher.'"):
        model = create("vit", tmp_path / "a.pth")
    assert largest_difference(model, small) == 0
    torch.save({"a": small.state_dict(), "b": create("vit").state_dict()}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="more than one such model, behind 'a.' and 'b.'"):
        create("vit", tmp_path / "b.pth")
    torch.save({"a": small.state_dict(), "b": small.state_dict()}, tmp_path / "c.pth")  # one, twice
    with pytest.warns(UserWarning, match="behind 'a.'; taken rather than 'b.'"):
        create("vit", tmp_path / "c.pth")


def test_original_releases(tmp_path):
    vit = drawn(create("vit"))
    state = vit.state_dict()
    decoder = {"mask_token": torch.ones(1, 1, 48), "decoder_pos_embed": torch.ones(1, 17, 3)}
    torch.save({"model": state | decoder}, tmp_path / "mae.pth")
    with pytest.warns(UserWarning, match="mae.pth: .*left out: decoder_pos_embed"):
        assert largest_difference(create("vit", tmp_path / "mae.pth"), vit) == 0
    chunked = {k.replace("blocks.", "blocks.0."): t for k, t in state.items()}  # DINOv2's training
    dino = behind("backbone.", chunked) | {"dino_head.mlp.0.weight": torch.ones(3, 3)}
    torch.save({"teacher": dino}, tmp_path / "dino.pth")
    assert largest_difference(create("vit", tmp_path / "dino.pth"), vit) == 0
    swin = drawn(create("swin"))
    old = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    for name, tensor in swin.state_dict().items():
        name = name.replace("layers.1.downsample", "layers.0.downsample")
        old[name.replace("head.fc.", "head.")] = tensor
    torch.save({"model": old}, tmp_path / "swin.pth")
    assert largest_difference(create("swin", tmp_path / "swin.pth"), swin) == 0


# ---- Other sizes ----


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("vit", {"image_size": 64}, r"pos_embed resampled from \[1, 17, 48\] to \[1, 65, 48\]"),
        ("vit", {"image_size": 16, "patch_size": 4}, "patch_embed.proj.weight resampled from"),
        (
            "swin",
            {"window_size": 8},
            r"bias_table resampled from \[49, 2\] to \[225, 2\] and 2 more",
        ),
        ("swinv2", {"window_size": 8}, "windows are 8 wide, 4 in the file"),
        ("swin", {"image_size": 20}, "outputs are not torchvision's: timm shifts, then pads"),
    ],
)
def test_what_is_resampled_or_else_is_not_as_it_was_is_said(kind, options, said, tmp_path):
    torch.save(torchvision_model(kind).state_dict(), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=said) as warned:
        create(kind, tmp_path / "a.pth", **options)
    assert len(warned) == 1


# ---- Refusals ----

OTHER = {
    "depth": ("vit", {"depth": 3}, r"depth 3 \(the model 2\); what fits it is depth=3"),
    "stages": ("swin", {"depths": (1, 2, 1), "num_heads": (2, 4, 4)}, r"fits it is depths=\(1, 2, 1\), num_h"),
    "width": ("vit", {"embed_dim": 24}, r"embed_dim=24, num_heads=... \(no tensor tells it\)"),
    "neurons": ("vit", {"mlp_ratio": 3}, "what fits it is mlp_ratio=3.0"),
    "heads": ("swinv2", {"num_heads": (3, 6)}, r"what fits it is num_heads=\(3, 6\)"),
    "channels": ("vit", {"in_chans": 1}, "what fits it is in_chans=1"),
    "no class token": ("vit", {"class_token": False, "global_pool": "avg"}, "0 .the model 1.*class_token=False"),
    "registers": ("vit", {"reg_tokens": 2}, "tokens before the patches 3 .the model 1.*reg_tokens=2"),
    "pooling": ("vit", {"global_pool": "avg"}, "what fits it is global_pool='avg'"),
    "layer scale": ("vit", {"init_values": 1e-5}, "what fits it is init_values=1e-05"),
    "no bias": ("swin", {"qkv_bias": False}, "what fits it is qkv_bias=False"),
    "query norm": ("vit", {"qk_norm": True}, "what fits it is qk_norm=True"),
    "attention pooling": ("vit", {"global_pool": "map"}, "what fits it is global_pool='map'"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "said"), OTHER.values(), ids=OTHER)
def test_another_architecture_is_refused_with_options_that_fit(kind, options, said, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(create(kind, **options).state_dict(), file)
    with pytest.raises(
        ValueError, match=rf"a.safetensors holds another .*of timm, such as .*{said}"
    ):
        create(kind, file)
    create(kind, file, **options)  # the cure


def test_other_families_are_refused(tmp_path):
    for kind in NAMES:
        save_file(create(kind).state_dict(), tmp_path / "a.safetensors")
        for other in NAMES.keys() - {kind}:
            with pytest.raises(
                ValueError, match=f"what fits it is a name .*such as {kind}_"
            ) as error:
                create(other, tmp_path / "a.safetensors")
            assert "depths=" not in str(error.value)
    distilled = create("deit_tiny_distilled_patch16_224").state_dict()
    save_file(distilled, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"tokens before the patches 2 \(the model 1\)"):
        create("deit_tiny_patch16_224", tmp_path / "a.safetensors")


NO_WEIGHTS = {
    "page.pth": (b"<!DOCTYPE html><html></html>", "it is a web page"),
    "page.safetensors": (b"\n<html></html>", "it is a web page"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    "jax.npz": (b"PK\x03\x04", ".npz is not read"),
    "short.pth": (b"PK\x03\x04", "broken or cut short"),
    "short.safetensors": (b"\x08\0\0\0\0\0\0\0{}", "broken or cut short"),
    "empty.pth": (b"", "broken or cut short"),
    "config.json": (b'{\n  "model_type": "vit"\n}', "it is text and no checkpoint"),
    "notes.pth": (b"the weights are elsewhere", "it is text and no checkpoint"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_files_that_are_no_weights_are_told_what_they_are(name, tmp_path):
    content, said = NO_WEIGHTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=f"no weights can be read from .*{name}: .*{said}"
    ) as error:
        create("vit", tmp_path / name)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize("kind", NAMES)
def test_values_that_are_not_finite_are_refused(kind, tmp_path):
    state = create(kind).state_dict()
    name = next(name for name in state if name.endswith("fc1.weight"))
    state[name][0, 0] = torch.nan
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a.pth holds values that are not finite, .* {name}:"):
        create(kind, tmp_path / "a.pth")


def test_a_folder_of_other_files_names_those_that_may_be_meant(tmp_path):
    for name in ("best.ckpt", "last.pt", "log.txt"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match="this one holds best.ckpt, last.pt: give"):
        create("vit", tmp_path)
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin$"):
        create("vit", tmp_path / "nowhere")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])
def test_a_pickled_model_is_refused_with_the_cure_and_without_unsafe_advice(new, tmp_path):
    torch.save(create("vit"), tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"torch.save\(model.state_dict\(\), ...\)") as error:
        create("vit", tmp_path / "a.pth")
    assert "weights_only" not in str(error.value) and error.value.__context__ is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no tensors by name"),
        (torch.ones(3), "holds no tensors by name"),
        (
            {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
            "no blocks of a transformer.*tensors are missing",
        ),
        (
            {"features.0.0.weight": torch.ones(3, 3, 3, 3)},
            "no library known here, such as features.0",
        ),
        (  # of MMPretrain
            {"backbone.patch_embed.projection.weight": torch.ones(48, 3, 8, 8)},
            "no library known here, behind 'backbone.'",
        ),
    ],
)
def test_files_without_such_a_model(content, said, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    for kind in NAMES:
        with pytest.raises(ValueError, match=f"a.pth .*{said}"):
            create(kind, tmp_path / "a.pth")


@pytest.mark.parametrize("kind", NAMES)
def test_tensors_of_odd_shapes_are_refused_and_the_file_is_named(kind, tmp_path):
    state = torchvision_model(kind).state_dict()
    for name in list(state)[::6]:
        if "relative" not in name and not name.startswith("head"):  # timm takes neither from there
            save_file(state | {name: torch.tensor(1.0)}, tmp_path / "odd.safetensors")
            with pytest.raises(ValueError, match="odd.safetensors holds another architecture"):
                create(kind, tmp_path / "odd.safetensors")


# ---- Cut checkpoints ----


@pytest.mark.parametrize("kind", NAMES)
def test_a_cut_checkpoint_starts_another_task(kind, tmp_path):
    model = drawn(create(kind))
    units = models.view(model).units(["heads", "neurons", "width"])
    gone = {key: [0] for key in units if key[1] == "heads"} | {
        key: [1, 2] for key in units if key[1] != "heads"
    }
    small = shrink.remove(model, gone)
    checkpoint.save(small, tmp_path)
    assert largest_difference(create(kind, tmp_path), small) == 0  # as many classes: its own head
    name, _ = NAMES[kind]
    with pytest.warns(UserWarning, match="the head is left out and starts new with 3 classes"):
        again = models.create(name, num_classes=3, weights=tmp_path).eval()
    state = small.state_dict()
    for key, tensor in again.state_dict().items():
        assert key.startswith("head.") or torch.equal(tensor, state[key]), key
    checkpoint.save(again, tmp_path / "again")
    assert largest_difference(checkpoint.load(tmp_path / "again"), again) == 0
    with pytest.raises(ValueError, match=r"holds a cut model of .*embed_dim 96 \(the checkpoint"):
        create(kind, tmp_path, embed_dim=96)
    with pytest.raises(ValueError, match=r"name 'conv_vit' \(the checkpoint '"):
        models.create("conv_vit", num_classes=3, weights=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what was resampled
        assert create(kind, tmp_path, image_size=64)(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_a_checkpoint_of_other_heads_is_refused(tmp_path):
    checkpoint.save(create("vit"), tmp_path)
    with pytest.raises(ValueError, match="what fits it is num_heads=3"):
        create("vit", tmp_path, num_heads=4)
