"""Bring a checkpoint out of a source, and check what is cheap to check before weights move."""

import tempfile
from pathlib import Path, PurePosixPath

from slm.config.model import Model
from slm.digests import digest_file, digest_of
from slm.sources.gguf import dequantize
from slm.sources.resolve import Source
from slm.sources.verify import (
    Declared,
    Permit,
    is_weights,
    lay_over,
    leave_code_behind,
    place_description,
    place_weights,
    require_known,
)


def bring(
    source: Source, model: Model, checkpoint: Path, permit: Permit, beside: Path | None = None
) -> Declared:
    """Put the checkpoint's files into a folder; return what the source declares besides.

    `permit` is told the licence before any weights are moved. `beside` is the folder of an adapter
    to the checkpoint, whose tokenizer takes the place of the source's.
    """
    names = source.names()
    files = [PurePosixPath(name).name for name in names]
    require_known([*files, *(path.name for path in beside.iterdir())] if beside else files, model)
    weights = [name for name in names if is_weights(name)]
    if not weights:
        return bring_gguf(source, names, model, checkpoint, permit, beside)
    described = [name for name in names if not is_weights(name)]
    folder = source.take(described, checkpoint)
    digests = digests_of(folder, described, source)
    place_description(folder, names, model, checkpoint, beside)
    licence = source.licence()
    permit(licence)
    folder = source.take(weights, checkpoint)
    digests |= digests_of(folder, weights, source)
    place_weights(folder, names, model, checkpoint)
    source.require_unchanged(names)
    return Declared(licence, content=digest_of(digests))


def bring_gguf(
    source: Source,
    names: list[str],
    model: Model,
    checkpoint: Path,
    permit: Permit,
    beside: Path | None,
) -> Declared:
    """Bring a GGUF file, and the chat template beside it, and write them as a checkpoint.

    A licence that the file alone states is held against those allowed once it is there.
    """
    licence = source.licence()
    if licence or model.licence:
        permit(licence)
    [gguf] = [name for name in names if name.endswith(".gguf")]
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        folder = source.take(names, Path(scratch))
        digests = digests_of(folder, names, source)
        declared = dequantize(
            folder / gguf,
            model,
            checkpoint,
            lambda stated: permit(stated or licence),
            may_lack_template=beside is not None,
        )
    source.require_unchanged(names)
    if beside:
        lay_over(beside, checkpoint)
        leave_code_behind(checkpoint)
    return Declared(licence or declared.licence, declared.turn_end, digest_of(digests))


def digests_of(folder: Path, names: list[str], source: Source) -> dict[str, str]:
    """SHA-256 of what was taken from a source whose revision is its content."""
    if source.revision:
        return {}
    return {PurePosixPath(name).name: digest_file(folder / name) for name in names}
