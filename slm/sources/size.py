"""How large the model at a source is, by its files' sizes, before the weights are brought."""

import contextlib
import re
import tempfile
from pathlib import Path

from slm.errors import UserError
from slm.running.costs import Size
from slm.sources.resolve import Source
from slm.sources.verify import read_json

CONFIG = "config.json"
# Bytes of a weight, by `dtype` of config.json; transformers 4 called it `torch_dtype`.
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
# Bits of a weight by what a GGUF's name says. Types with a K mix some: as llama.cpp's
# tools/quantize/README.md lists them for 8 billion parameters.
BITS = {"Q2_K": 3.2, "Q3_K": 4.0, "Q4_0": 4.6, "Q4_1": 5.1, "Q4_K": 4.9, "Q5_0": 5.6, "Q5_1": 6.0}
BITS |= {"Q5_K": 5.7, "Q6_K": 6.6, "Q8_0": 8.5, "F16": 16.0, "BF16": 16.0, "F32": 32.0}
NAMED = re.compile(rf"(?:^|[^A-Z0-9])({'|'.join(BITS)})(?:[^A-Z0-9]|$)")


def size_at(source: Source) -> Size | None:
    """The size of the model at a source; None if it cannot be known.

    Of a GGUF, its name has to tell the type of its weights.
    """
    stored_gb = source.weights_gb()
    if stored_gb is None:
        return None
    names = source.names()
    for name in names:
        if name.endswith(".gguf"):
            bits = bits_of(name)
            return None if bits is None else dequantized(8 * stored_gb / bits, stored_gb)
    return Size(stored_gb / (bytes_of(source) if CONFIG in names else 2), stored_gb)


def size_told(weights: float, uri: str) -> Size:
    """The size of 10^9 weights: of a GGUF of the type in its name, Q8_0 if none, or in bfloat16."""
    if uri.endswith(".gguf"):
        return dequantized(weights, weights * (bits_of(uri) or BITS["Q8_0"]) / 8)
    return Size(weights, 2 * weights)


def dequantized(weights: float, gguf_gb: float) -> Size:
    """The size of 10^9 weights out of a GGUF file, which become float32."""
    return Size(weights, 4 * weights, gguf_gb)


def bits_of(gguf: str) -> float | None:
    """How many bits a GGUF file has for each weight; None if its name does not tell."""
    found = NAMED.search(Path(gguf).name.upper())
    return BITS[found[1]] if found else None


def bytes_of(source: Source) -> int:
    """How many bytes each weight has at a source, as its config.json says; 2 if it does not."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(UserError):
        config = read_json(source.take([CONFIG], Path(scratch)) / CONFIG)
        for part in (config, config.get("text_config") or {}):
            if dtype := part.get("dtype") or part.get("torch_dtype"):
                return BYTES.get(dtype, 2)
    return 2
