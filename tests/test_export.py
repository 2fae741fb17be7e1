"""Exports: what other runtimes compute is what torch computes, for any number of images; a bad file is never left."""

import subprocess
import sys

import pytest
import torch

from vitlab import export, masks, models, prune, shrink

CHANGES = {
    "whole": lambda model: model,
    "units": lambda model: shrink.remove(model, units(model)),
    "rows": lambda model: shrink.remove(model, {(list(models.view(model).linears(["qkv"]))[-1], "rows"): [0, 5]}),
    "ranks": lambda model: shrink.compress(shrink.remove(model, units(model)), ratio=0.5, method="svd", multiple=1)[0],
}


def units(model):
    first, last = (models.view(model).blocks[i] for i in (0, -1))
    thinner = [head * last.head_dim for head in range(last.num_heads)]
    return {(first.name, "heads"): [1], (first.name, "neurons"): range(5), (last.name, "v"): thinner}


def check(model, tmp_path):
    error = export.to_onnx(model, tmp_path / "model.onnx")
    assert error < 1e-5 and [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session, images = export.Session(tmp_path / "model.onnx", threads=1), torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(session(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["units", "ranks"])
def test_cut_models_in_onnxruntime(model, change, tmp_path):
    check(CHANGES[change](model), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_every_architecture_in_onnxruntime(any_model, change, tmp_path):
    check(CHANGES[change](any_model), tmp_path)


def test_exported_programs_run_without_vitlab(swin, tmp_path):
    swin = CHANGES["units"](swin)
    torch.export.save(export.program(swin), tmp_path / "swin.pt2")
    torch.save(images := torch.randn(3, 3, 16, 16), tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "model = torch.export.load(sys.argv[1] + '/swin.pt2').module()\n"
        "images = torch.load(sys.argv[1] + '/images.pt', weights_only=True)\n"
        "torch.save(model(images), sys.argv[1] + '/logits.pt')\n"
        "assert not {'vitlab', 'timm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), swin(images))


def test_a_file_that_is_wrong_does_not_replace_one_that_is_there(vit, tmp_path, monkeypatch):
    path = tmp_path / "vit.onnx"
    path.write_text("older")
    with monkeypatch.context() as patch:
        patch.setattr(export, "_error", lambda model, session: float("nan"))
        with pytest.raises(
            ValueError, match=r"vit.onnx was not written: its logits differ by nan of the largest .at most 1e-04."
        ):
            export.to_onnx(vit, path)
    assert path.read_text() == "older" and len(list(tmp_path.iterdir())) == 1


def test_without_the_packages(vit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r'onnxruntime is missing: pip install "vitlab\[export\]"'):
        export.Session(tmp_path / "any.onnx")


def two_of_four(model):
    weights = {f"{name}.weight": layer.weight for name, layer in models.view(model).linears().items()}
    prune.apply(model, {name: masks.n_of_m(weight.detach().abs(), 2, 4) for name, weight in weights.items()})


def test_two_of_four_is_told_from_other_zeros():
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 0, 3, 4], [0, 0, 0, 0, 5, 0, 0, 0]])
    assert export.is_two_of_four(weight)
    assert not export.is_two_of_four(torch.ones(2, 8)) and not export.is_two_of_four(torch.zeros(2, 8))
    assert not export.is_two_of_four(weight[:, :6]) and not export.is_two_of_four(weight.roll(1, 1))


def test_semi_structured_off_such_a_gpu(vit):
    with pytest.raises(ValueError, match="no linear layer is masked 2:4"):
        export.semi_structured(vit)
    two_of_four(vit)
    with pytest.raises(ValueError, match="precision is bf16 or float16; got 'float32'"):
        export.semi_structured(vit, precision="float32")
    with pytest.raises(RuntimeError, match="NVIDIA GPUs of compute capability 8.0 or newer, and the model is on a cpu"):
        export.semi_structured(vit)


NEW_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.skipif(not NEW_GPU, reason="there is no GPU of compute capability 8.0 or newer")
def test_semi_structured_computes_the_same():
    torch.manual_seed(0)
    model = models.create("vit_tiny_patch16_224", num_classes=10).cuda().eval()
    two_of_four(model)
    sparse, images = export.semi_structured(model), torch.randn(64, 3, 224, 224, device="cuda")
    with torch.inference_mode():
        expected, found = model.bfloat16()(images.bfloat16()), sparse(images.bfloat16())
    assert type(sparse.blocks[0].mlp.fc1.weight.data).__name__.startswith("SparseSemiStructured")
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
