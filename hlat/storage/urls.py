"""URLs of folders in a store: the kinds that are tested, and how each is written."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of store.

    Attributes:
        form: how its URLs are written.
        package, extra: what reads it; empty where nothing is needed.
    """

    form: str
    package: str = ""
    extra: str = ""


_AZURE = "abfs://container@account/folder"
KINDS = {
    "s3": Kind("s3://bucket/folder", "s3fs", "s3"),
    "gs": Kind("gs://bucket/folder", "gcsfs", "gcs"),
    "abfs": Kind(_AZURE, "adlfs", "azure"),
    "abfss": Kind(_AZURE, "adlfs", "azure"),
    "file": Kind("file:///folder"),
}
"""Scheme -> kind of store. What fsspec has besides is refused: nobody has tried whether deletions, checksums
and errors are there what they are taken for.
"""
FORMS = "write {}, {}, {} or {}".format(*dict.fromkeys(kind.form for kind in KINDS.values()))

_FOLDER = re.compile(r"[a-z][a-z0-9+.-]*://(?!/*$)[^?#\s]+")
_LOGIN = re.compile(r"://[^/]*@")
_REFUSED = (
    (re.compile(r"\s"), "a space or another blank"),
    (re.compile(r"\?"), "a '?' (a query, or a version of one object)"),
    (re.compile(r"#"), "a '#' (a fragment)"),
    (re.compile(r"::"), "'::' (a chain of file systems)"),
    (re.compile(r"(?<!:/)/\.\.?(?:/|$)"), "'.' or '..' as a name"),
)
_CONTAINER = re.compile(
    r"abfss?://(?P<container>[a-z0-9-]+)@(?P<account>[a-z0-9]+)(?:\.(?:dfs|blob)\.core\.windows\.net)?"
    r"/+(?P<path>[^/].*)"
)


def scheme_of(url: str) -> str:
    """`s3` of `s3://bucket/folder`."""
    return url.partition("://")[0]


def check_url(url: str) -> str:
    """What is wrong with the URL of a folder in a store, or ""."""
    scheme = scheme_of(url)
    azure = scheme in ("abfs", "abfss")
    if _LOGIN.search(url) and not (azure and re.match(r"[a-z]+://[^/:@]*@[^/:@]*(?:/|$)", url)):
        return "it holds a login, which belongs into the environment"
    if refused := next((name for character, name in _REFUSED if character.search(url)), ""):
        return f"it holds {refused}, so it is not the URL of a folder"
    if not _FOLDER.fullmatch(url):
        return "it is not the URL of a folder"
    if scheme not in KINDS:
        return f"{scheme}:// is not a kind of store that HLAT knows"
    if azure and not _CONTAINER.fullmatch(url):
        return "it names no container, account and folder"
    if scheme == "file" and not re.match(r"file:///+[^/]", url):
        return "it is not the whole path of a folder, which begins with a third slash"
    return ""


def without_login(url: str) -> str:
    """The URL without what may be a login, to be shown."""
    return _LOGIN.sub("://", url)


def azure_place(url: str) -> tuple[str, str]:
    """The account of a checked URL of Azure, and container and path as `container/path`."""
    match = _CONTAINER.fullmatch(url)
    assert match is not None
    return match["account"], f"{match['container']}/{match['path']}"
