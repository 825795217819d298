"""Whether an ONNX file is what its target's name says, read out of the file itself.

Weights are read a few MB at a time, so that memory does not grow with the model.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from slm.config.target import ExecutionProvider, Precision, Quantizer, Target
from slm.errors import StepError
from slm.exporters.prompts import INT8_PRODUCT, ZERO_POINT
from slm.sources.weights import BITS, are_finite, layer_of, read_tensors
from slm_pyfunc.engine.decoder import LOGITS_TO_KEEP, PROMPT_GRAPH

FLOATS = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16"}
AT_ONCE = 2**23  # bytes
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "Conv")
# What a weight may go through on the way to its product.
BETWEEN = ("Transpose", "Cast", "Reshape", "Identity", "DequantizeLinear")
DOMAINS = ("", "ai.onnx", "com.microsoft")
# Of the default domain: onnxruntime-genai 0.18's builder writes 22, mobius-onnx 0.1 up to 24,
# optimum-onnx 0.1 18 at least.
OPSETS = range(18, 25)
INTEGER_INPUTS = ("input_ids", "attention_mask", "position_ids", LOGITS_TO_KEEP)


def require_structure(onnx: Path, target: Target, in_int8: dict[str, int] | None = None) -> None:
    """Raise StepError if the file is otherwise than the target's name and settings say.

    `in_int8` are the linears that keep 8 bits, with their numbers of weights (`kept_in_int8`).
    """
    model = ir.load(onnx / "model.onnx")
    for complaint in complaints(onnx, model, target, in_int8):
        raise StepError(
            f"{onnx} is not what its target's name, {target.name}, says: {complaint}. Do not use "
            "it: export again with another export.graph, or to another target."
        )


def kept_in_int8(
    checkpoint: Path, target: Target, linears: dict[str, dict[str, float]]
) -> dict[str, int] | None:
    """The linears that a mixed target keeps in 8 bits, and how many weights each has.

    `linears` is the record of a budget. None where nothing is mixed.
    """
    if not (target.int8 or linears):
        return None
    tensors = read_tensors(checkpoint, str(checkpoint))
    sizes = {name.removesuffix(".weight"): tensor.size for name, tensor in tensors.items()}
    tied = [name for name in sizes if name.endswith("embed_tokens")]
    sizes.setdefault("lm_head", sizes[tied[0]] if tied else 0)
    endings = tuple(f".{ending}" for ending in target.int8)
    return {
        name: size
        for name, size in sizes.items()
        if linears.get(name, {}).get("bits") == 8 or f".{name}".endswith(endings)
    }


def complaints(
    onnx: Path, model: ir.Model, target: Target, in_int8: dict[str, int] | None
) -> Iterator[str]:
    yield from wrong_provider(onnx, target)
    yield from wrong_operators(model)
    yield from wrong_types(model.graph, target)
    yield from wrong_products(model.graph, target)
    if in_int8 is not None:
        yield from wrong_mixture(model.graph, in_int8)
    yield from wrong_weights(onnx, model.graph)
    yield from wrong_prompts(onnx, model.graph, target)


def wrong_provider(onnx: Path, target: Target) -> Iterator[str]:
    """The execution provider that genai_config.json names."""
    decoder = json.loads((onnx / "genai_config.json").read_text())["model"]["decoder"]
    found = [name for each in decoder["session_options"]["provider_options"] for name in each]
    own = target.execution_provider
    expected = [] if own is ExecutionProvider.cpu else [own.value]
    if found != expected:
        yield f"genai_config.json names the execution providers {found}; expected {expected}"


def wrong_operators(model: ir.Model) -> Iterator[str]:
    """The versions of the operators, and whose they are."""
    version = model.graph.opset_imports.get("")
    if version not in OPSETS:
        yield f"its operators are of opset {version}; expected {OPSETS[0]} to {OPSETS[-1]}"
    for node in model.graph.all_nodes():
        if node.domain not in DOMAINS:
            yield f"{node.name} is an operator of {node.domain}, which onnxruntime does not have"


def wrong_types(graph: ir.Graph, target: Target) -> Iterator[str]:
    """The types of inputs and outputs: token ids are int64, all else the target's floats."""
    floats = floats_of(target)
    for value in (*graph.inputs, *graph.outputs):
        expected = {ir.DataType.INT64} if value.name in INTEGER_INPUTS else {floats}
        if value.name == "logits" and floats is ir.DataType.BFLOAT16:
            expected = {floats, ir.DataType.FLOAT}  # the builder casts them, mobius does not
        if value.dtype not in expected:
            yield f"{value.name} is {value.dtype}; expected {one_of(expected)}"


def floats_of(target: Target) -> ir.DataType:
    """The floats that a target computes in, as the builder chooses them."""
    quantized, provider = target.precision.bits, target.execution_provider
    asked = target.builder_options
    if quantized and provider is ExecutionProvider.cpu or asked.get("use_webgpu_fp32"):
        return ir.DataType.FLOAT
    if quantized and asked.get("use_cuda_bf16"):
        return ir.DataType.BFLOAT16
    return {
        Precision.fp32: ir.DataType.FLOAT,
        Precision.bf16: ir.DataType.BFLOAT16,
    }.get(target.precision, ir.DataType.FLOAT16)


def wrong_products(graph: ir.Graph, target: Target) -> Iterator[str]:
    """Every product with a constant weight, and every look-up in a quantized one."""
    quantized = 0
    for node in graph.all_nodes():
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            quantized += node.op_type == "MatMulNBits"
            yield from wrong_bits(node, target)
        elif node.op_type in PRODUCTS and len(node.inputs) > 1:
            weight, through = weight_of(node.inputs[1])
            if weight is None:
                continue
            dequantized = [each for each in through if each.op_type == "DequantizeLinear"]
            quantized += len(dequantized)
            for each in dequantized:
                yield from wrong_dequantized(each, target)
            if not dequantized:
                yield from wrong_floats(node, weight, target)
    if target.precision.bits and not quantized:
        yield "no product has quantized weights"


def weight_of(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """The constant that a value comes from, None if from none, and the nodes between."""
    through: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in BETWEEN:
            return None, through
        through.append(node)
        value = node.inputs[0]
    constant = value is not None and value.is_initializer()
    return (value if constant else None), through


def wrong_bits(node: ir.Node, target: Target) -> Iterator[str]:
    has = {name: attribute.value for name, attribute in node.attributes.items()}
    if target.precision.bits is None:
        yield f"{node.name} has quantized weights"
        return
    if target.execution_provider is ExecutionProvider.NvTensorRtRtx:
        yield f"{node.name} is {node.op_type}, which TensorRT-RTX does not have"
        return
    expected: dict[str, Any] = {
        "bits": bits_of(target),
        "block_size": {target.builder_options.get("block_size", 32)},
    }
    if node.op_type == "MatMulNBits":
        expected["accuracy_level"] = {target.accuracy_level}
    defaults = {"bits": 4, "block_size": 128, "accuracy_level": 0}
    for name, wanted in expected.items():
        if (found := has.get(name, defaults[name])) not in wanted:
            yield f"{node.name} has {name} {found}; expected {one_of(wanted)}"


def bits_of(target: Target) -> set[int]:
    """The bits that quantized weights may have; a mixture and a grid keep some in 8."""
    options = target.builder_options
    mixes = target.quantizer is Quantizer.grid or target.mixed
    mixes = mixes or bool(options.get("matmul_mixed_precision"))
    mixes = mixes or "_" in options.get("algo_config", "").replace("k_quant", "kquant")
    return {target.precision.bits or 0, *((8,) if mixes else ())}


def wrong_dequantized(node: ir.Node, target: Target) -> Iterator[str]:
    block_size, packed = target.builder_options.get("block_size", 32), node.inputs[0]
    if target.precision.bits is None:
        yield f"{node.name} has quantized weights"
    elif packed is None or packed.dtype is not ir.DataType.INT4:
        yield f"{node.name} reads {packed.dtype if packed else 'nothing'}; expected INT4"
    elif (found := node.attributes.get_int("block_size", 0)) != block_size:
        yield f"{node.name} has block_size {found}; expected {block_size}"


def wrong_floats(node: ir.Node, weight: ir.Value, target: Target) -> Iterator[str]:
    """A product whose weight is floats: right if the target's are, and of its kind."""
    excluded = target.builder_options.get("nodes_to_exclude")
    if len(weight.shape or ()) < 2:
        return
    if target.precision.bits and not (target.quantizer is Quantizer.builder and excluded):
        yield f"{node.name} has weights in {weight.dtype}; expected {target.precision.value}"
    elif weight.dtype is not floats_of(target):
        yield f"{node.name} has weights in {weight.dtype}; expected {floats_of(target)}"


def wrong_mixture(graph: ir.Graph, in_int8: dict[str, int]) -> Iterator[str]:
    """How many weights of each layer have 8 bits, whatever the graph joins or splits."""
    found: Counter[str] = Counter()
    for node in graph.all_nodes():
        packed, has = node.inputs[1] if node.op_type == "MatMulNBits" else None, node.attributes
        if packed is not None and has.get_int("bits", 4) == 8:
            found[layer_of(str(packed.name))] += has.get_int("K", 0) * has.get_int("N", 0)
    expected: Counter[str] = Counter()
    for name, weights in in_int8.items():
        expected[layer_of(name)] += weights
    for layer in sorted(found.keys() | expected.keys()):
        if found[layer] != expected[layer]:
            where = f"layer {layer}" if layer else "the head"
            yield f"{where} has {found[layer]} weights in int8; its record says {expected[layer]}"


def wrong_prompts(onnx: Path, graph: ir.Graph, target: Target) -> Iterator[str]:
    """The graph for prompts: there if it should be, and all of the layers' products in int8."""
    path = onnx / PROMPT_GRAPH
    if path.is_file() != bool(target.prompts):
        has = "is there" if path.is_file() else "is missing"
        yield f"{PROMPT_GRAPH} {has}, and target.prompts is {'int8' if target.prompts else 'null'}"
    elif target.prompts:
        prompts = ir.load(path)
        for complaint in (
            *wrong_operators(prompts),
            *wrong_products(prompts.graph, target),
            *wrong_int8(graph, prompts.graph),
            *wrong_weights(onnx, prompts.graph),
        ):
            yield f"in {PROMPT_GRAPH}, {complaint}"


def wrong_int8(graph: ir.Graph, prompts: ir.Graph) -> Iterator[str]:
    """Products of int8 weights and of uint8 that each token has rounded, and how many outputs."""
    ends, others = (
        [(v.name, v.dtype, v.shape) for v in (*g.inputs, *g.outputs)] for g in (graph, prompts)
    )
    if ends != others:
        yield "inputs or outputs are others than the first graph's"
    for node in prompts.all_nodes():
        if node.op_type == "MatMulNBits" and layer_of(weight_name(node)):
            yield f"{node.name} is no product in int8"
        elif node.op_type == INT8_PRODUCT:
            factor, weight, one, scales, zero_point = node.inputs
            by_token = factor.producer() if factor is not None else None
            if (
                by_token is None
                or (by_token.op_type, by_token.attributes.get_int("axis")) != ("QuantizeLinear", 1)
                or weight is None
                or weight.dtype is not ir.DataType.INT8
                or scales is None
                or (scales.shape or ())[:1] != (weight.shape or ())[1:]
                or [constant_of(one), constant_of(zero_point)] != [1, ZERO_POINT]
            ):
                yield f"{node.name} is no product of int8 weights with uint8 of each token"
    expected, found = outputs_by_layer(graph), outputs_by_layer(prompts)
    for layer in sorted(expected.keys() | found.keys()):
        if expected[layer] != found[layer]:
            where = f"layer {layer}" if layer else "the head"
            yield f"{where} has {found[layer]} outputs of products; expected {expected[layer]}"


def weight_name(node: ir.Node) -> str:
    return str(node.inputs[1].name) if node.inputs[1] is not None else ""


def constant_of(value: ir.Value | None) -> Any:
    tensor = value.const_value if value is not None else None
    return tensor.numpy().item() if tensor is not None else None


def outputs_by_layer(graph: ir.Graph) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in graph.all_nodes():
        if node.op_type == "MatMulNBits":
            found[layer_of(weight_name(node))] += node.attributes.get_int("N", 0)
        elif node.op_type == INT8_PRODUCT and (weight := node.inputs[1]) is not None:
            found[layer_of(weight_name(node))] += int(str((weight.shape or (0, 0))[1]))
    return found


def wrong_weights(onnx: Path, graph: ir.Graph) -> Iterator[str]:
    """Every float is finite, every tensor is whole, and TensorRT's scales are above 0."""
    scales = {
        node.inputs[1].name
        for node in graph.all_nodes()
        if node.op_type == "DequantizeLinear" and node.inputs[1] is not None
    }
    for each in (graph, *(sub for node in graph.all_nodes() for sub in graphs_of(node))):
        for name, value in each.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                end = (tensor.offset or 0) + tensor.nbytes
                path = onnx / tensor.location
                if not path.is_file() or path.stat().st_size < end:
                    yield f"{name} ends {end} bytes into {tensor.location}, which is shorter"
                    continue
            if tensor is None or tensor.dtype not in FLOATS:
                continue
            if not are_finite(pieces(onnx, tensor), FLOATS[tensor.dtype]):
                yield f"{name} holds NaN or infinity"
            elif name in scales and not (tensor.numpy().astype(np.float32) > 0).all():
                yield f"{name} holds scales that are not above 0, which TensorRT refuses"


def graphs_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs inside a node, such as the branches of an If."""
    return [a.value for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH]


def pieces(onnx: Path, tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """A tensor of floats as the integers that it is stored as."""
    kind, _ = BITS[FLOATS[tensor.dtype]]
    if not isinstance(tensor, ir.ExternalTensor):
        yield np.frombuffer(tensor.tobytes(), kind)
        return
    left = tensor.nbytes
    with (onnx / tensor.location).open("rb") as file:
        file.seek(tensor.offset or 0)
        while left:
            piece = file.read(min(left, AT_ONCE))
            left -= len(piece)
            yield np.frombuffer(piece, kind)


def one_of(values: set[Any]) -> str:
    return " or ".join(sorted(map(str, values)))
