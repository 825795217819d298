"""Carry a checkpoint's generation_config over to its ONNX model, and say what is not served."""

import json
import logging
from pathlib import Path
from typing import Any

from slm.sources.mend import settings_in_config

log = logging.getLogger("slm.export")

# What slm_pyfunc serves (engine/runtime.py reads it out of genai_config's `search`).
SERVED = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What says nothing about the text of an answer.
TECHNICAL = (
    *("decoder_start_token_id", "max_length", "use_cache", "return_dict_in_generate"),
    "transformers_version",
)


def carry_over(checkpoint: Path, onnx: Path) -> list[str]:
    """Write what is served into genai_config.json; return a sentence that names the rest.

    The model builder of onnxruntime-genai 0.18 drops `repetition_penalty`; mobius-onnx 0.1 reads no
    generation_config.json at all.
    """
    settings, neutral = generation_settings(checkpoint)
    path = onnx / "genai_config.json"
    genai_config = json.loads(path.read_text())
    genai_config["search"] |= {name: settings.pop(name, neutral[name]) for name in SERVED}
    genai_config["model"] |= {name: settings.pop(name) for name in IDS if name in settings}
    path.write_text(json.dumps(genai_config, indent=4) + "\n")
    unserved = [f"{n}={v!r}" for n, v in sorted(settings.items()) if v != neutral.get(n)]
    if not unserved:
        return []
    own = (checkpoint / "generation_config.json").is_file()
    place = "generation_config.json" if own else "config.json"
    note = f"{place} has what the ONNX model does not serve: {', '.join(unserved)}"
    log.warning("export_onnx: %s", note)
    return [note]


def generation_settings(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the checkpoint sets of how it generates, and what transformers takes where it does not.

    Older checkpoints have such settings in config.json.
    """
    from transformers import GenerationConfig

    if (checkpoint / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(checkpoint).to_diff_dict()
    else:
        found = settings_in_config(checkpoint)
    settings = {
        name: value
        for name, value in found.items()
        if value is not None
        and name not in TECHNICAL
        and not name.startswith(("_", "output_", "cache_"))
    }
    return settings, GenerationConfig._get_default_generation_params()  # of transformers 5.22
