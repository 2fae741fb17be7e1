"""Move large values from what linear layers of an ONNX model read into their weights: SmoothQuant.

Public: LINEAR, smoothed.
"""

import copy
from collections import defaultdict

import numpy as np

from vitlab.evaluation import export

LINEAR = ["MatMul", "Gemm"]
# What may stand between a norm and the layers that read it: it moves, takes or averages tokens, and
# pads with zeros.
_MOVES = "Concat Gather Pad ReduceMean Reshape Slice Squeeze Transpose Unsqueeze".split()
_LEAST = 1e-5  # of a largest value, as in the authors' code


def smoothed(model, images, alpha):
    """Return an ONNX model that computes the same, with large values moved into weights.

    A norm's channel j is divided by max|x_j|^alpha / max|W_j|^(1 - alpha), and row j of the layers
    that read it multiplied by as much, where x is what they read of the images, and W their weights
    (Xiao et al. 2023, arXiv:2211.10438, equation 4). A norm that anything else than linear layers
    reads stays as it is.

    model: onnx.ModelProto with shapes and constant weights, which stays as it is
    images: float32 [B, 3, S, S]
    alpha: of [0, 1]; the larger, the more goes into the weights
    """
    from onnx import numpy_helper

    weights = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    found = _found(model.graph, weights)
    largest = _largest(model, [layer.input[0] for _, layers in found for layer in layers], images)
    changed = {}
    for norm, layers in found:
        read = np.max([largest[layer.input[0]] for layer in layers], axis=0)
        rows = np.max([abs(_rows(layer, weights)).max(1) for layer in layers], axis=0)
        scale = read.clip(_LEAST) ** alpha / rows.clip(_LEAST) ** (1 - alpha)
        for name in norm.input[1:]:
            changed[norm.output[0], name] = weights[name] / scale
        for layer in layers:
            name = layer.input[1]
            by_row = scale if _is_transposed(layer) else scale[:, None]
            changed[layer.output[0], name] = weights[name] * by_row
    return _changed(model, changed)


def _found(graph, weights):
    """Return pairs of a norm and the linear layers that are all that reads it."""
    readers, widths = defaultdict(list), {}
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    for each in graph.value_info:
        if each.type.tensor_type.shape.dim:
            widths[each.name] = each.type.tensor_type.shape.dim[-1].dim_value
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    pairs = [
        (norm, _layers_after(norm, readers, widths, weights))
        for norm in norms
        if weights.keys() >= {*norm.input[1:]}
    ]
    return [(norm, layers) for norm, layers in pairs if layers]


def _layers_after(norm, readers, widths, weights):
    """Return the linear layers that read a norm, [] where anything else does."""
    channels = len(weights[norm.input[1]])
    layers, joins, reached = [], [], [norm.output[0]]
    for name in reached:  # it grows meanwhile
        # While the last axis stays the last and holds whole tokens, its index modulo the channels
        # is the channel: windows are cut with several tokens in it.
        if not widths.get(name) or widths[name] % channels:
            return []
        for node in readers[name]:
            is_layer = node.op_type in LINEAR and node.input[1] in weights
            if is_layer and len(_rows(node, weights)) == channels:
                layers.append(node)
            elif node.op_type in _MOVES and _keeps_last_axis(node):
                joins += [node] if node.op_type == "Concat" else []
                reached += [each for each in node.output if each not in reached]
            else:
                return []
    return layers if all({*node.input} <= {*reached} for node in joins) else []


def _keeps_last_axis(node):
    """Return whether a node, if it transposes at all, leaves the last axis where it is."""
    order = [each for each in node.attribute if each.name == "perm"]
    return node.op_type != "Transpose" or bool(
        order and order[0].ints[-1] == len(order[0].ints) - 1
    )


def _is_transposed(layer):
    """Return whether the weight of a linear layer is [outputs, inputs]."""
    return any(each.name == "transB" and each.i for each in layer.attribute)


def _rows(layer, weights):
    """Return the weight of a linear layer as [inputs, outputs]."""
    weight = weights[layer.input[1]]
    return weight.T if _is_transposed(layer) else weight


def _largest(model, names, images):
    """Return {name: the largest absolute value of each channel [C]} of tensors over images."""
    from onnx import ValueInfoProto

    told = copy.deepcopy(model)
    told.graph.output.extend(ValueInfoProto(name=name) for name in dict.fromkeys(names))
    session = export.runtime_session(told.SerializeToString())
    largest = dict.fromkeys(names, 0)
    for batch in images.split(16):
        for name, values in zip(
            largest, session.run([*largest], {"images": batch.numpy()}), strict=True
        ):
            axes = tuple(range(values.ndim - 1))
            largest[name] = np.maximum(largest[name], abs(values).max(axes))
    return largest


def _changed(model, arrays):
    """Return a copy of a model in which nodes read other constants, {(output, input): array}."""
    from onnx import numpy_helper

    # Each becomes a constant of its own, as several nodes may have shared one.
    model = copy.deepcopy(model)
    graph = model.graph
    for node in graph.node:
        for index, name in enumerate(node.input):
            if (node.output[0], name) in arrays:
                node.input[index] = f"{node.output[0]}.{name}"
                array = arrays[node.output[0], name].astype(np.float32)
                graph.initializer.append(numpy_helper.from_array(array, node.input[index]))
    read = {name for node in graph.node for name in node.input}
    kept = [each for each in graph.initializer if each.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return model
