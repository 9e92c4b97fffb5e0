"""Tokenized folders: repeatable, resumable, one builder at a time, all or nothing, checked when opened."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data import build as build_module
from hlat.data import lock, packed
from hlat.data import sources as sources_module
from hlat.data.batch import make_batch
from hlat.data.build import build
from hlat.data.loader import Data
from hlat.data.packed import TokenFolder, document_hash, holdout_threshold, token_dtype
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.data.verify import verify
from hlat.errors import UserError

BYTES = load_tokenizer("bytes")


def write_files(folder, texts):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return folder


def make(folder, out, holdout=0.25, workers=1, tokenizer=BYTES):
    return build([resolve_source(path=folder)], tokenizer, out, holdout=holdout, workers=workers)


def documents(folder, split):
    """The texts of a split, found by the document table alone."""
    texts = []
    for shard in TokenFolder(folder).shards[split]:
        start = 0
        for end, size, mark in shard.table.tolist():
            ids = shard.tokens[start:end]
            assert ids[-1] == 256
            text = bytes(ids[:-1].tolist())
            assert len(text) == size and document_hash(text) == mark
            texts.append(text.decode())
            start = end
        assert start == shard.count
    return texts


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TEXTS = [f"document number {i}\n" * (i % 7 + 1) for i in range(200)]


def test_shards_hold_every_document_once_in_order(tmp_path):
    make(write_files(tmp_path / "in", TEXTS), tmp_path / "out")
    below = holdout_threshold(0.25)
    held = [text for text in TEXTS if document_hash(text.encode()) < below]
    assert 25 < len(held) < 80
    assert documents(tmp_path / "out", "holdout") == held
    assert documents(tmp_path / "out", "train") == [text for text in TEXTS if text not in held]
    totals = TokenFolder(tmp_path / "out").manifest["totals"]
    assert totals["holdout"] == {
        "documents": len(held),
        "tokens": sum(len(text) + 1 for text in held),
        "bytes": sum(map(len, held)),
    }


def test_folder_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 1500)
    source = write_files(tmp_path / "in", [*TEXTS, "grüße 日本語"])
    (source / "bad.txt").write_bytes(b"\xff")
    for workers in (1, 2, 3):
        make(source, tmp_path / f"out{workers}", workers=workers)
    first = snapshot(tmp_path / "out1")
    assert len(first) > 20 and ".lock" not in first
    assert first == snapshot(tmp_path / "out2") == snapshot(tmp_path / "out3")
    dropped = TokenFolder(tmp_path / "out1").manifest["dropped"]
    assert dropped == {"not UTF-8": {"count": 1, "examples": ["bad.txt"]}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out1", "out2", "out3"]


def test_side_of_a_document_depends_on_nothing_else(tmp_path):
    whole = make(write_files(tmp_path / "a", TEXTS), tmp_path / "out_a").folder
    half = make(write_files(tmp_path / "b", TEXTS[::-2]), tmp_path / "out_b").folder
    held = set(documents(whole, "holdout"))
    assert set(documents(half, "holdout")) == held & set(TEXTS[::-2])
    assert not held & set(documents(whole, "train"))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_get_a_document(tmp_path, fraction):
    folder = make(
        write_files(tmp_path / "in", [*TEXTS[:9], TEXTS[3]]), tmp_path / "out", holdout=fraction
    ).folder
    sides = {split: documents(folder, split) for split in ("train", "holdout")}
    marks = {split: [document_hash(text.encode()) for text in sides[split]] for split in sides}
    assert sides["train"] and sides["holdout"] and max(marks["holdout"]) < min(marks["train"])
    assert sorted(sides["train"] + sides["holdout"]) == sorted([*TEXTS[:9], TEXTS[3]])
    assert len(set(sides["holdout" if fraction < 0.5 else "train"])) == 1


def test_a_single_document_and_no_split(tmp_path):
    folder = make(write_files(tmp_path / "one", ["only"]), tmp_path / "out_one").folder
    assert documents(folder, "train") == ["only"] and not documents(folder, "holdout")
    folder = make(write_files(tmp_path / "in", TEXTS[:5]), tmp_path / "out", holdout=0.0).folder
    assert documents(folder, "train") == TEXTS[:5]


BUILDER = """
    import sys
    from pathlib import Path
    from hlat.data import sources
    from hlat.data.build import build
    from hlat.data.tokenizer import load_tokenizer
    sources.UNIT_BYTES_MIN = 400
    source = sources.resolve_source(path=sys.argv[1])
    out, workers = Path(sys.argv[2]), int(sys.argv[3])
    built = build([source], load_tokenizer("bytes"), out, holdout=0.25, workers=workers)
    print(built.reused_units, built.bytes)
"""


def start_builder(source, out, workers):
    command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(source), str(out), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def running_workers(folder):
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as stream:
                if str(folder).encode() in stream.read():
                    found.append(int(entry))
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for left-over processes in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_builder_is_continued(tmp_path, workers):
    source, out = write_files(tmp_path / "in", TEXTS * 3), tmp_path / "out"
    partial = tmp_path / "out.partial"
    process = start_builder(source, out, workers)
    deadline = time.monotonic() + 60
    while (
        len(list(partial.glob("unit-*.json"))) < 3 and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    while running_workers(partial) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running_workers(partial)
    again = start_builder(source, out, workers)
    printed, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert int(printed.split()[0]) >= 3
    reference = start_builder(source, tmp_path / "reference", 1)
    reference.communicate(timeout=120)
    assert snapshot(out) == snapshot(tmp_path / "reference")
    assert not partial.exists()


def test_concurrent_builders_share_one_result(tmp_path):
    source, out = write_files(tmp_path / "in", TEXTS * 2), tmp_path / "out"
    processes = [start_builder(source, out, 1) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert sorted(int(printed.split()[1]) > 0 for printed, _ in results) == [False, False, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert sorted(documents(out, "train") + documents(out, "holdout")) == sorted(TEXTS * 2)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at open files in /proc")
def test_who_waits_goes_on_where_a_killed_builder_was(tmp_path, monkeypatch):
    source, out = write_files(tmp_path / "in", TEXTS * 3), tmp_path / "out"
    partial = tmp_path / "out.partial"
    first = start_builder(source, out, 1)
    deadline = time.monotonic() + 60
    while len(list(partial.glob("unit-*.json"))) < 3:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # it holds the lock as long as the second one needs to start
    waiting = start_builder(source, out, 1)
    while str(partial / ".lock") not in open_files(waiting.pid):
        assert time.monotonic() < deadline and waiting.poll() is None
        time.sleep(0.01)
    assert not out.exists()
    first.kill()
    first.communicate()
    printed, errors = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, errors
    assert int(printed.split()[0]) >= 3
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 400)
    make(source, tmp_path / "reference", holdout=0.25)
    assert snapshot(out) == snapshot(tmp_path / "reference")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "reference"]


def open_files(pid):
    found = []
    with suppress(OSError):
        for handle in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{handle}"))
    return found


def test_without_file_locks_the_second_result_is_discarded(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    source, out = write_files(tmp_path / "in", TEXTS), tmp_path / "out"
    publish = build_module._publish

    def publish_late(job, manifest, target):
        if not out.exists():  # another builder finishes between our last shard and our rename
            monkeypatch.setattr(build_module, "_publish", publish)
            monkeypatch.setattr(lock.os, "getpid", lambda: 1)
            make(source, out)
        publish(job, manifest, target)

    monkeypatch.setattr(build_module, "_publish", publish_late)
    make(source, out)
    assert len(documents(out, "train")) + len(documents(out, "holdout")) == len(TEXTS)
    assert not list(tmp_path.glob("out.partial*/*"))


def test_finished_folder_is_reused_and_a_foreign_one_refused(tmp_path):
    source, out = write_files(tmp_path / "in", TEXTS), tmp_path / "out"
    assert make(source, out).seconds > 0
    assert make(source, out).seconds == 0
    with pytest.raises(UserError, match="holds something else"):
        make(source, out, holdout=0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        make(source, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    make(source, tmp_path / "empty")
    assert len(documents(tmp_path / "empty", "train")) > 100


def test_nothing_usable_is_one_line_and_leaves_nothing(tmp_path):
    source = write_files(tmp_path / "in", [])
    (source / "a.bin").write_bytes(b"\xff\xfe")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"no document could be read \(1 not UTF-8\)"):
            make(source, tmp_path / "out", workers=workers)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, workers):
    """A file-size limit stands in for the full disk: the system refuses a write in the middle of a shard."""
    write_files(tmp_path / "in", ["long text\n" * 20_000, *TEXTS, "more text\n" * 20_000])
    code = f"""
        import resource, sys
        from pathlib import Path
        from hlat.data import sources
        from hlat.data.build import build
        from hlat.data.tokenizer import load_tokenizer
        from hlat.errors import UserError
        sources.UNIT_BYTES_MIN = 5000
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        source = sources.resolve_source(path="in")
        try:
            build([source], load_tokenizer("bytes"), Path("out"), holdout=0.1, workers={workers})
        except UserError as error:
            print(error.line())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "cannot write tokens (File too large)" in done.stdout and not done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_no_space_while_closing_a_shard(tmp_path, monkeypatch):
    def full(stream):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "_sync_and_close", full)
    with pytest.raises(
        UserError, match=r"out.*: cannot write tokens \(No space left on device\); free space"
    ):
        make(write_files(tmp_path / "in", TEXTS), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write tokens"):
        make(write_files(tmp_path / "in", TEXTS), tmp_path / "file" / "out")


def test_a_dead_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 1500)
    monkeypatch.setattr(build_module.pool, "_start", lambda *a: subprocess.Popen(
        [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ))  # fmt: skip
    with pytest.raises(RuntimeError, match="ended with status -9"):
        make(write_files(tmp_path / "in", TEXTS), tmp_path / "out", workers=2)


def damage_shorter(folder):
    with open(next(folder.glob("train-*.bin")), "r+b") as stream:
        stream.truncate(100)


def damage_missing(folder):
    next(folder.glob("holdout-*.docs")).unlink()


def damage_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-40])


def damage_counts(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"]["train"][0]["tokens"] += 1
    path.write_text(json.dumps(manifest))


def damage_name(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("train-00000", "../train-00000"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_shorter, r"train-00000\.bin: shard has 100 bytes instead of"),
        (damage_missing, r"holdout-00000\.docs: shard is missing"),
        (damage_manifest, "not a manifest of tokens"),
        (damage_counts, r"train-00000\.bin: shard has"),
        (damage_name, "outside the folder"),
    ],
)
def test_damage_is_found_on_opening(tmp_path, damage, message):
    folder = make(write_files(tmp_path / "in", TEXTS), tmp_path / "out").folder
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        TokenFolder(folder)
    assert "hlat data tokenize" in caught.value.line()


def test_changed_content_is_found_by_verification(tmp_path):
    folder = make(write_files(tmp_path / "in", TEXTS), tmp_path / "out").folder
    path = next(folder.glob("train-*.bin"))
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    [bad] = verify(folder)
    assert bad.file == path.name and "sha256" in bad.reason


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    folder = make(write_files(tmp_path / "in", TEXTS), tmp_path / "out").folder
    other = load_tokenizer("bytes")
    other.identity, other.vocab_size = "0" * 64, 300
    with pytest.raises(
        UserError, match=r"manifest\.json: .*another tokenizer \(vocabulary 257\) than .*\(vocabulary 300\)"
    ):
        Data([TokenFolder(folder)], [1.0], other, seq_len=8, document_mask=False, seed=0)


def test_numbers_are_as_small_as_the_vocabulary_allows():
    assert [token_dtype(n).itemsize for n in (257, 2**16, 2**16 + 1)] == [2, 2, 4]


texts_lists = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40),
    min_size=2,
    max_size=12,
)


@given(texts_lists, st.integers(1, 24), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_documents_to_stream_to_rows_and_back(tmp_path_factory, texts, seq_len, seed):
    """Random documents come back whole from the rows of one epoch, sorted by their place in the stream."""
    folder = tmp_path_factory.mktemp("round")
    make(write_files(folder / "in", texts), folder / "out", holdout=0.0)
    if len(b"".join(t.encode() for t in texts)) + len(texts) < seq_len:
        return
    data = Data([TokenFolder(folder / "out")], [1.0], BYTES, seq_len=seq_len, document_mask=True, seed=seed)
    source = data.train.sources[0]
    rows = {source.start(k): data.train.row(k)[0] for k in range(source.windows)}
    stream = np.concatenate([rows[place][:-1] for place in sorted(rows)])
    expected = np.concatenate([[*text.encode(), 256] for text in texts])[: len(stream)]
    np.testing.assert_array_equal(stream, expected)
    assert len(expected) == len(stream) == source.tokens - source.dropped_per_epoch
    for row in rows.values():  # no target crosses a document border
        batch = make_batch(row[None], 256, True)
        assert (batch.targets[batch.ids == 256] == -100).all()
