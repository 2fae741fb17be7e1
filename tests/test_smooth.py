"""Tests of SmoothQuant in ONNX: large values move into weights, and the logits stay."""

import numpy as np
import onnx
import pytest
import torch
from conftest import OTHERS, toy
from onnx import numpy_helper
from onnxruntime.quantization.shape_inference import quant_pre_process

from vitlab import models
from vitlab.evaluation import _smooth, export
from vitlab.pruning import factor, shrink


def prepared(model, path):
    """Return a model as deploy has it before it is quantised."""
    export.to_onnx(model, path)
    quant_pre_process(path, path, skip_symbolic_shape=True)
    return onnx.load(path)


def logits(model, images):
    return export.session(model.SerializeToString())(images)


def moved(model, other):
    """Return how many norms of a model read constants in the other one that it has not."""
    own = {each.name for each in model.graph.initializer}
    norms = [node for node in other.graph.node if node.op_type == "LayerNormalization"]
    return sum(node.input[1] not in own for node in norms)


@pytest.mark.parametrize(
    ("name", "count"),
    # two heads read one norm; norms after layers are read by sums; those of queries by products
    [("distilled", 5), ("norms last", 1), ("qk norm", 5)],
)
def test_logits_stay_and_only_what_linear_layers_read_moves(name, count, batch, tmp_path):
    model = prepared(toy(**OTHERS[name]), tmp_path / "model.onnx")
    before, expected = model.SerializeToString(), logits(model, batch[0])
    for alpha in (0.5, 0.75):
        made = _smooth.smoothed(model, batch[0], alpha)
        torch.testing.assert_close(logits(made, batch[0]), expected, rtol=1e-5, atol=1e-5)
        assert moved(model, made) == count
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_logits_of_cut_models_stay(name, request, batch, tmp_path):
    """Units are gone, or first factors of low rank read the norms: all of them move."""
    dense = request.getfixturevalue(name)
    [*_, last] = models.view(dense).blocks
    drop = {(last.name, "neurons"): range(9), (last.name, "heads"): [1]}
    low, _ = factor.compress(dense, method="svd", ratio=0.5)
    for case, cut in {"removed": shrink.remove(dense, drop), "factored": low}.items():
        model = prepared(cut.eval(), tmp_path / f"{case}.onnx")
        made = _smooth.smoothed(model, batch[0], 0.5)
        expected = logits(model, batch[0])
        torch.testing.assert_close(logits(made, batch[0]), expected, rtol=1e-5, atol=1e-5)
        norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
        assert moved(model, made) == len(norms)


def test_the_scales_are_those_of_the_paper(vit, batch, tmp_path):
    """By equation 4 with alpha 1/2, inputs and rows of a layer have the same largest values."""
    vit.blocks[0].norm1.weight.data[3] = 40  # of a channel that stands out
    vit.blocks[0].norm1.weight.data[4] = vit.blocks[0].norm1.bias.data[4] = 0  # nothing to divide
    model = prepared(vit, tmp_path / "model.onnx")
    made = _smooth.smoothed(model, batch[0], 0.5)
    norm = next(node for node in made.graph.node if node.op_type == "LayerNormalization")
    [layer] = [node for node in made.graph.node if norm.output[0] in node.input]
    made.graph.output.append(onnx.ValueInfoProto(name=norm.output[0]))
    session = export.runtime_session(made.SerializeToString())
    _, read = session.run(None, {"images": batch[0].numpy()})
    [weight] = [
        numpy_helper.to_array(each)
        for each in made.graph.initializer
        if each.name == layer.input[1]
    ]
    largest, rows = abs(read).max((0, 1)), abs(weight).max(1)
    others = np.arange(len(rows)) != 4
    np.testing.assert_allclose(largest[others], rows[others], rtol=1e-4)
    assert np.isfinite(weight).all() and largest[4] == 0
