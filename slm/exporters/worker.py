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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from slm.config import Quantizer, Target
from slm.errors import StepError, one_line, words_for
from slm.exporters import builder, graph, mobius, parity
from slm.exporters.parity import Parity, Twin
from slm.records import from_json
from slm.running.memory import peak_rss_mb, releasing_mapped

MAKERS = {"genai": builder.make, "mobius": mobius.make}
MARK = "@progress "  # begins the lines that the parent reads


@dataclass(frozen=True)
class Request:
    """What to export: the makers of graphs to try in this order, and the text to compare them on.

    `onnx` is the folder to make, `scratch` one for twins and for what the processes say.
    """

    checkpoint: str
    onnx: str
    scratch: str
    target: Target
    makers: list[str]
    text: str
    parity_tokens: int


@dataclass(frozen=True)
class Exported:
    """Whose graph it is, how close its twin was, and why others were `refused`, by name."""

    graph: str
    parity: Parity
    refused: dict[str, str]
    build_s: float
    peak_rss_mb: float


def export(request: Request) -> Exported:
    """Make the ONNX folder by the first maker whose twin agrees with transformers.

    Raises StepError if none does.
    """
    checkpoint, onnx = Path(request.checkpoint), Path(request.onnx)
    started = time.monotonic()
    maker, agreed, refused = choose(request, checkpoint, Path(request.scratch))
    gc.collect()
    target = request.target
    bits = target.precision.bits
    options = target.builder_options
    rtn, by_builder = None, target.quantizer is Quantizer.builder and bits is not None
    if bits and not by_builder:
        rtn = graph.Rtn(bits, options["block_size"], options.get("accuracy_level", 0))
    save = None if by_builder else partial(graph.write, rtn=rtn, said=say)
    with releasing_mapped(checkpoint):
        MAKERS[maker](checkpoint, target, target.precision, onnx, save)
    seconds = round(time.monotonic() - started - agreed.seconds, 1)
    return Exported(maker, agreed, refused, seconds, round(peak_rss_mb(), 1))


def choose(request: Request, checkpoint: Path, folder: Path) -> tuple[str, Parity, dict[str, str]]:
    """The first maker whose twin agrees, how closely, and why those before it were refused."""
    started = time.monotonic()
    say(0, 0, "comparing a shallow twin with transformers")
    twin = parity.write_twin(checkpoint, folder / "checkpoint", request.text, request.parity_tokens)
    reference = parity.reference_logits(twin)
    save = partial(graph.write, rtn=None, said=silent)
    precision = parity.twin_precision(request.target)
    refused: dict[str, str] = {}
    for maker in request.makers:
        try:
            made = folder / maker
            MAKERS[maker](twin.folder, request.target, precision, made, save)
            found = parity.compare(twin, made, reference, parity.TOLERANCES[precision], started)
        except Exception as error:  # of any library that makes or runs the graph
            refused[maker] = words_for(error) or f"{type(error).__name__}: {one_line(error)[:300]}"
            continue
        if found.first is None:
            return maker, found, refused
        refused[maker] = disagreement(found, twin)
    raise StepError(refusal(checkpoint, request.makers, refused))


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


def refusal(checkpoint: Path, makers: list[str], refused: dict[str, str]) -> str:
    """What the user is told where no graph is right."""
    config = json.loads((checkpoint / "config.json").read_text())
    special = parity.special_settings(config)
    has = f" Its config.json has {', '.join(special)}." if special else ""
    tried = "; ".join(f"{maker}: {why}" for maker, why in refused.items())
    others = [name for name in MAKERS if name not in makers]
    cure = f" Try export.graph=auto, which also asks {', '.join(others)}." if others else ""
    name = config["architectures"][0]
    return f"no graph of {name} means what its checkpoint means. {tried}.{has}{cure}"


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
