"""Let a graph compute the logits of a prompt's last tokens alone, for whoever asks.

A small model's head is a fifth of what a prompt costs, and of a prompt only the last token's logits
choose anything. Scoring needs those of all.
"""

import numpy as np
import onnx_ir as ir

from slm_pyfunc.engine.decoder import LOGITS_TO_KEEP

# Between the product of the head and the logits: scaling, soft-capping, casts.
AFTERWARDS = ("Cast", "Mul", "Div", "Tanh", "Add", "Identity")


def keep_last(graph: ir.Graph) -> None:
    """Give a graph the input LOGITS_TO_KEEP, int64 [1]: how many of each row's last logits to give.

    0, its value where nobody gives one, means all, as for transformers' argument of that name.
    Leaves the graph as it is where its head is not found.
    """
    head = head_of(graph)
    if head is None:
        return
    keep = constant(graph, LOGITS_TO_KEEP, 0)
    graph.inputs.append(keep)  # an initializer that is an input: one that has a default
    end = constant(graph, f"{LOGITS_TO_KEEP}_end", np.iinfo(np.int64).max)
    axis = constant(graph, f"{LOGITS_TO_KEEP}_axis", 1)
    first = ir.node("Neg", [keep])
    kept = ir.node("Slice", [head.inputs[0], first.outputs[0], end, axis])
    graph.insert_before(head, [first, kept])
    head.replace_input_with(0, kept.outputs[0])


def head_of(graph: ir.Graph) -> ir.Node | None:
    """The product that gives the logits, of a graph in floats."""
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    node = logits.producer() if logits is not None else None
    while node is not None and node.op_type in AFTERWARDS:
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "MatMul" else None


def constant(graph: ir.Graph, name: str, value: int) -> ir.Value:
    return initializer(graph, ir.Tensor(np.array([value]), name=name))


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The graph's initializer of a tensor, by its name."""
    name = str(tensor.name)
    if name not in graph.initializers:
        shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
