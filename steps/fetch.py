"""Fetch a checkpoint, pin its revision, and verify every file of it.

    python -m steps.fetch model=smollm2-135m-instruct
    python -m steps.fetch model=phi-3-mini-4k-instruct
    python -m steps.fetch model.name=my-model model.source=/data/my-model

Nothing that came with a checkpoint is executed (slm/sources/verify.py).
"""

from dataclasses import asdict
from pathlib import Path

from slm.config import Config, Model
from slm.digests import size_mb, write_provenance
from slm.errors import InputError
from slm.records import Checkpoint
from slm.running.command import entry_point
from slm.running.run import run_step
from slm.running.work import versions
from slm.sources.mend import mend
from slm.sources.resolve import Source, resolve
from slm.sources.verify import architecture_of, read_json, require_described
from slm.sources.weights import require_weights

LIBRARIES = ("transformers", "gguf", "safetensors", "huggingface_hub")


def fetch(model: Model, source: Source, folder: Path) -> Checkpoint:
    """Bring `source` to `folder`/checkpoint, and verify it against what `model` expects."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    declared = source.bring(model, checkpoint)
    licence = model.licence or declared.licence or "unknown"
    if declared.licence and declared.licence.lower() != licence.lower():
        raise InputError(
            f"{model.source} says its licence is {declared.licence}; "
            f"model.licence expects {licence}."
        )
    require_described(checkpoint, model)
    ties = require_weights(checkpoint, model.source)
    notes = mend(checkpoint, model.source, ties, declared.turn_end)
    provenance = write_provenance(
        checkpoint,
        model=model.name,
        source=source.pinned,
        revision=source.revision,
        licence=licence,
        versions=versions(*LIBRARIES),
        notes=notes,
    )
    return Checkpoint(
        uri=str(checkpoint),
        source=source.pinned,
        revision=source.revision,
        licence=licence,
        architecture=architecture_of(read_json(checkpoint / "config.json")),
        size_mb=size_mb(checkpoint),
        files=provenance.files,
    )


def main(config: Config) -> Checkpoint:
    source = resolve(config.model)
    expected = {
        name: value
        for name, value in asdict(config.model).items()
        if name not in ("source", "gates", "parameters")
    }
    return run_step(
        "fetch",
        config,
        Checkpoint,
        key={"source": source.identity, "model": expected, "versions": versions(*LIBRARIES)},
        make=lambda folder: fetch(config.model, source, folder),
    )


if __name__ == "__main__":
    entry_point(main)
