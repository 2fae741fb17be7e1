#!/usr/bin/env bash
# onnxruntime 1.32.0 with onnx 1.23.2: which products MatMulConstBOnly leaves in float32.
#
# A good guess: `quantize_static(..., extra_options={"MatMulConstBOnly": True})` quantises products with a
# constant alone, such as linear layers, and leaves products of two activations, such as those of queries
# and keys, as they are, in whichever format the result is written.
#
# What happens: that holds for QuantFormat.QOperator only. In QuantFormat.QDQ, which is the default, both
# operands of the product of activations are quantised all the same, with the option and without, and
# nothing is said. There `nodes_to_exclude` with the names of such nodes leaves them alone.
#
# Seen, of a linear layer and of a product of activations behind it: QOperator with the option int8 and
#       float32; QDQ with the option int8 and int8; QDQ with nodes_to_exclude int8 and float32.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > quantise.py <<'PYTHON'
import logging

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, quantize_static

logging.disable(logging.WARNING)
rng = np.random.default_rng(0)
weight = numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), "weight")
nodes = [
    helper.make_node("MatMul", ["x", "weight"], ["h"], name="linear"),
    # Its output is quantised, too. What is behind this stays in float32 unless the next product asks.
    helper.make_node("Relu", ["h"], ["a"], name="between"),
    helper.make_node("Transpose", ["a"], ["t"], name="turn", perm=[0, 2, 1]),
    helper.make_node("MatMul", ["a", "t"], ["y"], name="attention"),
]
shape = [1, 4, 8]
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4])
graph = helper.make_graph(nodes, "two products", [x], [y], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
onnx.checker.check_model(model)
onnx.save(model, "float.onnx")


class Reader:
    def __init__(self):
        self.left = [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


def products(**options):
    """Return in which form each of the two products is found."""
    quantize_static("float.onnx", "int8.onnx", Reader(), op_types_to_quantize=["MatMul"], **options)
    graph = onnx.load("int8.onnx").graph
    maker = {name: node.op_type for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulInteger", "QLinearMatMul"):
            inputs = [maker.get(name, "-") for name in node.input]
            quantised = node.op_type != "MatMul" or "DequantizeLinear" in inputs
            found.append("int8" if quantised else "float32")
    return " ".join(found)


only = {"extra_options": {"MatMulConstBOnly": True}}
for form in (QuantFormat.QOperator, QuantFormat.QDQ):
    for words, options in {"default": {}, "MatMulConstBOnly": only}.items():
        print(f"{form.name}, {words}: {products(quant_format=form, **options)}")
print(f"QDQ, nodes_to_exclude: {products(nodes_to_exclude=['attention'])}")
PYTHON

seen=$(venv/bin/python quantise.py 2>/dev/null)
echo "$seen"

[ "$seen" = "QOperator, default: int8 int8
QOperator, MatMulConstBOnly: int8 float32
QDQ, default: int8 int8
QDQ, MatMulConstBOnly: int8 int8
QDQ, nodes_to_exclude: int8 float32" ] || { echo "changed: what MatMulConstBOnly leaves in float32"; exit 1; }
