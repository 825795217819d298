"""The command line of every step: Hydra's own, and MLproject's on top of it.

    python -m steps.fetch model=smollm2-135m-instruct paths.work=/data/work
    python -m steps.fetch --cfg job

MLproject passes `--model`, `--target`, `--source`, … and `--overrides "key=value key='a b'"`; an
empty value means "as configured".
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra import main as hydra_main
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steps.config import CONF, Config
from steps.step import (
    EXPECTED_ERRORS,
    end_run_with_error,
    one_line,
    require_tracking_server,
    set_up_logging,
)

log = logging.getLogger("steps.command")

# The parameters that MLproject declares, per entry point.
PARAMETERS = {
    "main": ["model", "target"],
    "fetch": ["model", "target"],
    "export_onnx": ["model", "target", "source"],
    "log_pyfunc": ["model", "target", "source"],
    "log_transformers": ["model", "target", "source"],
    "evaluate": ["model", "target", "candidate", "reference"],
    "register": ["model", "target", "source"],
    "rollback": ["model", "target", "reason"],
}

HYDRA_FLAGS = (
    "help hydra-help version cfg resolve package run multirun shell-completion config-path"
)
HYDRA_FLAGS += " config-name config-dir experimental-rerun info"


def entry_point(step: Callable[[Config], object]) -> None:
    """Run `step` as a command: compose conf/, call it, and end the MLflow run.

    Every failure is one line on stderr and the tag `error` on the run; HYDRA_FULL_ERROR=1 adds the
    traceback. Exits with 1 where the step failed, 2 where the command line or conf/ is wrong, 130
    on Ctrl-C.
    """
    name = Path(sys.argv[0]).stem
    set_up_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # without it Hydra prints the error itself, and exits
    exit_code = 0

    @hydra_main(version_base="1.3", config_path=str(CONF), config_name="config")
    def composed(config: DictConfig) -> None:
        nonlocal exit_code
        try:
            typed = OmegaConf.to_object(config)
            assert isinstance(typed, Config)
            require_tracking_server()
            step(typed)
        except OmegaConfBaseException:
            raise
        except Exception as error:  # here, so that the other jobs of a --multirun go on
            if show_traceback or not isinstance(error, EXPECTED_ERRORS):
                log.exception("%s failed", name)
            end_run_with_error(name, one_line(error))
            exit_code = 1

    try:
        sys.argv[1:] = hydra_arguments(name, sys.argv[1:])
        composed()
    except KeyboardInterrupt:
        end_run_with_error(name, "interrupted", status="KILLED")
        exit_code = 130
    except (HydraException, OmegaConfBaseException) as error:
        if show_traceback:
            log.exception("composing conf/ failed")
        end_run_with_error(name, explain(error))
        exit_code = 2
    sys.exit(exit_code)


def hydra_arguments(name: str, argv: list[str]) -> list[str]:
    """Translate MLproject's `--parameter value` pairs into Hydra overrides."""
    arguments, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        parameter = argument.removeprefix("--")
        if argument == "--overrides":
            arguments += split_overrides(rest.pop(0) if rest else "")
        elif argument.startswith("--") and parameter in PARAMETERS.get(name, []):
            value = rest.pop(0) if rest else ""
            arguments += [f"{parameter}={quoted(value)}"] if value else []
        elif argument.startswith("--") and parameter.split("=")[0] not in HYDRA_FLAGS.split():
            valid = ", ".join([*PARAMETERS.get(name, []), "overrides"])
            raise HydraException(f"{name} has no parameter {parameter!r}; valid: {valid}")
        else:
            arguments.append(argument)
    return arguments


def split_overrides(text: str) -> list[str]:
    """Split at spaces outside quotes and brackets, the quotes kept for Hydra's own grammar.

    >>> split_overrides("a=1 b='x y' c=[1, 2]")
    ['a=1', "b='x y'", 'c=[1, 2]']
    """
    quoted_text = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
    bracketed = rf"\[(?:{quoted_text}|[^\]])*\]|\{{(?:{quoted_text}|[^}}])*\}}"
    words = re.findall(rf"(?:{quoted_text}|{bracketed}|\S)+", text)
    for word in words:
        if re.search(r"(?<!\\)['\"]", re.sub(quoted_text, "", word)):
            raise HydraException(f"a quote in the overrides is not closed: {word}")
    return [w[1:-1] if w[0] in "'\"" and w[0] == w[-1] and len(w) > 1 else w for w in words]


def join_overrides(overrides: list[str]) -> str:
    """The inverse of `split_overrides`."""
    return " ".join(
        o if split_overrides(o) == [o] else f'"{o}"' if '"' not in o else f"'{o}'"
        for o in overrides
    )


def quoted(value: str) -> str:
    """Quote a value for Hydra's override grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def explain(error: Exception) -> str:
    """One line for a composition error: the file, the key, and what would be valid."""
    causes: list[BaseException] = [error]
    while (
        cause := causes[-1].__cause__ or causes[-1].__context__
    ) is not None and cause not in causes:
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
