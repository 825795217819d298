"""Whether a graph means what its checkpoint means: a shallow float twin beside transformers.

The noise of quantization hides faults of structure (a window that is not there, rotary embeddings
of another type, a head that was dropped), so structure is checked without it. The twin is the
checkpoint's first layers, made into a graph of floats by the way that the model itself takes, and
transformers' own model of the same layers is what it has to agree with.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm.config.target import ExecutionProvider, Precision, Target
from slm.sources.verify import context_length_of
from slm.sources.weights import layer_of, weight_files
from slm_pyfunc.engine.batch_decoder import BatchDecoder
from slm_pyfunc.engine.cores import available_cores
from slm_pyfunc.engine.decoder import PROMPT_PIECE, runs_alone
from slm_pyfunc.engine.generator_decoder import GeneratorDecoder
from slm_pyfunc.engine.sampling import log_softmax


@dataclass(frozen=True)
class Tolerance:
    """The most by which floats of one precision part, at any position.

    `kl_divergence` is in nats, `error` a share of the logits' own spread.
    """

    kl_divergence: float
    error: float


# SmolLM2's sound graphs are at 3e-7 nats in float32, at 6e-5 in float16.
TOLERANCES = {Precision.fp32: Tolerance(1e-4, 5e-3), Precision.fp16: Tolerance(1e-3, 5e-2)}
LEAST = 1024  # tokens of the long text: several pieces of a prompt
ENDING = 8  # tokens at the end of each text that are decoded one by one as well
SHORT = 128  # tokens: below every length that a configuration treats specially
PAST = 64  # tokens that the long text goes past such a length


@dataclass(frozen=True)
class Twin:
    """A checkpoint of the first `layers` layers, whose vocabulary is that of one text.

    `tokens` is that text. `lengths` are those that the configuration treats specially, by key.
    """

    folder: Path
    layers: int
    tokens: list[int]
    lengths: dict[str, int]


@dataclass(frozen=True)
class Parity:
    """How far a twin's graph is from transformers over `tokens` positions and `layers` layers.

    `kl_divergence` (nats) and `error` (of the logits' spread) are the worst of all positions.
    `first` is the first position beyond the tolerance, None where there is none. `unchecked` names
    lengths of the configuration that the text does not reach past.
    """

    layers: int
    tokens: int
    kl_divergence: float
    error: float
    first: int | None
    unchecked: list[str]
    seconds: float


def write_twin(checkpoint: Path, folder: Path, text: str, most: int) -> Twin:
    """Write a checkpoint's first layers, enough to hold each kind of layer once.

    The embedding and the head keep the rows of the text's tokens alone, which bounds memory. The
    text is repeated until it goes past the configuration's special lengths, or to `most` tokens.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    folder.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    known = AutoConfig.from_pretrained(checkpoint)
    whole, count = known.to_dict(), known.num_hidden_layers
    layers = layers_of_each_kind(whole, count)
    lengths = special_lengths(whole)
    context = context_length_of(known)
    reached = [length for length in lengths.values() if length + PAST <= most]
    wanted = min(context, most, max(LEAST, max(reached, default=0) + 4 * PAST))
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False)["input_ids"]
    ids = (ids * (-(-wanted // len(ids))))[:wanted]
    rows = sorted({*ids, *(token for token in special_ids(config) if token < known.vocab_size)})
    row_of = {token: row for row, token in enumerate(rows)}
    tensors = {}
    for path in weight_files(checkpoint, str(checkpoint)):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no dict)
                layer = layer_of(name)
                if layer and int(layer) >= layers:
                    continue
                tensor = weights.get_tensor(name)
                if not layer and tensor.shape[0] == known.vocab_size:
                    tensor = tensor[rows]
                tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for key, value in config.items():
        if isinstance(value, list) and len(value) == count:
            config[key] = value[:layers]
        elif re.fullmatch(r"(bos|eos|pad|unk)_token_id", key):
            own = [row_of[token] for token in as_list(value) if token in row_of]
            config[key] = own if isinstance(value, list) else next(iter(own), None)
    if "attention_types" in config:  # GPT-Neo's way to say attention_layers
        config["attention_types"] = [[[kind], 1] for kind in known.attention_layers[:layers]]
    own_names = type(known).attribute_map  # GPT-2's num_hidden_layers is n_layer
    config |= {own_names.get("num_hidden_layers", "num_hidden_layers"): layers}
    config["vocab_size"] = len(rows)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (checkpoint / name).is_file():
            (folder / name).write_bytes((checkpoint / name).read_bytes())
    return Twin(folder, layers, [row_of[token] for token in ids], lengths)


def twin_precision(target: Target) -> Precision:
    """float32, but where onnxruntime-genai 0.18's builder makes no graph in it for the provider."""
    both = (ExecutionProvider.cpu, ExecutionProvider.webgpu)
    return Precision.fp32 if target.execution_provider in both else Precision.fp16


def compare(
    twin: Twin, graph: Path, reference: list[np.ndarray], tolerance: Tolerance, started: float
) -> Parity:
    """Hold a twin's ONNX folder against the reference's logits of the short and the long text."""
    decoder = open_decoder(graph)
    worst, error, first = 0.0, 0.0, None
    for expected in reference:
        tokens = twin.tokens[: len(expected)]
        for begin, found in ((0, decoder.score(tokens)), decoded(decoder, tokens)):
            kl, distance = np.nan_to_num(distances(expected[begin:], found), nan=np.inf)
            worst, error = max(worst, float(kl.max())), max(error, float(distance.max()))
            wrong = (kl > tolerance.kl_divergence) | (distance > tolerance.error)
            if wrong.any() and first is None:
                first = begin + int(wrong.argmax())
    length = len(twin.tokens)
    unchecked = [f"{key} {value}" for key, value in twin.lengths.items() if value >= length]
    seconds = round(time.monotonic() - started, 1)
    return Parity(twin.layers, length, worst, error, first, unchecked, seconds)


def decoded(decoder: Any, tokens: list[int]) -> tuple[int, np.ndarray]:
    """Where the ending of a text begins, and the logits of its tokens, decoded one by one."""
    begin = len(tokens) - ENDING
    row = decoder.open(tokens[:begin], len(tokens))
    for start in range(0, begin, PROMPT_PIECE):
        decoder.extend(row, tokens[start : min(start + PROMPT_PIECE, begin)])
    logits = []
    for token in tokens[begin:]:
        [found] = decoder.step([row], [token])
        if isinstance(found, Exception):
            raise found
        logits.append(found.copy())
    decoder.close(row)
    return begin, np.stack(logits)


def open_decoder(graph: Path) -> Any:
    """What serves such a folder on a CPU."""
    genai_config = json.loads((graph / "genai_config.json").read_text())
    threads = available_cores()
    if runs_alone(genai_config):
        return GeneratorDecoder(graph, genai_config, "cpu", threads, 0)
    return BatchDecoder(graph, genai_config, threads, 1, 0)


def reference_logits(twin: Twin) -> list[np.ndarray]:
    """transformers' logits in float32 of the text's beginning and of the whole, [tokens, rows].

    Both, because some rotary embeddings change for all positions when a text is long.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(available_cores())
    model = AutoModelForCausalLM.from_pretrained(twin.folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [
            model(torch.tensor([twin.tokens[:length]]), use_cache=False).logits[0].numpy()
            for length in sorted({min(SHORT, len(twin.tokens)), len(twin.tokens)})
        ]


def distances(expected: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL divergence (nats) and relative error of logits at each position, both [tokens]."""
    p, q = log_softmax(expected), log_softmax(found)
    kl = (np.exp(p) * (p - q)).sum(-1)
    spread = expected.std(-1)
    difference = (found - found.mean(-1, keepdims=True)) - (
        expected - expected.mean(-1, keepdims=True)
    )
    return kl, np.sqrt((difference**2).mean(-1)) / np.maximum(spread, 1e-12)


def layers_of_each_kind(config: dict[str, Any], count: int) -> int:
    """How many of the first of `count` layers hold each kind that the configuration lists."""
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == count]
    kinds = [json.dumps([values[layer] for values in lists]) for layer in range(count)]
    return min(count, max(2, max(kinds.index(kind) for kind in set(kinds)) + 1))


def special_lengths(config: dict[str, Any], prefix: str = "") -> dict[str, int]:
    """The lengths, in tokens, at which attention or positions change, by their keys."""
    found: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= special_lengths(value, f"{prefix}{key}.")
        elif type(value) is int and re.search(
            r"(window(_size)?|chunk_size|position_embeddings)$", key
        ):
            found[prefix + key] = value
    context = found.pop("max_position_embeddings", None)
    return {key: value for key, value in found.items() if context is None or value < context}


def special_settings(config: dict[str, Any]) -> list[str]:
    """What a configuration asks of attention and positions beyond the plain architecture."""
    asked = "sliding_window use_sliding_window layer_types rope_parameters rope_scaling "
    asked += "partial_rotary_factor no_rope_layers attention_bias"
    found = {key: config[key] for key in asked.split() if config.get(key)}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(found.get(key), dict):
            found[key] = found[key].get("rope_type") or found[key].get("type")
            if found[key] == "default":
                del found[key]
    return [f"{key}: {json.dumps(value)}" for key, value in found.items()]


def special_ids(config: dict[str, Any]) -> list[int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    return [token for name in names for token in as_list(config.get(name))]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
