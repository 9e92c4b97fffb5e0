"""Remembered SHA-256: read once, never wrong, whatever becomes of the files or of what is remembered."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from hlat.errors import UserError
from hlat.storage import digests
from hlat.storage.digests import file_digest, file_digests
from hlat.storage.user_cache import cache_root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settled(monkeypatch):
    """Files count as old enough at once; each test lets the clock of the file system tick between changes."""
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1e9)


def read_bytes(*paths) -> tuple[list[str], int]:
    """Digests, and how many bytes were read for them."""
    sizes: list[int] = []
    return file_digests(paths, sizes.append), sum(sizes)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tick(folder: Path) -> None:
    """Wait until a change gets another time than those before."""
    probe = folder / ".probe"
    probe.write_bytes(b"")
    first = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == first:
        probe.chmod(0o600)
    probe.unlink()


def test_a_second_look_reads_nothing(tmp_path, settled):
    paths = [tmp_path / name for name in ("a", "b", "\udce9")]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    first, read = read_bytes(*paths, paths[0])
    assert first == [sha(path) for path in (*paths, paths[0])] and read == 3000
    assert read_bytes(*paths) == (first[:3], 0)
    (tmp_path / "c").write_bytes(b"new")
    assert read_bytes(*paths, tmp_path / "c")[1] == 3
    assert read_bytes(tmp_path / "c", *paths)[1] == 0  # what another call wrote is still there


def edit_in_place(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(b"B")
    os.utime(path, ns=(stamp, stamp))


def replace(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    other = path.with_name("other")
    other.write_bytes(b"C" * path.stat().st_size)
    os.utime(other, ns=(stamp, stamp))
    other.rename(path)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [edit_in_place, replace, grow, lambda path: path.touch()])
def test_every_change_is_read_again(tmp_path, settled, change):
    path = tmp_path / "data"
    path.write_bytes(b"A" * 1000)
    for _ in range(3):
        file_digest(path)
        tick(tmp_path)
        change(path)
        digest, read = read_bytes(path)
        assert digest == [sha(path)] and read == path.stat().st_size


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"A" * 1000)
    assert read_bytes(path)[1] == read_bytes(path)[1] == 1000
    # Two changes may fall into one tick of the clock: same size, same times, other bytes.
    file_digest(path)
    path.write_bytes(b"B" * 1000)
    assert file_digest(path) == sha(path)


def rename_over(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)


@pytest.mark.parametrize("change", [grow, edit_in_place, rename_over, Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, settled, change):
    path = tmp_path / "data"
    path.write_bytes(b"A" * (5 << 20))  # two blocks
    tick(tmp_path)
    changed = []

    def between(size: int) -> None:
        if not changed:
            changed.append(size)
            change(path)

    with pytest.raises(UserError, match=r"changed while it was read|cannot be read") as error:
        file_digests([path], between)
    assert str(path) in error.value.line()
    if path.exists():
        assert file_digest(path) == sha(path)


def test_damage_is_computed_again(tmp_path, settled):
    path = tmp_path / "data"
    path.write_bytes(b"A" * 100)
    right = file_digest(path)
    (entry,) = (cache_root() / "digests").iterdir()
    whole = entry.read_bytes()
    forged = whole.replace(right[:4].encode(), b"0000")
    damaged = [b"", b"\xff\xfe", whole[: len(whole) // 2], forged, b"[]\n{}"]
    for body in (b'{"64617461": 3}', b"[]"):  # intact, and not what this version writes
        damaged.append(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    for content in damaged:
        entry.write_bytes(content)
        assert read_bytes(path) == ([right], 100), content
        assert read_bytes(path) == ([right], 0)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, settled):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_bytes(tmp_path / "file") == ([sha(tmp_path / "file")], 0)


def test_writers_at_once(tmp_path, settled):
    paths = [tmp_path / f"{number}" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    wrong: list[object] = []

    def work(shift: int) -> None:
        for _ in range(3):
            for path in [*paths[shift:], *paths[:shift]]:
                if file_digest(path) != sha(path):
                    wrong.append(path)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(0, 20, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list((cache_root() / "digests").iterdir())) == 1  # and no temporary file is left
    file_digests(paths)
    assert read_bytes(*paths)[1] == 0


def test_what_is_missing_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        file_digest(tmp_path / "nothing")
