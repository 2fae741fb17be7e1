"""Tests of runtimes: what a model answers where it runs is measured, and what cannot be had says why."""

import sys
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import onnx
import pandas as pd
import pytest
import torch
from test_deploy import noise

from vitlab.evaluation import bench, deploy, evaluate, export, runtimes
from vitlab.pruning import shrink
from vitlab.training import data

HERE = ["eager float32", "eager bf16", "onnxruntime float32"]


@pytest.fixture
def images():
    splits = [noise(count, seed) for seed, count in enumerate((40, 30, 12))]
    return data.Dataset("noise", ["cat", "dog", "emu"], *splits, 16, "noise")


def test_what_is_left_in_torch_and_onnxruntime(vit, images, monkeypatch):
    monkeypatch.setattr(evaluate, "gains_from_bf16", lambda device: True)
    half = shrink.remove(vit, {("blocks.0", "neurons"): range(20)})
    made, sizes, refused = runtimes.settings({"dense": vit, "half": half}, HERE, images=images)
    assert list(made) == [f"{name} {way}" for name in ("dense", "half") for way in HERE]
    assert refused.empty and list(sizes.model) == list(made)
    size = sizes.set_index("model").bytes
    assert size["half onnxruntime float32"] < size["dense onnxruntime float32"]
    assert size["dense eager bf16"] == size["dense eager float32"] // 2
    table = runtimes.left(made, images.test, batch=5).set_index("model")
    assert set(table.images) == {12} and table.top1.between(0, 100).all()
    for name, model in {"dense": vit, "half": half}.items():
        assert table.difference[f"{name} eager float32"] == 0
        assert table.difference[f"{name} onnxruntime float32"] < 1e-4
        assert 0 < table.difference_mean[f"{name} eager bf16"] < 0.1
        [(shown, labels)] = images.test.batches(12)
        with torch.inference_mode():
            right = (model(shown).argmax(1) == labels).double().mean().item()
        assert table.top1[f"{name} eager float32"] == pytest.approx(100 * right)
    times = bench.latency(made, batch=2, repeats=3)
    dense = times.model.str.startswith("dense")
    assert (times.here[dense] == 1).all() and times.here.notna().all()


def test_a_row_says_why_a_runtime_cannot_be_had(vit, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    ways = ["eager float32", "openvino float32", "onnxruntime int8"]
    made, sizes, refused = runtimes.settings({"dense": vit}, ways)
    assert list(made) == ["dense eager float32"] and len(sizes) == 1
    assert refused.model.tolist() == [f"dense {way}" for way in ways[1:]]
    assert refused.runtime.tolist() == ["openvino", "onnxruntime"]
    words = 'openvino is missing: pip install "vitlab[runtimes]"'
    assert refused.note.tolist() == [words, "int8 is calibrated by images; got none"]
    with pytest.raises(ValueError, match="unknown runtime 'tensorrt'"):
        bench.Setting(vit, "tensorrt")


def test_a_processor_without_bf16_is_not_timed_imitating_it(vit, monkeypatch):
    monkeypatch.setattr(evaluate, "gains_from_bf16", lambda device: False)
    ways = ["eager float32", "eager bf16", "openvino bf16", "openvino int8-bf16"]
    made, _, refused = runtimes.settings({"dense": vit}, ways)
    assert list(made) == ["dense eager float32"]
    assert set(refused.note) == {"this cpu has no bf16 instructions: it would imitate them"}
    assert len(refused) == 3


def test_int8_is_made_as_it_is_exported(vit, images, monkeypatch):
    given = []

    def convert(source, path, images=None, dynamic=False):
        given.append((path.suffix, images is not None))
        path.write_bytes(source.read_bytes())

    monkeypatch.setattr(deploy, "convert", convert)
    made, sizes, refused = runtimes.settings({"dense": vit}, ["onnxruntime int8"], images=images)
    assert given == [(".onnx", True)] and refused.empty
    table = runtimes.left(made, images.test)
    assert table.difference.item() < 1e-4  # the stand-in is in float32
    assert pd.notna(table.top1).all()


def test_dynamic_int8_scales_what_layers_read_anew(vit, images, tmp_path):
    made, _, refused = runtimes.settings(
        {"dense": vit}, ["eager float32", "onnxruntime int8-dynamic"], images=images
    )
    assert refused.empty
    assert 0 < runtimes.left(made, images.test).difference_mean.iloc[1] < 0.05
    export.to_onnx(vit, tmp_path / "float32.onnx")
    seen = deploy.first(images.train, 8)
    deploy.convert(tmp_path / "float32.onnx", tmp_path / "int8.onnx", seen, dynamic=True)
    made = Counter(node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node)
    linears = sum(isinstance(module, torch.nn.Linear) for module in vit.modules())
    assert made["MatMulInteger"] == linears
    assert made["MatMul"] == 2 * len(vit.blocks)  # queries with keys, and with values
    with pytest.raises(ValueError, match="dynamic int8 is onnxruntime's"):
        deploy.convert(tmp_path / "float32.onnx", tmp_path / "int8.xml", seen, dynamic=True)
    with pytest.raises(ValueError, match="dynamic int8 needs images"):
        deploy.convert(tmp_path / "float32.onnx", tmp_path / "int8.onnx", dynamic=True)
    with pytest.raises(ValueError, match="unknown precision 'int8-dynamic'"):
        bench.Setting(vit, "openvino", "int8-dynamic")


@pytest.mark.skipif(
    not find_spec("openvino"), reason='openvino is missing: pip install "vitlab[runtimes]"'
)
def test_openvino_beside_the_others(vit, images):
    ways = ["eager float32", "openvino float32"]
    made, sizes, refused = runtimes.settings({"dense": vit}, ways, images=images)
    assert refused.empty and runtimes.left(made, images.test).difference.max() < 1e-4
    times = bench.latency({"one": bench.Setting(vit, "openvino")}, batch=2, repeats=3)
    assert times.runtime.tolist() == ["openvino"]


@pytest.mark.skipif(
    not find_spec("openvino"), reason='openvino is missing: pip install "vitlab[runtimes]"'
)
def test_openvino_computes_in_bf16_what_it_is_told(vit, images, monkeypatch):
    monkeypatch.setattr(evaluate, "gains_from_bf16", lambda device: True)
    ways = ["eager float32", *(f"openvino {how}" for how in ("bf16", "int8", "int8-bf16"))]
    made, sizes, refused = runtimes.settings({"dense": vit}, ways, images=images)
    assert refused.empty
    size = sizes.set_index("model").bytes
    assert size["dense openvino int8-bf16"] == size["dense openvino int8"]
    assert runtimes.left(made, images.test).difference_mean.max() < 0.05
    settings = made | {"more": bench.Setting(vit, "openvino", "bf16")}
    assert set(bench.latency(settings, batch=2, repeats=3).precision) == {
        "float32",
        "bf16",
        "int8",
        "int8-bf16",
    }


@pytest.mark.parametrize("bf16", [False, True])
def test_a_session_in_openvino_has_the_precision_that_was_asked(bf16, monkeypatch):
    told = {}

    class Core:
        def set_property(self, options):
            pass

        def compile_model(self, path, device, options):
            told.update(options)

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core, __spec__=None))
    monkeypatch.setattr(export, "_need", lambda name: None)
    export.session("any.xml", "openvino", bf16=bf16)
    assert told["INFERENCE_PRECISION_HINT"] == ("bf16" if bf16 else "f32")


def test_what_is_timed_in_int8_computes_the_model(vit):
    setting = runtimes.timed(vit, "onnxruntime int8")
    assert (setting.runtime, setting.precision) == ("onnxruntime", "int8")
    shown = export.random_images(vit, 8)
    with torch.inference_mode():
        expected = vit(shown)
    off = (bench.runnable(setting, shown.device)(shown) - expected).abs().mean()
    assert 0 < off < 0.05 * expected.abs().max()  # and it is no float32
    assert runtimes.timed(vit, "eager").precision == "float32"
