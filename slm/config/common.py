"""What several groups of the schema share: places, names, and the settings of serving."""

import contextlib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from platformdirs import user_cache_path

from slm.errors import InputError
from slm_pyfunc.parameters import AT_LOAD, Parameters, RequestError
from slm_pyfunc.settings import PROVIDERS, Settings

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


def user_cache() -> str:
    """The folder for outcomes that no one chose another place for, which outlives every clone."""
    return str(user_cache_path("slm-packaging"))


def require_name(key: str, name: str) -> None:
    """Raise InputError unless MLflow can use the name, for models and in URIs."""
    if name != MISSING and not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{key} is {name!r}; it must be letters, digits, dots, _ and -.")


def require_template(key: str, template: str, *fields: str) -> None:
    """Raise InputError unless the template makes names; it may hold model, interface, `fields`."""
    valid = dict.fromkeys(("model", *fields, "interface"), "x")
    try:
        require_name(key, template.format(**valid))
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        known = ", ".join(f"{{{field}}}" for field in valid)
        raise InputError(
            f"{key} is {template!r}; it must be letters, digits, dots, _ and -, and of {known}."
        ) from error


def valid_settings(key: str, settings: Any) -> dict[str, Any]:
    """Settings of serving by name, {} for null; InputError for what a load would refuse."""
    settings = named_values(key, settings)
    require_settings(key, settings, [])
    return settings


def valid_at_load(key: str, settings: Any) -> dict[str, Any]:
    """All that `model_config` may change at load; InputError for what the load would refuse.

    Besides Settings, the execution provider and the defaults of a request's parameters.
    """
    settings = named_values(key, settings)
    if settings.get("execution_provider") is None:
        settings.pop("execution_provider", None)
    elif (provider := settings["execution_provider"]) not in PROVIDERS:
        raise InputError(
            f"{key}: execution_provider is {provider!r}; it must be one of {', '.join(PROVIDERS)}."
        )
    try:
        Parameters.of({name: settings[name] for name in AT_LOAD if name in settings})
    except RequestError as error:
        raise InputError(f"{key}: {error}.") from error
    more = ["execution_provider", *AT_LOAD]
    require_settings(key, {k: v for k, v in settings.items() if k not in more}, more)
    return settings


def named_values(key: str, settings: Any) -> dict[str, Any]:
    if isinstance(settings, str):  # of an environment variable
        with contextlib.suppress(ValueError):
            settings = json.loads(settings)
    if not isinstance(settings := settings or {}, dict):
        raise InputError(f"{key} is {settings!r}; it must be {{name: value, …}}.")
    return dict(settings)


def require_settings(key: str, settings: dict[str, Any], more: list[str]) -> None:
    """Raise InputError unless these are Settings; `more` names are valid besides."""
    valid = [*(f.name for f in fields(Settings)), *more]
    if unknown := [str(name) for name in settings if name not in valid]:
        raise InputError(f"{key} has {', '.join(unknown)}; valid: {', '.join(valid)}.")
    try:
        Settings(**settings)
    except ValueError as error:
        raise InputError(f"{key}: {error}.") from error
