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
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slm.config import Config
from slm.config.common import CONF, ROOT
from slm.errors import InputError, ToldError, UserError, as_user_error, told_of
from slm.redaction import redacted
from slm.running.chain import PIPELINE
from slm.running.hydra_errors import explain
from slm.running.logs import set_up_logging
from slm.running.summary import INTERRUPTED, Ending, Summary, job, worst
from slm.running.tracking import (
    calling_folder,
    end_run_with_error,
    environment,
    mlflow_run,
    settle_tracking,
    shown_tracking_uri,
)
from slm.running.work import work_folder

log = logging.getLogger("slm.command")

# Hydra prints errors itself, and exits, unless this is set.
FULL_ERRORS = "HYDRA_FULL_ERROR"
HYDRA_FLAGS = (
    "help hydra-help version cfg resolve package run multirun shell-completion config-path"
)
HYDRA_FLAGS += " config-name config-dir experimental-rerun info"
# Parameters of every entry point besides those in MLproject; `mlflow run -P` passes them on.
COMMON = ["force", "summary", "preflight"]
ALIASES = {"json": "summary"}


def entry_point(
    step: Callable[[Config], object], together: Callable[[Config], object] | None = None
) -> None:
    """Run `step` as a command: compose conf/, call it, and end the MLflow run and the summary.

    With --multirun, `step` is called for each job, in the order given; a job that fails does not
    keep the others from running. If there is a `together`, the jobs are child runs of one run, and
    it is called at the end with the configuration of the first of them.

    A failure is one line on stderr and the tags `error` and `exit_code` of the run. A traceback
    comes before the line if nobody expected the error, or if HYDRA_FULL_ERROR=1. Exits with the
    `exit_code` of the error (slm/errors.py), 2 if the command line or conf/ is wrong, 1 if nobody
    expected the error, 130 on Ctrl-C; of several jobs, with the worst of theirs.
    """
    name = Path(sys.argv[0]).stem
    set_up_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = os.environ.get(FULL_ERRORS, "0")
    ending = Ending(name)
    summary, parent = ending.summary, contextlib.ExitStack()
    given: list[list[str]] = []  # the overrides of each job of a --multirun
    first: list[Config] = []

    def run(config: DictConfig, told: Summary) -> None:
        """Compose and run the step once, and say in `told` of what it is."""
        values = typed(config)
        parameters = parameters_of(name)
        told.model = values.model.name if "model" in parameters else ""
        told.target = values.target.name if "target" in parameters else ""
        summary.tracking_uri = told.tracking_uri = shown_tracking_uri()
        hydra = HydraConfig.get()
        if together and told is not summary and not first:
            parent.enter_context(mlflow_run(name, work_folder(values.paths.work)))
        first.append(values)
        dropped = heed_another_source(values, hydra.overrides.task, hydra.runtime.choices["model"])
        if dropped and name == "fetch":  # the one step that compares digests
            names = ", ".join(dropped)
            log.info("another source: the configured digest of %s does not apply", names)
        step(values)

    @hydra_main(version_base="1.3", config_path=str(CONF), config_name="config")
    def composed(config: DictConfig) -> None:
        one_of_several = HydraConfig.get().mode is RunMode.MULTIRUN
        if one_of_several:
            given.append(list(HydraConfig.get().overrides.task))
        with job() if one_of_several else contextlib.nullcontext(summary) as told:
            try:
                with environment({FULL_ERRORS: asked}):  # what the step starts has its own errors
                    ending.goes_to(config.summary, calling_folder())
                    run(config, told)
            except OmegaConfBaseException:
                raise
            except Exception as error:  # here, so that the other jobs of a --multirun go on
                shared = one_of_several and together is not None
                told.error, told.exit_code = report(name, error, asked == "1", not shared)

    try:
        sys.argv[1:] = hydra_arguments(name, sys.argv[1:])
        with environment({FULL_ERRORS: "1"}), parent:
            composed()
            if given:
                sum_up(summary, given)
                try:
                    if together and first:
                        together(first[0])
                except Exception as error:
                    summary.error, summary.exit_code = report(name, error, asked == "1")
                else:
                    if summary.exit_code:
                        end_run_with_error(name, summary.error, summary.exit_code)
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


def sum_up(summary: Summary, given: list[list[str]]) -> None:
    """Label the jobs of a --multirun by the overrides that tell them apart, and sum up their ends.

    A job of `target=a` is labelled `a`; `given` are the overrides of each.
    """
    common = set(given[0]).intersection(*given) if len(given) > 1 else set()
    for told, overrides in zip(summary.jobs, given, strict=True):
        own = [re.sub("^(model|target)=", "", o).strip("'") for o in overrides if o not in common]
        told.label = " ".join(own) or told.target
    summary.exit_code = worst(told.exit_code for told in summary.jobs)
    failed = [told for told in summary.jobs if told.exit_code]
    if failed:
        errors = "; ".join(f"{told.label}: {told.error}" for told in failed)
        summary.error = f"{len(failed)} of {len(summary.jobs)} failed: {errors}"


def report(
    name: str, error: Exception, show_traceback: bool, ends_run: bool = True
) -> tuple[str, int]:
    """End the run with the error: in one line if it is the user's, else with its traceback.

    Returns that line, and the exit code. If it is not to end the run, the line is printed alone.
    """
    known, (text, exit_code) = as_user_error(error), told_of(error)
    if known is None or show_traceback:
        log.exception("%s failed", name)
    told = isinstance(error, ToldError)
    if ends_run:
        trace = None if known else traceback.format_exc()
        end_run_with_error(name, text, exit_code, traceback=trace, told=told)
    elif not told:
        print(f"{name}: {redacted(text)}", file=sys.stderr, flush=True)
    return text, exit_code


def parameters_of(name: str) -> list[str]:
    """The parameters of an entry point, without `overrides`."""
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    declared = entry_points.get(name, {}).get("parameters", {})
    return [parameter for parameter in declared if parameter != "overrides"] + COMMON


def hydra_arguments(name: str, argv: list[str]) -> list[str]:
    """Translate MLproject's `--parameter value`, or `--parameter=value`, into Hydra overrides.

    Several models or targets, with commas between, are jobs of a --multirun.
    """
    arguments: list[str] = []
    flags: list[str] = []  # argparse wants them before the overrides
    rest, parameters = list(argv), parameters_of(name)
    while rest:
        argument, equals, value = rest.pop(0).partition("=")
        parameter = argument.removeprefix("--")
        parameter = ALIASES.get(parameter, parameter)
        if argument.startswith("--") and parameter in [*parameters, "overrides"]:
            value = value if equals or not rest else rest.pop(0)
            if parameter == "overrides":
                words = split_overrides(value)
                flags += [word for word in words if word == "--multirun"]
                arguments += [word for word in words if word != "--multirun"]
            elif parameter in ("model", "target") and "," in value:  # names hold no comma
                flags.append("--multirun")
                arguments.append(f"{parameter}={''.join(value.split())}")
            elif value:
                arguments.append(f"{parameter}={quoted(value)}")
        elif argument.startswith("--") and parameter not in HYDRA_FLAGS.split():
            valid = ", ".join([*parameters, "overrides"])
            raise HydraException(f"{name} has no parameter {parameter!r}; valid: {valid}")
        else:
            arguments.append(argument + equals + value)
    return [*flags, *(listed(argument) for argument in arguments)]


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

    HydraException if a list is no JSON, or holds anything but texts; if a quote is not closed.
    Spaces inside quotes and brackets separate nothing; the quotes stay, for Hydra's own grammar.

    >>> split_overrides("a=1 b='x y' c=[1, 2]")
    ['a=1', "b='x y'", 'c=[1, 2]']
    """
    if text.startswith("["):  # no override begins so
        with contextlib.suppress(ValueError):
            given = json.loads(text)
            if all(isinstance(word, str) for word in given):
                return given
        raise HydraException(
            f"overrides={text} begins with [ and is no list of texts in JSON; give key=value words "
            'with spaces between, or ["key=value", …]'
        )
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
