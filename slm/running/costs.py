"""What a step takes, about: disk, memory and time by the number of weights.

The figures are those of docs/benchmarks.md, of two cores without a GPU. What was measured at one
size only (fetch, the logging steps, evaluate with `evaluate=smoke`, register) grows in proportion.
"""

import math
from dataclasses import dataclass, replace

from slm.config import Config, Graph, Precision, Quantizer

# Bytes of an ONNX folder for each weight: scales and an embedding in more bits included.
ONNX_BYTES = {4: 0.7, 8: 1.2}
FLOAT_BYTES = {Precision.fp32: 4.0}
LIBRARIES_GB = 0.6  # what a process holds that imported torch, transformers and MLflow


@dataclass(frozen=True)
class Size:
    """A model's weights, in 10^9, and its checkpoint's size in GB (10^9 bytes)."""

    weights: float
    checkpoint_gb: float


@dataclass(frozen=True)
class Cost:
    """What a step adds to the disk, takes of memory at its peak, and how long it lasts.

    None stands for what nobody knows beforehand.
    """

    disk_gb: float | None = None
    memory_gb: float | None = None
    seconds: float | None = None


def cost_of(step: str, size: Size, config: Config) -> Cost:
    """What a step takes of a model of that size under a configuration."""
    weights, checkpoint = size.weights, size.checkpoint_gb
    precision = config.target.precision
    per_weight = ONNX_BYTES.get(precision.bits or 0, FLOAT_BYTES.get(precision, 2.0))
    onnx, interfaces = weights * per_weight, len(config.log_pyfunc.interfaces)
    logged = onnx * interfaces * max(1, len(config.log_pyfunc.targets))
    costs = {
        "fetch": fetching(str(config.model.source), size, bool(config.model.adapter)),
        "export_onnx": exporting(config.target.quantizer, weights, onnx),
        "log_pyfunc": Cost(logged, LIBRARIES_GB + onnx, 6 + 15 * weights),
        "log_transformers": Cost(checkpoint, LIBRARIES_GB, 4 + 4 * checkpoint),
        "evaluate": Cost(0.0, LIBRARIES_GB + 1.4 * checkpoint, 20 + 430 * weights),
        "register": Cost(0.0, LIBRARIES_GB + 1.4 * checkpoint, 12 + 50 * weights),
    }
    if step == "export_onnx" and config.export.graph is Graph.optimum:
        return replace(costs[step], memory_gb=None, seconds=None)  # by what torch traces
    return costs[step]


def fetching(source: str, size: Size, merges: bool) -> Cost:
    """A GGUF is loaded to be dequantized; safetensors take as long as the network does.

    A base lies beside the checkpoint until an adapter is merged into it.
    """
    if merges:
        return Cost(2 * size.checkpoint_gb, LIBRARIES_GB + 1.5, 20 * size.weights)
    if source.endswith(".gguf"):
        return Cost(size.checkpoint_gb, LIBRARIES_GB + 2 * size.checkpoint_gb, 200 * size.weights)
    return Cost(size.checkpoint_gb, LIBRARIES_GB)


def exporting(quantizer: Quantizer, weights: float, onnx_gb: float) -> Cost:
    """By who rounds: one tensor at a time, layer by layer on a text, or the builder."""
    if quantizer in (Quantizer.rtn, Quantizer.grid):
        return Cost(onnx_gb, 0.5 + 1.15 * math.sqrt(weights), 12 + 9.5 * weights)
    if quantizer.calibrates:
        return Cost(onnx_gb, 3.5 + 0.65 * weights, 4400 * weights)
    return Cost(onnx_gb, 6 * weights, 58 * weights)
