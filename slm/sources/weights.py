"""What makes a checkpoint's weights whole: each one is there, of the model, and finite.

Files are matched to the model by their headers alone. Their numbers are read once, in pieces.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import InputError, one_line
from slm.sources.verify import INDEX, WHOLE, read_json, shards_in

log = logging.getLogger("slm.sources")

# An unsigned integer of a number's size, and the bits that are all set in NaN and infinity alone.
BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}
# Stands for what is no text: Gemma 3's text models have <image_soft_token>, and no row for it.
PLACEHOLDER = re.compile(r"<.*(image|audio|video).*>")
PIECE = 1 << 20  # numbers that are read at once
# What a prefix of all weights comes from, and how to save without it.
PREFIXES = {
    "_orig_mod.": "torch.compile's prefix: save the model that was compiled, `model._orig_mod`",
    "base_model.model.": "PEFT's prefix: save what `model.merge_and_unload()` returns",
    "module.": "DistributedDataParallel's prefix: save the model inside, `model.module`",
}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `begin` is its first byte in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def pieces(self) -> Iterator[np.ndarray]:
        """Its numbers, as unsigned integers."""
        kind, _ = BITS[self.dtype]
        if self.size:
            mapped = np.memmap(self.path, kind, "r", self.begin, (self.size,))
            for start in range(0, self.size, PIECE):
                yield mapped[start : start + PIECE]


def require_weights(checkpoint: Path, source: str) -> dict[str, str]:
    """Raise InputError unless the weights are whole.

    Each file can be opened, the files hold all of the model's weights and no others, every number
    is finite, and every token of the tokenizer has a row in the embedding. Files of weights that
    transformers does not load are removed. Returns the weights that the configuration ties, each
    with the one that stands for it.
    """
    loaded = set(weight_files(checkpoint, source))
    for path in set(checkpoint.glob("*.safetensors")) - loaded:
        log.info("fetch: %s is left behind: the index does not name it", path.name)
        path.unlink()
    tensors, ties = read_tensors(checkpoint, source), {}
    if "quantization_config" in read_json(checkpoint / "config.json"):
        log.info("fetch: quantized weights are not matched to the model")
    else:
        model = require_all_loaded(checkpoint, tensors, source)
        require_rows(checkpoint, model.get_input_embeddings().weight.shape[0], source)
        ties = model.all_tied_weights_keys
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(
                f"{source}: {name} in {tensor.path.name} holds NaN or infinity: the training "
                "diverged, or the file is damaged. Take an earlier checkpoint."
            )
    return ties


def read_tensors(checkpoint: Path, source: str) -> dict[str, Tensor]:
    """The tensors in the files that transformers loads, by name."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for path in weight_files(checkpoint, source):
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path.name} is truncated or damaged. Fetch it again.") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin = 8 + length + entry["data_offsets"][0]
            tensors[name] = Tensor(path, entry["dtype"], tuple(entry["shape"]), begin)
    return tensors


def weight_files(checkpoint: Path, source: str) -> list[Path]:
    """model.safetensors, else the shards that the index names; InputError if one is missing."""
    whole, index = checkpoint / WHOLE, checkpoint / INDEX
    found = {path.name for path in checkpoint.glob("*.safetensors")}
    named = set(shards_in(read_json(index), source)) if index.is_file() else set()
    if missing := sorted(named - found):
        raise InputError(f"{source} lacks {', '.join(missing)}, which {INDEX} names.")
    if adapters := sorted(name for name in found if name.startswith("adapter_")):
        raise InputError(
            f"{source} holds an adapter, {listed(adapters)}, beside its weights: put it into a "
            "folder of its own, and give that as model.adapter."
        )
    if not named and not whole.is_file():
        raise InputError(
            f"{source} holds {listed(sorted(found))}, but neither model.safetensors nor {INDEX}: "
            "save it by `save_pretrained`."
        )
    return [whole] if whole.is_file() else [checkpoint / name for name in sorted(named)]


def require_all_loaded(checkpoint: Path, tensors: Mapping[str, Tensor], source: str) -> Any:
    """Raise unless the model takes all of the tensors, and has no other weights.

    transformers itself loads them, on the meta device, where a tensor is a shape and no numbers: so
    its renamings and fusions count, and so does what it ties or ignores. Returns that model.
    """
    import torch
    import transformers

    shapes = {name: torch.empty(t.shape, device="meta") for name, t in tensors.items()}
    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    model_class = getattr(transformers, read_json(checkpoint / "config.json")["architectures"][0])
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=shapes,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # of the conversions of transformers
        raise InputError(
            f"{source}: transformers cannot load its weights: {one_line(error)[:300]}"
        ) from error
    require_complete(info, source)
    return model


def require_complete(info: Mapping[str, Any], source: str) -> None:
    """Raise if transformers' loading info has weights that are missing, left over, or misshapen."""
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [
        f"{name} is {list(found)}, not {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    wrong = [
        f"{words}: {listed(names)}"
        for words, names in (
            ("the model's weights that no file holds", missing),
            ("weights of the files that the model does not have", left),
            ("weights of another shape than config.json says", shapes),
        )
        if names
    ]
    if wrong:
        hints = [f" {p} is {why}." for p, why in PREFIXES.items() if left and left[0].startswith(p)]
        raise InputError(f"{source}: {'; '.join(wrong)}.{''.join(hints)}")


def require_rows(checkpoint: Path, rows: int, source: str) -> None:
    """Raise if the tokenizer has a token of text for which the embedding has no row."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False).get_vocab()
    if beyond := sorted(
        (number, token)
        for token, number in vocabulary.items()
        if number >= rows and not PLACEHOLDER.fullmatch(token)
    ):
        tokens = listed(f"{token!r} (id {number})" for number, token in beyond)
        raise InputError(
            f"{source}: the embedding has {rows} rows, none for the tokenizer's {tokens}. Save the "
            "model after `model.resize_token_embeddings(len(tokenizer))`, or take the tokens out."
        )


def layer_of(name: str) -> str:
    """The number of the layer that a weight is of, "" for those of none."""
    match = re.search(r"\.(\d+)\.", name)
    return match[1] if match else ""


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; integers are."""
    return tensor.dtype not in BITS or are_finite(tensor.pieces(), tensor.dtype)


def are_finite(pieces: Iterable[np.ndarray], dtype: str) -> bool:
    """Whether none of the numbers, as unsigned integers of a type of BITS, is NaN or infinite."""
    kind, mask = BITS[dtype]
    return not any((piece & kind(mask) == kind(mask)).any() for piece in pieces)


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of floats are the same to the bit."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    pairs = zip(first.pieces(), second.pieces(), strict=True)
    return all(np.array_equal(*pair) for pair in pairs)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own report of a load, and its bar."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
