"""Hydra 1.3.8's composition errors as one line: the file, the key, and what would be valid.

Hydra has no fields for these, so they are read out of its English: the one place that does.
"""

import re
import sys
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slm.config import Config
from slm.config.common import CONF


def explain(error: Exception) -> str:
    """One line for a composition error: the file, the key, and what would be valid."""
    causes: list[BaseException] = [error]
    while not isinstance(causes[-1], OmegaConfBaseException) and (  # its own cause says it again
        cause := causes[-1].__cause__ or causes[-1].__context__
    ):
        causes.append(cause)
    lines = [line.strip() for cause in causes for line in str(cause).splitlines()]
    text = "; ".join(
        dict.fromkeys(line for line in lines if line not in ("", "None") and "$VALUE" not in line)
    )
    if choice := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, name = choice.groups()
        valid = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        return f"conf/{group}/{name}.yaml does not exist: {group}={name} is unknown; valid: {valid}"
    full_key = next((str(key) for cause in causes if (key := getattr(cause, "full_key", None))), "")
    key = override_key(text) or full_key
    where = config_file(text, key)
    if unknown := re.search(r"Key '([^']+)' (?:is )?not in ", text):
        key = key or unknown.group(1)
        valid = ", ".join(keys_beside(key)) or f"any, added as +{key}=…"
        return f"{where}: unknown key {key!r}; valid: {valid}"
    if "mismatched input" in text or "no viable alternative" in text:
        text += "; quote a value that holds = , or brackets: key=\"'value'\""
    reason = re.sub(r"; (full_key|object_type|reference_type)[=:][^;]*", "", text)
    reason = re.sub(r"^Error merging override .*?; ", "", reason)
    return f"{where}: {f'key {key!r}: ' if key else ''}{reason}"


def override_key(text: str) -> str | None:
    """The dotted key in Hydra's words for a failed override, if it is about one."""
    match = re.search(r"Could not override '([^']+)'|merging override ([^=\s]+)=", text)
    return next((key for key in match.groups() if key), None) if match else None


def config_file(text: str, key: str) -> str:
    """The file that a composition error names, else the chosen one that holds `key`."""
    named = re.search(r"In '([\w./-]+)'", text)
    if named and named.group(1).removesuffix(".yaml") != "config":
        return f"conf/{named.group(1).removesuffix('.yaml')}.yaml"
    group = key.split(".")[0]
    if not group or not (CONF / group).is_dir():
        return "conf/config.yaml" if key else "command line"
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    chosen = next(
        choice[group] for choice in defaults if isinstance(choice, dict) and group in choice
    )
    for argument in sys.argv[1:]:
        if argument.startswith(f"{group}="):
            chosen = argument.split("=", 1)[1].strip("'\"")
    return f"conf/{group}/{chosen}.yaml"


def keys_beside(key: str) -> list[str]:
    """The valid keys beside the dotted `key`, from the schema; none where any is."""
    node: Any = OmegaConf.structured(Config)
    for part in key.split(".")[:-1]:
        if part not in node:
            return []
        node = node[part]
    return list(node) if OmegaConf.is_dict(node) else []
