"""What every field of a request has to be, whatever it is for: Unicode text, nested not too deep.

JSON can say more than templates, tokenizers and grammars can read.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

MAX_DEPTH = 100  # of a field, in levels of JSON; llguidance reads no schema deeper than 128
NOT_TEXT = "holds a NUL or half a surrogate pair; it must be Unicode text"


class RequestError(ValueError):
    """A request that cannot be answered: the message names the field and its limit, in one line.

    `code` is OpenAI's code for the error, if it has one.
    """

    code: str | None = None


def require_text(name: str, text: Any) -> str:
    """The text; RequestError if it is no string, or one that the tokenizer cannot read."""
    if not isinstance(text, str):
        raise RequestError(f"{name} is {text!r}; it must be a string")
    if "\0" in text or not is_unicode(text):
        raise RequestError(f"{name} {NOT_TEXT}")
    return text


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: half of a surrogate pair, an escape in JSON, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_plain(request: Mapping[str, Any]) -> None:
    """Raise RequestError for a field with half a surrogate pair, or one that is nested too deep."""
    for name, value in request.items():
        require_text("the name of a field", name)
        require_shallow(name, value)
        texts = (text for level in levels(value) for text in level if isinstance(text, str))
        if not all(map(is_unicode, texts)):
            raise RequestError(f"{name} {NOT_TEXT}")


def require_shallow(name: str, value: Any) -> None:
    """Raise RequestError for a value that is nested too deep for templates and grammars."""
    if next(islice(levels(value), MAX_DEPTH, None), None) is not None:
        raise RequestError(f"{name} is nested too deep; it may have {MAX_DEPTH} levels")


def levels(value: Any) -> Iterator[list[Any]]:
    """The values of a structure of JSON's types, keys included, level by level."""
    level = [value]
    while level:
        yield level
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, (list, tuple, np.ndarray)):
                inner += item
        level = inner
