"""Fetch a checkpoint, pin its revision, and verify every file of it.

    python -m steps.fetch model=smollm2-135m-instruct
    python -m steps.fetch model=phi-3-mini-4k-instruct
    python -m steps.fetch model.name=my-model model.source=/data/my-model
    python -m steps.fetch model.name=my-tune model.adapter=/data/my-lora model.source=null

Nothing that came with a checkpoint is executed (slm/sources/verify.py).
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from slm.config import Config
from slm.config.model import Fetch, Model
from slm.digests import PROVENANCE, Provenance, size_mb, write_provenance
from slm.planning import require_room_for
from slm.records import Checkpoint
from slm.running.command import entry_point
from slm.running.lineage import link_training
from slm.running.run import run_step
from slm.running.work import versions
from slm.sources.adapter import bring_merged, sources_of
from slm.sources.bring import bring
from slm.sources.licences import require_licence
from slm.sources.mend import mend
from slm.sources.resolve import Source
from slm.sources.verify import architecture_of, read_json, require_described
from slm.sources.weights import require_weights

LIBRARIES = ("transformers", "gguf", "safetensors", "huggingface_hub")
# Where weights are looked up, and what is measured of them: they are what they are without it.
BESIDES = ("source", "adapter", "tracking_uri", "registry_uri", "gates", "parameters")


def fetch(
    model: Model, source: Source, folder: Path, settings: Fetch, adapter: Source | None = None
) -> Checkpoint:
    """Bring `source` to `folder`/checkpoint, and verify it against what `model` expects.

    An `adapter` is merged into it.
    """
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    where = str(model.source)
    permit = partial(require_licence, model=model, settings=settings, where=where)
    if adapter is None:
        declared, merged = bring(source, model, checkpoint, permit), None
    else:
        own = partial(permit, model=replace(model, licence=None), where=str(model.adapter))
        declared, merged = bring_merged(source, adapter, model, checkpoint, permit, own)
    require_described(checkpoint, model)
    ties = require_weights(checkpoint, where)
    notes = mend(checkpoint, where, ties, declared.turn_end)
    licence = model.licence or declared.licence or "unknown"
    revision = source.revision or declared.content
    provenance = write_provenance(
        checkpoint,
        model=model.name,
        source=source.pinned,
        revision=revision,
        licence=licence,
        training=training_of(source, adapter),
        adapter=merged,
        versions=versions(*LIBRARIES),
        notes=notes,
    )
    return Checkpoint(
        uri=str(checkpoint),
        source=source.pinned,
        revision=revision,
        licence=licence,
        architecture=architecture_of(read_json(checkpoint / "config.json")),
        size_mb=size_mb(checkpoint),
        files=provenance.files,
    )


def training_of(source: Source, adapter: Source | None) -> dict[str, str]:
    """The run that trained last."""
    return adapter.training if adapter else source.training


def main(config: Config) -> Checkpoint:
    model, source, adapter = sources_of(config.model)
    expected = {name: value for name, value in asdict(model).items() if name not in BESIDES}

    def make(folder: Path) -> Checkpoint:
        require_room_for("fetch", config, source=source)
        return fetch(model, source, folder, config.fetch, adapter)

    outcome = run_step(
        "fetch",
        config,
        Checkpoint,
        key={
            "source": source.identity,
            "model": expected,
            "versions": versions(*LIBRARIES),
            **({"adapter": adapter.identity, "peft": versions("peft")} if adapter else {}),
        },
        publish=lambda *_: link_training(Provenance({}, training=training_of(source, adapter))),
        make=make,
    )
    # What is reused was fetched when other licences were allowed.
    licence = None if outcome.licence == "unknown" else outcome.licence
    require_licence(licence, model=model, settings=config.fetch, where=outcome.source)
    recorded = Provenance.of(read_json(Path(outcome.uri) / PROVENANCE)).adapter
    if recorded and recorded.licence:
        own = replace(model, licence=None)
        require_licence(recorded.licence, model=own, settings=config.fetch, where=recorded.source)
    return outcome


if __name__ == "__main__":
    entry_point(main)
