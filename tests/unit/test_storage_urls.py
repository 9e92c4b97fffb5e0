"""URLs of stores: which are taken, and what is said of the others."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hlat.errors import UserError
from hlat.recipe import Recipe
from hlat.storage.remote import Remote, check_url


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("s3://key:secret@bucket/x", "login"),
        ("bucket/x", "not the URL"),
        ("s3://", "not the URL"),
        ("simplecache::s3://bucket/x", "a chain"),
        ("s3://bucket/x?versionId=1", r"'\?' \(a query"),
        ("s3://bucket/a b", "a space"),
        ("s3://bucket/a\nb", "a space or another blank"),
        ("s3://bucket/a#b", "'#'"),
        ("file:///data/runs/..", "'.' or '..'"),
        ("s3://bucket/./a", "'.' or '..'"),
        ("http://host/folder", "http:// is not a kind of store"),
        ("https://me:secret@host/folder", "login"),
        ("hf://buckets/me/x", "hf:// is not"),
        ("s3a://bucket/x", "s3a:// is not"),
        ("gcs://bucket/x", "gcs:// is not"),
        ("az://container@account/x", "login"),
        ("az://container/x", "az:// is not"),
        ("sftp://host/x", "sftp:// is not"),
        ("local:///x", "local:// is not"),
        ("abfs://container/x", "no container, account and folder"),
        ("abfs://container@account", "no container, account and folder"),
        ("abfs://container@account/", "no container, account and folder"),
        ("abfs://container@account.example.org/x", "no container, account and folder"),
        ("abfs://me:secret@account/x", "login"),
        ("abfs://c@me:secret@account/x", "login"),
        ("gs://me:secret@bucket/x", "login"),
        ("gs://key@bucket/x", "login"),
        ("file://store", "third slash"),
        ("file://~/store", "third slash"),
    ],
)
def test_urls_that_are_refused(url: str, word: str) -> None:
    assert re.search(word, check_url(url))
    with pytest.raises(UserError, match=word) as caught:
        Remote(url)
    assert "secret" not in caught.value.line()


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("s3://bucket/x", "s3fs", "s3"),
        ("gs://bucket/x", "gcsfs", "gcs"),
        ("abfs://container@account/x", "adlfs", "azure"),
    ],
)
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str) -> None:
    import fsspec

    def missing(*args: Any, **options: Any) -> None:
        raise ImportError("install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'hlat\[{extra}\]'"):
        Remote(url)


def test_a_root_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in ("/proc/nowhere", f"{tmp_path}/file/x", f"{tmp_path}/{'x' * 300}"):
        with pytest.raises(UserError, match="writing file://"):
            Remote(f"file://{root}/store").probe()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"remote": "s3://me:pw@bucket/x"}, "login"),
        ({"remote": "http://b/x"}, "http:// is not a kind of store"),
        ({"remote": "s3://b/x", "format": "nxd"}, "not uploaded"),
        ({"remote": "s3://b/x", "patience": 4000.0}, "4000 s exceeds parallel.first_timeout, 3600 s"),
    ],
)
def test_recipes_that_are_refused(section: dict[str, Any], words: str) -> None:
    model = {"layers": 1, "hidden": 8, "heads": 1, "kv_heads": 1, "ffn": 8, "vocab": 300, "max_seq_len": 8}
    data = {"sources": [{"path": "x"}], "micro_batch": 1, "global_batch": 1}
    with pytest.raises(ValidationError, match=words):
        Recipe.model_validate({"model": model, "data": data, "checkpoint": section})


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/folder",
        "gs://bucket/folder/of it[1]".replace(" ", "%20"),
        "abfs://container@account/folder",
        "abfss://container@account.dfs.core.windows.net/folder/",
        "abfs://container@account.blob.core.windows.net/a@b",
        "file:///folder",
    ],
)
def test_urls_that_are_taken(url: str) -> None:
    assert check_url(url) == ""
