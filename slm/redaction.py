"""Secrets, kept out of all that is said and recorded.

Secret are the user and password in a URI, what its query signs or authorizes with, an Authorization
header, and the values of environment variables whose names say so.
"""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

from slm.variables import variables

HIDDEN = "***"
# Shorter values, `true` say, are settings; and no word of a message should vanish.
SHORTEST = 8

SECRET_VARIABLE = re.compile(
    "TOKEN|PASSW|SECRET|CREDENTIAL|WEBHOOK|CONNECTION_STRING|SAS(_|$)"
    "|(?<!PUBLIC)(^|_|API|ACCESS)KEY(_|$)",
    re.IGNORECASE,
)
# What stands before the @ is a container in Azure's URIs, unless a password follows it.
USER_INFO = re.compile(
    r"""(?P<container>(?:abfss?|wasbs?)://[^/\s:@'"<>]+@)|(?<=://)[^/\s'"<>]*@"""
)
PASSWORD = re.compile(r"""://[^/\s:@]*:([^/\s]+)@""")
QUERY = re.compile(
    r"(?<=[?&;])((?:x-amz-|x-goog-)?(?:signature|credential|security-token)|sig|token|access_?token"
    r"|password|secret|api_?key|access_?key|accountkey|sharedaccesssignature)=[^&;\s'\"]+",
    re.IGNORECASE,
)
HEADER = re.compile(r"""(authorization['"]?\s*[:=]\s*['"]?)(?:\w+ )?[^\s'",}]+""", re.IGNORECASE)


def redacted(text: str) -> str:
    """A text without the secrets in it; a URI stays whole but for its user and password."""
    for value in secret_values():
        text = text.replace(value, HIDDEN)
    text = USER_INFO.sub(r"\g<container>", text)
    text = QUERY.sub(rf"\1={HIDDEN}", text)
    return HEADER.sub(rf"\1{HIDDEN}", text)


def redacted_texts(value: Any) -> Any:
    """A structure of JSON's types without the secrets in its texts.

    To be taken before it is encoded: JSON spells a quote, and so a secret with one, otherwise.
    """
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: redacted_texts(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_texts(part) for part in value]
    return value


def secret_values() -> list[str]:
    """The secrets in this process's environment, as they are and as a URI spells them.

    The longest come first: one may hold another.
    """
    return sorted(set(found_in_environment()), key=len, reverse=True)


def found_in_environment() -> Iterator[str]:
    for name, value in variables().items():
        found = PASSWORD.findall(value)
        if SECRET_VARIABLE.search(name) and not os.path.exists(value):
            found.append(value)
        for secret in found:
            spelled = (secret, quote(secret, ""), unquote(secret))
            yield from (spelling for spelling in spelled if len(spelling) >= SHORTEST)
