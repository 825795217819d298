"""Small checkpoints that the tests make: a few layers of random weights, or of SmolLM2's."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# A shape for all that does not depend on weights: megabytes, and an answer in milliseconds.
TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def write_tiny(folder: Path, tokenizer: Path, architecture: str = "Llama", **config: Any) -> Path:
    """Write a checkpoint of random weights, with the tokenizer of another one.

    `architecture` is a prefix of transformers' classes; `config` changes its TINY_SHAPE.
    """
    import torch
    import transformers

    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    vocabulary = json.loads((tokenizer / "config.json").read_text())
    special = {name: vocabulary[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    shape = {**TINY_SHAPE, **special, "pad_token_id": special["eos_token_id"], **config}
    torch.manual_seed(0)
    model_config = getattr(transformers, f"{architecture}Config")(**shape)
    model = transformers.AutoModelForCausalLM.from_config(model_config)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of the letters, and the part of a configuration that `write_tiny` reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(ids))
    return folder


def write_shallow(folder: Path, checkpoint: Path, layers: int = 2) -> Path:
    """Write the first layers of a checkpoint: a fraction of its size, and it still answers."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(checkpoint / name, folder / name)
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))

    def is_kept(name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return layer is None or int(layer.group(1)) < layers

    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if is_kept(name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_as_phi3(folder: Path, checkpoint: Path, **config: Any) -> Path:
    """Write a Llama checkpoint's weights as a `Phi3ForCausalLM` one: trained, on Phi-3's path.

    q, k and v become one `qkv_proj`, gate and up one `gate_up_proj`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(checkpoint / name, folder / name)
    values = json.loads((checkpoint / "config.json").read_text())
    values |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": 2047}
    values |= {"original_max_position_embeddings": values["max_position_embeddings"], **config}
    (folder / "config.json").write_text(json.dumps(values))
    weights = load_file(checkpoint / "model.safetensors")
    for i in range(values["num_hidden_layers"]):
        for parts, fused in (
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj"),
            (("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
        ):
            names = [f"model.layers.{i}.{part}.weight" for part in parts]
            fused_weight = torch.cat([weights.pop(name) for name in names])
            weights[f"model.layers.{i}.{fused}.weight"] = fused_weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tiny_gguf(
    path: Path, template: str, without: str = "", kinds: dict[str, str] | None = None
) -> Path:
    """Write a GGUF file of random weights, all but one if asked, with a byte-level tokenizer.

    Its eos is <|endoftext|>, and its token that ends a turn <|im_end|>. `kinds` are the types of
    weights whose names begin so; others are float32.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *bytes_to_unicode().values(), "ab"]
    width, heads = 256 if kinds else 32, 2
    writer = GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_block_count(1)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_chat_template(template)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (width, width) for name in names}
    shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind = next((kind for start, kind in (kinds or {}).items() if name.startswith(start)), "")
        if kind and len(shape) == 2:
            stored = quantized(random.normal(0, 0.05, shape).astype(np.float32), kind)
            raw_type = GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", stored, raw_dtype=raw_type)
        elif name != without:
            writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(weight: Any, kind: str) -> Any:
    """A weight [outputs, inputs] as a GGUF keeps it, uint8.

    The library reads K-quants and IQ4, and does not write them: their bits are random.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    scales = {
        "IQ4_NL": [1e-3],
        "IQ4_XS": [2e-5],
        "Q4_K": [1e-4, 7e-4],
        "Q5_K": [1e-4, 1.5e-3],
        "Q6_K": [2e-5],
    }
    if kind not in scales:
        return quants.quantize(weight, GGMLQuantizationType[kind])
    size, stored_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    outputs, inputs = weight.shape
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (outputs, inputs // size, stored_bytes)).astype(np.uint8)
    own = np.array(scales[kind], np.float16).view(np.uint8)  # d, or d and dmin
    start = stored_bytes - 2 if kind == "Q6_K" else 0
    blocks[..., start : start + len(own)] = own
    return blocks.reshape(outputs, -1)
