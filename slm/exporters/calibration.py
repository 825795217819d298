"""Quantize a checkpoint layer by layer, on the inputs that its layers have when they are quantized.

Two streams of one text pass through transformers' own layers, of which one is in memory at a time:
the checkpoint's own and the quantized one. Each linear's weight is first corrected towards what the
checkpoint's stream has at its output, and then rounded (gptq.py) under the moments of its quantized
inputs. Each layer's result is a file of the folder, and a layer that has one is not made again.
"""

import bisect
import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from slm.errors import StepError
from slm.exporters.gptq import pack, round_weight, unpack
from slm.sources.weights import weight_files

# Of the moments' mean diagonal: how little a text may correct.
CORRECTION_DAMPING = 0.05
HEAD = "head"
PACKED, SCALES = ".packed", ".scales"  # endings of the names in a layer's file

Call = Callable[[nn.Module, torch.Tensor], Any]


@dataclass(frozen=True)
class Rounding:
    """How linears are rounded: to `bits`, or to 8 where a name has an ending of `int8`."""

    bits: int
    block_size: int
    int8: list[str]

    def round(self, name: str, weight: torch.Tensor, moments: torch.Tensor) -> "Rounded":
        whole = tuple(f".{ending}" for ending in self.int8)  # not 10.mlp for 0.mlp
        bits = 8 if f".{name}".endswith(whole) else self.bits
        integers, scales = round_weight(weight.numpy(), moments.numpy(), bits, self.block_size)
        return Rounded(pack(integers, bits, self.block_size), scales, self.block_size)


@dataclass(frozen=True)
class Rounded:
    """A weight as MatMulNBits reads it: packed integers and scales [outputs, blocks]."""

    packed: np.ndarray
    scales: np.ndarray
    block_size: int

    def weight(self, inputs: int) -> nn.Parameter:
        """What the kernel multiplies by, [outputs, inputs]."""
        values = unpack(self.packed, self.block_size) * self.scales[..., None].astype(np.float32)
        return nn.Parameter(torch.from_numpy(values.reshape(len(values), -1)[:, :inputs].copy()))


class Tensors:
    """A checkpoint's tensors by name, in float32, read when they are asked for."""

    def __init__(self, checkpoint: Path) -> None:
        self.files: dict[str, Any] = {}
        for path in weight_files(checkpoint, str(checkpoint)):
            file = safe_open(path, "pt")
            self.files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise StepError(
                f"the checkpoint has no tensor {name}, which transformers' model has: calibration "
                "cannot run it. Export with target.quantizer=rtn."
            )
        tensor = self.files[name].get_tensor(name).float()
        if not tensor.isfinite().all():
            raise StepError(f"{name} holds NaN or infinity: the checkpoint is damaged.")
        return tensor

    def rows(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """For each row of `wanted`, the number of the tensor's equal row, or -1.

        Of several equal rows it is the one that comes next, as in the tensor itself.
        """
        own = self[name].numpy().astype(wanted.dtype)
        if own.shape[1] != wanted.shape[1]:
            return np.full(len(wanted), -1)
        numbers: dict[int, list[int]] = {}
        for number, row in enumerate(own):
            numbers.setdefault(hash(row.tobytes()), []).append(number)
        found, last = np.full(len(wanted), -1), -1
        for i, row in enumerate(wanted):
            if equal := numbers.get(hash(row.tobytes())):
                last = found[i] = equal[bisect.bisect_right(equal, last) % len(equal)]
        found[(own[found] != wanted).any(1)] = -1
        return found

    def fill(self, module: nn.Module, prefix: str, apart_from: str = "\0") -> None:
        """Give a module on the meta device its weights."""
        names = [name for name in module.state_dict() if not name.startswith(apart_from)]
        own = {name: self[f"{prefix}.{name}"] for name in names}
        module.load_state_dict(own, strict=False, assign=True)


@torch.inference_mode()
def calibrate(
    checkpoint: Path,
    tokens: list[int],
    window: int,
    rounding: Rounding,
    folder: Path,
    said: Callable[[str], None],
) -> None:
    """Write the file of each layer that has none, and of the head.

    The text is read in windows of that many tokens.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    names = {module: name for name, module in model.named_modules()}
    tensors = Tensors(checkpoint)
    inner = model.get_decoder()
    if not hasattr(inner, "layers") or not hasattr(inner, "norm"):
        raise StepError(
            f"calibration needs a decoder of layers and a final norm, and {type(inner).__name__} "
            "has other names for them. Export with target.quantizer=rtn."
        )
    layers = inner.layers
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors.fill(inner, names[inner], apart_from="layers.")
    windows = torch.tensor(tokens)[: len(tokens) // window * window].view(-1, 1, window)
    calls = calls_of_layers(inner, layers, windows[0])
    embed = functools.partial(first_inputs, inner, layers, windows)
    whole = embed()
    saved = Saved(folder / f"{HEAD}.safetensors", rounding.block_size)
    if config.tie_word_embeddings:
        # The embedding is the head's weight, so the head is rounded before all else.
        if not saved.arrays:
            said("calibrating the head, which is the embedding too: a pass through all layers")
            through = whole
            for layer, call in zip(layers, calls, strict=True):
                tensors.fill(layer, names[layer])
                through = [output_of(call(layer, hidden)) for hidden in through]
                layer.to("meta")
            moments = sum_of(product(x, x) for x in map(inner.norm, through))
            saved.add(names[embedding], rounding.round(names[head], embedding.weight, moments))
            saved.write()
        embedding.weight = saved[names[embedding]].weight(embedding.weight.shape[1])
    rounded = embed()
    embedding.to("meta")
    started = time.monotonic()
    for i, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        left = f", {(time.monotonic() - started) / i * (len(layers) - i):.0f} s left" if i else ""
        said(f"calibrating layer {i} of {len(layers)}{left}")
        tensors.fill(layer, names[layer])
        file = Saved(folder / f"{i}.safetensors", rounding.block_size)
        traces = [traced(layer, call, hidden) for hidden in whole]
        whole = [trace.output for trace in traces]
        if not file.arrays:
            quantize_layer(layer, call, traces, rounded, names, rounding, file)
            file.write()
        for name in file.names():
            linear = layer.get_submodule(name.removeprefix(f"{names[layer]}."))
            linear.weight = file[name].weight(linear.in_features)
        rounded = [output_of(call(layer, hidden)) for hidden in rounded]
        layer.to("meta")
        del traces  # before the next layer's are made
    if not saved.arrays:
        tensors.fill(head, names[head])
        whole, rounded = [inner.norm(x) for x in whole], [inner.norm(x) for x in rounded]
        moments = sum_of(product(x, x) for x in rounded)
        pairs = zip(whole, rounded, strict=True)
        drift = head.weight @ sum_of(product(x - y, y) for x, y in pairs)
        weight = corrected(head.weight, moments, drift)
        saved.add(names[head], rounding.round(names[head], weight, moments))
        saved.write()


def calls_of_layers(inner: Any, layers: nn.ModuleList, window: torch.Tensor) -> list[Call]:
    """How the model calls each of its layers: with which masks and positions."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((args, kwargs))
        return hidden

    for layer in layers:
        layer.forward = record  # type: ignore[assignment]
    inner(window, use_cache=False)
    for layer in layers:
        del layer.forward

    def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return lambda layer, hidden: layer(hidden, *args, **kwargs)

    return [call_of(*each) for each in seen]


class Reached(Exception):
    """What was wanted of a pass through a layer is there."""


def first_inputs(inner: Any, layers: nn.ModuleList, windows: torch.Tensor) -> list[torch.Tensor]:
    """What the model gives its first layer for each window."""
    found: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])
        raise Reached

    hook = layers[0].register_forward_pre_hook(stop)
    for window in windows:
        with contextlib.suppress(Reached):
            inner(window, use_cache=False)
    hook.remove()
    return found


@dataclass
class Trace:
    """One pass through a layer: each linear's input in the order in which they ran.

    `outputs` are those of linears that may be added to the layer's own output.
    """

    input: torch.Tensor
    inputs: dict[nn.Linear, torch.Tensor]
    outputs: dict[nn.Linear, torch.Tensor]
    output: torch.Tensor

    def residual(self, writer: nn.Linear, writers: list[nn.Linear]) -> torch.Tensor:
        """What the writer's output is added to."""
        if writer is writers[0]:
            return self.input
        later = writers[writers.index(writer) :]
        return self.output - sum_of(self.outputs[each] for each in later)


def traced(
    layer: nn.Module,
    call: Call,
    hidden: torch.Tensor,
    until: nn.Linear | None = None,
    silent: Iterable[nn.Linear] = (),
) -> Trace:
    """Run a layer to its end, or to the input of one linear; `silent` linears give zeros."""
    trace = Trace(hidden, {}, {}, hidden)

    def hook(linear: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        trace.inputs[linear] = args[0]
        if linear is until:
            raise Reached
        if output.shape == hidden.shape:
            trace.outputs[linear] = output
        return torch.zeros_like(output) if linear in silent else None

    linears = (module for module in layer.modules() if isinstance(module, nn.Linear))
    hooks = [linear.register_forward_hook(hook) for linear in linears]
    with contextlib.suppress(Reached):
        trace.output = output_of(call(layer, hidden))
    for each in hooks:
        each.remove()
    return trace


def quantize_layer(
    layer: nn.Module,
    call: Call,
    traces: list[Trace],
    rounded: list[torch.Tensor],
    names: dict[nn.Module, str],
    rounding: Rounding,
    file: "Saved",
) -> None:
    """Round a layer's linears in the order in which they run, on inputs from those before."""
    inputs = traces[0].inputs
    writers = residual_writers(layer, call, traces[0])
    for _, group in itertools.groupby(inputs, lambda linear: id(inputs[linear])):
        linears = list(group)
        lead = linears[0]
        moments = drift = change = torch.zeros(())
        for trace, hidden in zip(traces, rounded, strict=True):
            own = traced(layer, call, hidden, None if lead in writers[1:] else lead)
            x = own.inputs[lead]
            moments = moments + product(x, x)
            change = change + product(trace.inputs[lead] - x, x)
            if lead in writers:
                apart = trace.residual(lead, writers) - own.residual(lead, writers)
                drift = drift + product(apart, x)
        for linear in linears:
            weight = corrected(linear.weight, moments, linear.weight @ change + drift)
            name = names[linear]
            file.add(name, rounding.round(name, weight, moments))
            linear.weight = file[name].weight(linear.in_features)


def residual_writers(layer: nn.Module, call: Call, trace: Trace) -> list[nn.Linear]:
    """The linears whose output is added to the layer's as it is, in the order in which they run."""
    writers: list[nn.Linear] = []
    for linear, output in reversed(trace.outputs.items()):
        with_it = traced(layer, call, trace.input, silent=writers).output
        without = traced(layer, call, trace.input, silent=[linear, *writers]).output
        if torch.allclose(with_it - without, output, atol=1e-3 * float(output.std())):
            writers.insert(0, linear)
    return writers


def corrected(weight: torch.Tensor, moments: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """The weight whose outputs on the quantized stream are nearest to the checkpoint's.

    `drift` is the outputs' difference times the inputs, summed: [outputs, inputs].
    """
    damping = CORRECTION_DAMPING * float(moments.diag().mean()) or 1.0
    return weight + torch.linalg.solve(moments + damping * torch.eye(len(moments)), drift.T).T


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X^T Y over all positions."""
    return x.flatten(0, -2).T @ y.flatten(0, -2)


def sum_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, tensors)


def output_of(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


class Saved:
    """The rounded linears of one file, by name. It is there whole or not at all."""

    def __init__(self, path: Path, block_size: int) -> None:
        self.path, self.block_size = path, block_size
        self.arrays: dict[str, np.ndarray] = load_file(path) if path.is_file() else {}

    def names(self) -> list[str]:
        return [key.removesuffix(PACKED) for key in self.arrays if key.endswith(PACKED)]

    def __getitem__(self, name: str) -> Rounded:
        return Rounded(self.arrays[name + PACKED], self.arrays[name + SCALES], self.block_size)

    def add(self, name: str, rounded: Rounded) -> None:
        self.arrays |= {name + PACKED: rounded.packed, name + SCALES: rounded.scales}

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        save_file(self.arrays, partial)
        os.replace(partial, self.path)
