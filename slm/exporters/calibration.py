"""Quantize a checkpoint layer by layer, on the inputs that its layers have when they are quantized.

Two streams of one text pass through transformers' own layers, of which one is in memory at a time:
the checkpoint's own and the quantized one. Each linear's weight is first corrected towards what the
checkpoint's stream has at its output, as far as one half of the text's windows foretells the other,
and then rounded (gptq.py) under the moments of its quantized inputs. Each layer's result is a file
of the folder, and a layer that has one is not made again.
"""

import contextlib
import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from slm.errors import StepError
from slm.exporters.decoder import Call, Decoder, Reached, bfloat16_products, output_of
from slm.exporters.gptq import SWEEPS, Inputs, pack, round_weight, search_scales, unpack
from slm.running.whole import in_one_motion

# Of the moments' mean diagonal: how little a text may correct. The best differs by a factor of 100
# between linears, and too little makes a correction of the noise of one text.
DAMPINGS = (25.0, 5.0, 1.0, 0.2, 0.05)
TINY = 1e-12  # a residual of zeros stays finite
HEAD = "head"
PACKED, SCALES = ".packed", ".scales"  # endings of the names in a layer's file


@dataclass(frozen=True)
class Rounding:
    """How linears are rounded: to `bits`, or to 8 where a name has an ending of `int8`.

    By GPTQ, or, if `searched`, to nearest with scales of least squared error.
    """

    bits: int
    block_size: int
    int8: list[str]
    searched: bool = False

    def bits_of(self, name: str) -> int:
        whole = tuple(f".{ending}" for ending in self.int8)  # not 10.mlp for 0.mlp
        return 8 if f".{name}".endswith(whole) else self.bits

    def round(
        self,
        name: str,
        weight: torch.Tensor,
        inputs: Inputs,
        sweeps: int = SWEEPS,
    ) -> "Rounded":
        """Round a weight [outputs, inputs]."""
        bits, block_size = self.bits_of(name), self.block_size
        if self.searched:
            integers, scales = search_scales(weight.numpy(), inputs.importance, bits, block_size)
        else:
            integers, scales = round_weight(weight.numpy(), inputs, bits, block_size, sweeps)
        return Rounded(pack(integers, bits, block_size), scales, block_size)

    def round_corrected(
        self, weights: dict[str, torch.Tensor], halves: list["Half"]
    ) -> dict[str, "Rounded"]:
        """Round weights of the same inputs towards what the checkpoint has at their outputs.

        Empties `halves`, whose room it needs.
        """
        if not self.searched:
            weights = {name: corrected(weight, halves) for name, weight in weights.items()}
        inputs = Inputs((halves[0].moments + halves[1].moments).numpy())
        halves.clear()
        return {name: self.round(name, weight, inputs) for name, weight in weights.items()}


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


@bfloat16_products()
@torch.no_grad()
def calibrate(
    decoder: Decoder,
    rounding: Rounding,
    folder: Path,
    said: Callable[[str], None],
) -> None:
    """Write the file of each layer that has none, and of the head."""
    names, layers = decoder.name_of, decoder.layers
    embedding, head, norm = decoder.embedding, decoder.head, decoder.inner.norm
    calls = list(zip(layers, decoder.calls, strict=True))
    whole = decoder.embedded()
    saved = Saved(folder / f"{HEAD}.safetensors", rounding.block_size)
    if decoder.tied:
        # The embedding is the head's weight, so the head is rounded before all else.
        if not saved.arrays:
            said("calibrating the head, which is the embedding too: a pass through all layers")
            through, progress = whole, Progress(len(layers))
            for i, (layer, call) in enumerate(calls):
                said(f"for the head, through layer {progress.of(i)}")
                with decoder.filled(layer):
                    through = [output_of(call(layer, hidden)) for hidden in through]
            moments = sum_of(product(x, x) for x in map(norm, through))
            inputs = Inputs(moments.numpy())
            saved.add({names[embedding]: rounding.round(names[head], embedding.weight, inputs)})
            saved.write()
        embedding.weight = saved[names[embedding]].weight(embedding.weight.shape[1])
    rounded = decoder.embedded()
    embedding.to("meta")
    progress = Progress(len(layers))
    for i, (layer, call) in enumerate(calls):
        file = Saved(folder / f"{i}.safetensors", rounding.block_size)
        if file.arrays:
            said(f"passing through calibrated layer {i} of {len(layers)}")
        else:
            said(f"calibrating layer {progress.of(i)}")
        with decoder.filled(layer):
            if file.arrays:
                whole = [output_of(call(layer, hidden)) for hidden in whole]
            else:
                quantize_layer(layer, call, whole, rounded, names, rounding, file)
                file.write()
            for name in file.names():
                linear: Any = layer.get_submodule(name.removeprefix(f"{names[layer]}."))
                linear.weight = file[name].weight(linear.in_features)
            rounded = [output_of(call(layer, hidden)) for hidden in rounded]
    if not saved.arrays:
        decoder.fill_head()
        whole, rounded = [norm(x) for x in whole], [norm(x) for x in rounded]
        halves = [Half(), Half()]
        for number, (own, x) in enumerate(zip(whole, rounded, strict=True)):
            halves[number % 2].add(x, own)
        saved.add(rounding.round_corrected({names[head]: head.weight}, halves))
        saved.write()


class Progress:
    """The time left of a number of layers, by those done since the first that it was told of."""

    def __init__(self, count: int) -> None:
        self.count, self.first, self.started = count, -1, 0.0

    def of(self, done: int) -> str:
        """`3 of 32, 290 s left`; `done` layers are."""
        if self.first < 0:
            self.first, self.started = done, time.monotonic()
        own = done - self.first
        each_s = (time.monotonic() - self.started) / max(own, 1)
        left = f", {each_s * (self.count - done):.0f} s left" if own else ""
        return f"{done} of {self.count}{left}"


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
    """Run a layer to its end, or through one of its linears; `silent` ones give zeros."""
    trace = Trace(hidden, {}, {}, hidden)

    def hook(linear: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        trace.inputs[linear] = args[0]
        if output.shape == hidden.shape:
            trace.outputs[linear] = output
        if linear is until:
            raise Reached
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
    whole: list[torch.Tensor],
    rounded: list[torch.Tensor],
    names: dict[nn.Module, str],
    rounding: Rounding,
    file: "Saved",
) -> None:
    """Round a layer's linears in the order in which they run, on inputs from those before.

    The windows of `whole` become what the checkpoint's own layer makes of them. It runs beside the
    rounded one for each group of linears anew: keeping what it had would take gigabytes.
    """
    first = traced(layer, call, whole[0])
    writers, groups = residual_writers(layer, call, first), groups_of(first.inputs)
    del first
    if not groups:
        whole[:] = [output_of(call(layer, hidden)) for hidden in whole]
    # Of the same weights, which the layer's linears lose one by one.
    own_layer = copy.deepcopy(layer, {id(weight): weight for weight in layer.parameters()})
    own_of = dict(zip(layer.modules(), own_layer.modules(), strict=True))
    own_writers = [own_of[writer] for writer in writers]
    for linears in groups:
        lead, last = linears[0], linears is groups[-1]
        own_lead, to_end = own_of[lead], last or lead in writers[1:]
        halves = [Half(), Half()]
        for number, hidden in enumerate(rounded):
            trace = traced(layer, call, hidden, None if to_end else lead)
            own = traced(own_layer, call, whole[number], None if to_end else own_lead)
            half, x, own_x = halves[number % 2], trace.inputs[lead], own.inputs[own_lead]
            if lead in writers:
                residual = own.residual(own_lead, own_writers)
                drift = residual - trace.residual(lead, writers)
                half.add(x, own_x, drift, residual + own.outputs[own_lead])
            else:
                half.add(x, own_x)
            if last:
                whole[number] = own.output
        del half, trace, own
        weights = {names[linear]: linear.weight for linear in linears}
        file.add(rounding.round_corrected(weights, halves))
        del weights
        for linear in linears:
            linear.weight = file[names[linear]].weight(linear.in_features)


class Half:
    """What every other window of a text tells of a linear's inputs, summed over positions.

    `moments` are the quantized inputs' [inputs, inputs]. The others are products with them: of the
    inputs' `change`, which is the checkpoint's own less the quantized, and of the `drift`
    [outputs, inputs] of what the output is added to.
    """

    def __init__(self) -> None:
        self.moments = self.change = self.drift = torch.zeros(())

    def add(
        self,
        x: torch.Tensor,
        own_x: torch.Tensor,
        drift: torch.Tensor | None = None,
        normed: torch.Tensor | None = None,
    ) -> None:
        """Add a window. Where the norm that follows divides by what is `normed`, errors count less.

        The first token's is a thousand times the others' in many models.
        """
        weighed = root = x
        if normed is not None:
            each = (normed.square().mean(-1, keepdim=True) + TINY).rsqrt()
            root, weighed = x * each, x * each.square()
        self.moments = self.moments + product(root, root)  # positive in any precision
        self.change = self.change + product(own_x - x, weighed)
        if drift is not None:
            self.drift = self.drift + product(drift, weighed)

    def apart(self, weight: torch.Tensor) -> torch.Tensor:
        """How far the outputs are from the checkpoint's, times the inputs: [outputs, inputs]."""
        return weight @ self.change + self.drift


def groups_of(inputs: dict[nn.Linear, torch.Tensor]) -> list[list[nn.Linear]]:
    """The linears that read one tensor, together."""
    return [list(group) for _, group in itertools.groupby(inputs, lambda own: id(inputs[own]))]


def residual_writers(layer: nn.Module, call: Call, trace: Trace) -> list[nn.Linear]:
    """The linears whose output is added to the layer's as it is, in the order in which they run."""
    writers: list[nn.Linear] = []
    for linear, output in reversed(trace.outputs.items()):
        with_it = traced(layer, call, trace.input, silent=writers).output
        without = traced(layer, call, trace.input, silent=[linear, *writers]).output
        if torch.allclose(with_it - without, output, atol=1e-3 * float(output.std())):
            writers.insert(0, linear)
    return writers


def corrected(weight: torch.Tensor, halves: list[Half]) -> torch.Tensor:
    """The weight whose outputs on the quantized stream are nearest to the checkpoint's.

    By ridge regression, damped as is best for the second half if it is fitted to the first, or not
    at all if any correction makes the second half worse.
    """
    first, second = halves
    if not second.moments.ndim:  # a text of one window
        return weight
    wanted, other = first.apart(weight), second.apart(weight)
    best, least = None, 0.0
    for damping in DAMPINGS:
        change = ridge(first.moments, wanted, damping)
        left = float(((change @ second.moments - 2 * other) * change).sum())
        if left >= least:
            break
        best, least = damping, left
    if best is None:
        return weight
    return weight + ridge(first.moments + second.moments, wanted + other, best)


def ridge(moments: torch.Tensor, products: torch.Tensor, damping: float) -> torch.Tensor:
    """What [outputs, inputs] gives such `products` with inputs of such moments, or nearly so."""
    damped = moments.clone()
    damped.diagonal().add_(damping * float(moments.diag().mean()) or 1.0)
    return torch.linalg.solve(damped, products.T).T


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X^T Y over all positions."""
    return x.flatten(0, -2).T @ y.flatten(0, -2)


def sum_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, tensors)


class Saved:
    """The rounded linears of one file, by name. It is there whole or not at all."""

    def __init__(self, path: Path, block_size: int) -> None:
        self.path, self.block_size = path, block_size
        self.arrays: dict[str, np.ndarray] = load_file(path) if path.is_file() else {}

    def names(self) -> list[str]:
        return [key.removesuffix(PACKED) for key in self.arrays if key.endswith(PACKED)]

    def __getitem__(self, name: str) -> Rounded:
        return Rounded(self.arrays[name + PACKED], self.arrays[name + SCALES], self.block_size)

    def add(self, rounded: dict[str, Rounded]) -> None:
        for name, own in rounded.items():
            # safetensors writes an array's memory as it lies, whatever its strides.
            packed, scales = map(np.ascontiguousarray, (own.packed, own.scales))
            self.arrays |= {name + PACKED: packed, name + SCALES: scales}

    def write(self) -> None:
        with in_one_motion(self.path) as partial:
            save_file(self.arrays, partial)
            kept = load_file(partial)
            for name, array in self.arrays.items():
                if kept[name].tobytes() != array.tobytes():
                    raise StepError(
                        f"{self.path} was not kept as it was written, at {name}: the disk or "
                        "safetensors is at fault. Run it again."
                    )
