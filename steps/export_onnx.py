"""Export a checkpoint to ONNX for one hardware target.

    python -m steps.export_onnx target=cpu-int4-rtn-block-32-acc-level-4 source=/data/checkpoint
    python -m steps.export_onnx source=/data/checkpoint export.graph=auto

An export counts only once a float32 twin of its graph agrees with transformers
(slm/exporters/parity.py), the file is what its target's name says (slm/exporters/structure.py), its
tokenizer agrees with the checkpoint's, and it has loaded and generated (slm/exporters/checks.py).
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slm.config import Config
from slm.config.common import ROOT
from slm.config.packaging import WINDOW, Export, Graph
from slm.config.target import Target
from slm.digests import (
    Provenance,
    digest_files,
    digest_of,
    read_provenance,
    require_files,
    size_mb,
    write_provenance,
)
from slm.errors import InputError
from slm.exporters import optimum
from slm.exporters.builder import builder_arguments
from slm.exporters.calibration_text import read_calibration
from slm.exporters.checks import require_it_generates
from slm.exporters.generation import carry_over
from slm.exporters.process import WORKER, run_worker
from slm.exporters.structure import kept_in_int8, require_structure
from slm.exporters.worker import Request
from slm.planning import require_room_for
from slm.records import OnnxModel
from slm.running.command import entry_point
from slm.running.run import run_step
from slm.running.tracking import local_path
from slm.running.work import code_digests, locked, versions
from slm.sources.verify import INDEX, WHOLE

LIBRARIES = (
    "onnxruntime-genai",
    "mobius-onnx",
    "onnxruntime",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnx-shape-inference",
    "numpy",
    "scipy",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
)
# What twins are compared on: prose and dialogue in several languages.
TEXTS = ROOT / "data" / "texts.jsonl"


def export_onnx(
    checkpoint: Path, provenance: Provenance, target: Target, settings: Export, folder: Path
) -> OnnxModel:
    """Make the graph and its weights, check them, and record how they were made."""
    onnx, scratch = folder / "onnx", folder / "scratch"
    if settings.graph is Graph.optimum:
        optimum.python()  # now, with its minutes on the terminal
    calibrated, shared = calibrated_of(folder), shared_of(folder, provenance, target, settings)
    calibration = calibration_of(target, settings)
    texts = [json.loads(line)["text"] for line in TEXTS.read_text().splitlines()]
    request = Request(
        checkpoint=str(checkpoint),
        onnx=str(onnx),
        scratch=str(scratch),
        target=target,
        makers=settings.graph.makers,
        text="\n".join(texts),
        parity_tokens=settings.parity_tokens,
        calibration=read_calibration(settings.calibration) if calibration else [],
        calibration_tokens=settings.calibration_tokens,
        calibrated=str(calibrated),
        shared=str(shared),
    )
    exported = run_worker(request)
    shutil.rmtree(scratch)
    require_files(
        onnx, "genai_config.json", "tokenizer.json", "tokenizer_config.json", made_by="export_onnx"
    )
    notes = [f"the graph is not by {name}: {why}" for name, why in exported.refused.items()]
    if exported.parity.unchecked:
        notes.append(f"the graph was not compared past {', '.join(exported.parity.unchecked)}")
    if exported.rounded:
        names = ", ".join(exported.rounded[:3]) + (", …" if len(exported.rounded) > 3 else "")
        notes.append(f"{len(exported.rounded)} weights with rows on no grid are rounded: {names}")
    notes += carry_over(checkpoint, onnx)
    require_structure(onnx, target, kept_in_int8(checkpoint, target, exported.linears))
    checked_on, differences = require_it_generates(onnx, checkpoint, target, request.text)
    pinned = optimum.versions() if settings.graph is Graph.optimum else {}
    arguments = builder_arguments(target) if exported.graph == "genai" else []
    found = {"read": exported.read, "linears": exported.linears}
    found = {name: value for name, value in found.items() if value}
    onnx_provenance = write_provenance(
        onnx,
        checkpoint=provenance,
        target=target.name,
        checked_on=checked_on,
        graph=exported.graph,
        refused=exported.refused,
        quantizer=target.quantizer.value if target.precision.bits else "",
        calibration=calibration | found,
        builder_arguments=arguments,
        versions=versions(*LIBRARIES) | pinned,
        notes=notes,
    )
    return OnnxModel(
        uri=str(onnx),
        target=target.name,
        checked_on=checked_on,
        tokenizer_differences=differences,
        graph=exported.graph,
        refused=exported.refused,
        parity_layers=exported.parity.layers,
        parity_tokens=exported.parity.tokens,
        parity_kl=exported.parity.kl_divergence,
        parity_s=exported.parity.seconds,
        size_mb=size_mb(onnx),
        build_s=exported.build_s,
        peak_rss_mb=exported.peak_rss_mb,
        builder_arguments=arguments,
        versions=onnx_provenance.versions,
        files=onnx_provenance.files,
    )


def calibrated_of(folder: Path) -> Path:
    """Where calibrated layers lie, beside an outcome's folder: they outlive a failure."""
    return folder.with_name(f"{folder.name}.calibrated")


def shared_of(folder: Path, provenance: Provenance, target: Target, settings: Export) -> Path:
    """Where lies what targets of a checkpoint share: its answers, and what int4 harms in it."""
    calibration = calibration_of(target, settings)
    own = {
        "checkpoint": provenance.identity,
        "text": [calibration.get(name) for name in ("text", "tokens")],
        "window": WINDOW,
        "rounding": [target.precision.value, target.builder_options.get("block_size")],
        "graph": settings.graph.value,
        "versions": versions(*LIBRARIES),
        "code": code_digests(WORKER),
        **project_of(settings.graph),
    }
    return folder.with_name(f"{digest_of(own)[:16]}.shared")


def calibration_of(target: Target, settings: Export) -> dict[str, Any]:
    """All that shapes the weights of a calibrated target; nothing of others."""
    if not target.quantizer.calibrates:
        return {}
    text = digest_of(read_calibration(settings.calibration))
    mixed = {name: getattr(target, name) for name in ("int8", "budget_mb", "budget_bits")}
    own = {name: value for name, value in mixed.items() if value}
    return {"text": text, "tokens": settings.calibration_tokens, **own}


def project_of(graph: Graph) -> dict[str, Any]:
    """What shapes a graph besides this project's modules: the files of optimum's project."""
    return {"project": digest_files(optimum.PROJECT)} if graph is Graph.optimum else {}


def main(config: Config) -> OnnxModel:
    checkpoint = local_path(config.source, "source", "fetch")
    require_files(checkpoint, "config.json", made_by="fetch")
    if {WHOLE, INDEX} <= {path.name for path in checkpoint.iterdir()}:
        raise InputError(
            f"{checkpoint} has {WHOLE} and {INDEX}, which may hold different weights. Fetch it: "
            "that takes what transformers loads."
        )
    provenance = read_provenance(checkpoint)

    def make(folder: Path) -> OnnxModel:
        if "export_onnx" in config.force:
            shutil.rmtree(calibrated_of(folder), ignore_errors=True)
            shared = shared_of(folder, provenance, config.target, config.export)
            with locked(shared.with_suffix("")):
                shutil.rmtree(shared, ignore_errors=True)
        require_room_for("export_onnx", config, checkpoint)
        return export_onnx(checkpoint, provenance, config.target, config.export, folder)

    def remove_calibrated(made: OnnxModel, _: bool) -> None:
        shutil.rmtree(calibrated_of(Path(made.uri).parent), ignore_errors=True)

    return run_step(
        "export_onnx",
        config,
        OnnxModel,
        key={
            "checkpoint": provenance.identity,
            "target": asdict(config.target),
            "export": asdict(replace(config.export, calibration="", calibration_tokens=WINDOW)),
            "calibration": calibration_of(config.target, config.export),
            "texts": digest_of(TEXTS.read_text()),
            "versions": versions(*LIBRARIES),
            **project_of(config.export.graph),
        },
        make=make,
        publish=remove_calibrated,  # the export is recorded
    )


if __name__ == "__main__":
    entry_point(main)
