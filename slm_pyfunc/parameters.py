"""What a request may ask for, named as in OpenAI's Chat Completions, and how it is checked."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .plain import RequestError, require_plain, require_text

MAX_STOP = 16
MAX_TOKENS = 256  # of an answer, where neither the request nor the load says how many
TOKEN_ID = re.compile(r"\d{1,18}")  # enough for any id; int() refuses 4,300
# Small models fill free whitespace without end; llguidance reads this out of a schema.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class TooLong(RequestError):
    """Prompt and answer are longer than the context."""

    code = "context_length_exceeded"


NUMBER = (int, float)


@dataclass(frozen=True)
class Limit:
    """What a parameter's value must be, in code and in words."""

    kinds: type | tuple[type, ...]
    holds: Callable[[Any], bool]
    words: str


def limited(
    default: Any, kinds: Any, holds: Callable[[Any], bool], words: str, *, at_load: bool = False
) -> Any:
    """A field of Parameters with its limit; a load may change the default of one `at_load`."""
    return field(
        default=default, metadata={"limit": Limit(kinds, holds, words), "at_load": at_load}
    )


@dataclass(frozen=True)
class Parameters:
    """One request's parameters. A wrong one raises RequestError.

    Signatures, defaults at load and checks are derived from the fields, so this is their only list.

    - `max_tokens`: of the answer. None is the default of the load, or the room that is left in the
      context if that is less.
    - `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.
    - `frequency_penalty`, `presence_penalty`: taken from the logits of what the answer has already.
    - `logit_bias`: (id, bias) of tokens, added to their logits.
    - `stop`: strings before which the answer ends.
    - `n`: answers sampled for each prompt; `seed` makes them repeatable.
    - `schema`: the JSON schema of `response_format`, as text.
    - `top_logprobs`: how many alternatives are listed beside each token's log-probability.
    """

    max_tokens: int | None = limited(
        None, int, lambda v: v >= 1, "an integer of at least 1", at_load=True
    )
    temperature: float = limited(
        0.0, NUMBER, lambda v: 0 <= v <= 100, "a number from 0 to 100", at_load=True
    )
    top_p: float = limited(
        1.0, NUMBER, lambda v: 0 < v <= 1, "a number above 0 and at most 1", at_load=True
    )
    top_k: int = limited(
        0, int, lambda v: v >= 0, "an integer of at least 0, 0 for no limit", at_load=True
    )
    min_p: float = limited(
        0.0, NUMBER, lambda v: 0 <= v < 1, "a number of at least 0 and below 1", at_load=True
    )
    repetition_penalty: float = limited(
        1.0, NUMBER, lambda v: 0 < v <= 100, "a number above 0 and at most 100", at_load=True
    )
    frequency_penalty: float = limited(0.0, NUMBER, lambda v: -2 <= v <= 2, "a number from -2 to 2")
    presence_penalty: float = limited(0.0, NUMBER, lambda v: -2 <= v <= 2, "a number from -2 to 2")
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = limited(
        None, int, lambda v: 0 <= v < 2**63, "an integer from 0 to 2^63 - 1", at_load=True
    )
    stop: tuple[str, ...] = field(default=(), metadata={"at_load": True})
    n: int = limited(1, int, lambda v: 1 <= v <= 128, "an integer from 1 to 128")
    schema: str | None = None
    logprobs: bool = False
    top_logprobs: int = limited(0, int, lambda v: 0 <= v <= 20, "an integer from 0 to 20")

    def __post_init__(self) -> None:
        for parameter in fields(self):
            limit: Limit | None = parameter.metadata.get("limit")
            value = getattr(self, parameter.name)
            if limit is None or (value is None and parameter.default is None):
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, limit.kinds)
                or not limit.holds(value)
            ):
                raise RequestError(f"{parameter.name} is {value!r}; it must be {limit.words}")
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs}; it needs logprobs: true")

    @classmethod
    def of(cls, request: Mapping[str, Any], defaults: "Parameters | None" = None) -> "Parameters":
        """Read a request's fields; what is absent, null or empty stays as in `defaults`.

        An absent `max_tokens` becomes None, so that the default may be cut to the context's room.
        """
        require_plain(request)
        values = {field.name: getattr(defaults or cls(), field.name) for field in fields(cls)}
        values["max_tokens"] = None
        for name, value in request.items():
            value = value.item() if isinstance(value, np.generic) else value
            if is_absent(value) or name == "schema":
                continue
            if isinstance(value, float) and value.is_integer():  # a data frame's, or JSON's
                value = int(value)
            if name == "response_format":
                values["schema"] = json_schema(value)
            elif name == "stop":
                values["stop"] = stop_strings(value)
            elif name == "logit_bias":
                values["logit_bias"] = logit_bias(value)
            elif name == "logprobs" and not isinstance(value, bool):
                raise RequestError(f"logprobs is {value!r}; it must be true or false")
            elif name in values:
                values[name] = value
        return cls(**values)


# The parameters whose defaults `model_config` may change at load.
AT_LOAD = tuple(p.name for p in fields(Parameters) if p.metadata.get("at_load"))


def is_absent(value: Any) -> bool:
    """Whether a field is as if it were not there: null, a data frame's NaN, an empty list."""
    empty = isinstance(value, (list, dict)) and not value
    return value is None or empty or isinstance(value, float) and math.isnan(value)


def stop_strings(stop: Any) -> tuple[str, ...]:
    """`stop` as a tuple: one string, or a list of them."""
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple, np.ndarray)) or len(strings) > MAX_STOP:
        raise RequestError(
            f"stop is {stop!r}; it must be a string, or a list of at most {MAX_STOP}"
        )
    for string in strings:
        if not require_text("stop", string):
            raise RequestError(f"stop holds {string!r}; it must hold strings that are not empty")
    return tuple(strings)


def logit_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    """`logit_bias` as (token id, bias): OpenAI's map of ids, as text, to numbers."""
    wrong = RequestError(
        f"logit_bias is {bias!r}; it must map token ids to numbers from -100 to 100"
    )
    if not isinstance(bias, dict):
        raise wrong
    pairs = []
    for token, value in bias.items():
        is_id = isinstance(token, int) or TOKEN_ID.fullmatch(str(token))
        if not is_id or isinstance(value, bool) or not isinstance(value, NUMBER):
            raise wrong
        if not -100 <= value <= 100:
            raise wrong
        pairs.append((int(token), float(value)))
    return tuple(pairs)


def json_schema(response_format: Any) -> str | None:
    """The JSON schema that OpenAI's `response_format` asks for, as text; None for free text."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise RequestError(
            f"response_format is {response_format!r}; its type must be text, json_object or "
            "json_schema"
        )
    wrapper = response_format.get("json_schema")
    schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
    if kind == "json_object":
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise RequestError(
            f"response_format.json_schema.schema is {schema!r}; it must be a JSON schema"
        )
    return json.dumps({"x-guidance": JSON_STYLE, **schema})
