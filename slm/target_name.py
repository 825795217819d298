"""What a target's name says of it: `<device>-<precision>[-<quantizer>][-block-N][-acc-level-N]
[-int8-prompts]`.

A registered model bears its target's name, so the name has to be true. Names of other forms may be
given too: of them, only such words as stand here are held against the target.
"""

import re
from typing import Any

# Execution providers by their names' words; a name that says dml says DirectML.
DEVICES = {
    "cpu": "cpu",
    "cuda": "cuda",
    "directml": "dml",
    "dml": "dml",
    "webgpu": "webgpu",
    "trt-rtx": "NvTensorRtRtx",
}
WORDS = {
    "execution_provider": "|".join(DEVICES),
    "precision": r"(?:int4|int8|bf16|fp16|fp32)(?!-prompts)",
    "quantizer": "rtn|grid|mse|gptq|mixed",
    "block_size": r"block-(?P<block>\d+)",
    "accuracy_level": r"acc-level-(?P<level>\d+)",
    "prompts": "int8-prompts",
}
WHOLE = "({})-({})(-({}))?(-{})?(-{})?(-{})?".format(*WORDS.values())


def said(name: str) -> dict[str, Any]:
    """What the words of a name say, by the fields that they speak of.

    A name of the whole form that has no accuracy level says that it is 0, and one without prompts
    that they have no graph of their own.
    """
    found: dict[str, Any] = {}
    for field, words in WORDS.items():
        if match := re.search(f"(?<![^-])({words})(?![^-])", name):
            found[field] = match[1]
    if "execution_provider" in found:
        found["execution_provider"] = DEVICES[found["execution_provider"]]
    for field in ("block_size", "accuracy_level"):
        if field in found:
            found[field] = int(found[field].rpartition("-")[2])
    if "prompts" in found:
        found["prompts"] = found["prompts"].removesuffix("-prompts")
    if is_whole(name):
        found.setdefault("prompts", None)
    if is_whole(name) and found["precision"].startswith("int"):
        found.setdefault("accuracy_level", 0)
    return found


def is_whole(name: str) -> bool:
    """Whether all of a name is of the form above."""
    return re.fullmatch(WHOLE, name) is not None


def untrue(name: str, target: dict[str, Any]) -> list[str]:
    """Where a name says otherwise than the target's own values, in words."""
    return [
        f"{field} is {says}, and it is {target[field]}"
        for field, says in said(name).items()
        if target[field] != says
    ]


def true_name(target: dict[str, Any]) -> str:
    """The name of the form above that says what a target is."""
    words = {provider: word for word, provider in reversed(DEVICES.items())}
    parts = [words[target["execution_provider"]], target["precision"]]
    if target["quantizer"]:
        parts.append(target["quantizer"])
        if target["quantizer"] != "mixed":
            parts.append(f"block-{target['block_size']}")
        if target["accuracy_level"]:
            parts.append(f"acc-level-{target['accuracy_level']}")
    if target["prompts"]:
        parts.append(f"{target['prompts']}-prompts")
    return "-".join(parts)


def joined(targets: list[str]) -> str:
    """The name of several targets that one model serves."""
    return "_".join(targets)
