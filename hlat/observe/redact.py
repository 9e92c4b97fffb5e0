"""Takes secrets out of text before it leaves a process: environment.json, supervisor logs, `hlat doctor`.

Secrets come by environment variable only (docs/operations/security.md). What is taken out: the values of
variables whose name says secret, wherever they stand; logins in URLs; values given to such a name
(`--api-key=…`, `password: …`); and well-known forms of tokens.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

HIDDEN = "***"
_LEAST = 8  # characters: a shorter value would be found in innocent text
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH|JWT", re.IGNORECASE)
# "tokens", "tokenizer", "keys" and "author" are no secrets, though their names hold one of these words.
_WORDS = (
    r"(?:(?:api|access|private|secret)[_-]?key(?:[_-]?id)?|token|secret|passw(?:or)?d|passwd|credentials?)"
)
_ASSIGNED = re.compile(
    rf"""(?P<name>(?<![A-Za-z])(?:\w+[_-])?{_WORDS}["']?(?:\s*[=:]\s*|\s+(?=\S*\d)))(?P<quote>["']?)"""
    rf"""(?P<value>[^\s"',;&]{{{_LEAST},}})""",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+\d.,e%]+", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(\w+://)[^/@\s]+@")
_PASSWORD = re.compile(r"\w+://[^/@\s:]+:[^/@\s]+@|\bhttps?://[^/@\s]+@")
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS access key ids
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{20,}"
    r"|\bsk-[\w-]{20,}"
    r"|\bxox[abprs]-[\w-]{10,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"  # JSON web tokens
    r"|(?<=\bBearer )\S{8,}|(?<=\bBasic )[A-Za-z0-9+/=]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_SIGNED = re.compile(r"((?:X-Amz-(?:Signature|Credential|Security-Token)|sig|Signature)=)[^&\s\"']+")


def names_secret(name: str) -> bool:
    """Whether the name of a variable says that its value is a secret. Errs on the side of yes."""
    return bool(_SECRET_NAME.search(name))


def without_login(text: str) -> str:
    """The text without the `user:password@` of URLs."""
    return _URL_LOGIN.sub(r"\1", text)


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text with `***` in place of every secret.

    Args:
        text: any text; its lines stay lines.
        environ: whose secret variables are looked for; default: this process's.
    """
    environ = os.environ if environ is None else environ
    values = {
        value
        for name, value in environ.items()
        if names_secret(name) and len(value) >= _LEAST and not _NUMBER.fullmatch(value)
    }
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, HIDDEN)
    text = _FORMS.sub(HIDDEN, without_login(text))
    return _ASSIGNED.sub(_hide, _SIGNED.sub(rf"\1{HIDDEN}", text))


def redact_all(data: Any, environ: Mapping[str, str] | None = None) -> Any:
    """JSON-ready data with `redact` applied to every text in it."""
    if isinstance(data, str):
        return redact(data, environ)
    if isinstance(data, Mapping):
        return {key: redact_all(value, environ) for key, value in data.items()}
    return [redact_all(item, environ) for item in data] if isinstance(data, list | tuple) else data


def line_with_secret(text: str) -> int | None:
    """The line (from 1) on which a login in a URL or a well-known form of token begins; None without one."""
    starts = [match.start() for match in (_FORMS.search(text), _PASSWORD.search(text)) if match]
    return text.count("\n", 0, min(starts)) + 1 if starts else None


def print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: the traceback as Python prints it, without secrets."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _hide(match: re.Match[str]) -> str:
    if _NUMBER.fullmatch(match["value"]) or match["value"].startswith(HIDDEN):
        return match[0]
    return f"{match['name']}{match['quote']}{HIDDEN}"
