"""Who rounds the weights of a target, and what has to be known before: a text, a budget's shares.

What a calibration needs is looked at before anything is made. Its results stay in two folders: the
request's `calibrated` has the layers, `shared` what other targets of the checkpoint read as well.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from slm.config.packaging import WINDOW
from slm.config.target import ExecutionProvider, Precision, Quantizer, Target
from slm.errors import InputError, StepError
from slm.exporters import dequantized, graph
from slm.exporters.grid import Grid
from slm.running.whole import write_whole
from slm.running.work import locked

if TYPE_CHECKING:
    from slm.exporters.builder import Save
    from slm.exporters.calibration import Rounding
    from slm.exporters.decoder import Decoder
    from slm.exporters.worker import Request

MIXED = "mixed.json"  # beside the calibrated layers: the linears that a budget was shared among
Make = Callable[[Target, Precision, Path, "Save"], None]


def require_possible(request: "Request") -> None:
    """Raise InputError where a target cannot be calibrated on its text, or has no such linears."""
    target = request.target
    if not target.quantizer.calibrates:
        return
    from slm.exporters.calibration_text import require_readable
    from slm.exporters.decoder import empty_model, linears_of_model, require_linears
    from slm.exporters.sensitivity import left_for_int8, sizes_of

    checkpoint = Path(request.checkpoint)
    require_readable(request.calibration, checkpoint)
    model = empty_model(checkpoint)
    require_linears(model)
    linears = linears_of_model(model)
    rounding = rounding_of(target)
    for ending in target.int8:
        only = replace(rounding, int8=[ending])
        if not any(only.bits_of(name) > rounding.bits for name in linears):
            raise InputError(
                f"target.int8 has {ending}, which is not the end of any linear's name in this "
                f"checkpoint, such as {', '.join(list(linears)[-2:])}."
            )
    if target.budget_mb or target.budget_bits:
        sizes = sizes_of(linears, rounding.block_size)
        left_for_int8(sizes, budget_mb_of(target, sum(size.weights for size in sizes.values())))


def quantizer_of(
    request: "Request", make: Make, said: Callable[[str], None]
) -> graph.Quantizer | None:
    """What rounds the weights of the target; None where it leaves them floats.

    `make` makes an ONNX folder of the checkpoint, for the draft that answers the text's questions.
    """
    target = request.target
    bits = target.precision.bits
    if bits is None:
        return None
    block_size = target.builder_options["block_size"]
    accuracy_level = target.accuracy_level
    if target.execution_provider is ExecutionProvider.NvTensorRtRtx:
        return dequantized.PositiveRtn(bits, block_size)
    if target.quantizer is Quantizer.rtn:
        return graph.Rtn(bits, block_size, accuracy_level)
    if target.quantizer is Quantizer.grid:
        return Grid(block_size, accuracy_level)
    from slm.exporters.calibrated import Calibrated
    from slm.exporters.calibration import calibrate
    from slm.exporters.calibration_text import calibration_windows
    from slm.exporters.decoder import Decoder

    checkpoint = Path(request.checkpoint)
    folder, shared = Path(request.calibrated), Path(request.shared)
    for each in (folder, shared):
        each.mkdir(exist_ok=True)

    def draft() -> Path:
        said("the model's own answers, by a draft that is rounded to nearest")
        onnx = Path(request.scratch) / "draft" / "onnx"
        cpu = replace(target, name="draft", execution_provider=ExecutionProvider.cpu)
        rtn = graph.Rtn(4, block_size, 4)
        save = partial(graph.write, quantizer=rtn, said=lambda *_: None, last_logits=True)
        make(cpu, Precision.int4, onnx, save)
        return onnx

    rows, most = request.calibration, request.calibration_tokens
    rounding = rounding_of(target)
    with locked(shared.with_suffix(""), said):  # of several targets at once, one makes it
        windows = calibration_windows(rows, checkpoint, most, draft, shared / "answers.json", said)
        shutil.rmtree(Path(request.scratch) / "draft", ignore_errors=True)
        if target.budget_mb or target.budget_bits:
            decoder = Decoder(checkpoint, windows)
            int8 = share_budget(target, decoder, rounding, folder, shared, said)
            rounding = replace(rounding, int8=int8)
    calibrate(Decoder(checkpoint, windows), rounding, folder, said)
    return Calibrated(checkpoint, folder, block_size, accuracy_level, len(windows) * WINDOW)


def rounding_of(target: Target) -> "Rounding":
    from slm.exporters.calibration import Rounding

    bits, block_size = target.precision.bits, target.builder_options["block_size"]
    assert bits is not None
    return Rounding(bits, block_size, target.int8, target.quantizer is Quantizer.mse)


def budget_mb_of(target: Target, weights: int) -> float:
    return target.budget_mb or (target.budget_bits or 0) * weights / 8e6


def share_budget(
    target: Target,
    decoder: "Decoder",
    rounding: "Rounding",
    folder: Path,
    shared: Path,
    said: Callable[[str], None],
) -> list[str]:
    """The linears that keep 8 bits within the target's budget. Notes all of them in `folder`."""
    from slm.exporters.sensitivity import keep_in_int8, sensitivity, sizes_of

    sizes = sizes_of(decoder.linears, rounding.block_size)
    budget_mb = budget_mb_of(target, sum(size.weights for size in sizes.values()))
    divergence = sensitivity(decoder, rounding, shared, said)
    if missing := sizes.keys() - divergence.keys():
        raise StepError(
            f"the calibration text never reaches {', '.join(sorted(missing)[:3])}, so that what "
            "int4 does to it is not known. Give target.int8 a list in place of a budget, or "
            "export with target.quantizer=rtn."
        )
    int8 = keep_in_int8(divergence, sizes, budget_mb)
    linears = {
        name: {
            "bits": 8 if name in int8 else 4,
            "divergence": float(f"{divergence[name]:.3g}"),
        }
        for name in sizes
    }
    write_whole(folder / MIXED, json.dumps(linears))
    taken = sum(size.int8 if name in int8 else size.int4 for name, size in sizes.items()) / 1e6
    said(f"{len(int8)} of {len(sizes)} linears keep 8 bits: {taken:.3g} MB of {budget_mb:.3g}")
    return int8


def require_kept(grid: Grid) -> list[str]:
    """The weights that stand on no grid. Raises StepError if all of them do."""
    if not grid.kept:
        raise StepError(
            "no weight of the checkpoint stands on a grid of at most 255 steps a block: it was "
            "never quantized, or not kept in float32 since, or the target's weights are float16. "
            "Export with target.quantizer=rtn, or for a CPU."
        )
    return grid.rounded
