"""Set right what a checkpoint says of itself, where its own files show that it is wrong.

Each function changes the placed copy alone, and returns a sentence for the provenance, or none.
"""

import logging
from pathlib import Path
from typing import Any

from slm.errors import InputError
from slm.sources.verify import read_json, write_json
from slm.sources.weights import are_equal, read_tensors
from slm_pyfunc.chat_template import ChatTemplate
from slm_pyfunc.parameters import RequestError

log = logging.getLogger("slm.sources")


def mend(checkpoint: Path, source: str, ties: dict[str, str], turn_end: int | None) -> list[str]:
    """Everything that is mended.

    `ties` are the weights that the configuration ties, each with the one that stands for it;
    `turn_end` is the id of a GGUF's token that ends a turn.
    """
    notes = untie_own_head(checkpoint, source, ties) + add_turn_ends(checkpoint, source, turn_end)
    for note in notes:
        log.warning("fetch: %s", note)
    return notes


def untie_own_head(checkpoint: Path, source: str, ties: dict[str, str]) -> list[str]:
    """Let a head of its own count, which `tie_word_embeddings: true` would replace.

    Merging an adapter that trained the head leaves such a checkpoint.
    """
    tensors = read_tensors(checkpoint, source)
    own = [
        name
        for name, other in ties.items()
        if {name, other} <= tensors.keys() and not are_equal(tensors[name], tensors[other])
    ]
    if not own:
        return []
    path = checkpoint / "config.json"
    write_json(path, read_json(path) | {"tie_word_embeddings": False})
    return [f"tie_word_embeddings is now false: {own[0]} differs from {ties[own[0]]}"]


def add_turn_ends(checkpoint: Path, source: str, turn_end: int | None) -> list[str]:
    """Add to the eos ids the tokens that end a turn, by the chat template and by a GGUF."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    ends = {} if turn_end is None else {turn_end: "the GGUF"}
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    text = text_after_a_turn(checkpoint, source).lstrip()
    if written := max((token for token in added if text.startswith(token)), key=len, default=""):
        ends[added[written]] = "the chat template"
    known = eos_ids(checkpoint)
    new = {number: where for number, where in ends.items() if number not in known}
    if not new:
        return []
    path = checkpoint / "generation_config.json"
    values = read_json(path) if path.is_file() else settings_in_config(checkpoint)
    write_json(path, values | {"eos_token_id": [*known, *new]})
    return [
        f"eos_token_id now has {number} ({tokenizer.convert_ids_to_tokens(number)}), which ends a "
        f"turn in {where}"
        for number, where in new.items()
    ]


def text_after_a_turn(checkpoint: Path, source: str) -> str:
    """What the chat template writes after an assistant's message; "" if it refuses a plain one."""
    try:
        return ChatTemplate(checkpoint).turn_end()
    except RequestError:
        return ""
    except ValueError as error:
        raise InputError(f"{source}: its chat template is not valid: {error}.") from error


def eos_ids(checkpoint: Path) -> list[int]:
    """The ids that end an answer: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = checkpoint / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def settings_in_config(checkpoint: Path) -> dict[str, Any]:
    """What transformers 5.22 takes from config.json where there is no generation_config.json.

    Older checkpoints set there how they generate. AutoConfig drops such settings as it reads.
    """
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(
        checkpoint, config_file_name="config.json", _from_model_config=True
    )
    metadata = ("_from_model_config", "transformers_version")
    return {name: value for name, value in config.to_diff_dict().items() if name not in metadata}
