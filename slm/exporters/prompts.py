"""Write a second graph, of int8 products, beside a quantized one: what a prompt is read by.

ONNX Runtime's kernel of int4 weights is made for a token at a time. Its int8 kernel (U8S8) reads
the many rows of a prompt at ten times the speed where a CPU has VNNI or AMX. Weights are rounded
with a scale for each output; activations with a scale for each token, so that a token's results do
not hang on what is read beside it. All that is no product of a layer, such as the head, the
embedding and the norms, is the first graph's, in its data file.

Weights are the checkpoint's; where int4 was calibrated, midway between the checkpoint's and int4's.
Calibration corrects what reads keys and values for int4's own, so that answers after the
checkpoint's are a third farther from it (in KL divergence), and prompts by int4's as far as int4.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from slm.errors import StepError
from slm.exporters.graph import (
    MICROSOFT,
    ROUNDED_AT_ONCE,
    Packed,
    Product,
    Quantizer,
    naming,
    nonzero,
    on_all_cores,
    remove_unused,
    require_finite,
    stored,
    weights_of_products,
)
from slm.exporters.graph import (
    write as write_quantized,
)
from slm.exporters.logits import head_of, initializer
from slm_pyfunc.engine.decoder import PROMPT_GRAPH

INT8_PRODUCT = "MatMulIntegerToFloat"
MOST = np.float32(127)  # of an int8, or of a uint8 from its zero point on
ZERO_POINT = np.uint8(128)
LEAST = np.float32(1e-12)  # a token's scale, where all of its activations are 0


@dataclass(frozen=True)
class Int8:
    """A weight [inputs, outputs], and its scales [outputs], in the data file of prompts."""

    weight: ir.TensorProtocol
    scales: ir.TensorProtocol


@dataclass
class AlsoInInt8:
    """A quantizer that leaves the weights of these `names` in int8 too, `midway` to its own."""

    quantizer: Quantizer
    names: set[str]
    midway: bool
    data: BinaryIO
    made: dict[str, Int8] = field(default_factory=dict)

    @property
    def block_size(self) -> int:
        return self.quantizer.block_size

    @property
    def accuracy_level(self) -> int:
        return self.quantizer.accuracy_level

    def quantize(self, name: str, weight: np.ndarray, looked_up: bool = False) -> list[Packed]:
        parts = self.quantizer.quantize(name, weight, looked_up)
        if name in self.names:
            own = np.concatenate([self.floats_of(*part) for part in parts]) if self.midway else None
            self.made[name] = in_int8(name, weight, own, self.data)
        return parts

    def floats_of(self, packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """What a part stands for, float32 [outputs, inputs]."""
        from slm.exporters.gptq import unpack

        values = unpack(packed, self.block_size) * scales[..., None].astype(np.float32)
        return values.reshape(len(packed), -1)


def write(
    model: ir.Model,
    path: Path,
    quantizer: Quantizer,
    said: Callable[[int, int, str], None],
    midway: bool,
) -> None:
    """Write a graph of floats quantized, as graph.py does, and the one for prompts beside it."""
    ends = {product.name: ends_of(product.node) for product in products_of_layers(model.graph)}
    prompt = path.with_name(PROMPT_GRAPH)
    with prompt.with_name(f"{prompt.name}.data").open("wb", buffering=0) as data:
        both = AlsoInInt8(quantizer, set(ends), midway, data)
        write_quantized(model, path, both, said, last_logits=True)
    written = ir.load(path)
    put(written.graph, both.made, ends)
    with naming("the graph", prompt):
        ir.save(written, prompt)


def products_of_layers(graph: ir.Graph) -> Iterator[Product]:
    """The products with a constant weight, but the head."""
    head = head_of(graph)
    if head is None:
        raise StepError("the graph's head is not found: export with target.prompts=null.")
    yield from (each for each in weights_of_products(graph) if each.node is not head)


def ends_of(node: ir.Node) -> tuple[str, str]:
    """The names of a product's input and output."""
    assert node.inputs[0] is not None
    return str(node.inputs[0].name), str(node.outputs[0].name)


def in_int8(name: str, weight: np.ndarray, other: np.ndarray | None, data: BinaryIO) -> Int8:
    """Round a weight [outputs, inputs] to nearest, midway to another; append it to the data file.

    Raises StepError where it is not finite.
    """
    outputs, inputs = weight.shape
    integers, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32)

    def round_rows(some: slice) -> None:
        rows = weight[some].astype(np.float32)
        if other is not None:
            rows = (rows + other[some, :inputs]) / 2
        scales[some] = np.abs(rows).max(1) / MOST
        integers[:, some] = np.rint(rows / nonzero(scales[some])[:, None]).T

    on_all_cores(round_rows, outputs, max(1, ROUNDED_AT_ONCE // inputs))
    require_finite(name, scales)
    with naming(name, Path(data.name)):
        return Int8(
            stored(ir.Tensor(integers, name=f"{name}_int8"), data),
            stored(ir.Tensor(scales, name=f"{name}_int8_scales"), data),
        )


def put(graph: ir.Graph, made: dict[str, Int8], ends: dict[str, tuple[str, str]]) -> None:
    """Put int8 products in the place of a quantized graph's, whatever these are made of.

    `ends` are the names of each one's input and output.
    """
    values = {str(value.name): value for node in graph for value in node.outputs}
    values |= {str(value.name): value for value in graph.inputs}
    zero_points = zero_points_of_tokens(graph)
    one, zero_point = constant(graph, "one", np.float32(1)), constant(graph, "zero", ZERO_POINT)
    integers: dict[str, tuple[ir.Value, ir.Value]] = {}  # of each input that products share
    for name, (reads, gives) in ends.items():
        before = values[gives]
        own = before.producer()
        assert own is not None
        if reads not in integers:
            nodes = rounding(graph, values[reads], zero_points)
            graph.insert_before(own, nodes)
            integers[reads] = nodes[-1].outputs[0], nodes[-3].outputs[0]
        factor, scale = integers[reads]
        weight, scales = (initializer(graph, t) for t in (made[name].weight, made[name].scales))
        read = [factor, weight, one, scales, zero_point]
        product = ir.node(INT8_PRODUCT, read, domain=MICROSOFT, name=f"{name}_{INT8_PRODUCT}")
        scaled = ir.node("Mul", [product.outputs[0], scale], name=f"{name}_by_token")
        [after] = scaled.outputs
        after.type, after.shape = before.type, before.shape
        graph.insert_before(own, [product, scaled])
        ir.convenience.replace_all_uses_with(before, after)
    remove_unused(graph)
    graph.sort()


def rounding(graph: ir.Graph, value: ir.Value, zero_points: ir.Value) -> list[ir.Node]:
    """Round each token's activations: the scale [1, tokens, 1] is the last but two, uint8 the last.

    QuantizeLinear has no scale for two axes, so that there has to be one row of tokens.
    """
    last = constant(graph, "last_axis", np.array([-1]))
    others = constant(graph, "other_axes", np.array([0, 2]))
    up, down = (constant(graph, f"{sign}_step", s / MOST) for sign, s in (("up", 1), ("down", -1)))
    least = constant(graph, "least_scale", LEAST)
    name = f"{value.name}_uint8"
    highest = ir.node("ReduceMax", [value, last], {"keepdims": 1}, name=f"{name}_highest")
    lowest = ir.node("ReduceMin", [value, last], {"keepdims": 1}, name=f"{name}_lowest")
    above = ir.node("Mul", [highest.outputs[0], up], name=f"{name}_above")
    below = ir.node("Mul", [lowest.outputs[0], down], name=f"{name}_below")
    scale = ir.node("Max", [above.outputs[0], below.outputs[0], least], name=f"{name}_scale")
    vector = ir.node("Squeeze", [scale.outputs[0], others], name=f"{name}_scales")
    integers = ir.node(
        "QuantizeLinear", [value, vector.outputs[0], zero_points], {"axis": 1}, name=name
    )
    return [highest, lowest, above, below, scale, vector, integers]


def zero_points_of_tokens(graph: ir.Graph) -> ir.Value:
    """As many zero points as there are tokens."""
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    count = ir.node("Shape", [ids], {"start": 1, "end": 2}, name="prompt_tokens")
    value = ir.tensor(np.array([ZERO_POINT]))
    points = ir.node("ConstantOfShape", count.outputs, {"value": value}, name="prompt_zero_points")
    graph.insert_before(graph[0], [count, points])
    return points.outputs[0]


def constant(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    return initializer(graph, ir.Tensor(np.asarray(array), name=f"prompt_{name}"))
