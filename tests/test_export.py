"""Exports: what other runtimes compute is what torch computes, for any number of images; a bad file is never left."""

import subprocess
import sys

import pytest
import torch

from vitlab import export, models, shrink

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
        with pytest.raises(ValueError, match=r"vit.onnx was not written: its logits differ by nan of the largest .at most 1e-04."):
            export.to_onnx(vit, path)
    assert path.read_text() == "older" and len(list(tmp_path.iterdir())) == 1


def test_without_the_packages(vit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r'onnxruntime is missing: pip install "vitlab\[export\]"'):
        export.Session(tmp_path / "any.onnx")
