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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from slm.config.packaging import Graph
from slm.config.target import ExecutionProvider, Quantizer, Target
from slm.errors import InfrastructureError, StepError, as_user_error, one_line, words_for
from slm.exporters import builder, dequantized, graph, mobius, optimum, parity, prompts
from slm.exporters.grid import Grid
from slm.exporters.parity import Parity, Twin
from slm.exporters.quantizers import MIXED, quantizer_of, require_kept, require_possible
from slm.records import from_json
from slm.running.memory import peak_with_children_mb, releasing_mapped
from slm.running.orphans import end_with_parent
from slm_pyfunc.engine.decoder import runs_alone

MAKERS = {"genai": builder.make, "mobius": mobius.make, "optimum": optimum.make}
MARK = "@progress "  # begins the lines that the parent reads


@dataclass(frozen=True)
class Request:
    """What to export: the makers of graphs to try in this order, and the text to compare them on.

    `onnx` is the folder to make, `scratch` one for twins and for what the processes say. Where the
    target is calibrated, it is on at most `calibration_tokens` of `calibration`, into folders that
    outlive a failure: `calibrated` for this target, `shared` for others of the checkpoint too.
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
    shared: str = ""


@dataclass(frozen=True)
class Exported:
    """Whose graph it is, how close its twin was, and why others were `refused`, by name.

    `rounded` are the weights that `quantizer=grid` had to round. `read` are the tokens of a
    calibration; `linears` has the bits of each linear that a budget was shared among, and what int4
    costs it.
    """

    graph: str
    parity: Parity
    refused: dict[str, str]
    build_s: float
    peak_rss_mb: float
    rounded: list[str] = field(default_factory=list)
    linears: dict[str, dict[str, float]] = field(default_factory=dict)
    read: int = 0


def export(request: Request) -> Exported:
    """Make the ONNX folder by the first maker whose twin agrees with transformers.

    Raises StepError if none does.
    """
    checkpoint, onnx = Path(request.checkpoint), Path(request.onnx)
    started = time.monotonic()
    require_possible(request)
    maker, agreed, refused = choose(request, checkpoint, Path(request.scratch))
    gc.collect()
    target = request.target
    save: builder.Save | None = None
    quantizer = None
    with releasing_mapped(checkpoint):
        if not (target.quantizer is Quantizer.builder and target.precision.bits):
            make = partial(MAKERS[maker], checkpoint)
            quantizer = quantizer_of(request, make, partial(say, 0, 0))
            if target.prompts and quantizer:
                midway = target.quantizer.calibrates
                save = partial(prompts.write, quantizer=quantizer, said=say, midway=midway)
            else:
                reads_floats = isinstance(quantizer, dequantized.PositiveRtn)
                put = dequantized.put if reads_floats else graph.quantize_product
                save = saving(target, quantizer=quantizer, said=say, put=put)
        MAKERS[maker](checkpoint, target, target.precision, onnx, save)
    rounded = require_kept(quantizer) if isinstance(quantizer, Grid) else []
    seconds = round(time.monotonic() - started - agreed.seconds, 1)
    mixed = Path(request.calibrated) / MIXED
    linears = json.loads(mixed.read_text()) if mixed.is_file() else {}
    peak_mb = peak_with_children_mb()
    read = getattr(quantizer, "read", 0)
    return Exported(maker, agreed, refused, seconds, peak_mb, rounded, linears, read)


def require_batched(twin: Path) -> None:
    """Raise StepError where the decoder that runs a graph for prompts does not run the model."""
    if runs_alone(json.loads((twin / "genai_config.json").read_text())):
        raise StepError(
            "target.prompts is int8, and models that change their rotary factors with the length, "
            "or whose caches grow, are run by one graph: export with target.prompts=null."
        )


def saving(target: Target, **told: Any) -> builder.Save:
    """How a graph is written; on the CPU, a prompt's logits are asked for its last token alone."""
    on_cpu = target.execution_provider is ExecutionProvider.cpu
    return partial(graph.write, last_logits=on_cpu, **told)


def choose(request: Request, checkpoint: Path, folder: Path) -> tuple[str, Parity, dict[str, str]]:
    """The first maker whose twin agrees, how closely, and why those before it were refused."""
    started = time.monotonic()
    say(0, 0, "comparing a shallow twin with transformers")
    twin = parity.write_twin(checkpoint, folder / "checkpoint", request.text, request.parity_tokens)
    reference = parity.reference_logits(twin)
    save = saving(request.target, quantizer=None, said=silent)
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
            if request.target.prompts:
                require_batched(made)
            said = f"{maker}'s graph agrees with transformers over {found.tokens} tokens"
            say(0, 0, f"{said}: KL up to {found.kl_divergence:.1e} nats")
            return maker, found, refused
        compared = True
        refused[maker] = disagreement(found, twin)
    raise StepError(refusal(checkpoint, request.makers, refused, compared))


def is_a_makers(error: Exception) -> bool:
    """Whether a maker, or ONNX Runtime, could not do it; no full disk, no fault of our own."""
    if isinstance(error, OSError) or isinstance(as_user_error(error), InfrastructureError):
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
        known = as_user_error(error)
        if known is None:
            raise
        path.with_name("error").write_text(one_line(known))
        parser.exit(known.exit_code)
    path.with_name("exported.json").write_text(json.dumps(asdict(exported)))


if __name__ == "__main__":
    main()
