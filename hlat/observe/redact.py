"""Takes secrets out of text before it leaves a process: environment.json, logs, reports, `hlat doctor`.

Secrets come by environment variable only (docs/operations/security.md). What is taken out: the values of
variables whose name says secret, wherever they stand (`hlat.observe.secrets`); logins in URLs; values given
to such a name (`--api-key=…`, `password: …`); and well-known forms of tokens.

A rank prints what it likes, a word of a megabyte too: each expression here begins with a fixed text and scans
what follows it once, so that the work grows with the length of the text and no faster.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from hlat.observe.secrets import HIDDEN, LEAST, known, names_secret

__all__ = ["HIDDEN", "line_with_secret", "names_secret", "redact", "redact_all", "without_login"]

# "tokens", "tokenizer", "keys" and "author" are no secrets, though their names hold one of these words. What
# stands before the word does not matter, hence no expression for it. In capitals, as the names of variables
# are, KEY, AUTH and the like say secret by themselves; "sort_key" and "forward_pass" do not.
_KEYS = "access|account|api|auth|deploy|encryption|master|private|secret|service|shared|signing|ssh|storage"
_SIGN = r"""["']?\s*+[=:]"""
_PASSWORDS = r"(?:passw(?:or)?d|passphrase|passcode|(?-i:(?<=_)(?:PASS|PWD))|(?<=;)pwd)"
_WORDS = (
    rf"(?:(?<![A-Za-z])(?:(?:{_KEYS})[_-]?key(?:[_-]?id)?|token|secret|{_PASSWORDS}|credentials?|jwt"
    rf"""|auth(?==|["']\s?:\s?["'])|(?-i:(?:KEY|AUTH)(?={_SIGN})))|(?-i:(?:(?<=_)PAT|(?<![A-Za-z])(?:PIN|DSN))(?={_SIGN}))"""
    r"|(?<![A-Za-z])(?:conn(?:ection)?[_-]?str(?:ing)?|webhook(?:[_-]?ur[li])?)"
    r"|(?<=access)(?:token|key)|(?<=refresh)token|(?<=auth)token)"
)
_ASSIGNED = re.compile(
    rf"""(?P<name>{_WORDS}["']?(?:\s*+(?P<sign>[=:])\s*+(?:[|>][-+]?\s++)?|\s++(?=\S*\d)))(?P<quote>["']?)"""
    rf"""(?P<value>(?<=[=: ]["'])[^"'\n]{{{LEAST},1024}}+(?=["'])|[^\s"',;&]{{{LEAST},}}+)""",
    re.IGNORECASE,
)
# A password may be shorter: what stands after it and `=`, in quotes, or has a digit.
_SHORT = re.compile(
    rf"""((?<![A-Za-z])(?:{_PASSWORDS}|secret)(?:["']?[=:] ?|(?<=-password) )["']?)"""
    rf"""(?!\*|(?:none|null|true|false)\b)((?<==)[^\s"',;&]{{1,{LEAST - 1}}}+(?![^\s"',;&])"""
    rf"""|(?<=["'])[^"'\n]{{1,{LEAST - 1}}}+(?=["'])"""
    rf"""|(?=[^\s"',;&\d]{{0,{LEAST - 1}}}\d)[^\s"',;&]{{1,{LEAST - 1}}}+(?![^\s"',;&]))""",
    re.IGNORECASE,
)
# Headers of HTTP: of a scheme with one value this, of one with several the line, without one the word.
_HEADER = r"""((?:authorization["']?\s?[=:]\s?["']?)"""
_ONE, _MANY = "(?:bearer|basic|token|api-?key|negotiate|ntlm)", "(?:digest|oauth|hawk)"
_HEADERS = tuple(
    re.compile(text, re.IGNORECASE)
    for text in (
        rf"""{_HEADER}{_ONE} )(?!\*)[^\s"',;]++""",
        rf"{_HEADER}{_MANY} )(?!\*)[^\n]++",
        rf"""{_HEADER})(?!\*|{_ONE}\s|{_MANY}\s)[^\s"',;]{{{LEAST},}}+""",
        r"""(\bcookie["']?: ["']?)(?!\*)[^"'\n]++""",
    )
)
# <|endoftext|>, <pad>, <your token>: text of a model or of instructions.
_MARK = re.compile(r"<[^<>\s]{1,64}>[\])}.:]{0,4}")
# Such a name at the end of a text: its value follows.
HANGING = re.compile(rf"""{_WORDS}["']?\s*+(?:[=:]\s*+(?:[|>][-+]?\s*+)?)?["']?\Z""", re.IGNORECASE)
_NUMBER = re.compile(r"[-+\d.,e%]+", re.IGNORECASE)
# In Azure's URLs a container's name, which holds no colon, stands where others have a login.
_URL_LOGIN = re.compile(r"(?<=\w://)(?:(?<!abfs://)(?<!abfss://)[^/\s]*@|[^/\s:]*:[^/\s]*@)")
_PASSWORD = re.compile(
    r"(?<=\w://)[^/@\s:]++:[^/\s]*@|(?:(?<=\bhttp://)|(?<=\bhttps://))[^/@\s]++@", re.IGNORECASE
)
_PEM_BEGIN = r"-----BEGIN [A-Z0-9 ]{0,40}?PRIVATE KEY(?: BLOCK)?-----"
_PEM_END = r"-----END [A-Z0-9 ]{0,40}?PRIVATE KEY(?: BLOCK)?-----"
# Without the fixed text of the first column the expression beside it need not be tried.
_FORMS = (
    ("hf_", re.compile(r"\bhf_[A-Za-z0-9]{20,}+")),  # Hugging Face
    ("AKIA", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),  # AWS access key ids
    ("ASIA", re.compile(r"\bASIA[0-9A-Z]{16}\b")),
    ("gh", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}+|\bgithub_pat_\w{20,}+")),
    ("glpat-", re.compile(r"\bglpat-[\w-]{20,}+")),
    ("sk-", re.compile(r"\bsk-[\w-]{20,}+")),
    ("xox", re.compile(r"\bxox[abprs]-[\w-]{10,}+")),
    ("eyJ", re.compile(r"(?<![\w-])eyJ[\w-]{10,}+\.[\w-]{10,}+\.[\w-]*+")),  # JSON web tokens
    ("earer ", re.compile(r"(?<=\b[Bb]earer )\S{8,}+")),
    ("asic ", re.compile(r"(?<=\b[Bb]asic )[A-Za-z0-9+/=]{8,}+")),
    (
        "PRIVATE KEY",  # without an end: as much as a key may be long
        re.compile(rf"{_PEM_BEGIN}(?:[\s\S]{{0,16384}}?(?:{_PEM_END}|\Z)|[\s\S]{{0,16384}})"),
    ),
)
_SIGNED = re.compile(r"((?:X-Amz-(?:Signature|Credential|Security-Token)|sig|Signature)=)[^&\s\"']++")
PEM_BEGIN, PEM_END = re.compile(_PEM_BEGIN), re.compile(_PEM_END)


def without_login(text: str) -> str:
    """The text without the `user:password@` of URLs."""
    return _URL_LOGIN.sub("", text) if "://" in text else text


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text with `***` in place of every secret, of several lines too.

    Args:
        text: any text.
        environ: whose secret variables are looked for; default: this process's.
    """
    text = known(os.environ if environ is None else environ).hide(text)
    text = without_login(text)
    for begin, form in _FORMS:
        if begin in text:
            text = form.sub(HIDDEN, text)
    if "=" in text:
        text = _SIGNED.sub(rf"\1{HIDDEN}", text)
    for header in _HEADERS:
        text = header.sub(rf"\1{HIDDEN}", text)
    return _SHORT.sub(rf"\1{HIDDEN}", _ASSIGNED.sub(_hide, text))


def redact_all(data: Any, environ: Mapping[str, str] | None = None) -> Any:
    """JSON-ready data with `redact` applied to every text and number in it, the keys too. A text whose key
    says secret is one.
    """
    if isinstance(data, str):
        return redact(data, environ)
    if isinstance(data, int | float) and HIDDEN in (text := redact(str(data), environ)):
        return text
    if isinstance(data, Mapping):
        hidden = {key: HIDDEN for key, value in data.items() if _is_secret_entry(key, value)}
        return {
            redact_all(key, environ): redact_all(value, environ) for key, value in {**data, **hidden}.items()
        }
    return [redact_all(item, environ) for item in data] if isinstance(data, list | tuple) else data


def line_with_secret(text: str, environ: Mapping[str, str] | None = None) -> int | None:
    """The line (from 1) on which a login in a URL, a well-known form of token, or the value of a secret
    variable begins; None without one. Such a value counts if it cannot be an innocent word: it has a digit
    or 20 characters.

    Args:
        environ: whose secret variables are looked for; default: this process's.
    """
    found = [form.search(text) for begin, form in _FORMS if begin in text]
    starts = [match.start() for match in (*found, _PASSWORD.search(text)) if match]
    at = known(os.environ if environ is None else environ).find(text)
    starts += [] if at is None else [at]
    return text.count("\n", 0, min(starts)) + 1 if starts else None


def print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: the traceback as Python prints it, without secrets."""
    from hlat.observe.terminal import escaped

    sys.stderr.write(escaped(redact("".join(traceback.format_exception(kind, error, trace)))))


def _is_secret_entry(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not isinstance(value, str) or _MARK.fullmatch(value):
        return False
    word = f"{key}={'x' * min(len(value), LEAST)}"
    return redact(word, {}) != word


def _hide(match: re.Match[str]) -> str:
    value = match["value"]
    if value.startswith(HIDDEN) or _MARK.fullmatch(value):
        return match[0]
    if _NUMBER.fullmatch(value) and not (match["sign"] and value.isdecimal()):
        return match[0]
    return f"{match['name']}{match['quote']}{HIDDEN}"
