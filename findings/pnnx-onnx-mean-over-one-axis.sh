#!/usr/bin/env bash
# pnnx 20261020 with ncnn 1.0.20261020 and onnx 1.23.2: ONNX's mean over one axis, from opset 18 on.
#
# A good guess: an ONNX file that holds a mean over one axis, such as the pooled tokens of a transformer,
# becomes the same mean in ncnn, in whichever opset it is written. Where pnnx knows no way it says so.
#
# What happens: until opset 17, where the axes are an attribute of ReduceMean, it is so. From opset 18 on they
# are an input. There a mean over two axes is right, and one over a single axis gets an empty list of axes,
# which ncnn takes for none: it returns its input as it is, with the elements of the axis that should be gone.
# pnnx ends without an error, ncnn loads the file and computes. ReduceSum does the same from opset 13 on.
# torch's ONNX exporter writes opset 18 or newer, so its means are of this kind; the same model as TorchScript
# is converted rightly.
#
# Seen: mean over [3] right in opset 17, its input in opset 18; over [2, 3] right in both.
#       sum over [3] right in opset 11, its input in opset 13 and 18.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
# pnnx asks for torch, which its command for ONNX files does not need.
venv/bin/pip install -q ncnn==1.0.20261020 onnx==1.23.2 numpy==2.4.6
venv/bin/pip install -q --no-deps pnnx==20261020

cat > reduce.py <<'PYTHON'
import subprocess
from importlib.metadata import distribution

import ncnn
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PNNX = str(distribution("pnnx").locate_file("pnnx/pnnx"))
rng = np.random.default_rng(0)
kernel = rng.normal(size=(5, 3, 1, 1)).astype(np.float32)
image = rng.normal(size=(3, 4, 6)).astype(np.float32)
channels = np.einsum("oi,ihw->ohw", kernel[:, :, 0, 0], image)


def in_ncnn(kind, axes, opset):
    """Return what ncnn computes of a convolution and a reduction behind it."""
    as_input = opset >= (18 if kind == "ReduceMean" else 13)
    constants = [numpy_helper.from_array(kernel, "kernel")]
    names, attributes = ["h"], {"axes": axes}
    if as_input:
        constants.append(numpy_helper.from_array(np.array(axes), "axes"))
        names, attributes = ["h", "axes"], {}
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["h"]),
        helper.make_node(kind, names, ["y"], keepdims=0, **attributes),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *image.shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, 4][: 4 - len(axes)])
    graph = helper.make_graph(nodes, "reduced", [x], [y], constants)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "reduced.onnx")
    command = [PNNX, "reduced.onnx", "inputshape=[1,3,4,6]", "fp16=0"]
    subprocess.run(command, check=True, capture_output=True)
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    assert not net.load_param("reduced.ncnn.param") and not net.load_model("reduced.ncnn.bin")
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(image).clone())
    code, out = extractor.extract("out0")
    assert code == 0
    return np.array(out)


def judged(kind, axes, opset):
    reduce = {"ReduceMean": np.mean, "ReduceSum": np.sum}[kind]
    right = reduce(channels, axis=tuple(axis - 1 for axis in axes))
    seen = in_ncnn(kind, axes, opset)
    for word, wanted in {"right": right, "its input": channels}.items():
        if seen.shape == wanted.shape and np.allclose(seen, wanted, atol=1e-4):
            return word
    return f"neither: {seen.shape}"


for kind, opsets in {"ReduceMean": (17, 18), "ReduceSum": (11, 13, 18)}.items():
    for axes in ([3], [2, 3]):
        print(kind, axes, *(f"{opset}: {judged(kind, axes, opset)}" for opset in opsets), sep=", ")
PYTHON

seen=$(venv/bin/python reduce.py 2>/dev/null)
echo "$seen"

[ "$seen" = "ReduceMean, [3], 17: right, 18: its input
ReduceMean, [2, 3], 17: right, 18: right
ReduceSum, [3], 11: right, 13: its input, 18: its input
ReduceSum, [2, 3], 11: right, 13: right, 18: right" ] || { echo "changed: reductions over one axis in pnnx"; exit 1; }
