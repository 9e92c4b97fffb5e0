"""Folders of a store are listed and deleted by their exact names, however odd, and however many files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hlat.storage.remote import Remote

# A name, and those of other runs that it would match were it a pattern.
ODD_NAMES = {
    "a[1]b": ["a1b"],
    "a*": ["ab", "a[1]b"],
    "[ab]": ["a", "b"],
    "[!x]": ["c", "!"],
    "**": ["a/b"],
    "{a,b}": ["a", "b"],
    "run": ["run2", "run/inner", "ru"],
    "50%20a": ["50 a", "50"],
    "a+b": ["a b", "aab"],
}


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_folder_is_deleted_by_its_exact_name(kind: str, name: str, tmp_path: Path) -> None:
    """As a part of the URL, as a folder in it, and as the name of a file."""
    base = f"memory://{tmp_path.name}" if kind == "memory" else f"file://{tmp_path}/store"
    everything = Remote(base)
    others = [f"{other}/{file}" for other in ODD_NAMES[name] for file in ("step-1/data", "step-10/data")]
    for path in [*others, f"{name}/step-1/data", f"{name}/step-1/{name}/deep", f"{name}/step-10/data"]:
        everything.write(path, b"x")
    before = everything.files()
    run = Remote(f"{base}/{name}")
    assert {path for path in run.files() if path.startswith("step")} == {
        "step-1/data",
        f"step-1/{name}/deep",
        "step-10/data",
    }
    run.delete("step-1", "data")
    gone = {f"{name}/step-1/data", f"{name}/step-1/{name}/deep"}
    assert everything.files() == {path: size for path, size in before.items() if path not in gone}
    if kind == "file":
        assert not (tmp_path / "store" / name / "step-1").exists(), "no empty folder stays"
    everything.delete(name, "step-10/data")
    inner = {path for path in others if path.startswith(f"{name}/")}
    assert set(everything.files()) == set(others) - inner


def test_more_files_than_a_store_names_at_once(tmp_path: Path) -> None:
    remote = Remote(f"memory://{tmp_path.name}/run")
    for number in range(1050):
        remote.write(f"step-1/data-{number:05}", b"")
    remote.write("step-10/data", b"")
    assert len(remote.files("step-1")) == 1050
    remote.delete("step-1", "data-00007")
    assert remote.files() == {"step-10/data": 0}


def test_the_marker_is_deleted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote(f"file://{tmp_path}/store")
    for name in ("a", "complete", "z"):
        remote.write(f"step/{name}", b"")
    deleted: list[str] = []
    really = remote._fs.rm_file
    monkeypatch.setattr(remote._fs, "rm_file", lambda path: (deleted.append(path), really(path)))
    remote.delete("step", "complete")
    assert deleted[0] == remote.at("step/complete") and len(deleted) == 3


def test_unfinished_uploads_are_dropped_beyond_the_first_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 names 1,000 of them at a time; the names of its answers are those of its API reference."""
    pytest.importorskip("s3fs")
    remote = Remote("s3://bucket/run")
    uploads = [{"Key": f"run/step/{number}", "UploadId": f"id-{number}"} for number in range(2300)]
    aborted: list[str] = []

    def call(name: str, **words: Any) -> dict[str, Any]:
        if name == "abort_multipart_upload":
            aborted.append(words["UploadId"])
            return {}
        assert words["Prefix"] == "run/"
        start = int(words["UploadIdMarker"].removeprefix("id-")) + 1 if "KeyMarker" in words else 0
        page = uploads[start : start + 1000]
        more = start + 1000 < len(uploads)
        last = page[-1]
        markers = {"NextKeyMarker": last["Key"], "NextUploadIdMarker": last["UploadId"]} if more else {}
        return {"Uploads": page, "IsTruncated": more, **markers}

    monkeypatch.setattr(remote._fs, "call_s3", call)
    assert remote.abort_uploads() == 2300 and aborted == [upload["UploadId"] for upload in uploads]
