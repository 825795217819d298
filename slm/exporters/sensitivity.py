"""How much a text's predictions suffer if a linear is rounded to int4, for each linear by itself.

To second order, the KL divergence that a change dW of its weight causes at a position is half the
mean square of g . dW x, where x is the linear's input and g the gradient, at its output, of the
log-likelihood of a token drawn from the model's own predictions (the Fisher information). The
gradients come by a pass back through the layers, of which one is in memory at a time; each layer's
inputs, and its rounded weights, wait on disk. What one position's change does to the next is left
out: the layers that are rounded later make up for most of what positions have in common.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from slm.errors import InputError
from slm.exporters.calibration import (
    Progress,
    Rounding,
    Saved,
    groups_of,
    product,
    sum_of,
    traced,
)
from slm.exporters.decoder import Call, Decoder, bfloat16_products, output_of
from slm.exporters.gptq import Inputs
from slm.running.whole import in_one_motion, write_whole

WINDOWS = 16  # of the text, spread over it: as many as ranking the linears takes
STATE = "back.npz"


@bfloat16_products()
@torch.no_grad()
def sensitivity(
    decoder: Decoder, rounding: Rounding, folder: Path, said: Callable[[str], None]
) -> dict[str, float]:
    """Each linear's divergence, in nats a token; kept in `folder`.

    A pass that broke off goes on after the last whole layer.
    """
    path, scratch = folder / "sensitivity.json", folder / "sensitivity"
    if path.is_file():
        shutil.rmtree(scratch, ignore_errors=True)  # of a pass that was killed at its end
        return dict(json.loads(path.read_text()))
    scratch.mkdir(exist_ok=True)
    decoder.windows = decoder.windows[:: -(-len(decoder.windows) // WINDOWS)]
    names, count, positions = decoder.name_of, len(decoder.layers), decoder.windows.numel()
    hidden, progress = decoder.embedded(), Progress(count)
    for i, (layer, call) in enumerate(zip(decoder.layers, decoder.calls, strict=True)):
        after = scratch / f"{i}.npy"  # what the next module reads: there if this layer is whole
        if not after.is_file():
            said(f"what int4 harms: forward through layer {progress.of(i)}")
            saved = Saved(scratch / f"{i}.int4", rounding.block_size)
            with decoder.filled(layer):
                hidden = round_once(layer, call, hidden, names, rounding, saved)
            with in_one_motion(after) as unfinished, unfinished.open("wb") as file:
                np.save(file, torch.cat(hidden).numpy())
        hidden = read_windows(after)

    def go_back(
        module: nn.Module, call: Call, inputs: Iterable[torch.Tensor], saved: Saved, slope_of: Slope
    ) -> list[torch.Tensor]:
        """Through one module: the gradients at its inputs."""
        changes = {
            linear: saved[names[linear]].weight(linear.in_features) - linear.weight
            for linear in linears_of(module)
            if names[linear] in saved.names()
        }
        found.update({names[linear]: 0.0 for linear in changes})
        slopes = []
        for number, x in enumerate(inputs):
            slope, gradients = gradients_of(module, call, x, partial(slope_of, number))
            slopes.append(slope)
            for linear, (own, gradient) in gradients.items():
                effect = (gradient * (own @ changes[linear].T)).sum(-1)
                found[names[linear]] += float(effect.square().sum()) / 2 / positions
        return slopes

    left, slopes, found = read_state(scratch)
    saved = Saved(scratch / "head.int4", rounding.block_size)
    if left is None:
        said("what int4 harms: the head")
        decoder.fill_head()
        round_once(decoder.head, decoder.predict, hidden, names, rounding, saved)
        slopes = go_back(decoder.head, decoder.predict, hidden, saved, slope_of_a_draw)
        if not decoder.tied:
            decoder.head.to("meta")
        left = count
        write_state(scratch, left, slopes, found)
    progress = Progress(count)
    for i in reversed(range(left)):
        said(f"what int4 harms: back through layers: {progress.of(count - 1 - i)}")
        layer, call = decoder.layers[i], decoder.calls[i]
        inputs = read_windows(scratch / f"{i - 1}.npy") if i else decoder.embedded()
        rounded = Saved(scratch / f"{i}.int4", rounding.block_size)
        with decoder.filled(layer):
            slopes = go_back(layer, call, inputs, rounded, slope_among(slopes))
        write_state(scratch, i, slopes, found)
    if decoder.tied:  # the embedding changes with the head
        whole = decoder.embedded()
        inputs_of_head = decoder.embedding.weight.shape[1]
        decoder.embedding.weight = saved[names[decoder.head]].weight(inputs_of_head)
        pairs = zip(slopes, whole, decoder.embedded(), strict=True)
        effects = sum_of((g * (y - x)).sum(-1).square().sum() for g, x, y in pairs)
        found[names[decoder.head]] += float(effects) / 2 / positions
    write_whole(path, json.dumps(found))
    shutil.rmtree(scratch)
    return found


def read_windows(path: Path) -> list[torch.Tensor]:
    return list(torch.from_numpy(np.load(path)).split(1))


def write_state(
    scratch: Path, left: int, slopes: list[torch.Tensor], found: dict[str, float]
) -> None:
    """Note how many layers the pass back has before it, the gradients there, and what it found."""
    with in_one_motion(scratch / STATE) as path, path.open("wb") as file:
        own = torch.cat(slopes).numpy()
        np.savez(file, left=np.array(left), slopes=own, found=np.array(json.dumps(found)))


def read_state(scratch: Path) -> tuple[int | None, list[torch.Tensor], dict[str, float]]:
    """What was noted last; None, and nothing, before the pass back has begun."""
    if not (scratch / STATE).is_file():
        return None, [], {}
    with np.load(scratch / STATE) as kept:
        slopes = list(torch.from_numpy(kept["slopes"]).split(1))
        return int(kept["left"]), slopes, dict(json.loads(str(kept["found"])))


def keep_in_int8(found: dict[str, float], sizes: dict[str, "Size"], budget_mb: float) -> list[str]:
    """The linears to leave 8 bits: those that it saves most divergence for each byte."""
    left = left_for_int8(sizes, budget_mb)
    kept = []
    for name in sorted(sizes, key=lambda name: -found[name] / sizes[name].more):
        if sizes[name].more <= left:
            left -= sizes[name].more
            kept.append(name)
    return kept


def left_for_int8(sizes: dict[str, "Size"], budget_mb: float) -> int:
    """What all linears in int4 leave of a budget, in bytes. Raises InputError if they exceed it."""
    left = round(budget_mb * 1e6) - sum(size.int4 for size in sizes.values())
    if left < 0:
        least, most = (sum(getattr(s, n) for s in sizes.values()) / 1e6 for n in ("int4", "int8"))
        raise InputError(
            f"the target's budget is {budget_mb:.3g} MB; this checkpoint's linears take "
            f"{least:.3g} MB in int4 and {most:.3g} in int8, with their scales."
        )
    return left


class Size(NamedTuple):
    """A linear's weights, and the bytes of its integers and scales."""

    weights: int
    int4: int
    int8: int

    @property
    def more(self) -> int:
        return self.int8 - self.int4


def sizes_of(linears: dict[str, nn.Linear], block_size: int) -> dict[str, Size]:
    sizes = {}
    for name, linear in linears.items():
        blocks = linear.out_features * -(-linear.in_features // block_size)
        own = Size(linear.weight.numel(), blocks * (block_size // 2 + 2), blocks * (block_size + 2))
        sizes[name] = own
    return sizes


Slope = Callable[[int, torch.Tensor], torch.Tensor]


def linears_of(module: nn.Module) -> list[nn.Linear]:
    return [each for each in module.modules() if isinstance(each, nn.Linear)]


def round_once(
    module: nn.Module,
    call: Call,
    hidden: list[torch.Tensor],
    names: dict[nn.Module, str],
    rounding: Rounding,
    saved: Saved,
) -> list[torch.Tensor]:
    """Round a module's linears, each on the inputs that it has; return the module's outputs."""
    moments: dict[nn.Linear, torch.Tensor] = {}
    groups: dict[nn.Linear, list[nn.Linear]] = {}
    outputs = []
    for x in hidden:
        trace = traced(module, call, x)
        outputs.append(trace.output)
        for linears in groups_of(trace.inputs):
            lead, own = linears[0], trace.inputs[linears[0]]
            groups[lead] = linears
            moments[lead] = moments.get(lead, torch.zeros(())) + product(own, own)
    for lead, linears in groups.items():
        inputs = Inputs(moments.pop(lead).numpy())
        for linear in linears:
            name = names[linear]
            saved.add({name: rounding.round(name, linear.weight, inputs, sweeps=0)})
    saved.write()
    return outputs


def gradients_of(
    module: nn.Module, call: Call, x: torch.Tensor, slope_of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, dict[nn.Linear, tuple[torch.Tensor, torch.Tensor]]]:
    """The gradient at a module's input, and each linear's input with the gradient at its output."""
    seen: dict[nn.Linear, tuple[torch.Tensor, torch.Tensor]] = {}

    def record(linear: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen[linear] = args[0].detach(), output

    hooks = [linear.register_forward_hook(record) for linear in linears_of(module)]
    module.requires_grad_(False)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        output = output_of(call(module, x))
        through = [x, *(own for _, own in seen.values())]
        slope, *slopes = torch.autograd.grad(output, through, slope_of(output.detach()))
    for hook in hooks:
        hook.remove()
    pairs = zip(seen.items(), slopes, strict=True)
    return slope, {linear: (own, gradient) for (linear, (own, _)), gradient in pairs}


def slope_among(slopes: list[torch.Tensor]) -> Slope:
    return lambda number, _: slopes[number]


def slope_of_a_draw(number: int, logits: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss at logits [1, positions, vocabulary], for tokens drawn from them."""
    slope = logits.softmax(-1)
    seeded = torch.Generator().manual_seed(number)
    drawn = torch.multinomial(slope[0], 1, generator=seeded)
    slope[0].scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
    return slope
