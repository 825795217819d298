"""The command line of every step: Hydra's own, and MLproject's on top of it.

    python -m steps.fetch model=smollm2-135m-instruct paths.work=/data/work
    python -m steps.fetch --cfg job

MLproject passes its parameters as `--model`, `--target`, `--source`, … and any Hydra overrides in
one string, `--overrides "key=value key='a b'"`, or as a JSON list. An empty value means "as
configured".
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import yaml
from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slm.config import CONF, ROOT, Config
from slm.errors import InputError, ToldError, UserError, as_user_error, one_line
from slm.running.chain import PIPELINE
from slm.running.hydra_errors import explain
from slm.running.logs import set_up_logging
from slm.running.summary import INTERRUPTED, Ending
from slm.running.tracking import (
    calling_folder,
    end_run_with_error,
    environment,
    settle_tracking,
    shown_tracking_uri,
)

log = logging.getLogger("slm.command")

# Hydra prints errors itself, and exits, unless this is set.
FULL_ERRORS = "HYDRA_FULL_ERROR"
HYDRA_FLAGS = (
    "help hydra-help version cfg resolve package run multirun shell-completion config-path"
)
HYDRA_FLAGS += " config-name config-dir experimental-rerun info"
# Parameters of every entry point besides those in MLproject; `mlflow run -P` passes them on.
COMMON = ["force", "summary"]
ALIASES = {"json": "summary"}


def entry_point(step: Callable[[Config], object]) -> None:
    """Run `step` as a command: compose conf/, call it, and end the MLflow run and the summary.

    A failure is one line on stderr and the tags `error` and `exit_code` of the run. A traceback
    comes before the line if nobody expected the error, or if HYDRA_FULL_ERROR=1. Exits with the
    `exit_code` of the error (slm/errors.py), 2 if the command line or conf/ is wrong, 1 if nobody
    expected the error, 130 on Ctrl-C.
    """
    name = Path(sys.argv[0]).stem
    set_up_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = os.environ.get(FULL_ERRORS, "0")
    ending = Ending(name)
    summary = ending.summary

    @hydra_main(version_base="1.3", config_path=str(CONF), config_name="config")
    def composed(config: DictConfig) -> None:
        try:
            with environment({FULL_ERRORS: asked}):  # what the step starts has errors of its own
                ending.goes_to(config.summary, calling_folder())
                values = typed(config)
                if "model" in parameters_of(name):
                    summary.model, summary.target = values.model.name, values.target.name
                summary.tracking_uri = shown_tracking_uri()
                hydra = HydraConfig.get()
                dropped = heed_another_source(
                    values, hydra.overrides.task, hydra.runtime.choices["model"]
                )
                if dropped and name == "fetch":  # the one step that compares digests
                    names = ", ".join(dropped)
                    log.info("another source: the configured digest of %s does not apply", names)
                step(values)
        except OmegaConfBaseException:
            raise
        except Exception as error:  # here, so that the other jobs of a --multirun go on
            summary.error, summary.exit_code = report(name, error, asked == "1")

    try:
        sys.argv[1:] = hydra_arguments(name, sys.argv[1:])
        with environment({FULL_ERRORS: "1"}):
            composed()
    except KeyboardInterrupt:
        summary.error, summary.exit_code = "interrupted", INTERRUPTED
        end_run_with_error(name, summary.error, summary.exit_code, status="KILLED")
    except (HydraException, OmegaConfBaseException) as error:
        if asked == "1":
            log.exception("composing conf/ failed")
        with contextlib.suppress(InputError):
            ending.goes_to(ending.path or told_summary(sys.argv[1:]), calling_folder())
        summary.error, summary.exit_code = explain(error), InputError.exit_code
        end_run_with_error(name, summary.error, summary.exit_code)
    ending.tell()
    sys.exit(summary.exit_code)


def typed(config: DictConfig) -> Config:
    """The composed configuration as dataclasses, with the stores that it will use settled."""
    try:
        values = OmegaConf.to_object(config)
    except ValueError as error:  # a dataclass of conf/ refuses its values
        if isinstance(error, (UserError, OmegaConfBaseException)):
            raise
        raise InputError(str(error)) from error
    assert isinstance(values, Config)
    steps = [link.step for link in PIPELINE]
    if unknown := sorted(set(values.force) - set(steps)):
        raise InputError(f"force={','.join(unknown)} is no step; valid: {', '.join(steps)}.")
    settle_tracking()
    return values


def heed_another_source(config: Config, overrides: list[str], chosen: str) -> list[str]:
    """If `model.source` is overridden, drop what the file of the `chosen` model says of its source.

    The digests, whose files are returned, go in any case, and the licence, architecture, context
    length, parameters and tool calls unless `model.name` says that this is a copy of the chosen
    model; what is overridden stays. Raises InputError without `model.name`: the checkpoint would be
    registered as the chosen model, and could become its champion.
    """
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    if "model.adapter" in given and "model.name" not in given:
        raise InputError(
            "model.adapter is overridden, and model.name is not: the merged model is another one. "
            "Give model.name=<its own name>."
        )
    if "model.source" not in given:
        return []
    if "model.name" not in given:
        raise InputError(
            "model.source is overridden, and model.name is not. Give model.name=<its own name>, or "
            f"model.name={chosen} if it is a copy of that model."
        )
    if config.model.name != chosen:
        for key in ("licence", "architecture", "context_length", "parameters"):
            if f"model.{key}" not in given:
                setattr(config.model, key, None)
        if "model.tool_calls" not in given:
            config.model.tool_calls = "none"
    kept: set[str] = set()
    for override in overrides:
        if override.lstrip("+").startswith("model.sha256="):
            value = OverridesParser.create().parse_override(override).value()
            kept |= {str(name) for name in value} if isinstance(value, dict) else set()
    dropped = sorted(config.model.sha256.keys() - kept)
    config.model.sha256 = {name: config.model.sha256[name] for name in kept}
    return dropped


def report(name: str, error: Exception, show_traceback: bool) -> tuple[str, int]:
    """End the run with the error: in one line if it is the user's, else with its traceback.

    Returns that line, and the exit code.
    """
    known = as_user_error(error)
    if known is None or show_traceback:
        log.exception("%s failed", name)
    if known is None:
        text, exit_code = f"{type(error).__name__}: {one_line(error)}", UserError.exit_code
        end_run_with_error(name, text, exit_code, traceback=traceback.format_exc())
    else:
        text, exit_code = one_line(known), known.exit_code
        end_run_with_error(name, text, exit_code, told=isinstance(error, ToldError))
    return text, exit_code


def parameters_of(name: str) -> list[str]:
    """The parameters of an entry point, without `overrides`."""
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    declared = entry_points.get(name, {}).get("parameters", {})
    return [parameter for parameter in declared if parameter != "overrides"] + COMMON


def hydra_arguments(name: str, argv: list[str]) -> list[str]:
    """Translate MLproject's `--parameter value`, or `--parameter=value`, into Hydra overrides."""
    arguments, rest, parameters = [], list(argv), parameters_of(name)
    while rest:
        argument, equals, value = rest.pop(0).partition("=")
        parameter = argument.removeprefix("--")
        parameter = ALIASES.get(parameter, parameter)
        if argument.startswith("--") and parameter in [*parameters, "overrides"]:
            value = value if equals or not rest else rest.pop(0)
            if parameter == "overrides":
                arguments += split_overrides(value)
            elif value:
                arguments.append(f"{parameter}={quoted(value)}")
        elif argument.startswith("--") and parameter not in HYDRA_FLAGS.split():
            valid = ", ".join([*parameters, "overrides"])
            raise HydraException(f"{name} has no parameter {parameter!r}; valid: {valid}")
        else:
            arguments.append(argument + equals + value)
    return [listed(argument) for argument in arguments]


def listed(override: str) -> str:
    """`force=a,b` as one value: to Hydra it would be two runs."""
    steps = re.fullmatch(r"force=(\w+(?:,\w+)+)", override)
    return f"force={quoted(steps[1])}" if steps else override


def told_summary(argv: list[str]) -> str | None:
    """The file of `summary` in a command line that cannot be composed."""
    told = r"(?<![\w.])(?:summary=|--(?:summary|json)[ =])'?([^\s'\",]+)"
    words = re.findall(told, " ".join(argv))
    return words[-1] if words else None


def split_overrides(text: str) -> list[str]:
    """The overrides in one string: a JSON list, or words with spaces between.

    Spaces inside quotes and brackets separate nothing; the quotes stay, for Hydra's own grammar.

    >>> split_overrides("a=1 b='x y' c=[1, 2]")
    ['a=1', "b='x y'", 'c=[1, 2]']
    """
    if text.startswith("["):  # no override begins so
        return json.loads(text)
    words: list[str] = [""]
    quote, depth, escaped = "", 0, False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth = max(depth - 1, 0)
        if character.isspace() and not quote and not depth:
            words.append("")
        else:
            words[-1] += character
    if quote:
        raise HydraException(f"a quote in the overrides is not closed: {words[-1]}")
    return [
        w[1:-1] if w[0] in "'\"" and w[0] == w[-1] and len(w) > 1 else w
        for w in filter(None, words)
    ]


def quoted(value: str) -> str:
    """Quote a value for Hydra's override grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
