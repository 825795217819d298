"""Read a GGUF file, and write it as a float32 checkpoint."""

import functools
import logging
from pathlib import Path, PurePosixPath
from typing import Any

from slm.config.model import Model
from slm.errors import InputError, one_line
from slm.running.patched import patched
from slm.sources.verify import NO_TEMPLATE, Declared, Permit, require_digest
from slm.sources.weights import require_complete

log = logging.getLogger("slm.sources")

TEMPLATE_FILE = "chat_template.jinja"


def template_beside(gguf: str, names: list[str]) -> list[str]:
    """The name of the chat template that stands beside a GGUF file: one, or none."""
    beside = str(PurePosixPath(gguf).with_name(TEMPLATE_FILE))
    return [name for name in names if name == beside]


def dequantize(
    gguf: Path, model: Model, checkpoint: Path, permit: Permit, may_lack_template: bool = False
) -> Declared:
    """Verify a GGUF file, write it as a float32 checkpoint, and return what it declares.

    A chat_template.jinja beside the file takes the place of the template inside it. InputError if
    there is neither, unless it `may_lack_template`: an adapter may bring one.
    """
    require_digest(gguf, model.sha256.get(gguf.name))
    reader = read(gguf)
    fields = dict(reader.fields)
    beside = gguf.parent / TEMPLATE_FILE
    template = beside.read_text() if beside.is_file() else field(fields, "tokenizer.chat_template")
    if not template and not may_lack_template:
        raise InputError(f"{model.source}: {NO_TEMPLATE}.")
    permit(licence := field(fields, "general.license"))
    log.info("fetch: dequantizing %s to float32", gguf.name)
    try:
        tokenizer, causal_lm, info = load(gguf, reader)
    except Exception as error:  # of transformers and gguf alike: an unknown architecture, say
        raise InputError(
            f"transformers cannot read {gguf.name}: {one_line(error)[:300]}"
        ) from error
    require_complete(info, gguf.name)
    tokenizer.chat_template = template
    mend_tokenizer(tokenizer, fields)
    tokenizer.save_pretrained(checkpoint)
    causal_lm.save_pretrained(checkpoint)
    for path in checkpoint.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
    turn_end = field(fields, "tokenizer.ggml.eot_token_id")
    return Declared(licence, None if turn_end is None else int(turn_end))


def read(gguf: Path) -> Any:
    """The gguf package's reader of a file; InputError if it is none, or damaged.

    The reader of gguf 0.19 slices the file a million times for a vocabulary of 50,000 tokens, which
    takes a plain array a third of the time that a memmap takes.
    """
    with gguf.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise InputError(
                f"{gguf.name} is not a GGUF file: it begins with {magic!r}, not b'GGUF'."
            )
    import numpy as np
    from gguf import GGUFReader

    memmap = np.memmap
    try:
        with patched(np, "memmap", lambda *args, **named: memmap(*args, **named).view(np.ndarray)):
            return GGUFReader(gguf)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise InputError(f"{gguf.name} is truncated or damaged. Fetch it again.") from error


def field(fields: dict[str, Any], name: str) -> Any:
    """The value of a metadata field, None if the file has none of that name."""
    return fields[name].contents() if name in fields else None


def load(gguf: Path, reader: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The tokenizer, the dequantized model and its loading info, as transformers reads them.

    transformers 5.22 reads the file's metadata three times, seconds each for a vocabulary of 50,000
    tokens: `reader` has it already. It makes the map of all names anew for each module.
    """
    import gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = str(gguf.parent)
    quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
    name_map = functools.cache(package.get_tensor_name_map)
    with (
        patched(package, "GGUFReader", lambda *_: reader),
        patched(package, "get_tensor_name_map", name_map),
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf.name,
            quantization_config=quantization,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return tokenizer, *loaded


def mend_tokenizer(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Set right what transformers 5.24 reads wrongly out of a GGUF tokenizer.

    It reads no special tokens from the metadata and takes bos for eos. It also writes a decoder for
    byte fallback, from which onnxruntime-genai 0.18 concludes that a byte-level tokenizer is
    SentencePiece, and then encodes every space as unknown.
    """
    from tokenizers.decoders import ByteLevel

    for name, attribute in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = field(fields, f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            token = tokenizer.convert_ids_to_tokens(int(token_id))
            setattr(tokenizer, f"{attribute}_token", token)
    if field(fields, "tokenizer.ggml.model") == "gpt2":
        tokenizer.backend_tokenizer.decoder = ByteLevel()
