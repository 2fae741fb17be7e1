"""Tests of export: other runtimes compute what torch computes, and no bad file is ever left."""

import copy
import json
import subprocess
import sys

import onnx
import pytest
import torch

from vitlab import models
from vitlab.evaluation import export
from vitlab.models import _layers
from vitlab.pruning import factor, masks, prune, shrink

CHANGES = {
    "whole": lambda model: model,
    "units": lambda model: shrink.remove(model, units(model)),
    "rows": lambda model: shrink.remove(
        model, {(list(models.view(model).linears(["qkv"]))[-1], "rows"): [0, 5]}
    ),
    "ranks": lambda model: factor.compress(
        shrink.remove(model, units(model)), ratio=0.5, method="svd", multiple=1
    )[0],
    "stem": lambda model: thinner(factor.factorise(model, {models.view(model).stem[-1][0]: 4})),
    **{
        support: lambda model, support=support: sparse(model, support)
        for support in _layers.SUPPORTS
    },
}


def units(model):
    first, last = (models.view(model).blocks[i] for i in (0, -1))
    thinner = [head * last.head_dim for head in range(last.num_heads)]
    return {
        (first.name, "heads"): [1],
        (first.name, "neurons"): range(5),
        (last.name, "v"): thinner,
        (f"{first.name}.attn.proj", "rows"): range(3),
    }


def thinner(model):
    """Return the model without a whole block, some channels and, where the stem has them, filters."""
    view = models.view(model)
    places = [*view.units(["width"]), *list(view.units(["filters"]))[:1]]
    return shrink.remove(
        model, {(view.blocks[-1].name, "block"): [0], **{place: [0, 2] for place in places}}
    )


def sparse(model, support):
    """Return the model with fc1 low rank and sparse, and qkv sparse alone."""
    thin = model
    for role, method in (("fc1", "svd+iht"), ("qkv", "iht")):
        grams = {
            name: torch.eye(layer.in_features)
            for name, layer in models.view(model).linears([role]).items()
        }
        options = {"ratio": 0.5, "support": support, "roles": [role], "multiple": 1, "rounds": 1}
        thin, _ = factor.compress(thin, method=method, grams=grams, **options)
    return thin


def check(model, tmp_path):
    model.normalise = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    model.class_names = ["cat", "dog", "emu"]
    error = export.to_onnx(model, tmp_path / "model.onnx")
    assert error < 1e-5 and [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session, images = export.session(tmp_path / "model.onnx"), torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(session(images), model(images), rtol=1e-4, atol=1e-4)
    written = onnx.load(tmp_path / "model.onnx")
    assert not any(node.op_type.startswith("Scatter") for node in written.graph.node)
    known = ("mean", "std", "classes")
    said = {e.key: json.loads(e.value) for e in written.metadata_props if e.key in known}
    classes = ["cat", "dog", "emu"]
    assert said == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "classes": classes}
    for end in (written.graph.input[0], written.graph.output[0]):
        assert end.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_low_rank_and_entries_are_one_product_of_a_constant(vit, tmp_path):
    thin = sparse(vit, "entries")
    before = list(thin.modules())
    check(thin, tmp_path)
    assert list(thin.modules()) == before  # the model itself keeps its factors
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = {constant.name: sorted(constant.dims) for constant in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    constant = [shapes[node.input[1]] for node in nodes if node.input[1] in shapes]
    linears = [layer for layer in vit.modules() if isinstance(layer, torch.nn.Linear)]
    assert constant == [sorted(layer.weight.shape) for layer in linears]
    assert len(nodes) == len(constant) + 2 * len(vit.blocks)  # with the products of attention


@pytest.mark.parametrize("change", ["units", "ranks", "stem"])
def test_cut_models_in_onnxruntime(model, change, tmp_path):
    check(CHANGES[change](model), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_every_architecture_in_onnxruntime(any_model, change, tmp_path):
    check(CHANGES[change](any_model), tmp_path)


def test_what_is_exported_has_at_most_four_dimensions(any_model):
    """Other runtimes, such as ncnn, do not read more."""
    images = torch.randn(2, 3, 16, 16)
    opened = export.opened(any_model)
    with torch.inference_mode():
        torch.testing.assert_close(opened(images), any_model(images))
    for node in export._program(any_model).graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, torch.Tensor) or value.ndim <= 4, node


def test_exported_programs_run_without_vitlab(swin, tmp_path):
    swin = CHANGES["units"](swin)
    torch.export.save(export._program(swin), tmp_path / "swin.pt2")
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
            ValueError,
            match=r"vit.onnx was not written: its logits differ by nan of the largest .at most 1e-04.",
        ):
            export.to_onnx(vit, path)
    assert path.read_text() == "older" and len(list(tmp_path.iterdir())) == 1


def test_a_classifier_of_features_that_hardly_differ_is_named_as_the_reason(vit):
    images = export.random_images(vit, 2)
    assert not export.cancellation(vit, images)
    with torch.no_grad():
        vit.fc_norm.weight *= 1e-6
        vit.fc_norm.bias += 1
        vit.head.weight *= 1e6
        vit.head.bias -= vit.head.weight @ vit.fc_norm.bias
    assert "large terms cancel" in export.cancellation(vit, images)
    assert vit.head.weight.dtype == torch.float32


def test_without_the_packages(vit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'onnxruntime is missing: pip install "vitlab\[export\]"'
    ):
        export.session(tmp_path / "any.onnx")


def two_of_four(model):
    weights = {
        f"{name}.weight": layer.weight for name, layer in models.view(model).linears().items()
    }
    prune.apply(
        model, {name: masks.n_of_m(weight.detach().abs(), 2, 4) for name, weight in weights.items()}
    )


def test_two_of_four_differs_from_other_zeros():
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 0, 3, 4], [0, 0, 0, 0, 5, 0, 0, 0]])
    assert export._is_two_of_four(weight)
    assert not export._is_two_of_four(torch.ones(2, 8)) and not export._is_two_of_four(
        torch.zeros(2, 8)
    )
    assert not export._is_two_of_four(weight[:, :6]) and not export._is_two_of_four(
        weight.roll(1, 1)
    )


def compressed(model, **options):
    linears = models.view(model).linears()
    grams = {name: torch.eye(layer.in_features) for name, layer in linears.items()}
    return factor.compress(model, grams=grams, support="2:4", multiple=1, rounds=1, **options)[
        0
    ], list(linears)


@pytest.mark.parametrize("ratio, method", [(0.5, "iht"), (0.25, "svd+iht")])
def test_what_would_be_semi_structured_of_a_compressed_model(
    model, batch, ratio, method, monkeypatch
):
    thin, linears = compressed(model, ratio=ratio, method=method)
    names = export._two_of_four(thin)
    assert names == [f"{name}.sparse" for name in linears]
    assert export._two_of_four(model) == []
    with pytest.raises(
        RuntimeError,
        match="NVIDIA GPUs of compute capability 8.0 or newer, and the model is on cpu",
    ):
        export.semi_structured(thin)

    def converted(weight):
        if weight.shape[0] > weight.shape[1]:
            raise RuntimeError("not of this shape")
        return 2 * weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", converted)
    changed = export._semi_structured(copy.deepcopy(thin), names)
    for name in names:
        weight = thin.get_parameter(name)
        times = 1 if weight.shape[0] > weight.shape[1] else 2
        assert torch.equal(changed.get_parameter(name), times * weight)
        assert changed.get_parameter(name).requires_grad == (times == 1)
    with torch.no_grad():
        assert not torch.equal(
            changed(batch[0]), thin(batch[0])
        )  # what was converted is what is computed with


def test_semi_structured_off_such_a_gpu(vit):
    with pytest.raises(ValueError, match="no linear layer is masked 2:4"):
        export.semi_structured(vit)
    two_of_four(vit)
    with pytest.raises(
        RuntimeError,
        match="NVIDIA GPUs of compute capability 8.0 or newer, and the model is on cpu",
    ):
        export.semi_structured(vit)


NEW_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.skipif(not NEW_GPU, reason="there is no GPU of compute capability 8.0 or newer")
@pytest.mark.parametrize("made", ["masked", "iht", "svd+iht"])
def test_semi_structured_computes_the_same(made):
    torch.manual_seed(0)
    model = models.create("vit_tiny_patch16_224", num_classes=10).eval()
    if made == "masked":
        two_of_four(model)
    else:
        model, _ = compressed(model, ratio=0.5 if made == "iht" else 0.25, method=made)
    model = model.cuda()
    sparse, images = export.semi_structured(model), torch.randn(64, 3, 224, 224, device="cuda")
    with torch.inference_mode():
        expected, logits = model.bfloat16()(images.bfloat16()), sparse(images.bfloat16())
    first = sparse.get_parameter(f"blocks.0.mlp.fc1.{'weight' if made == 'masked' else 'sparse'}")
    assert type(first.data).__name__.startswith("SparseSemiStructured")
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
