"""Several ONNX folders of one checkpoint in one folder, where equal weights lie once.

    <target>/   what the exporter made for a target, but its weights
    weights/    the weights of all, each file named by its SHA-256

A graph may not read weights outside of its own folder, through no path and no link; but ONNX
Runtime looks for all of them in the folder that a session option names, and onnxruntime-genai reads
that option out of genai_config.json, relative to it. So each folder is a whole one for both.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm.digests import PROVENANCE, Provenance, digest_file, write_provenance
from slm.errors import InputError
from slm.target_name import joined
from slm_pyfunc.engine.decoder import PROMPT_GRAPH, WEIGHTS_FOLDER

WEIGHTS, GRAPHS = "weights", ("model.onnx", PROMPT_GRAPH)


def bundle(folders: list[Path], provenances: list[Provenance], into: Path) -> Provenance:
    """Lay out ONNX folders, the preferred one first; weights are hard links if they can be.

    Raises InputError unless they are of one checkpoint, and each for a target of its own.
    """
    first = provenances[0]
    names = [provenance.target for provenance in provenances]
    if "" in names or max(Counter(names).values()) > 1:
        raise InputError(f"source holds folders for {names}; each must be for a target of its own.")
    for provenance in provenances:
        if provenance.origin.files != first.origin.files:
            raise InputError(
                f"source holds folders of two checkpoints: those for {first.target} and "
                f"{provenance.target}. Export both from one."
            )
    (into / WEIGHTS).mkdir(parents=True)
    for folder, name in zip(folders, names, strict=True):
        place(folder, into / name, into / WEIGHTS)
    parts = {
        name: replace(provenance, checkpoint=None)
        for name, provenance in zip(names, provenances, strict=True)
    }
    return write_provenance(
        into,
        target=joined(names),
        checkpoint=first.checkpoint,
        checked_on=next((p.checked_on for p in provenances if p.checked_on != "none"), "none"),
        graph=" and ".join(dict.fromkeys(provenance.graph for provenance in provenances)),
        versions=first.versions,
        notes=[f"{name}: {note}" for name, part in parts.items() for note in part.notes],
        parts=parts,
    )


def place(folder: Path, into: Path, weights: Path) -> None:
    """Copy an ONNX folder, whose graphs read their weights from another one."""
    import onnx

    into.mkdir()
    places: dict[str, str] = {}
    for name in graphs_in(folder):
        graph = onnx.load(folder / name, load_external_data=False)
        for entry in (e for tensor in tensors_of(graph.graph) for e in tensor.external_data):
            if entry.key == "location":
                if entry.value not in places:
                    places[entry.value] = moved(folder / entry.value, weights)
                entry.value = places[entry.value]
        onnx.save(graph, into / name)
    for path in folder.iterdir():
        if path.name not in (*GRAPHS, PROVENANCE, *places):
            shutil.copy(path, into / path.name)
    config = json.loads((into / "genai_config.json").read_text())
    options = config["model"]["decoder"].setdefault("session_options", {})
    options[WEIGHTS_FOLDER] = f"../{weights.name}"
    (into / "genai_config.json").write_text(json.dumps(config, indent=4) + "\n")


def graphs_in(folder: Path) -> list[str]:
    return [name for name in GRAPHS if (folder / name).is_file()]


def tensors_of(graph: Any) -> Iterator[Any]:
    """The initializers of an ONNX graph, and of those inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from tensors_of(attribute.g)


def moved(path: Path, weights: Path) -> str:
    """The name of a file's place among the weights, where it is after this."""
    place = weights / f"{digest_file(path)}.data"
    if not place.exists():
        try:
            os.link(path, place)
        except OSError:
            shutil.copy(path, place)
    return place.name


def digests_of(bundled: Path, provenance: Provenance) -> dict[str, dict[str, str]]:
    """The SHA-256 of what each target reads, by names that are relative to its folder."""
    digests: dict[str, dict[str, str]] = {}
    for name in provenance.parts:
        own = {
            file.removeprefix(f"{name}/"): digest
            for file, digest in provenance.files.items()
            if file.startswith(f"{name}/")
        }
        folder = bundled / name
        graphs = b"".join((folder / graph).read_bytes() for graph in graphs_in(folder))
        shared = {
            f"../{file}": digest
            for file, digest in provenance.files.items()
            if file.startswith(f"{WEIGHTS}/") and digest.encode() in graphs
        }
        digests[name] = own | shared
    return digests


def provider_of(folder: Path) -> str:
    """The execution provider that an ONNX folder is for, as its genai_config.json says."""
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    options = decoder["session_options"]["provider_options"]
    return next((name for each in options for name in each), "cpu")
