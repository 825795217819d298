"""Export a checkpoint to ONNX for one hardware target, with onnxruntime-genai's builder.

    python -m steps.export_onnx target=cpu-int4-rtn-block-32-acc-level-4 source=/data/checkpoint

An export counts only once its tokenizer agrees with the checkpoint's, and it has loaded and
generated (slm/exporters/checks.py).
"""

from dataclasses import asdict
from pathlib import Path

from slm.config import Config, Target
from slm.digests import Provenance, read_provenance, require_files, size_mb, write_provenance
from slm.exporters.builder import build, builder_arguments
from slm.exporters.checks import require_it_generates
from slm.exporters.generation import carry_over
from slm.records import OnnxModel
from slm.running.command import entry_point
from slm.running.run import run_step
from slm.running.tracking import local_path
from slm.running.work import versions

LIBRARIES = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")


def export_onnx(
    checkpoint: Path, provenance: Provenance, target: Target, folder: Path
) -> OnnxModel:
    """Run the builder, check what it wrote, and record how it was made."""
    onnx = folder / "onnx"
    arguments = builder_arguments(target)
    build_s, peak_rss_mb = build(checkpoint, arguments, onnx, folder / "cache")
    require_files(
        onnx, "genai_config.json", "tokenizer.json", "tokenizer_config.json", made_by="export_onnx"
    )
    notes = carry_over(checkpoint, onnx)
    checked_on, differences = require_it_generates(onnx, checkpoint, target)
    onnx_provenance = write_provenance(
        onnx,
        checkpoint=provenance,
        target=target.name,
        checked_on=checked_on,
        builder_arguments=arguments,
        versions=versions(*LIBRARIES),
        notes=notes,
    )
    return OnnxModel(
        uri=str(onnx),
        target=target.name,
        checked_on=checked_on,
        tokenizer_differences=differences,
        size_mb=size_mb(onnx),
        build_s=build_s,
        peak_rss_mb=peak_rss_mb,
        builder_arguments=arguments,
        versions=onnx_provenance.versions,
        files=onnx_provenance.files,
    )


def main(config: Config) -> OnnxModel:
    checkpoint = local_path(config.source, "source", "fetch")
    require_files(checkpoint, "config.json", made_by="fetch")
    provenance = read_provenance(checkpoint)
    return run_step(
        "export_onnx",
        config,
        OnnxModel,
        key={
            "checkpoint": provenance.json(),
            "target": asdict(config.target),
            "versions": versions(*LIBRARIES),
        },
        make=lambda folder: export_onnx(checkpoint, provenance, config.target, folder),
    )


if __name__ == "__main__":
    entry_point(main)
