"""Export one checkpoint in this process: choose a graph by its twin, make it, and write it.

    python -m slm.exporters.worker request.json

`process.py` starts it, reads its lines, and finds `exported.json` or `error` beside the request. As
a process of its own it gives its memory back at the end.
"""

import argparse
import gc
import json
import logging
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.config import WINDOW, ExecutionProvider, Graph, Precision, Quantizer, Target
from slm.errors import InputError, StepError, one_line, words_for
from slm.exporters import builder, graph, mobius, optimum, parity
from slm.exporters.grid import Grid
from slm.exporters.parity import Parity, Twin
from slm.records import from_json
from slm.running.memory import peak_with_children_mb, releasing_mapped
from slm.running.orphans import end_with_parent

if TYPE_CHECKING:
    from slm.exporters.calibration import Rounding
    from slm.exporters.decoder import Decoder

MAKERS = {"genai": builder.make, "mobius": mobius.make, "optimum": optimum.make}
MIXED = "mixed.json"  # beside the calibrated layers: the linears that a budget was shared among
MARK = "@progress "  # begins the lines that the parent reads


@dataclass(frozen=True)
class Request:
    """What to export: the makers of graphs to try in this order, and the text to compare them on.

    `onnx` is the folder to make, `scratch` one for twins and for what the processes say. Where the
    target is calibrated, it is on at most `calibration_tokens` of `calibration`, into a folder that
    outlives a failure: `calibrated`.
    """

    checkpoint: str
    onnx: str
    scratch: str
    target: Target
    makers: list[str]
    text: str
    parity_tokens: int
    calibration: list[dict[str, Any]] = field(default_factory=list)
    calibration_tokens: int = 0
    calibrated: str = ""


@dataclass(frozen=True)
class Exported:
    """Whose graph it is, how close its twin was, and why others were `refused`, by name.

    `rounded` are the weights that `quantizer=grid` had to round. `linears` has the bits of each
    that a budget was shared among, and what int4 costs it.
    """

    graph: str
    parity: Parity
    refused: dict[str, str]
    build_s: float
    peak_rss_mb: float
    rounded: list[str] = field(default_factory=list)
    linears: dict[str, dict[str, float]] = field(default_factory=dict)


def export(request: Request) -> Exported:
    """Make the ONNX folder by the first maker whose twin agrees with transformers.

    Raises StepError if none does.
    """
    checkpoint, onnx = Path(request.checkpoint), Path(request.onnx)
    started = time.monotonic()
    maker, agreed, refused = choose(request, checkpoint, Path(request.scratch))
    gc.collect()
    target = request.target
    save = quantizer = None
    if not (target.quantizer is Quantizer.builder and target.precision.bits):
        quantizer = quantizer_of(request, maker)
        save = partial(graph.write, quantizer=quantizer, said=say)
    with releasing_mapped(checkpoint):
        MAKERS[maker](checkpoint, target, target.precision, onnx, save)
    rounded = require_kept(quantizer) if isinstance(quantizer, Grid) else []
    seconds = round(time.monotonic() - started - agreed.seconds, 1)
    mixed = Path(request.calibrated) / MIXED
    linears = json.loads(mixed.read_text()) if mixed.is_file() else {}
    peak_mb = peak_with_children_mb()
    return Exported(maker, agreed, refused, seconds, peak_mb, rounded, linears)


def require_kept(grid: Grid) -> list[str]:
    """The weights that stand on no grid. Raises StepError if all of them do."""
    if not grid.kept:
        raise StepError(
            "no weight of the checkpoint stands on a grid of at most 255 steps a block: it was "
            "never quantized, or not kept in float32 since, or the target's weights are float16. "
            "Export with target.quantizer=rtn, or for a CPU."
        )
    return grid.rounded


def quantizer_of(request: Request, maker: str) -> graph.Quantizer | None:
    """What rounds the weights of the target; None where it leaves them floats."""
    target = request.target
    bits = target.precision.bits
    if bits is None:
        return None
    block_size = target.builder_options["block_size"]
    accuracy_level = target.builder_options.get("accuracy_level", 0)
    if target.quantizer is Quantizer.rtn:
        return graph.Rtn(bits, block_size, accuracy_level)
    if target.quantizer is Quantizer.grid:
        return Grid(block_size, accuracy_level)
    from torch.nn import Linear

    from slm.exporters.calibrated import Calibrated
    from slm.exporters.calibration import Rounding, calibrate
    from slm.exporters.calibration_text import calibration_tokens
    from slm.exporters.decoder import Decoder

    checkpoint, folder = Path(request.checkpoint), Path(request.calibrated)
    folder.mkdir(exist_ok=True)

    def draft() -> Path:
        say(0, 0, "the model's own answers, by a draft that is rounded to nearest")
        onnx = Path(request.scratch) / "draft" / "onnx"
        cpu = replace(target, execution_provider=ExecutionProvider.cpu)
        save = partial(graph.write, quantizer=graph.Rtn(4, block_size, 4), said=silent)
        MAKERS[maker](checkpoint, cpu, Precision.int4, onnx, save)
        return onnx

    rows, most = request.calibration, request.calibration_tokens
    tokens = calibration_tokens(rows, checkpoint, most, draft, folder / "answers.json")
    decode = partial(Decoder, checkpoint, tokens, WINDOW)
    rounding = Rounding(bits, block_size, target.int8, target.quantizer is Quantizer.mse)
    if target.budget_mb or target.budget_bits:
        rounding = replace(rounding, int8=share_budget(target, decode(), rounding, folder))
    decoder = decode()
    names = [name for module, name in decoder.name_of.items() if isinstance(module, Linear)]
    if target.int8 and not any(rounding.bits_of(name) > bits for name in names):
        raise InputError(
            f"target.int8 is {', '.join(target.int8)}; none of it is the end of a linear's name in "
            f"this checkpoint, such as {names[-1]}."
        )
    calibrate(decoder, rounding, folder, partial(say, 0, 0))
    return Calibrated(checkpoint, folder, block_size, accuracy_level)


def share_budget(
    target: Target, decoder: "Decoder", rounding: "Rounding", folder: Path
) -> list[str]:
    """The linears that keep 8 bits within the target's budget. Notes all of them in `folder`."""
    from slm.exporters.sensitivity import keep_in_int8, left_for_int8, sensitivity, sizes_of

    sizes = sizes_of(decoder, rounding.block_size)
    weights = sum(size.weights for size in sizes.values())
    budget_mb = target.budget_mb or (target.budget_bits or 0) * weights / 8e6
    left_for_int8(sizes, budget_mb)  # before the pass, which takes minutes
    divergence = sensitivity(decoder, rounding, folder, partial(say, 0, 0))
    int8 = keep_in_int8(divergence, sizes, budget_mb)
    linears = {
        name: {
            "bits": 8 if name in int8 else 4,
            "divergence": float(f"{divergence[name]:.3g}"),
        }
        for name in sizes
    }
    (folder / MIXED).write_text(json.dumps(linears))
    taken = sum(size.int8 if name in int8 else size.int4 for name, size in sizes.items()) / 1e6
    said = f"{len(int8)} of {len(sizes)} linears keep 8 bits: {taken:.3g} MB of {budget_mb:.3g}"
    say(0, 0, said)
    return int8


def choose(request: Request, checkpoint: Path, folder: Path) -> tuple[str, Parity, dict[str, str]]:
    """The first maker whose twin agrees, how closely, and why those before it were refused."""
    started = time.monotonic()
    say(0, 0, "comparing a shallow twin with transformers")
    twin = parity.write_twin(checkpoint, folder / "checkpoint", request.text, request.parity_tokens)
    reference = parity.reference_logits(twin)
    save = partial(graph.write, quantizer=None, said=silent)
    precision = parity.twin_precision(request.target)
    refused: dict[str, str] = {}
    compared = False
    for maker in request.makers:
        try:
            made = folder / maker
            MAKERS[maker](twin.folder, request.target, precision, made, save)
            found = parity.compare(twin, made, reference, parity.TOLERANCES[precision], started)
        except Exception as error:
            if not is_a_makers(error):
                raise
            refused[maker] = words_for(error) or f"{type(error).__name__}: {one_line(error)[:300]}"
            continue
        if found.first is None:
            said = f"{maker}'s graph agrees with transformers over {found.tokens} tokens"
            say(0, 0, f"{said}: KL up to {found.kl_divergence:.1e} nats")
            return maker, found, refused
        compared = True
        refused[maker] = disagreement(found, twin)
    raise StepError(refusal(checkpoint, request.makers, refused, compared))


def is_a_makers(error: Exception) -> bool:
    """Whether a maker, or ONNX Runtime, could not do it; no full disk, nor a fault of our own."""
    if isinstance(error, OSError | MemoryError):
        return False
    at = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, RuntimeError) or "site-packages" in at


def disagreement(found: Parity, twin: Twin) -> str:
    """In words, where a twin's graph and transformers part."""
    whole = twin.lengths.items()
    past = [f"{key} {value}" for key, value in whole if abs(value - (found.first or 0)) <= 8]
    where = f" (past {', '.join(past)})" if past else ""
    return (
        f"its graph says otherwise than transformers from position {found.first}{where} of "
        f"{found.tokens} on: KL up to {found.kl_divergence:.2g} nats before any quantization, over "
        f"{found.layers} layers"
    )


def refusal(checkpoint: Path, makers: list[str], refused: dict[str, str], compared: bool) -> str:
    """What the user is told where no graph is right."""
    config = json.loads((checkpoint / "config.json").read_text())
    special = parity.special_settings(config)
    has = f" Its config.json has {', '.join(special)}." if special else ""
    tried = "; ".join(f"{maker}: {why.rstrip('.')}" for maker, why in refused.items())
    others = [name for name in Graph.auto.makers if name not in makers]
    cure = " Try export.graph=optimum, which makes an environment of its own."
    if others:
        cure = f" Try export.graph=auto, which also asks {', '.join(others)}."
    name = config["architectures"][0]
    words = f"no graph of {name} means what its checkpoint means"
    if not compared:
        words = f"no graph of {name} can be made"
    return f"{words}. {tried}.{has}{cure}"


def say(done: int, total: int, name: str) -> None:
    """Tell the parent how far it is: tensors written, of how many, and what is next."""
    print(MARK + json.dumps([done, total, name]), flush=True)


def silent(*_: object) -> None:
    """A twin is written in a second."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("request", type=Path, help="JSON: what to export")
    path: Path = parser.parse_args().request
    logging.disable(logging.INFO)
    end_with_parent()
    try:
        exported = export(from_json(Request, json.loads(path.read_text())))
    except Exception as error:
        words = words_for(error)
        if words is None:
            raise
        path.with_name("error").write_text(words)
        parser.exit(1)
    path.with_name("exported.json").write_text(json.dumps(asdict(exported)))


if __name__ == "__main__":
    main()
