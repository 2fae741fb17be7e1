"""Checkpoints come back as saved; broken ones are refused; a killed save loses nothing."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from vitlab import files, models
from vitlab.evaluation import cost
from vitlab.models import checkpoint
from vitlab.pruning import factor, masks, prune, shrink


def cut(model):
    """Return model without one head and 15 neurons of its first block."""
    block = models.view(model).blocks[0].name
    return shrink.remove(model, {(block, "heads"): [1], (block, "neurons"): list(range(0, 30, 2))})


def without_rows(model):
    """Return model without three rows of its last qkv, then factored."""
    name = list(models.view(model).linears(["qkv"]))[-1]
    return factored(shrink.remove(model, {(name, "rows"): [0, 5, 7]}))


def factored(model):
    return factor.compress(model, ratio=0.5, method="svd", multiple=1)[0]


def sparse(support):
    def change(model):
        linears = models.view(model).linears()
        grams = {name: torch.eye(m.in_features, dtype=torch.float64) for name, m in linears.items()}
        return factor.compress(model, ratio=0.3, support=support, grams=grams, multiple=1)[0]

    return change


CHANGES = {
    "dense": lambda model: model,
    "cut": cut,
    "rows": without_rows,
    "factored": factored,
    "cut and factored": lambda model: factored(cut(model)),
    **{f"low rank and {support}": sparse(support) for support in ("entries", "rows", "columns")},
}


def rewrite(folder, record):
    (folder / checkpoint.RECORD).write_text(json.dumps(record))


def rewrite_with_new_hash(folder, record):
    """Rewrite the record in folder with a new hash, as can only be done on purpose."""
    own = "record" if record["format"] == checkpoint._FORMAT else "architecture"
    files = {name: each for name, each in record["sha256"].items() if name.endswith(".safetensors")}
    record = record | {"sha256": files}
    rewrite(folder, record | {"sha256": files | {own: checkpoint._own_hash(record)}})


def rewrite_in_older_format(folder, written):
    """Rewrite the record in folder in an older format."""
    record = checkpoint.read(folder)
    rewrite_with_new_hash(
        folder,
        {k: v for k, v in record.items() if k != "packed" or written > 1} | {"format": written},
    )


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_comes_back_bit_by_bit(model, batch, change, tmp_path):
    model = CHANGES[change](model)
    checkpoint.save(model, tmp_path / "here")
    back = checkpoint.load(tmp_path / "here")
    assert same(model, back) and not back.training
    assert torch.equal(model(batch[0]), back(batch[0]))
    assert cost.macs(model) == cost.macs(back)
    assert all(parameter.requires_grad for parameter in back.parameters())
    back(batch[0]).sum().backward()  # and can be trained on


def test_every_architecture_comes_back_cut_and_whole(any_model, batch, tmp_path):
    block = models.view(any_model).blocks[-1]
    cut = {
        ("stages.0", "width"): [1],
        (block.name, "heads"): [0],
        (block.name, "neurons"): range(block.neurons),
    }
    for name, model in {"whole": any_model, "cut": shrink.remove(any_model, cut)}.items():
        checkpoint.save(model, tmp_path / name)
        assert torch.equal(checkpoint.load(tmp_path / name)(batch[0]), model(batch[0]))


def test_a_real_swin_comes_back_with_its_window_masks(tmp_path):
    model = models.create(
        "swin_tiny_patch4_window7_224",
        num_classes=3,
        image_size=64,
        depths=(1, 2, 1, 1),
        embed_dim=48,
    ).eval()
    checkpoint.save(model, tmp_path)
    back, x = checkpoint.load(tmp_path), torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), back(x))
    assert not any(tensor.is_meta for tensor in (*back.parameters(), *back.buffers()))
    held = dict(model.named_buffers())  # also those that no state dict holds
    assert all(torch.equal(held[name], tensor) for name, tensor in back.named_buffers())


def test_the_record_says_what_it_is(vit, tmp_path):
    written = checkpoint.save(vit, tmp_path, extra={"top1": 84.25})
    record = checkpoint.read(tmp_path)
    assert record == written == json.loads((tmp_path / "model.json").read_text())
    assert record["format"] == 3 and record["extra"] == {"top1": 84.25}
    assert record["recipe"] == vit.recipe and record["recipe"]["name"] == "conv_vit"
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert record["sha256"]["model.safetensors"] == digest
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]
    assert cost.bytes_disk(vit) == cost.bytes_disk(vit, folder=tmp_path)
    assert cost.bytes_disk(vit) == (tmp_path / "model.safetensors").stat().st_size


def test_a_fresh_process_loads_it(swin, batch, tmp_path):
    swin = cut(swin)
    checkpoint.save(swin, tmp_path)
    torch.save(batch[0], tmp_path / "x.pt")
    code = (
        "import sys, torch, timm\n"
        "timm.layers.set_fused_attn(False)\n"
        "from vitlab import checkpoint\n"
        "x = torch.load(sys.argv[1] + '/x.pt', weights_only=True)\n"
        "torch.save(checkpoint.load(sys.argv[1])(x), sys.argv[1] + '/y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    y = torch.load(tmp_path / "y.pt", weights_only=True)
    assert torch.allclose(
        y, swin(batch[0]), atol=1e-5
    )  # another number of threads may add in another order


def test_saving_and_loading_leave_the_random_numbers_alone(vit, tmp_path):
    vit = without_rows(vit)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    checkpoint.save(vit, tmp_path)
    checkpoint.load(tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_a_loaded_model_does_not_change_with_its_file(vit, tmp_path):
    checkpoint.save(vit, tmp_path)
    back = checkpoint.load(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:  # in place, as cp does
        file.write(bytes(path.stat().st_size))
    assert same(vit, back)


def test_weights_in_half_precision(model, tmp_path):
    model = cut(model)
    checkpoint.save(model, tmp_path / "half", dtype=torch.float16)
    checkpoint.save(model, tmp_path / "full")
    stored = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    own = model.state_dict()
    assert all(
        stored[name].dtype == (torch.float16 if t.is_floating_point() else t.dtype)
        for name, t in own.items()
    )
    back = checkpoint.load(tmp_path / "half")
    assert all(t.dtype == own[name].dtype for name, t in back.state_dict().items())
    assert all(
        torch.equal(t, own[name].to(stored[name].dtype).to(t.dtype))
        for name, t in back.state_dict().items()
    )
    assert cost.bytes_disk(back, folder=tmp_path / "half") < 0.65 * cost.bytes_disk(
        model, folder=tmp_path / "full"
    )


def test_half_precision_that_does_not_hold_a_value(vit, tmp_path):
    with torch.no_grad():
        vit.head.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="head.weight does not fit into torch.float16"):
        checkpoint.save(vit, tmp_path / "never", dtype=torch.float16)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("shapes", [{"a": (3, 7)}, {"a": (1,), "b": (16, 8)}, {}])
def test_masks_come_back_exactly(vit, shapes, tmp_path):
    masks = {name: torch.rand(shape) < 0.5 for name, shape in shapes.items()}
    checkpoint.save(vit, tmp_path, masks=masks)
    back = checkpoint.load_masks(tmp_path)
    assert back.keys() == masks.keys()
    assert all(
        back[name].dtype == torch.bool and torch.equal(back[name], mask)
        for name, mask in masks.items()
    )
    checkpoint.save(vit, tmp_path)  # the next save without masks leaves none behind
    assert checkpoint.load_masks(tmp_path) == {} and not (tmp_path / "masks.safetensors").exists()


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("sparsity", [0.9, 0.5, 0.01])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_weights_and_masks_come_back_whether_applied_or_not(
    model, batch, applied, sparsity, dtype, tmp_path
):
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    keep = masks.keep_largest({name: p.abs() for name, p in weights.items()}, sparsity=sparsity)
    kept = next(name for name, mask in keep.items() if 0 < mask.sum() < mask.numel())
    if applied:
        prune.apply(model, keep)
        with torch.no_grad():
            weights[kept].masked_fill_(
                weights[kept] == weights[kept][keep[kept]][0], 0
            )  # zero, and in its mask
    if dtype is not None:
        model = model.to(dtype).float()
    record = checkpoint.save(model, tmp_path, masks=keep, dtype=dtype)
    back, loaded = checkpoint.load(tmp_path), checkpoint.load_masks(tmp_path)
    assert same(model, back) and torch.equal(model(batch[0]), back(batch[0]))
    assert loaded.keys() == keep.keys()
    assert all(torch.equal(loaded[name], keep[name]) for name in keep)
    if applied:  # what is packed holds its mask, and is not stored twice
        apart = tmp_path / "masks.safetensors"
        assert not set(record["packed"]) & set(
            safetensors.torch.load_file(apart) if apart.exists() else {}
        )
        assert record["packed"] or sparsity == 0.01


def test_ninety_percent_zeros_take_at_most_fourteen_percent_of_the_bytes(tmp_path):
    model = models.create("vit_small_patch16_224", num_classes=10, depth=2)
    weights = {name: p.abs() for name, p in model.named_parameters() if p.ndim == 2}
    keep = masks.keep_largest(weights, sparsity=0.9)
    checkpoint.save(model, tmp_path / "dense")
    dense = cost.bytes_disk(model, folder=tmp_path / "dense")
    prune.apply(model, keep)
    checkpoint.save(model, tmp_path / "masked", masks=keep)
    files = sum(path.stat().st_size for path in (tmp_path / "masked").glob("*.safetensors"))
    rest = 4 * sum(
        tensor.numel() for name, tensor in model.state_dict().items() if name not in keep
    )
    assert files - rest < 0.135 * (dense - rest)  # 0.1 of the values and a 32nd for the bits
    assert files == cost.bytes_disk(model, folder=tmp_path / "masked") == cost.bytes_disk(model)
    checkpoint.save(model, tmp_path / "half", masks=keep, dtype=torch.float16)
    assert cost.bytes_disk(model, folder=tmp_path / "half") < 0.7 * files


@pytest.mark.parametrize("written", [1, 2])
def test_checkpoints_of_older_formats_are_read(vit, written, tmp_path):
    masks = {"apart": torch.rand(3, 7) < 0.5}
    if written > 1:
        with torch.no_grad():
            vit.head.weight.zero_()  # packed
    else:
        for buffer in vit.buffers():
            buffer.add_(1)  # without zeros
    checkpoint.save(vit, tmp_path, masks=masks, extra={"top1": 9})
    rewrite_in_older_format(tmp_path, written)
    assert same(vit, checkpoint.load(tmp_path)) and checkpoint.read(tmp_path)["extra"] == {
        "top1": 9
    }
    assert torch.equal(checkpoint.load_masks(tmp_path)["apart"], masks["apart"])


COMMITTED = sorted((files.repository() / "checkpoints").glob("*/*"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda path: path.name)
def test_the_committed_checkpoints_are_read(folder):
    assert checkpoint.read(folder)["extra"]["test"] and not checkpoint.load(folder).training


@pytest.mark.parametrize(
    "shape, reason",
    [
        ([3, 64], r"needs 24 bytes of bits; got 12"),
        ([4, 24], r"size mismatch for head.weight: .*\[4, 24\].*\[3, 32\]"),
    ],
)
def test_bits_that_do_not_belong_to_their_record(vit, shape, reason, tmp_path):
    with torch.no_grad():
        vit.head.weight.zero_()
    record = checkpoint.save(vit, tmp_path)
    assert record["packed"]["head.weight"] == [3, 32]
    rewrite_with_new_hash(tmp_path, record | {"packed": record["packed"] | {"head.weight": shape}})
    with pytest.raises(ValueError, match=reason):
        checkpoint.load(tmp_path)


def test_parameters_that_share_memory_are_stored_apart(vit, tmp_path):
    whole = torch.randn(4, 32)
    vit.head.weight = torch.nn.Parameter(whole[:3])  # a view of a larger tensor
    vit.blocks[0].mlp.fc2.weight = vit.blocks[1].mlp.fc2.weight
    checkpoint.save(vit, tmp_path)
    assert same(vit, checkpoint.load(tmp_path))


# --- broken and foreign checkpoints


@pytest.mark.parametrize("missing", ["", "model.json", "model.safetensors"])
def test_missing_files(vit, missing, tmp_path):
    if missing:
        checkpoint.save(vit, tmp_path / "here")
        (tmp_path / "here" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"here.*{missing}"):
        checkpoint.load(tmp_path / "here")


@pytest.mark.parametrize(
    "change", [lambda data: data[:-40], lambda data: data[:-1] + bytes([data[-1] ^ 1])]
)
def test_altered_tensors(vit, change, tmp_path):
    checkpoint.save(vit, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    for call in (checkpoint.load, checkpoint.read):
        with pytest.raises(
            ValueError, match=r"model.safetensors is not the file .* altered or cut short"
        ):
            call(tmp_path)


def test_an_altered_architecture(vit, tmp_path):
    record = checkpoint.save(vit, tmp_path)
    options = record["recipe"]["options"] | {"num_heads": 2}  # every tensor would fit
    rewrite(tmp_path, record | {"recipe": record["recipe"] | {"options": options}})
    with pytest.raises(
        ValueError, match="model.json was altered after saving: what it says is not"
    ):
        checkpoint.load(tmp_path)


def without(name):
    return lambda record: {key: value for key, value in record.items() if key != name}


def hashes(**change):
    """A record whose hashes are changed so; None takes one out."""

    def altered(record):
        found = record["sha256"] | {name.replace("_", "."): value for name, value in change.items()}
        return record | {
            "sha256": {name: value for name, value in found.items() if value is not None}
        }

    return altered


TAMPERED = {  # {what was altered: (the altered record, the reason for which it is refused)}
    "the result": (lambda r: r | {"extra": {"top1": 99.0}}, "was altered after saving"),
    "the version": (lambda r: r | {"vitlab": "9"}, "was altered after saving"),
    "the structure": (
        lambda r: r | {"structure": r["structure"] | {"skipped": ["blocks.0"]}},
        "was altered after",
    ),
    "a mask's shape": (
        lambda r: r | {"masks": r["masks"] | {"apart": [7, 3]}},
        "was altered after saving",
    ),
    "a mask less": (lambda r: r | {"masks": {"apart": [3, 7]}}, "was altered after saving"),
    "a mask more": (
        lambda r: r | {"masks": r["masks"] | {"no.such": [1]}},
        "was altered after saving",
    ),
    "no masks": (lambda r: r | {"masks": {}}, "was altered after saving"),
    "a packed tensor less": (lambda r: r | {"packed": {}}, "was altered after saving"),
    "an older format": (lambda r: r | {"format": 2}, "no checkpoint's record.*architecture"),
    "the oldest format": (lambda r: r | {"format": 1}, "no checkpoint's record.*architecture"),
    "a format that is none": (lambda r: r | {"format": 3.0}, "was altered after saving"),
    "a format that is a list": (lambda r: r | {"format": [3]}, r"has format \[3\]"),
    "a field that is none": (lambda r: r | {"mood": "good"}, "was altered after saving"),
    "hashes as a list": (lambda r: r | {"sha256": ["a"]}, "is no checkpoint's record"),
    "no hash of the weights": (hashes(model_safetensors=None), "was altered after saving"),
    "no hash of the masks": (hashes(masks_safetensors=None), "was altered after saving"),
    "no hash of the record": (hashes(record=None), "no checkpoint's record.*'record'"),
    "another hash of the weights": (hashes(model_safetensors="0"), "was altered after saving"),
    "a hash of another file": (hashes(other="0"), "was altered after saving"),
    "masks as a list": (lambda r: r | {"masks": ["apart"]}, "was altered after saving"),
    "a shape that is none": (
        lambda r: r | {"masks": {"apart": 21}},
        "was altered after saving",
    ),
    "a shape below 0": (
        lambda r: r | {"packed": {"w": [-3, 7]}},
        "was altered after saving",
    ),
    "no version": (without("vitlab"), "was altered after saving"),
    "no recipe": (without("recipe"), "no checkpoint's record.*'recipe'"),
    "no structure": (without("structure"), "no checkpoint's record.*'structure'"),
    "no packed": (without("packed"), "was altered after saving"),
    "no field of masks": (without("masks"), "was altered after saving"),
    "no extra": (without("extra"), "was altered after saving"),
    "no hashes": (without("sha256"), "no checkpoint's record.*'sha256'"),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_an_altered_record_is_refused_with_the_reason(vit, change, tmp_path):
    keep = {"apart": torch.rand(3, 7) < 0.5, "head.weight": torch.rand(3, 32) < 0.5}
    alter, reason = TAMPERED[change]
    rewrite(tmp_path, alter(checkpoint.save(vit, tmp_path, masks=keep, extra={"top1": 84.25})))
    for call in (checkpoint.read, checkpoint.load, checkpoint.load_masks):
        with pytest.raises(ValueError, match=f"model.json .*{reason}"):
            call(tmp_path)


def test_doubled_weights_without_their_hash(vit, tmp_path):
    record, path = checkpoint.save(vit, tmp_path), tmp_path / "model.safetensors"
    doubled = {
        name: 2 * tensor for name, tensor in safetensors.torch.load(path.read_bytes()).items()
    }
    safetensors.torch.save_file(doubled, path)
    with pytest.raises(ValueError, match="model.safetensors is not the file"):
        checkpoint.load(tmp_path)
    record["sha256"]["model.safetensors"] = None
    rewrite_with_new_hash(tmp_path, record)
    with pytest.raises(ValueError, match="model.safetensors is not the file"):
        checkpoint.load(tmp_path)
    for written in (1, 2, 3):
        del record["sha256"]["model.safetensors"]
        rewrite_with_new_hash(
            tmp_path, without("packed" if written == 1 else "")(record) | {"format": written}
        )
        with pytest.raises(ValueError, match="model.safetensors is not the file"):
            checkpoint.load(tmp_path)
        record["sha256"]["model.safetensors"] = "0"


@pytest.mark.parametrize("written", [1, 2])
def test_what_older_formats_know_of_their_record(vit, written, tmp_path):
    checkpoint.save(vit, tmp_path)
    rewrite_in_older_format(tmp_path, written)
    record = json.loads((tmp_path / "model.json").read_text())
    rewrite(tmp_path, record | {"recipe": record["recipe"] | {"num_classes": 4}})
    with pytest.raises(
        ValueError, match="was altered after saving: recipe or structure are not what was saved"
    ):
        checkpoint.load(tmp_path)
    rewrite(tmp_path, record | {"masks": {"no.such": [3]}})
    with pytest.raises(
        ValueError, match="the masks in .*model.json are in no file beside it: no.such"
    ):
        checkpoint.load_masks(tmp_path)


def test_any_json_can_be_the_callers_own(vit, tmp_path):
    extra = {2: (1.5, float("inf")), 10: None, "ä": [True, {"b": 1, "a": float("nan")}]}
    record = checkpoint.save(vit, tmp_path, extra=extra)
    assert str(checkpoint.read(tmp_path)) == str(record)  # nan is no nan


def test_another_format(vit, tmp_path):
    checkpoint.save(vit, tmp_path)
    rewrite_with_new_hash(tmp_path, checkpoint.read(tmp_path) | {"format": 99})
    with pytest.raises(ValueError, match="has format 99, this vitlab .* reads up to format 3"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "{", "1", '"format"', "\xff"])
def test_a_broken_record(vit, text, tmp_path):
    checkpoint.save(vit, tmp_path)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match="model.json is no checkpoint's record"):
        checkpoint.load(tmp_path)
    checkpoint.save(vit, tmp_path)  # but it can be replaced
    assert same(vit, checkpoint.load(tmp_path))


def test_tensors_of_another_architecture(vit, swin, tmp_path):
    checkpoint.save(swin, tmp_path / "swin")
    checkpoint.save(vit, tmp_path / "vit")
    os.replace(tmp_path / "swin" / "model.safetensors", tmp_path / "vit" / "model.safetensors")
    record = json.loads((tmp_path / "vit" / "model.json").read_text())
    digest = hashlib.sha256((tmp_path / "vit" / "model.safetensors").read_bytes()).hexdigest()
    rewrite_with_new_hash(tmp_path / "vit", record | {"sha256": {"model.safetensors": digest}})
    with pytest.raises(ValueError, match=r"no model that fits its record: .*VisionTransformer"):
        checkpoint.load(tmp_path / "vit")


def test_a_model_of_unknown_making(tmp_path):
    with pytest.raises(ValueError, match="has no recipe"):
        checkpoint.save(torch.nn.Linear(2, 2), tmp_path)


# --- what is in neither recipe nor structure


def small(name="vit_tiny_patch16_224", **options):
    """Return one of timm's models, made small, in eval mode: 3 classes, 32 px."""
    torch.manual_seed(0)
    sizes = dict(depth=3, num_heads=3)
    if name.startswith("swin"):
        sizes = dict(depths=(1, 2), num_heads=(3, 6), window_size=5)
    options = dict(patch_size=2, embed_dim=24, img_size=32) | sizes | options
    return timm.create_model(name, num_classes=3, **options).eval()


def made(name="vit_tiny_patch16_224", change=None, **options):
    """Return a small model that models.create made, and that `change` has changed."""
    sizes = {} if "_r26" in name else small(name)._model_args
    sizes = {key: value for key, value in sizes.items() if key not in ("num_classes", "img_size")}
    model = models.create(name, num_classes=3, image_size=32, **sizes | options).eval()
    if change:
        change(model)
    return model


CHANGED = {  # {what timm's own calls changed: (the model, its images' size)}
    "pooling": lambda: (made(change=lambda m: m.reset_classifier(5, "avg")), 32),
    "no classes": lambda: (made(change=lambda m: m.reset_classifier(0)), 32),
    "pooling of a Swin": lambda: (
        made("swin_tiny_patch4_window7_224", lambda m: m.reset_classifier(5, "max")),
        32,
    ),
    "image size": lambda: (made(change=lambda m: m.set_input_size((48, 32))), (48, 32)),
    "windows": lambda: (
        made("swin_tiny_patch4_window7_224", lambda m: m.set_input_size((64, 64), window_size=4)),
        64,
    ),
    "stem": lambda: (made("vit_tiny_r_s16_p8_224", patch_size=1), 32),
    "timm's own": lambda: (small(drop_path_rate=0.2), 32),
    "timm's own, cut": lambda: (shrink.remove(small(), {("blocks.1", "heads"): [0]}), 32),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's resampling
@pytest.mark.parametrize("case", CHANGED)
def test_what_timm_itself_records_comes_back(case, tmp_path):
    model, size = CHANGED[case]()
    checkpoint.save(model, tmp_path)
    x = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    back = checkpoint.load(tmp_path)
    assert torch.equal(model(x), back(x)) and back.num_classes == model.num_classes
    assert str(model) == str(back)  # drop-path, too
    checkpoint.save(back, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def other_attention(model):
    model.blocks[0].__class__ = type("Fewer", (type(model.blocks[0]),), {})


LOST = {  # {words of the refusal: what was done to the model}
    "blocks.2 is missing": lambda m: m.prune_intermediate_layers([0, 1]),
    "blocks.2.attn is missing": lambda m: setattr(m, "blocks", m.blocks[:2]),
    "blocks.3 was added": lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])),
    "blocks.0 has forward hooks": lambda m: m.blocks[0].register_forward_hook(lambda *_: None),
    "blocks.1 has forward hooks": lambda m: m.blocks[1].register_forward_pre_hook(lambda *_: None),
    "norm has a forward pass of its own": lambda m: setattr(m.norm, "forward", torch.relu),
    "blocks.0 is a Fewer instead of a Block": other_attention,
    "blocks.0.mlp.act is a ReLU instead of a GELU": lambda m: setattr(
        m.blocks[0].mlp, "act", torch.nn.ReLU()
    ),
    "norm has eps 0.1 instead of 1e-06": lambda m: setattr(m.norm, "eps", 0.1),
    "pos_embed is missing instead of [1, 257, 24]": lambda m: setattr(m, "pos_embed", None),
    "head is a Sequential instead of a Linear": lambda m: setattr(
        m, "head", torch.nn.Sequential(m.head)
    ),
    "norm.table is in no state dict": lambda m: m.norm.register_buffer(
        "table", torch.ones(2), persistent=False
    ),
}


@pytest.mark.parametrize("words", LOST)
def test_what_no_checkpoint_holds_is_refused_at_save(words, tmp_path):
    with pytest.raises(ValueError, match="cannot hold this model.*" + re.escape(words)):
        checkpoint.save(made(change=LOST[words]), tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_model_that_does_not_know_its_arguments_is_given_them(tmp_path):
    sizes = dict(img_size=32, patch_size=2, embed_dim=24, depth=3, num_heads=3)
    model = timm.models.VisionTransformer(num_classes=3, **sizes).eval()
    model = shrink.remove(model, {("blocks.1", "neurons"): range(9)})
    with pytest.raises(ValueError, match="has no recipe .* checkpoint.save the name and options"):
        checkpoint.save(model, tmp_path)
    with pytest.raises(ValueError, match="cannot hold this model: .*blocks.3 is missing"):
        checkpoint.save(model, tmp_path, name="vit_tiny_patch16_224", options=sizes | {"depth": 4})
    checkpoint.save(model, tmp_path, name="vit_tiny_patch16_224", options=sizes)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(checkpoint.load(tmp_path)(x), model(x))


def test_arguments_that_are_no_plain_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match="argument that a checkpoint cannot hold .*type"):
        checkpoint.save(small(norm_layer=torch.nn.LayerNorm), tmp_path)
    checkpoint.save(small(norm_layer="layernorm"), tmp_path)


# --- saves that do not end


def read_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_save_that_fails_leaves_the_old_checkpoint(vit, swin, at, tmp_path, monkeypatch):
    masks = {"head.weight": torch.ones(3, 32, dtype=torch.bool)}
    checkpoint.save(vit, tmp_path, masks=masks)
    before, write, calls = read_files(tmp_path), Path.write_bytes, []

    def full(path, data):
        calls.append(path)
        if len(calls) > at:
            write(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(swin, tmp_path, masks=masks)
    assert read_files(tmp_path) == before


@pytest.mark.parametrize("at", range(4))
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(vit, swin, at, tmp_path, monkeypatch):
    masks = {"head.weight": torch.ones(3, 32, dtype=torch.bool)}
    checkpoint.save(vit, tmp_path, masks=masks)
    replace, unlink, calls = os.replace, Path.unlink, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) > at:
            raise KeyboardInterrupt
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: None
    )  # a killed process does not tidy up
    if at < 3:
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(swin, tmp_path, masks=masks)
    else:
        checkpoint.save(swin, tmp_path, masks=masks)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)
    expected = vit if at == 0 else swin  # the record is the first to move
    assert same(checkpoint.load(tmp_path), expected)
    assert checkpoint.load_masks(tmp_path).keys() == masks.keys()
    checkpoint.save(vit, tmp_path)  # and the next save starts from there
    assert same(checkpoint.load(tmp_path), vit)
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]


def test_a_save_that_is_killed_after_one_that_was_killed(vit, swin, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    replace, write = os.replace, Path.write_bytes
    checkpoint.save(vit, tmp_path)
    monkeypatch.setattr(
        os, "replace", lambda old, new: replace(old, new) if "json" in str(old) else killed()
    )
    with pytest.raises(
        KeyboardInterrupt
    ):  # the record of the Swin is in place, its tensors are not
        checkpoint.save(swin, tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (write(path, data[:9]), killed()))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(vit, tmp_path)
    assert same(checkpoint.load(tmp_path), swin)


def test_a_folder_that_is_a_file(vit, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(
            OSError, match=r"cannot write the checkpoint folder .*taken.*: choose another folder"
        ):
            checkpoint.save(vit, folder)
    assert (tmp_path / "taken").read_text() == "mine"


def test_no_permission_to_write(vit, tmp_path, monkeypatch):
    checkpoint.save(vit, tmp_path)
    before = read_files(tmp_path)

    def refused(path, data):  # root may write anywhere, so permission bits would not do
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(
        PermissionError, match=r"cannot write the checkpoint folder .*Permission denied.*choose"
    ):
        checkpoint.save(vit, tmp_path)
    assert read_files(tmp_path) == before
