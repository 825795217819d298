"""Write a graph, and round its weights to int4 or int8 on the way, one at a time.

Whoever made the graph: an `onnx_ir` model whose initializers are read when they are asked for. Each
weight goes to the external data file as soon as it is made, so that memory grows with the largest
tensor and not with the model.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import onnx_ir as ir

from slm.errors import StepError
from slm.exporters.logits import keep_last
from slm_pyfunc.engine.cores import available_cores

MICROSOFT = "com.microsoft"
# Where tensors begin in the data file, in bytes; large ones may be mapped into memory alone.
LARGE, LARGE_ALIGNMENT, ALIGNMENT = 2**20, 2**16, 64
SMALL = 1024  # bytes: tensors that stay in the graph
ROUNDED_AT_ONCE = 2**20  # weights, by each core


# Packed uint8 [outputs, blocks, block_size * bits / 8], and scales [outputs, blocks]. Blocks beyond
# the inputs weigh the means of the inputs' blocks (`columns_of_means`).
Packed = tuple[np.ndarray, np.ndarray]


class Quantizer(Protocol):
    """What rounds weights in blocks of `block_size` along their inputs, symmetric about 0.

    `accuracy_level` 4 rounds activations to int8 inside the matrix products, 0 leaves them.
    """

    @property
    def block_size(self) -> int: ...

    @property
    def accuracy_level(self) -> int: ...

    def quantize(self, name: str, weight: np.ndarray, looked_up: bool = False) -> list[Packed]:
        """Round a weight [outputs, inputs]; parts follow one another along the outputs.

        A part has 4 or 8 bits of its own. A weight that is `looked_up` by its rows as well is one
        part, without means.
        """


@dataclass(frozen=True)
class Rtn:
    """Round to nearest.

    The scale of a block is its signed extreme over -2^(bits - 1): to the bit what onnxruntime's
    DefaultWeightOnlyQuantizer does, which the model builder calls `default`.
    """

    bits: int
    block_size: int
    accuracy_level: int = 0

    def quantize(self, name: str, weight: np.ndarray, looked_up: bool = False) -> list[Packed]:
        """Round a weight, some rows at a time, on all cores; its scales are of its own type."""
        outputs, inputs = weight.shape
        blocks = -(-inputs // self.block_size)
        packed = np.empty((outputs, blocks, self.block_size * self.bits // 8), np.uint8)
        scales = np.empty((outputs, blocks), weight.dtype)

        def round_rows(some: slice) -> None:
            integers, scales[some] = self.round_blocks(self.blocks_of(weight[some]))
            integers.reshape(len(integers), -1)[:, inputs:] = 0  # as the kernel leaves them
            packed[some] = packed_integers(integers, self.bits)

        on_all_cores(round_rows, outputs, max(1, ROUNDED_AT_ONCE // inputs))
        return [(packed, scales)]

    def blocks_of(self, rows: np.ndarray) -> np.ndarray:
        """Rows in blocks, float32 [rows, blocks, block_size], with zeros at their end."""
        missing = -rows.shape[1] % self.block_size
        padded = np.pad(rows.astype(np.float32), ((0, 0), (0, missing)))
        return padded.reshape(len(rows), -1, self.block_size)

    def scales_of(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The scales of blocks by their lowest and highest values."""
        return np.where(np.abs(high) > np.abs(low), high, low) / -np.float32(2 ** (self.bits - 1))

    def round_blocks(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The integers, uint8 [rows, blocks, block_size], and scales [rows, blocks] of blocks."""
        zero_point = np.float32(2 ** (self.bits - 1))
        scales = self.scales_of(blocks.min(-1), blocks.max(-1))
        steps = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
        exact = blocks * steps[..., None] + zero_point
        rounded = np.floor(exact)
        rounded += (exact - rounded) >= 0.5  # halves away from zero, as C's roundf
        return np.clip(rounded, 0, 2 * zero_point - 1).astype(np.uint8), scales


def on_all_cores(work: Callable[[slice], None], rows: int, at_once: int) -> None:
    """Work on some rows at a time, each core on its own."""
    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(work, (slice(i, i + at_once) for i in range(0, rows, at_once))))


def as_stored(scales: np.ndarray) -> np.ndarray:
    """Scales as a file keeps them in float16."""
    return scales.astype(np.float16).astype(np.float32)


def nonzero(scales: np.ndarray) -> np.ndarray:
    """Scales to divide by."""
    return np.where(scales == 0, 1, scales)


def packed_integers(integers: np.ndarray, bits: int) -> np.ndarray:
    """Integers as MatMulNBits reads them: two of four bits in a byte, the first one low."""
    return integers if bits == 8 else integers[..., ::2] | integers[..., 1::2] << 4


def columns_of_means(blocks: int, block_size: int) -> np.ndarray:
    """Which block's mean each column behind the inputs is.

    Each mean stands in two blocks of columns at least, so that a second weight can make up for what
    rounding leaves of the first.
    """
    times = max(3, block_size // blocks + 2) if blocks % block_size else 2
    return np.tile(np.arange(blocks), times)


def write(
    model: ir.Model,
    path: Path,
    quantizer: Quantizer | None,
    said: Callable[[int, int, str], None],
    put: Callable[[ir.Model, "Product", Quantizer, BinaryIO], None] | None = None,
    last_logits: bool = False,
) -> None:
    """Write a model, its weights beside it in `path`.data, quantized if there is a `quantizer`.

    With `last_logits` the graph can leave out those of other tokens (logits.py). `put` puts
    quantized weights in the place of floats, `quantize_product` if None. `said` is told of each
    tensor: how many are written, of how many, and its name. Raises StepError where a weight is not
    finite, OSError that names the tensor where it cannot be written.
    """
    graph, put = model.graph, put or quantize_product
    if last_logits:
        keep_last(graph)
    products = list(weights_of_products(graph)) if quantizer else []
    weights = {product.name for product in products}
    total = len(weights | graph.initializers.keys())
    data_path = path.with_name(f"{path.name}.data")
    with data_path.open("wb", buffering=0) as data:  # a full disk is met at the tensor, not later
        if quantizer:
            for written, product in enumerate(products, 1):
                with naming(product.name, data_path):
                    put(model, product, quantizer, data)
                said(written, total, product.name)
            remove_unused(graph)
        values = [value for value in graph.initializers.values() if not is_in(data_path, value)]
        for left, value in zip(reversed(range(len(values))), values, strict=True):
            with naming(str(value.name), data_path):
                value.const_value = stored(value.const_value, data)
            said(total - left, total, str(value.name))
    graph.sort()
    with naming("the graph", path):
        ir.save(model, path)


@contextlib.contextmanager
def naming(tensor: str, path: Path) -> Iterator[None]:
    """Say of a disk that is full, or cannot be written to, at which tensor of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, at {tensor}", str(path)) from error


@dataclass(frozen=True)
class Product:
    """A matrix product with a constant `weight` [inputs, outputs], or `transposed`."""

    node: ir.Node
    weight: ir.Value
    transposed: bool

    @property
    def name(self) -> str:
        return str(self.weight.name)

    def read(self) -> np.ndarray:
        """The weight, [outputs, inputs]."""
        assert self.weight.const_value is not None
        array = self.weight.const_value.numpy()
        return array if self.transposed else array.T


def weights_of_products(graph: ir.Graph) -> Iterable[Product]:
    """The matrix products whose weight is constant."""
    for node in graph:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        weight = node.inputs[1]
        before = weight.producer() if weight is not None else None
        transposed = before is not None and before.op_type == "Transpose"
        source = before.inputs[0] if transposed and before is not None else weight
        if source is not None and source.is_initializer() and len(source.shape or ()) == 2:
            yield Product(node, source, transposed)


def quantize_product(
    model: ir.Model, product: Product, quantizer: Quantizer, data: BinaryIO
) -> None:
    """Put MatMulNBits in the place of a product, and its weight into the data file.

    A look-up of the same weight (tied embeddings) reads the quantized one.
    """
    node, weight = product.node, product.weight
    array = product.read()
    graph, block_size, inputs = model.graph, quantizer.block_size, array.shape[1]
    lookups = [use.node for use in weight.uses() if use.node.op_type == "Gather"]
    lookups = lookups if product.transposed else []
    looked_up = bool(lookups) or named(graph, f"{product.name}_Q4") is not None
    parts = quantizer.quantize(product.name, array, looked_up)
    require_finite(product.name, *(scales for _, scales in parts))
    own = {"block_size": block_size}
    if quantizer.accuracy_level:
        own["accuracy_level"] = quantizer.accuracy_level
    products = []
    for number, (packed, scales) in enumerate(parts):
        name = product.name if len(parts) == 1 else f"{product.name}_{number}"
        bits = packed.shape[2] * 8 // block_size
        if bits == 8:
            look_up_as_int8(graph, name, len(packed), inputs, block_size, data)
        factor, columns = node.inputs[0], inputs
        if packed.shape[1] * block_size >= inputs + block_size:
            factor, means = with_means(node, inputs // block_size, block_size)
            columns += means
        constants = [
            add_constant(graph, f"{name}_Q{bits}", packed, data),
            add_scales(graph, f"{name}_scales", scales, array.dtype, node, data),
        ]
        attributes = {**own, "K": columns, "N": len(packed), "bits": bits}
        products.append(([factor, *constants], attributes))
    if len(parts) == 1:
        replace(graph, node, "MatMulNBits", *products[0], MICROSOFT)
    else:
        nodes = [ir.node("MatMulNBits", *each, domain=MICROSOFT) for each in products]
        graph.insert_before(node, nodes)
        replace(graph, node, "Concat", [each.outputs[0] for each in nodes], {"axis": -1})
    for lookup in lookups:
        width = -(-inputs // block_size) * block_size
        row = np.array([len(packed), width * bits // 8])
        shape = add_constant(graph, f"{product.name}_rows", row, data)
        rows = ir.node("Reshape", [constants[0], shape])
        attributes = {"bits": bits, "block_size": block_size}
        attributes |= {"gather_axis": 0, "quantize_axis": 1}
        read = [rows.outputs[0], lookup.inputs[1], constants[1]]
        graph.insert_before(lookup, rows)
        if width == inputs:
            replace(graph, lookup, "GatherBlockQuantized", read, attributes, MICROSOFT)
            continue
        whole = ir.node("GatherBlockQuantized", read, attributes, domain=MICROSOFT)
        graph.insert_before(lookup, whole)
        ends = [
            add_constant(graph, f"{product.name}_{name}", np.array([value]), data)
            for name, value in (("first", 0), ("inputs", inputs), ("last_axis", -1))
        ]
        replace(graph, lookup, "Slice", [whole.outputs[0], *ends], {})
    model.opset_imports.setdefault(MICROSOFT, 1)
    drop_unread(graph, weight)


def require_finite(name: str, *scales: np.ndarray) -> None:
    if not all(np.isfinite(each).all() for each in scales):
        raise StepError(f"{name} holds NaN or infinity: the checkpoint is damaged.")


def drop_unread(graph: ir.Graph, weight: ir.Value) -> None:
    """Drop a weight that no node reads any more."""
    if not weight.uses():
        del graph.initializers[str(weight.name)]
        weight.const_value = None


def look_up_as_int8(
    graph: ir.Graph, name: str, rows: int, inputs: int, block_size: int, data: BinaryIO
) -> None:
    """Make the maker's own look-ups of a tied head, which it expects in int4, read int8."""
    expected = named(graph, f"{name}_Q4")
    if expected is None:
        return
    row = np.array([rows, -(-inputs // block_size) * block_size])
    shape = add_constant(graph, f"{name}_rows", row, data)
    for reshape, _ in list(expected.uses()):
        reshape.replace_input_with(1, shape)
        for lookup, _ in reshape.outputs[0].uses():
            lookup.attributes["bits"] = ir.AttrInt64("bits", 8)
        reshape.outputs[0].shape = ir.Shape(row)
    expected.name = f"{name}_Q8"


def with_means(node: ir.Node, blocks: int, block_size: int) -> tuple[ir.Value, int]:
    """The inputs of a product with their blocks' means behind them, and how many these are."""
    inputs = node.inputs[0]
    assert inputs is not None and node.graph is not None
    columns = len(columns_of_means(blocks, block_size))
    name = f"{inputs.name}_with_means"
    if (known := next((u.node for u in inputs.uses() if u.node.name == name), None)) is None:
        window = {"kernel_shape": [block_size], "strides": [block_size]}
        pool = ir.node("AveragePool", [inputs], window, name=f"{inputs.name}_means")
        means = [pool.outputs[0]] * (columns // blocks)
        known = ir.node("Concat", [inputs, *means], {"axis": -1}, name=name)
        node.graph.insert_before(node, [pool, known])
    return known.outputs[0], columns


def replace(
    graph: ir.Graph,
    node: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, Any],
    domain: str = "",
) -> None:
    """Put another operator in the place of a node with one output."""
    [before] = node.outputs
    made = ir.node(op_type, inputs, attributes, domain=domain, name=f"{node.name}_{op_type}")
    [after] = made.outputs
    after.name, after.type, after.shape = before.name, before.type, before.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], [before], [after])


def add_scales(
    graph: ir.Graph, name: str, scales: np.ndarray, dtype: Any, node: ir.Node, data: BinaryIO
) -> ir.Value:
    """Make an initializer of scales for a node, and cast it to the type of the products.

    onnxruntime casts it once, when it loads the graph.
    """
    if scales.dtype == dtype:
        return add_constant(graph, name, scales, data)
    value = add_constant(graph, f"{name}_as_stored", scales, data)
    to = ir.DataType.from_numpy(dtype)
    cast = ir.node("Cast", [value], {"to": to.value}, name=f"{name}_Cast")
    [made] = cast.outputs
    made.name, made.type, made.shape = name, ir.TensorType(to), ir.Shape(scales.shape)
    if known := named(graph, name):
        ir.convenience.replace_all_uses_with(known, made)
    graph.insert_before(node, cast)
    return made


def named(graph: ir.Graph, name: str) -> ir.Value | None:
    """The value of this name that a node reads and nothing gives."""
    read = (value for node in graph for value in node.inputs if value is not None)
    return next((value for value in read if value.name == name and value.producer() is None), None)


def add_constant(graph: ir.Graph, name: str, array: np.ndarray, data: BinaryIO) -> ir.Value:
    """Make an initializer of an array; the value that already has its name, if a node reads it."""
    value = named(graph, name) or ir.Value(name=name)
    value.const_value = stored(ir.Tensor(array, name=name), data)
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def stored(tensor: ir.TensorProtocol | None, data: BinaryIO) -> ir.TensorProtocol:
    """Append a tensor to the data file; what the graph then holds in its place.

    Small ones stay in the graph: onnxruntime has to read shapes and axes before it opens the file.
    """
    assert tensor is not None
    if tensor.nbytes < SMALL:  # may be in a file that the graph does not keep
        return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
    alignment = LARGE_ALIGNMENT if tensor.nbytes > LARGE else ALIGNMENT
    data.seek(-(-data.tell() // alignment) * alignment)
    offset = data.tell()
    if tensor.dtype.bitwidth < 8:  # numpy has a byte for each
        left = memoryview(tensor.tobytes())
    else:
        left = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
    while left:
        left = left[data.write(left) :]
    path = Path(data.name)
    return ir.ExternalTensor(
        path.name,
        offset,
        tensor.nbytes,
        tensor.dtype,
        name=tensor.name or "",
        shape=ir.Shape(tensor.shape.numpy()),
        base_dir=path.parent,
    )


def is_in(data_path: Path, value: ir.Value) -> bool:
    """Whether a tensor is written already, and not in a file that it is read from."""
    tensor = value.const_value
    return isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == data_path


def remove_unused(graph: ir.Graph) -> None:
    """Drop nodes and initializers that nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
