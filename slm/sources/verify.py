"""What makes a folder a checkpoint: known files, a known architecture, a readable tokenizer.

Nothing that came with a checkpoint is executed: pickled weights are refused, and Python files and
references to them (`auto_map`) are left behind.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from slm.config.model import Model
from slm.digests import digest_file
from slm.errors import InputError, one_line

log = logging.getLogger("slm.sources")

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a checkpoint folder may hold; everything else stays at the source.
WANTED = (
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
)
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}  # one of them makes a tokenizer
CONFIGS = ("config.json", "generation_config.json")
# The context length in transformers' configurations. GPT-2 and others map their name to the first.
CONTEXT_LENGTH = ("max_position_embeddings", "max_seq_len", "seq_length")
NO_TEMPLATE = (
    "its tokenizer has no chat template. Put one beside the weights, as chat_template.jinja"
)


# Told the licence that a source states, None if it states none; raises if it is not allowed.
Permit = Callable[[str | None], None]


@dataclass(frozen=True)
class Declared:
    """What a source says besides files: its licence, the id of the token that ends a turn.

    `content` is the digest of the files that were taken, of a source without another revision.
    """

    licence: str | None = None
    turn_end: int | None = None
    content: str = ""


def wanted_names(names: list[str]) -> list[str]:
    """The files of a source that belong into a checkpoint; no code, no pickles, no subfolders.

    Where there is a model.safetensors, it is what transformers loads: no shards, nor their index.
    """
    wanted = [n for n in names if "/" not in n and any(map(PurePosixPath(n).match, WANTED))]
    if WHOLE in wanted:
        wanted = [n for n in wanted if n == WHOLE or ".safetensors" not in n]
    return sorted(wanted)


def require_safetensors(names: list[str], where: str) -> None:
    """Refuse weights that are pickles: unpickling runs code that the checkpoint brings."""
    if any(map(is_weights, names)):
        return
    pickles = sorted(name for name in names if PurePosixPath(name).suffix in PICKLES)
    found = (
        f"only {', '.join(pickles)}, refused: loading a pickle runs code that it brings"
        if pickles
        else "none"
    )
    raise InputError(f"{where}: weights must be safetensors or GGUF; found {found}.")


def taken_names(names: list[str], uri: str, model: Model, at: Callable[[str], str]) -> list[str]:
    """What is taken of a source's files: those of an adapter, of a checkpoint, or one GGUF file.

    InputError if they are none of what the source was given as. `at` writes one file as a source.
    """
    if uri == model.adapter:
        return adapter_names(names, uri)
    if ADAPTER_CONFIG in names and not {WHOLE, INDEX} & set(names):
        raise InputError(
            f"{uri} is an adapter, not a checkpoint: write model.adapter={uri}, and its base as "
            f"model.source (with model.source=null, the base that its {ADAPTER_CONFIG} names)."
        )
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if any(map(is_weights, names)) or not ggufs:
        require_safetensors(names, uri)
        return wanted_names(names)
    if len(ggufs) > 1:
        raise InputError(
            f"{uri} holds {len(ggufs)} GGUF files: {', '.join(ggufs)}. Choose one by its path: "
            f"model.source={at(ggufs[0])}"
        )
    return ggufs


def adapter_names(names: list[str], uri: str) -> list[str]:
    """The files of an adapter: its configuration, its weights, and a tokenizer of its own."""
    if ADAPTER_CONFIG not in names:
        raise InputError(
            f"model.adapter={uri} is no adapter: it has no {ADAPTER_CONFIG}. Give the folder that "
            "PEFT's `save_pretrained` made."
        )
    if ADAPTER_WEIGHTS not in names:
        pickles = ", ".join(name for name in names if PurePosixPath(name).suffix in PICKLES)
        raise InputError(
            f"model.adapter={uri} has no {ADAPTER_WEIGHTS}"
            + (f", only {pickles}: a pickle runs code that it brings." if pickles else ".")
        )
    described = [n for n in wanted_names(names) if not is_weights(n) and n not in CONFIGS]
    return sorted([ADAPTER_CONFIG, ADAPTER_WEIGHTS, *described])


def key_of(uri: str, model: Model) -> str:
    """The key of the configuration that names a source."""
    return "model.adapter" if uri == model.adapter else "model.source"


def require_known(names: list[str], model: Model) -> None:
    """Raise if a digest is expected of a file that is not there: it would guard nothing."""
    if unknown := sorted(set(model.sha256) - set(names)):
        raise InputError(
            f"model.sha256 names {', '.join(unknown)}, which {model.source} does not bring; "
            f"it brings {', '.join(sorted(names))}."
        )


def require_inside(name: str, where: str) -> None:
    """Raise if a name that a listing, an index or an archive gives leads out of its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise InputError(f"{where} names {name}, which lies outside its folder. Do not use it.")


def require_same(before: Mapping[str, Any], after: Mapping[str, Any], where: str) -> None:
    """Raise if what tells a file's content is another than it was when the source was pinned."""
    if changed := sorted(name for name, mark in before.items() if after.get(name) != mark):
        raise InputError(f"{where}: {', '.join(changed)} changed meanwhile. Run it again.")


def require_digest(path: Path, expected: str | None) -> None:
    """Raise if a file has another SHA-256 than expected."""
    if expected and (found := digest_file(path)) != expected:
        raise InputError(f"{path.name}: SHA-256 is {found}; expected {expected}. Do not use it.")


def place(source: Path, destination: Path) -> None:
    """Hard-link a file of a cache, at no cost in disk, or copy it where the file systems differ.

    Any other file is copied: its owner may write into it.
    """
    real = source.resolve()
    if digest_in_cache(source):
        with contextlib.suppress(OSError):
            os.link(real, destination)
            return
    shutil.copyfile(real, destination)


def digest_in_cache(path: Path) -> str | None:
    """The SHA-256 by which the Hugging Face cache knows a large file; None for other files."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def place_description(
    folder: Path, names: list[str], model: Model, checkpoint: Path, beside: Path | None = None
) -> None:
    """Place all files but the weights, and raise unless they are what `model` expects.

    The tokenizer of an adapter's folder `beside` takes the place of the base's.
    """
    place_files(folder, [name for name in names if not is_weights(name)], model, checkpoint)
    if beside:
        lay_over(beside, checkpoint)
    require_no_code(checkpoint, model)
    leave_code_behind(checkpoint)
    require_described(checkpoint, model)


def place_weights(folder: Path, names: list[str], model: Model, checkpoint: Path) -> None:
    """Place the weights."""
    place_files(folder, [name for name in names if is_weights(name)], model, checkpoint)


def place_files(folder: Path, names: list[str], model: Model, checkpoint: Path) -> None:
    for name in names:
        if folder != checkpoint:
            place(folder / name, checkpoint / name)
        require_digest(checkpoint / name, model.sha256.get(name))


def lay_over(adapter: Path, checkpoint: Path) -> None:
    """Put the adapter's tokenizer in place of its base's: it was trained with that one."""
    names = {path.name for path in adapter.iterdir()} - {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    if not names & TOKENIZER:
        names &= {"chat_template.jinja"}
    for name in names:
        (checkpoint / name).unlink(missing_ok=True)  # it may be a link into a cache
        shutil.copyfile(adapter / name, checkpoint / name)


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def holds_weights(name: str) -> bool:
    """Whether a file that is taken of a source is of weights: those of a GGUF too."""
    return is_weights(name) or name.endswith(".gguf")


def leave_code_behind(checkpoint: Path) -> None:
    """Drop references to Python files, which MLflow's transformers flavor may trust."""
    for path in checkpoint.glob("*config.json"):
        config = read_json(path)
        if config.pop("auto_map", None):
            log.info("%s: its reference to Python code (auto_map) is left behind", path.name)
            write_json(path, config)


def require_no_code(checkpoint: Path, model: Model) -> None:
    """Raise if the architecture is known by Python files of the checkpoint alone."""
    path = checkpoint / "config.json"
    config = read_json(path) if path.is_file() else {}
    code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if code and architecture_of(config) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise InputError(
            f"{model.source}: the architecture {architecture_of(config)} comes as code of its own, "
            f"{str(code).rpartition('.')[0]}, which is not executed. Take a model whose "
            "architecture transformers has."
        )


def require_described(checkpoint: Path, model: Model) -> None:
    """Raise unless configuration and tokenizer are there, known, and what `model` expects."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{model.source} has no config.json: it is not a checkpoint.")
    config = read_json(checkpoint / "config.json")
    architecture = architecture_of(config)
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise InputError(
            f"{model.source}: the architecture {architecture} is not among "
            "the causal language models of transformers."
        )
    require_expected("architecture", architecture, model)
    try:
        known = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers and json alike
        raise InputError(
            f"{model.source}: transformers cannot read its configuration or tokenizer: "
            f"{one_line(error)[:300]}."
        ) from error
    if model.context_length is not None:
        require_expected("context_length", context_length_of(known), model)
    if not tokenizer.chat_template:
        raise InputError(f"{model.source}: {NO_TEMPLATE}.")


def require_expected(key: str, found: object, model: Model) -> None:
    """Raise InputError unless a value is what the model's file expects, if it expects one."""
    if (expected := getattr(model, key)) not in (None, found):
        raise InputError(f"{model.source}: {key} is {found}; model.{key} expects {expected}.")


def context_length_of(config: Any) -> int:
    """The most tokens that a model reads, by transformers' configuration of it.

    Raises InputError where it says none.
    """
    for name in CONTEXT_LENGTH:
        if isinstance(found := getattr(config, name, None), int):
            return found
    raise InputError(
        f"config.json of this {config.model_type} has no context length: add "
        "max_position_embeddings to it, the number of tokens that the model was trained on."
    )


def architecture_of(config: dict[str, Any]) -> str:
    """The architecture that a config.json names first."""
    return (config.get("architectures") or ["none"])[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file of the checkpoint."""
    try:
        return parse_json(path.read_text(), path.name)
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not JSON: {error}.") from error


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The JSON object in a text; InputError with its file's name if there is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{name} is not a JSON object.")
    return value


def shards_in(index: dict[str, Any], where: str) -> list[str]:
    """The files that an index of weights names.

    InputError unless it names one for each weight, none of them outside its folder.
    """
    named = index.get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise InputError(
            f"{where}: {INDEX} is damaged: its weight_map does not name a file for each weight. "
            "Fetch it again."
        )
    files = sorted(set(named.values()))
    for file in files:
        require_inside(file, f"{where}: {INDEX}")
    return files


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object in place of a file of the checkpoint."""
    path.unlink(missing_ok=True)  # it may be a link into a cache
    path.write_text(json.dumps(value, indent=2) + "\n")
