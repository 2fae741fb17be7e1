"""Tests of deploy: what leaves for another machine is checked, described, whole, and needs no torch."""

import json
import subprocess
import sys
import venv
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from onnx import shape_inference
from PIL import Image

from vitlab import files, models
from vitlab.__main__ import main
from vitlab.evaluation import deploy, export
from vitlab.models import checkpoint
from vitlab.pruning import prune
from vitlab.training import data

PAGE = files.repository() / "docs" / "your-own-model.md"
MOMENTS = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def noise(count, seed):
    """Return a data.Split of images of 20 px, of which 16 are shown, as data.load makes them."""
    store = np.random.default_rng(seed).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
    labels = torch.arange(count) % 3
    return data.Split(store, np.arange(count), labels, 16, 16, *MOMENTS, ("cat", "dog", "emu"))


@pytest.fixture
def images():
    splits = [noise(count, seed) for seed, count in enumerate((40, 30, 12))]
    return data.Dataset("noise", ["cat", "dog", "emu"], *splits, 16, "noise")


@pytest.fixture
def folder(vit, tmp_path):
    vit.normalise = MOMENTS
    checkpoint.save(vit, tmp_path / "run" / "dense", extra={"test": {"top1": 84.5}})
    kept = {"method": "pool", "target": 0.5, "top1": 83.25}
    checkpoint.save(vit, tmp_path / "run" / "half", extra=kept)
    return tmp_path / "run" / "half"


def kinds_of(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def quantised_inputs(path, kind):
    """Return of each node of a kind which of its inputs are in int8."""
    graph = onnx.load(path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    nodes = [node for node in graph.node if node.op_type == kind]
    return [[made_by.get(name) == "DequantizeLinear" for name in node.input[:2]] for node in nodes]


def test_a_model_leaves_with_what_its_user_must_know(folder, images, tmp_path):
    path = tmp_path / "out" / "small.onnx"
    lines = deploy.write(folder, path, images=images)
    assert {each.name for each in path.parent.iterdir()} == {"small.onnx", "small.json", "small.md"}
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["size"] == [16, 16] and about["border"] == pytest.approx(0.1)
    assert (about["mean"], about["std"]) == tuple(map(list, MOMENTS))
    assert about["classes"] == ["cat", "dog", "emu"]
    card = path.with_suffix(".md").read_text()
    assert deploy.LINES[".onnx"].replace("NAME", "small") in card and "from vitlab" not in card
    for words in (
        "84.50 % before the cut, 83.25 % of this model",
        "| method | pool |",
        "`license:`",
        "on 30 validation images of noise",
    ):
        assert words in card
    assert len(lines) == 2 and "\nlicense" not in card


def test_the_card_says_how_many_answers_of_each_file_are_right(
    folder, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(deploy, "_AGREEMENT", 0.8)  # of a toy on noise
    path = tmp_path / "small.onnx"
    lines = deploy.write(folder, path, images=images, int8=True)
    [(shown, labels)] = images.test.batches(12)
    with torch.inference_mode():
        answers = {"float32": checkpoint.load(folder)(shown)}
    answers["int8"] = export.session(path)(shown.contiguous())
    for precision, logits in answers.items():
        top1 = 100 * (logits.argmax(1) == labels).double().mean()
        line = f"{precision}: top-1 {top1:.1f} % on 12 test images"
        assert line in lines and f"- {line}" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("gain", [0.9, 1.1])
def test_int8_takes_what_gains(folder, images, tmp_path, monkeypatch, gain):
    times = {"float32": 3, "linear": 2, "all": 2 / gain}
    times = {name: np.full(5, time, float) for name, time in times.items()}
    monkeypatch.setattr(deploy, "_times", lambda sessions, images: times)
    monkeypatch.setattr(deploy, "_AGREEMENT", 0.8)  # of a toy on noise
    path = tmp_path / "small.onnx"
    lines = deploy.write(folder, path, images=images, int8=True)
    assert any(f"convolutions in {'int8' if gain > 1 else 'float32'}" in line for line in lines)
    convolutions = quantised_inputs(path, "Conv")
    assert convolutions and all(each == [gain > 1] * 2 for each in convolutions)
    # Layers are in int8, products of queries, keys and values are not.
    assert sorted(quantised_inputs(path, "MatMul")) == [[False] * 2] * 4 + [[True] * 2] * 8


@pytest.mark.parametrize("changed", [(True, True), (False, False)])
def test_int8_is_of_the_way_whose_logits_are_nearest(
    folder, images, tmp_path, monkeypatch, changed
):
    from onnxruntime import quantization

    quantize = quantization.quantize_static

    def worse(source, target, reader, *, per_channel, reduce_range, **options):
        """Quantise, but set the last layer to zero in all ways but one."""
        quantize(
            source, target, reader, per_channel=per_channel, reduce_range=reduce_range, **options
        )
        if (per_channel, reduce_range) != changed:
            written = onnx.load(target)
            for tensor in written.graph.initializer:
                if "head.weight" in tensor.name and tensor.name.endswith("scale"):
                    tensor.CopyFrom(
                        onnx.numpy_helper.from_array(
                            0 * onnx.numpy_helper.to_array(tensor), tensor.name
                        )
                    )
            onnx.save(written, target)

    monkeypatch.setattr(quantization, "quantize_static", worse)
    monkeypatch.setattr(deploy, "_AGREEMENT", 0.8)
    lines = deploy.write(folder, tmp_path / "small.onnx", images=images, int8=True)
    assert f"per_channel={changed[0]}, reduce_range={changed[1]}" in lines[2]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("errors", "chosen", "words"),
    [
        (
            [3, 2, 4, 9, 1, 9],
            4,
            "per_channel=False, reduce_range=False, signed weights with Smooth",
        ),
        ([3, 1, 2, 2, 2, 2], 1, "reduce_range=False, unsigned weights with SmoothQuant"),
        ([1, 2, 1.05, 3, 3, 3], 2, "per_channel=True, reduce_range=False, signed weights without"),
    ],
)
def test_int8_smooths_where_that_is_nearer(
    vit, images, tmp_path, monkeypatch, dynamic, errors, chosen, words
):
    """With and without by one way, then the other ways; unsigned weights must be a tenth nearer."""
    times = {"float32": np.full(5, 3.0), "linear": np.full(5, 2.0), "all": np.full(5, 2.5)}
    monkeypatch.setattr(deploy, "_times", lambda sessions, images: times)
    logits, told = [], iter(errors)
    monkeypatch.setattr(
        deploy, "_mean_error", lambda given, expected: logits.append(given) or next(told)
    )
    export.to_onnx(vit, tmp_path / "float32.onnx")
    shown, path = deploy.first(images.train, 40), tmp_path / "int8.onnx"
    lines = deploy.convert(tmp_path / "float32.onnx", path, shown, dynamic=dynamic)
    assert words in lines[0] and next(told, None) is None
    torch.testing.assert_close(export.session(path)(shown), logits[chosen])


with_openvino = pytest.mark.skipif(
    not (find_spec("openvino") and find_spec("nncf")),
    reason='openvino or nncf is missing: pip install "vitlab[runtimes]"',
)


@with_openvino
def test_openvino_float32_leaves_whole(folder, vit, images, tmp_path, capsys, monkeypatch):
    weights = {f"{name}.weight": each.weight for name, each in models.view(vit).linears().items()}
    prune.apply(vit, {name: torch.rand_like(weight) > 0.5 for name, weight in weights.items()})
    vit.normalise = MOMENTS
    checkpoint.save(vit, folder)
    path = tmp_path / "out" / "small.xml"
    monkeypatch.setattr("vitlab.__main__._images_of", lambda *_: images)
    assert main(["export", folder, path]) == 0
    names = {"small.xml", "small.bin", "small.json", "small.md"}
    assert {each.name for each in path.parent.iterdir()} == names
    size = sum(path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin"))
    assert f"small.xml: {size / 1e6:.1f} MB\nfloat32: logits as torch's" in capsys.readouterr().out
    assert 'openvino.compile_model("small.xml"' in path.with_suffix(".md").read_text()
    assert str(tmp_path) not in path.read_text()
    assert "openvino_telemetry" not in {name for name, each in sys.modules.items() if each}
    session = export.session(path, "openvino")
    with torch.inference_mode():
        for count in (1, 3):
            shown = torch.randn(count, 3, 16, 16)
            torch.testing.assert_close(session(shown), vit(shown), rtol=1e-4, atol=1e-4)
    # Masked weights are plain constants: nothing as large as a weight is multiplied elsewhere.
    graph = export.openvino_package().Core().read_model(str(path))
    layers = [each for each in graph.get_ops() if each.get_type_name() == "MatMul"]
    weighed = [each for each in layers if is_constant(each.input_value(1))]
    assert len(weighed) == len(weights) + 1  # the head's
    factors = [each for each in graph.get_ops() if each.get_type_name() == "Multiply"]
    least = min(weight.numel() for weight in weights.values())
    constants = [end for each in factors for end in each.input_values() if is_constant(end)]
    assert all(np.prod(list(end.get_shape())) < least for end in constants)


def is_constant(end):
    return end.get_node().get_type_name() == "Constant"


@with_openvino
def test_openvino_int8_is_of_the_bits_whose_logits_are_nearest(
    folder, images, tmp_path, monkeypatch
):
    times = {name: np.full(5, 2.0) for name in ("float32", "int8")}
    monkeypatch.setattr(deploy, "_times", lambda sessions, images: times)
    monkeypatch.setattr(deploy, "_AGREEMENT", 0.8)  # of a toy on noise
    path = tmp_path / "small.xml"
    logits, made = [], deploy._mean_error

    def first_is_nearest(given, expected):
        logits.append(given)
        return len(logits)

    monkeypatch.setattr(deploy, "_mean_error", first_is_nearest)
    lines = deploy.write(folder, path, images=images, int8=True)
    assert "weights of eight bits with SmoothQuant" in lines[2] and "1.00 times as fast" in lines[3]
    shown = deploy.first(images.train, 128)
    torch.testing.assert_close(export.session(path, "openvino")(shown), logits[0])
    assert 0 < made(logits[0], logits[1]) < 0.2  # without SmoothQuant
    assert 0 < made(logits[0], logits[2]) < 0.2  # of the other bits
    kinds = [each.get_type_name() for each in graph_of(path).get_ops()]
    layers = [each for each in graph_of(path).get_ops() if each.get_type_name() == "MatMul"]
    assert kinds.count("FakeQuantize") >= len([each for each in layers if not is_product(each)])
    monkeypatch.setattr(deploy, "_agreement", lambda *_: 0.5)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="small.xml was not written: in int8 50.0 %"):
        deploy.write(folder, path, images=images, int8=True)
    assert path.read_bytes() == before


@with_openvino
def test_openvino_int8_smooths_only_where_that_is_nearer(swin, images, tmp_path):
    source, path, shown = (
        tmp_path / "swin.onnx",
        tmp_path / "swin.xml",
        deploy.first(images.train, 40),
    )
    export.to_onnx(swin, source)
    lines = deploy.convert(source, path, shown)
    with torch.inference_mode():
        error = deploy._mean_error(export.session(path, "openvino")(shown), swin(shown))
    assert error < 0.02, lines


def graph_of(path):
    return export.openvino_package().Core().read_model(str(path))


def is_product(layer):
    return "FakeQuantize" not in {
        each.get_node().get_type_name() for each in layer.input_values()
    } and not is_constant(layer.input_value(1))


def test_without_openvino(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("vitlab.__main__._images_of", lambda *_: None)
    assert main(["export", folder, tmp_path / "small.xml"]) == 1
    words = 'openvino is missing: pip install "vitlab[runtimes]"'
    assert words in capsys.readouterr().err and not list(tmp_path.glob("small*"))


def test_a_model_that_answers_otherwise_leaves_nothing(folder, images, tmp_path, monkeypatch):
    path = tmp_path / "out" / "small.onnx"
    path.parent.mkdir()
    path.write_text("older")
    monkeypatch.setattr(deploy, "_agreement", lambda *_: 0.5)
    with pytest.raises(
        ValueError, match=r"in int8 50.0 % of its answers are torch's .at least 95 %"
    ):
        deploy.write(folder, path, images=images, int8=True)
    with monkeypatch.context() as patch:
        patch.setattr(export, "difference", lambda *_: float("nan"))
        with pytest.raises(ValueError, match="was not written: its logits differ by nan"):
            deploy.write(folder, path, images=images)
    assert path.read_text() == "older" and list(path.parent.iterdir()) == [path]


def test_what_cannot_be_right_is_refused_first(folder, vit, images, tmp_path, capsys):
    with pytest.raises(ValueError, match="does not end in .onnx, nor in .xml for OpenVINO"):
        deploy.write(folder, tmp_path / "small.bin")
    vit.normalise = None
    checkpoint.save(vit, tmp_path / "unsaid")
    with pytest.raises(ValueError, match="how its images were normalised: give --images"):
        deploy.write(tmp_path / "unsaid", tmp_path / "small.onnx")
    assert main(["export", folder, tmp_path / "small.onnx", "--int8"]) == 1
    assert "got no images: give --images" in capsys.readouterr().err
    assert not list(tmp_path.glob("small*"))
    assert main(["export", folder, tmp_path / "small.onnx"]) == 0
    said = capsys.readouterr().out
    assert "16 drawn images" in said and "top-1" not in said


def test_images_are_here_or_not(tmp_path):
    assert not any(
        data.is_here(name, root=tmp_path) for name in ("cifar10", "shapes", "photos", "")
    )
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    assert data.is_here("cifar10", root=tmp_path) and data.is_here(tmp_path, root=tmp_path)


def test_a_masked_model_holds_plain_constants(vit, tmp_path):
    weights = {f"{name}.weight": each.weight for name, each in models.view(vit).linears().items()}
    prune.apply(vit, {name: torch.rand_like(weight) > 0.5 for name, weight in weights.items()})
    export.to_onnx(vit, tmp_path / "masked.onnx")
    graph = onnx.load(tmp_path / "masked.onnx").graph
    constants = {each.name: list(each.dims) for each in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert sum(node.input[1] in constants for node in layers) == len(weights) + 1  # the head's
    factors = [name for node in graph.node if node.op_type == "Mul" for name in node.input]
    assert all(not constants.get(name) for name in factors)  # scalars at most
    assert "Where" not in kinds_of(tmp_path / "masked.onnx")
    torch.nn.utils.prune.l1_unstructured(vit.blocks[0].attn.qkv, "weight", 0.5)
    with pytest.raises(ValueError, match=r"call torch.nn.utils.prune.remove"):
        export.to_onnx(vit, tmp_path / "hooks.onnx")


def test_attention_is_opened_and_no_path_is_told(vit, tmp_path):
    assert type(vit.blocks[0].attn).__module__.startswith("timm")
    export.to_onnx(vit, tmp_path / "vit.onnx")
    assert type(vit.blocks[0].attn).__module__.startswith("timm")  # in the file alone
    shapes = shape_inference.infer_shapes(onnx.load(tmp_path / "vit.onnx")).graph.value_info
    assert len(shapes) > 50 and max(len(each.type.tensor_type.shape.dim) for each in shapes) == 4
    assert b"site-packages" not in (tmp_path / "vit.onnx").read_bytes()
    assert str(files.repository()).encode() not in (tmp_path / "vit.onnx").read_bytes()


def test_the_page_shows_the_lines():
    for lines in deploy.LINES.values():
        assert len([line for line in lines.splitlines() if line]) <= 8
        assert "vitlab" not in lines and "torch" not in lines
    text = PAGE.read_text()
    assert f"```python\n{deploy.LINES['.onnx'].replace('NAME', 'small')}\n```" in text
    first, *_, run, _ = deploy.LINES[".xml"].splitlines()
    assert f"```python\n{first}\n\n{run.replace('NAME', 'small')}\n```" in text


@pytest.mark.long
@pytest.mark.parametrize("int8", [False, True])
def test_the_lines_run_without_torch(folder, vit, images, tmp_path, monkeypatch, int8):
    monkeypatch.setattr(deploy, "_AGREEMENT", 0.8)
    deploy.write(folder, tmp_path / "small.onnx", images=images, int8=int8)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    wanted = ["onnxruntime", "numpy", "pillow"]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip cannot install {' '.join(wanted)}: {installed.stderr[-200:]}")
    told = []
    for pixels in images.val.images[:3]:
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        (tmp_path / "photo.png").rename(tmp_path / "photo.jpg")  # as it is, without loss
        code = deploy.LINES[".onnx"].replace("NAME", "small") + (
            "\nimport sys; assert not {'torch', 'vitlab'} & set(sys.modules)\nprint(*logits[0])"
        )
        command = [python, "-I", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        told.append(done.stdout.splitlines())
    session = export.session(tmp_path / "small.onnx")
    shown = next(iter(images.val.take([0, 1, 2]).batches(3)))[0].contiguous()
    expected = session(shown)
    assert [each[0] for each in told] == [images.classes[i] for i in expected.argmax(1)]
    logits = torch.tensor([[float(number) for number in each[1].split()] for each in told])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 if not int8 else 0.05)
