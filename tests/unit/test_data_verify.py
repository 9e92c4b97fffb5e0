"""Tokenized folders that are not what was written: at the start, under a run, and in `data verify`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hlat.cli import main
from hlat.data import shard as shard_module
from hlat.data import token_file, verify
from hlat.data.build import build
from hlat.data.loader import SourceSpec, prepare
from hlat.data.packed import MANIFEST, TokenFolder
from hlat.data.shard import BlockDigests, block_digest
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("original")
    (place / "in").mkdir()
    for number in range(40):
        (place / f"in/{number}.txt").write_text(f"document {number} " * (number + 1))
    built = build(
        [resolve_source(path=place / "in")], load_tokenizer("bytes"), place / "out", holdout=0.2, workers=1
    )
    return built.folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(original, tmp_path / "tokens"))


def start(folder: Path) -> TokenFolder:
    [opened], _ = prepare([SourceSpec(path=str(folder))], "bytes", 0.2, quiet=True)
    return opened


def rewrite(path: Path, change) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def manifest(folder: Path, change) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def rehash(folder: Path) -> None:
    """As another tool would write the manifest: what stands in the files is right."""

    def change(content) -> None:
        for entries in content["shards"].values():
            for entry in entries:
                raw = (folder / f"{entry['file']}.bin").read_bytes()
                table = (folder / f"{entry['file']}.docs").read_bytes()
                entry["sha256"] = hashlib.sha256(raw).hexdigest()
                entry["docs_sha256"] = hashlib.sha256(table).hexdigest()
                entry.pop("blocks"), entry.pop("block_bytes")

    manifest(folder, change)


def flip(content: bytearray) -> None:
    content[0] ^= 1


def beyond(content: bytearray) -> None:
    content[200:202] = (999).to_bytes(2, "little")


def end_of_document(content: bytearray) -> None:
    content[200:202] = (256).to_bytes(2, "little")


def descending(content: bytearray) -> None:
    content[0:8] = (10**6).to_bytes(8, "little")


DAMAGE = {
    "flipped": ("train-00000.bin", flip, False, "sha256"),
    "held out": ("holdout-00000.bin", flip, False, "sha256"),
    "table": ("train-00000.docs", flip, False, "sha256"),
    "tokens of another": ("train-00000.bin", beyond, False, "sha256"),
    "out of range": ("train-00000.bin", beyond, True, r"document \d+ of train-00000 holds the id 999"),
    "borders": ("train-00000.docs", descending, True, "ends of its documents"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed_before_the_first_step_and_by_verify(folder: Path, name: str, capsys) -> None:
    file, change, hashed, message = DAMAGE[name]
    assert verify.verify(folder) == [] and start(folder)
    rewrite(folder / file, change)
    if hashed:
        rehash(folder)
    with pytest.raises(UserError, match=message) as caught:
        start(folder)
    assert "data verify" in str(caught.value.fix)
    assert main(["data", "verify", str(folder), "--json"]) == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False and printed["bad"][0]["file"] == file
    assert main(["data", "verify", str(folder)]) == 2
    assert file in capsys.readouterr().out


def test_a_known_hash_is_compared_without_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hlat.storage import digests

    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    start(folder)
    monkeypatch.setattr(digests, "_read", lambda *_: pytest.fail("a file was read again"))
    start(folder)
    manifest(folder, lambda m: m["shards"]["train"][0].update(sha256="0" * 64))
    with pytest.raises(UserError, match="sha256"):
        start(folder)


@pytest.mark.parametrize("blocks", [True, False])
def test_of_large_folders_some_blocks_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, blocks: bool
) -> None:
    monkeypatch.setattr(verify, "FULL_BELOW", 0)
    assert start(folder)
    if blocks:
        rewrite(folder / "train-00000.bin", flip)
        message = "not those written"
    else:
        rewrite(folder / "train-00000.bin", beyond)
        rehash(folder)
        message = "holds the id 999"
    with pytest.raises(UserError, match=message):
        start(folder)


def test_hashes_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "BLOCK", 10)
    content = bytes(range(25))
    for parts in ([content], [content[:3], content[3:20], content[20:]], [bytes([b]) for b in content]):
        digests = BlockDigests()
        for part in parts:
            digests.update(part)
        expected = [block_digest(content[at : at + 10]) for at in (0, 10, 20)]
        assert digests.entry() == {"block_bytes": 10, "blocks": expected}
    assert BlockDigests().entry()["blocks"] == []


def test_verify_names_all_that_is_wrong(folder: Path, capsys) -> None:
    assert main(["data", "verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "bad": []}
    assert main(["data", "verify", str(folder)]) == 0 and "is whole" in capsys.readouterr().out
    rewrite(folder / "train-00000.bin", lambda content: content.extend(b"xx"))
    (folder / "holdout-00000.docs").unlink()
    manifest(folder, lambda m: m["tokenizer"].update(identity="0" * 64))
    found = {bad.file: bad.reason for bad in verify.verify(folder)}
    assert found.keys() == {"train-00000.bin", "holdout-00000.docs", "tokenizer"}
    assert "bytes instead of" in found["train-00000.bin"] and found["holdout-00000.docs"] == "is missing"


def test_verify_finds_an_end_of_document_within_one(folder: Path) -> None:
    rewrite(folder / "train-00000.bin", end_of_document)
    rehash(folder)
    [bad] = verify.verify(folder)
    assert bad.file == "train-00000.bin" and "end-of-document" in bad.reason


@pytest.mark.parametrize(
    ("content", "reason"), [("{}", "not a manifest"), ("[" * 9999, "not a manifest"), (None, "no readable")]
)
def test_verify_of_a_folder_without_a_manifest(folder: Path, content, reason: str) -> None:
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_text(content)
    [bad] = verify.verify(folder)
    assert bad.file == MANIFEST and reason in bad.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(holdout=float("nan")),
        lambda m: m.update(holdout=float("inf")),
        lambda m: m.update(sources=5),
        lambda m: m.update(sources=[{}]),
        lambda m: m["sources"][0].update(label=None),
        lambda m: m["sources"][0].update(skipped=["x"]),
        lambda m: m.update(dropped={"x": {"count": 1, "examples": [1]}}),
        lambda m: m["totals"]["train"].update(tokens="5"),
        lambda m: m["tokenizer"].update(eos_id=10**9),
        lambda m: m["tokenizer"].update(eos_id=-1),
        lambda m: m["tokenizer"].update(bos_id=float("inf")),
        lambda m: m["tokenizer"].update(vocab_size=10**30),
        lambda m: m["tokenizer"].update(identity=[]),
        lambda m: m["shards"]["train"][0].update(tokens=-1),
        lambda m: m["shards"]["train"][0].update(file=7),
        lambda m: m["shards"]["train"][0].update(file="../x"),
        lambda m: m["shards"].update(train={}),
        lambda m: m["shards"].update(train=None),
        lambda m: m.update(dtype="object"),
        lambda m: m.update(dtype=[["a", 5]]),
    ],
)
def test_a_manifest_of_wrong_values_is_one_line(folder: Path, change, capsys) -> None:
    manifest(folder, change)
    for action in ("inspect", "verify"):
        assert main(["data", action, str(folder)]) == 2
        captured = capsys.readouterr()
        assert MANIFEST in captured.out + captured.err or "shard" in captured.err


def test_inspect_of_a_folder_without_training_text(folder: Path, capsys) -> None:
    manifest(folder, lambda m: m["shards"].update(train=[]))
    assert main(["data", "inspect", str(folder)]) == 0


def test_verify_of_nothing_is_one_line(tmp_path: Path, capsys) -> None:
    assert main(["data", "verify", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_inspect_says_what_verifies(folder: Path, capsys) -> None:
    assert main(["data", "inspect", str(folder), "--verify"]) == 2
    assert f"hlat data verify {folder}" in capsys.readouterr().err


def test_a_manifest_that_contradicts_its_tokenizer(folder: Path) -> None:
    manifest(folder, lambda m: m["tokenizer"].update(vocab_size=70_000))
    with pytest.raises(UserError, match="does not say of the tokenizer"):
        start(folder)


@pytest.mark.slow
def test_a_run_whose_tokens_are_truncated_ends_with_one_line(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"""
run: {{name: cut, steps: 100000, dir: {tmp_path}/run}}
model: {{layers: 1, hidden: 16, heads: 2, ffn: 32, vocab: 257, max_seq_len: 32}}
data: {{sources: [{{path: {folder}}}], tokenizer: bytes, seq_len: 32, micro_batch: 4, global_batch: 4,
       holdout: 0.2}}
precision: {{compute: fp32}}
eval: {{every: 0}}
log: {{every: 1}}
compile: false
"""
    )
    command = [sys.executable, "-m", "hlat", "train", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_text().count('"train"') > 3:
                break
            time.sleep(0.05)
        os.truncate(folder / "train-00000.bin", 10)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "token shard changed while a run reads it" in errors
    assert "Traceback" not in errors and "train-00000.bin" in errors


class TestUnderARun:
    """What happens to a file while rows are read from it."""

    @pytest.fixture
    def rows(self, folder: Path):
        return start(folder).shards["train"][0]

    def test_truncated(self, rows) -> None:
        before = rows.ids(0, 50)
        os.truncate(rows.path, 60)
        with pytest.raises(UserError, match="changed while a run reads it: it has 60 bytes"):
            rows.ids(0, 50)
        assert len(before) == 50

    def test_truncated_between_the_look_and_the_read(self, rows, monkeypatch: pytest.MonkeyPatch) -> None:
        rows.ids(0, 50)
        monkeypatch.setattr(token_file.TokenFile, "_check", lambda *_: os.truncate(rows.path, 60))
        with pytest.raises(UserError, match="is shorter than it was"):
            rows.ids(0, 50)

    def test_overwritten_in_place(self, rows) -> None:
        rows.ids(0, 50)
        with open(rows.path, "r+b") as stream:
            stream.write(b"\1\0")
        os.utime(rows.path, ns=(1, 1))
        with pytest.raises(UserError, match="holds something else"):
            rows.ids(0, 50)

    def test_touched(self, rows) -> None:
        before = rows.ids(0, 50)
        os.utime(rows.path, ns=(1, 1))
        assert np.array_equal(rows.ids(0, 50), before)

    def test_replaced_or_removed(self, rows, tmp_path: Path) -> None:
        """The open file is what it was."""
        before = rows.ids(0, 50)
        (tmp_path / "other").write_bytes(b"\0" * rows.path.stat().st_size)
        os.replace(tmp_path / "other", rows.path)
        assert np.array_equal(rows.ids(0, 50), before)
        rows.path.unlink()
        assert np.array_equal(rows.ids(0, 50), before)

    def test_with_more_shards_than_files_may_be_open(self, folder: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(token_file.resource, "getrlimit", lambda _: (0, 0))
        rows = start(folder).shards["train"][0]
        before, count = rows.ids(0, 50), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0
        assert np.array_equal(rows.ids(0, 50), before)
        if count:
            assert len(os.listdir("/proc/self/fd")) == count
        (tmp_path / "other").write_bytes(b"\0" * rows.path.stat().st_size)
        os.replace(tmp_path / "other", rows.path)
        with pytest.raises(UserError, match="holds something else"):
            rows.ids(0, 50)
        rows.path.unlink()
        with pytest.raises(UserError, match="cannot be read"):
            rows.ids(0, 50)

    def test_an_id_beyond_the_vocabulary_is_named(self, folder: Path) -> None:
        rewrite(folder / "train-00000.bin", beyond)
        rows = TokenFolder(folder).shards["train"][0]
        document = int(np.searchsorted(rows.table[:, 0], 100, side="right"))
        with pytest.raises(UserError, match=f"document {document} of train-00000 holds the id 999"):
            rows.ids(90, 120)
        assert rows.ids(0, 100).max() < 257

    def test_slices(self, rows) -> None:
        whole = np.fromfile(rows.path, dtype="<u2")
        assert len(rows.tokens) == rows.count == len(whole)
        for part in (slice(None), slice(3, 9), slice(5, 5), slice(9, 3), slice(-4, None), slice(0, 10**9)):
            assert np.array_equal(rows.tokens[part], whole[part])
        with pytest.raises(ValueError, match="order"):
            rows.tokens[::2]
