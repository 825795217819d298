"""What a step takes, about: disk, memory and time by the number of weights.

The figures are those of docs/benchmarks.md, of two cores without a GPU. What was measured at one
size only (fetch, the logging steps, evaluate with `evaluate=smoke`, register) grows in proportion.
"""

import math
from dataclasses import dataclass, replace

from slm.config import Config
from slm.config.packaging import Graph
from slm.config.target import Precision, Quantizer, Target

# Bytes of an ONNX folder for each weight: scales and an embedding in more bits included.
ONNX_BYTES = {4: 0.7, 8: 1.2}
MIXED_BYTES = 0.22  # more, where a budget or a list leaves some weights 8 bits
PROMPTS_BYTES = 1.0  # more, for a graph of int8 products
FLOAT_BYTES = {Precision.fp32: 4.0}
LIBRARIES_GB = 0.6  # what a process holds that imported torch, transformers and MLflow


@dataclass(frozen=True)
class Size:
    """A model's weights, in 10^9, and its checkpoint's size in GB (10^9 bytes).

    `gguf_gb` is that of the GGUF file which the checkpoint is dequantized from, 0 if it is not.
    """

    weights: float
    checkpoint_gb: float
    gguf_gb: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What a step adds to disks, takes of memory at its peak, and how long it lasts.

    `disk_gb` is kept in the work folder, `store_gb` in MLflow's artifact store, `cache_gb` in the
    Hugging Face cache; `scratch_gb` is in the work folder besides, until the step ends. None stands
    for what nobody knows beforehand.
    """

    disk_gb: float | None = None
    memory_gb: float | None = None
    seconds: float | None = None
    store_gb: float = 0.0
    cache_gb: float = 0.0
    scratch_gb: float = 0.0


def cost_of(step: str, size: Size, config: Config) -> Cost:
    """What a step takes of a model of that size under a configuration."""
    weights, checkpoint = size.weights, size.checkpoint_gb
    precision = config.target.precision
    per_weight = ONNX_BYTES.get(precision.bits or 0, FLOAT_BYTES.get(precision, 2.0))
    target = config.target
    per_weight += MIXED_BYTES * (target.mixed or target.quantizer is Quantizer.grid)
    per_weight += PROMPTS_BYTES * bool(target.prompts)
    onnx, interfaces = weights * per_weight, len(config.log_pyfunc.interfaces)
    logged = onnx * interfaces * max(1, len(config.log_pyfunc.targets))
    costs = {
        "fetch": fetching(str(config.model.source), size, bool(config.model.adapter)),
        "export_onnx": exporting(target, weights, onnx),
        "log_pyfunc": Cost(0.0, LIBRARIES_GB + onnx, 6 + 15 * weights, store_gb=logged),
        "log_transformers": Cost(0.0, LIBRARIES_GB, 4 + 4 * checkpoint, store_gb=checkpoint),
        "evaluate": Cost(0.0, LIBRARIES_GB + 1.4 * checkpoint, 20 + 430 * weights),
        "register": Cost(0.0, LIBRARIES_GB + 1.4 * checkpoint, 12 + 50 * weights),
    }
    if step == "export_onnx" and config.export.graph is Graph.optimum:
        return replace(costs[step], memory_gb=None, seconds=None)  # by what torch traces
    return costs[step]


def fetching(source: str, size: Size, merges: bool) -> Cost:
    """A GGUF is loaded to be dequantized; safetensors take as long as the network does.

    A base lies beside the checkpoint until an adapter is merged into it. What comes from the hub
    lies in its cache too.
    """
    checkpoint = size.checkpoint_gb
    cached = (size.gguf_gb or checkpoint) if source.startswith("hf://") else 0.0
    if merges:
        memory, seconds = LIBRARIES_GB + 1.5, 20 * size.weights
        return Cost(checkpoint, memory, seconds, cache_gb=cached, scratch_gb=checkpoint)
    if size.gguf_gb:
        return Cost(checkpoint, LIBRARIES_GB + 2 * checkpoint, 200 * size.weights, cache_gb=cached)
    return Cost(checkpoint, LIBRARIES_GB, cache_gb=cached)


def exporting(target: Target, weights: float, onnx_gb: float) -> Cost:
    """By who rounds: one tensor at a time, layer by layer on a text, or the builder.

    Meanwhile there is the float32 twin of a few layers. A calibration has a draft first, and then
    what it rounded so far; one that shares a budget has a pass's outputs and rounded weights too.
    """
    twin = 0.1 + 0.35 * weights
    if target.quantizer in (Quantizer.rtn, Quantizer.grid):
        memory, seconds = 0.5 + 1.15 * math.sqrt(weights), 12 + 9.5 * weights
        return Cost(onnx_gb, memory, seconds, scratch_gb=twin)
    if target.quantizer.calibrates:
        memory, seconds = 3.5 + 0.65 * weights, 4400 * weights
        beside = onnx_gb * (2 if target.mixed else 1)
        return Cost(onnx_gb, memory, seconds, scratch_gb=twin + beside)
    return Cost(onnx_gb, 6 * weights, 58 * weights, scratch_gb=twin)
