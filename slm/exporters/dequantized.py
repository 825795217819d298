"""Weights as DequantizeLinear reads them, for TensorRT-RTX, which has no MatMulNBits.

onnxruntime-genai 0.18's builder writes the same operators, but with scales below 0 where a block's
extreme is above it, and of 0 where a block is: TensorRT's parser refuses both ("Scale coefficients
must all be positive", https://github.com/onnx/onnx-tensorrt).
"""

from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir

from slm.exporters.graph import (
    Product,
    Quantizer,
    Rtn,
    add_constant,
    add_scales,
    drop_unread,
    require_finite,
)

SMALLEST = np.float32(np.finfo(np.float16).tiny)  # that has all of float16's precision


@dataclass(frozen=True)
class PositiveRtn(Rtn):
    """Round to nearest with scales above 0: the smallest that clip neither end of a block."""

    def scales_of(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        half = np.float32(2 ** (self.bits - 1))
        return np.maximum(np.maximum(low / -half, high / (half - 1)), SMALLEST)


def put(model: ir.Model, product: Product, quantizer: Quantizer, data: BinaryIO) -> None:
    """Let a product read its weight through DequantizeLinear, in int4 [inputs, outputs].

    A look-up of the same weight goes on reading floats.
    """
    node, weight, graph = product.node, product.weight, model.graph
    array = product.read()
    inputs, block_size = array.shape[1], quantizer.block_size
    [(packed, scales)] = quantizer.quantize(product.name, array)
    require_finite(product.name, scales)
    integers = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :inputs]
    signed = np.ascontiguousarray(integers.T).astype(np.int8) - np.int8(8)
    own: dict[str, Any] = {"axis": 0, "block_size": block_size}
    constants = [
        add_constant(graph, f"{product.name}_Q4", signed.astype(ml_dtypes.int4), data),
        add_scales(graph, f"{product.name}_scales", scales.T, array.dtype, node, data),
    ]
    floats = ir.node("DequantizeLinear", constants, own, name=f"{node.name}_DequantizeLinear")
    floats.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.insert_before(node, floats)
    node.replace_input_with(1, floats.outputs[0])
    drop_unread(graph, weight)
