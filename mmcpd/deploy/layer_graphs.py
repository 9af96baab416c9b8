"""Write one layer as an ONNX graph of a single node, with random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from mmcpd.deploy.layers import Layer, LayerKind

OPSET, IR_VERSION = 17, 8


def layer_graph(layer: Layer) -> tuple[bytes, Mapping[str, np.ndarray]]:
    """Return an ONNX file of one layer, and what to feed it with.

    Example:
        >>> file, fed = layer_graph(Layer(LayerKind.PRODUCT, (197, 64, 32)))
        >>> fed['left'].shape, len(file) > 4 * 64 * 32    # the right factor is in the file
        ((197, 64), True)
    """
    product = layer.kind is LayerKind.PRODUCT
    shapes = _product_shapes(layer) if product else _convolution_shapes(layer)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    node = helper.make_node(layer.kind.value, list(arrays), ['out'], 'layer', **_attributes(layer))
    constant = ['right'] if layer.weights else []
    fed = {name: array for name, array in arrays.items() if name not in constant}
    graph = helper.make_graph(
        [node],
        'layer',
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in fed.items()],
        [helper.make_tensor_value_info('out', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(arrays[name], name) for name in constant],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString(), fed


def _product_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    *lead, rows, inner, columns = layer.sizes
    if layer.weights:
        return {'left': (math.prod(lead) * rows, inner), 'right': (inner, columns)}
    return {'left': (*lead, rows, inner), 'right': (*lead, inner, columns)}


def _convolution_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    first, second, batch = layer.sizes
    channels = first if layer.kind is LayerKind.TRANSPOSED else second * layer.groups
    return {'left': (batch, channels, *layer.space), 'right': (first, second, *layer.kernel)}


def _attributes(layer: Layer) -> dict[str, object]:
    if layer.kind is LayerKind.PRODUCT:
        return {}
    found: dict[str, object] = {
        'kernel_shape': list(layer.kernel), 'strides': list(layer.stride), 'dilations': list(layer.dilation),
        'pads': [*layer.padding, *layer.padding], 'group': layer.groups,
    }  # fmt: skip
    return found if layer.kind is LayerKind.CONVOLUTION else {**found, 'output_padding': list(layer.output_padding)}
