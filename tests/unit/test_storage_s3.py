"""`checkpoint.remote` against a real S3 server on loopback: save, resume, retention, any kind of trouble."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hlat.checkpoint import uploader
from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main
from hlat.recipe import load
from hlat.storage import remote as storage
from hlat.storage.journal import Journal
from hlat.storage.remote import Remote, StoreError
from hlat.train import loop, remote

pytest.importorskip("s3fs")
pytest.importorskip("moto")
_spec = importlib.util.spec_from_file_location("store_server", Path(__file__).with_name("store_server.py"))
assert _spec is not None and _spec.loader is not None
store_server = importlib.util.module_from_spec(_spec)
sys.modules["store_server"] = store_server
_spec.loader.exec_module(store_server)

RECIPE = """
run: {name: small, steps: 12, seed: 3}
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 32}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 4, global_batch: 4, holdout: 0.2}
schedule: {name: constant}
checkpoint: {every: 4, keep: 2, async: false, remote: "s3://bucket/runs", patience: 60}
log: {every: 1}
compile: false
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    server = store_server.Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.die()


@pytest.fixture
def proxy(server: Any) -> Iterator[Any]:
    proxy = store_server.Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any, proxy: Any) -> Path:
    """A working directory with a recipe and text, an empty bucket behind a proxy, and short pauses."""
    monkeypatch.chdir(tmp_path)
    for name, value in server.environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(uploader, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(remote, "_PAUSES", (0.1, 0.5))
    (tmp_path / "text").mkdir()
    for number, row in enumerate(np.random.default_rng(0).choice(["ab", "cd", "ef"], size=(40, 100))):
        (tmp_path / "text" / f"{number:02}.txt").write_text(" ".join(row))
    (tmp_path / "small.yaml").write_text(RECIPE)
    store = Remote("s3://bucket/runs")
    for name in {path.partition("/")[0] for path in store.files()}:
        store.delete(name, "complete.json")
    return tmp_path


def train(*overrides: str) -> int:
    return main(["train", "small.yaml", *overrides])


def rows(folder: str, kind: str = "train") -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(folder: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(folder)]


def same_state(a: str, b: str) -> bool:
    one, two = open_checkpoint(a), open_checkpoint(b)
    assert one.step == two.step and one.names() == two.names()
    return all(torch.equal(one.read(name), two.read(name)) for name in one.names())


def stored(name: str = "small") -> dict[int, str]:
    """Step -> folder of what has a marker in the store."""
    files = Remote(f"s3://bucket/runs/{name}").files()
    found = [path.partition("/")[0] for path in files if path.endswith("/complete.json")]
    return {int(folder.split("-")[1]): folder for folder in sorted(found)}


def whole() -> None:
    """The same run without a store, undisturbed, in the folder `whole`."""
    assert train("run.dir=whole", "checkpoint.remote=null") == 0


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls something before the step after so many."""
    step, calls = loop.train_step, {}

    def with_calls(run: Any) -> Any:
        calls.get(run.step, lambda: None)()
        return step(run)

    monkeypatch.setattr(loop, "train_step", with_calls)
    return calls


def keeping_up(at_step: Any) -> None:
    """Let the store have each checkpoint before training goes on (else it may skip some)."""
    for step in (4, 8):
        at_step[step] = lambda step=step: until(lambda: step in stored())


def until(true: Any) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_saved_kept_and_continued_on_an_empty_disk(place: Path, at_step: Any, capsys) -> None:
    whole()
    keeping_up(at_step)
    assert train("run.stop_at_step=9") == 0
    assert sorted(stored()) == [8, 9], "retention as on the disk"
    uploads = [
        (row["step"], row["error"]) for row in rows("runs/small", "storage") if row["what"] == "upload"
    ]
    assert uploads[-1] == (9, None) and all(row["bytes"] > 1e5 for row in rows("runs/small", "storage")[-1:])
    shutil.rmtree("runs")  # the node is lost
    at_step.clear()
    capsys.readouterr()
    assert train() == 0
    assert "checkpoint of step 9 fetched from s3://bucket/runs/small" in capsys.readouterr().out
    assert losses("runs/small") == losses("whole"), "its metrics came back as well"
    assert same_state("runs/small", "whole") and sorted(stored()) == [9, 12]
    for file in Path("runs").rglob("*"):
        assert not file.is_file() or b"very-secret-key" not in file.read_bytes(), file
    assert "very-secret-key" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_permanent_checkpoint_stays_in_the_store(place: Path, at_step: Any) -> None:
    keeping_up(at_step)
    assert train("checkpoint.permanent_every_tokens=512", "checkpoint.keep=1") == 0
    local = sorted(int(path.name.split("-")[1]) for path in Path("runs/small/checkpoints").iterdir())
    assert local == [4, 8, 12] and sorted(stored()) == [4, 8, 12]
    at_step.clear()
    assert train("run.dir=other", "run.name=other", "checkpoint.keep=1") == 0
    assert sorted(stored("other")) == [12]


@pytest.mark.slow
def test_the_newer_of_disk_and_store_is_used(place: Path) -> None:
    whole()
    assert train("run.stop_at_step=4") == 0
    shutil.copytree("runs/small", "old")
    assert train("run.stop_at_step=8") == 0
    shutil.rmtree("runs/small")
    shutil.move("old", "runs/small")  # a node that was away comes back with an older state
    assert train() == 0
    assert losses("runs/small") == losses("whole") and same_state("runs/small", "whole")
    assert train("checkpoint.remote=null", "run.dir=mine", "run.stop_at_step=8") == 0
    assert train("run.dir=mine") == 0, "the store has step 12, the disk 8 of the same run"
    fetched = [row["step"] for row in rows("mine", "storage") if row["what"] == "fetch"]
    assert fetched[-1] == 12 and rows("mine")[-1]["step"] == 12


def damage(name: str) -> None:
    """Change one byte of a data file in the store."""
    store = Remote("s3://bucket/runs/small")
    path = f"{name}/data-00000.safetensors"
    data = bytearray(store.read(path))
    data[-1] ^= 1
    store.write(path, bytes(data))


@pytest.mark.slow
def test_a_damaged_object_is_skipped_and_replaced_later(place: Path, at_step: Any, capsys) -> None:
    whole()
    keeping_up(at_step)
    assert train("run.stop_at_step=9") == 0
    damage(stored()[9])
    shutil.rmtree("runs")
    at_step.clear()
    assert train() == 0
    out = capsys.readouterr().out
    assert "skipped checkpoint s3://bucket/runs/small/step-00000009" in out and "is damaged" in out
    assert "checkpoint of step 8 fetched" in out
    assert same_state("runs/small", "whole") and losses("runs/small") == losses("whole")
    assert max(stored()) == 12


@pytest.mark.slow
def test_a_damaged_disk_is_mended_from_the_store(place: Path, capsys) -> None:
    whole()
    assert train("run.stop_at_step=9") == 0
    victim = Path("runs/small/checkpoints/step-00000009/data-00000.safetensors")
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert train() == 0
    assert "checkpoint of step 9 fetched" in capsys.readouterr().out
    assert same_state("runs/small", "whole")


@pytest.mark.slow
def test_a_store_that_dies_in_the_middle_of_an_upload(
    place: Path, server: Any, proxy: Any, at_step: Any, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The server is killed while step 4 is on its way and comes back, empty, at step 10, which comes when an
    upload has failed.
    """
    whole()
    proxy.delay = 0.3

    def die() -> None:
        end = time.monotonic() + 30
        while not any(method == "PUT" and "data-" in path for method, path in proxy.seen):
            assert time.monotonic() < end
            time.sleep(0.01)
        server.die()
        proxy.delay = 0.0

    def come_back() -> None:
        until(lambda: failures)
        server.start()

    failures, failed = [], Journal.failed
    monkeypatch.setattr(Journal, "failed", lambda self, *a, **k: (failures.append(a), failed(self, *a, **k)))
    proxy.seen.clear()
    at_step[4], at_step[10] = die, come_back
    assert train() == 0
    out = capsys.readouterr().out
    assert "was not uploaded" in out and "the trouble is over" in out
    assert losses("runs/small") == losses("whole") and same_state("runs/small", "whole")
    during = [row["step_seconds"] for row in rows("runs/small") if 5 < row["step"] < 10]
    assert max(during) < 1.0, "training does not wait"
    assert max(stored()) == 12, "it arrives later"
    told = [row for row in rows("runs/small", "storage") if row["what"] == "upload" and row["error"]]
    assert told and told[0]["step"] == 4
    shutil.rmtree("runs")
    assert train() == 0 and same_state("runs/small", "whole")


def test_a_store_that_answers_with_errors(place: Path, proxy: Any, at_step: Any, capsys) -> None:
    """Every third request fails, then all, then none."""
    whole()
    count = iter(range(1 << 30))

    def some() -> None:
        proxy.fail = lambda method, path: next(count) % 3 == 0

    def all_() -> None:
        proxy.fail = lambda method, path: True

    def none() -> None:
        proxy.fail = lambda method, path: False

    at_step.update({2: some, 6: all_, 11: none})
    assert train() == 0
    assert same_state("runs/small", "whole") and max(stored()) == 12
    out = capsys.readouterr().out
    assert out.count("was not uploaded") <= 2, "once per kind, not per attempt"


@pytest.mark.slow
def test_a_store_that_is_away_at_the_end(place: Path, server: Any, proxy: Any, at_step: Any, capsys) -> None:
    keeping_up(at_step)
    at_step[10] = lambda: setattr(proxy, "fail", lambda method, path: True)
    assert train("checkpoint.patience=3") == 74
    error = capsys.readouterr().err
    assert error.count("hlat: error:") == 1 and "Traceback" not in error
    # Whether an attempt has failed by then, and of which step, depends on how fast the machine is.
    assert "the last checkpoint is safe in" in error and "but not in the store after 3 s" in error, error
    assert "start again to go on with the upload" in error, error
    assert open_checkpoint("runs/small").step == 12
    proxy.fail = lambda method, path: False
    assert train() == 0, "the same command goes on with the upload"
    assert max(stored()) == 12


def test_a_store_that_is_away_at_the_start(place: Path, server: Any, proxy: Any, capsys) -> None:
    proxy.fail = lambda method, path: True
    assert train("checkpoint.patience=1") == 74
    assert "the store did not answer for 1 s" in capsys.readouterr().err
    assert not Path("runs").exists()
    proxy.fail = lambda method, path: False
    assert train("checkpoint.remote=s3://no-such-bucket/runs") == 2
    assert "bucket does not exist" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("size", [0, 1000, 5 << 20, 23 << 20])
def test_s3_names_the_checksum_of_an_upload_in_one_piece_or_in_parts(
    place: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Parts of 6 MiB here, so the largest file has four; nothing is read back unless the name is another."""
    monkeypatch.setattr(storage, "PART", 6 << 20)
    store, file = Remote("s3://bucket/runs/parts"), place / "file"
    file.write_bytes(np.random.default_rng(size).bytes(size))
    back: list[str] = []
    digest = Remote._digest
    monkeypatch.setattr(Remote, "_digest", lambda self, *a: (back.append("read"), digest(self, *a))[1])
    assert store.upload(file, "file") == size and not back
    store.download("file", place / "copy")
    assert (place / "copy").read_bytes() == file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_s3_tag", lambda *args: "of an encrypted object")
        assert store.same(file, "file") and back
    if size:
        file.write_bytes(bytes(size))
        assert not store.same(file, "file")


def test_a_folder_in_s3_is_deleted_by_its_exact_name(place: Path) -> None:
    everything, names = Remote("s3://bucket/runs"), ("a[1]b", "a1b", "a*", "run", "run2", "a%20+", "a +")
    for name in names:
        everything.write(f"{name}/step-1/data", b"x")
    for name in ("a[1]b", "a*", "run", "a%20+"):
        run = Remote(f"s3://bucket/runs/{name}")
        assert run.files() == {"step-1/data": 1}
        run.delete("step-1", "complete.json")
        assert run.files() == {}
    assert set(everything.files()) == {f"{name}/step-1/data" for name in ("a1b", "run2", "a +")}


@pytest.mark.slow
def test_more_objects_than_s3_names_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Remote("s3://bucket/runs/many")
    store._fs.pipe({store.at(f"step-1/data-{number:05}"): b"" for number in range(1005)})
    store.write("step-10/data", b"")
    assert len(store.files("step-1")) == 1005
    store.delete("step-1", "data-00007")
    assert store.files() == {"step-10/data": 0}
    denied = {
        "Errors": [{"Key": "runs/many/step-10/data", "Code": "AccessDenied", "Message": "Access Denied"}]
    }
    answer = store._fs.call_s3
    monkeypatch.setattr(
        store._fs,
        "call_s3",
        lambda name, **words: denied if name == "delete_objects" else answer(name, **words),
    )
    with pytest.raises(StoreError, match="1 of 1 objects: AccessDenied") as caught:
        store.delete("step-10", "complete.json")
    assert caught.value.lasting


def test_another_run_is_not_continued(place: Path, capsys) -> None:
    assert train("run.stop_at_step=4") == 0
    assert train("run.dir=other", "run.seed=4") == 2
    assert "run.seed was 3" in capsys.readouterr().err and not Path("other").exists()
    assert train("run.dir=other", "run.resume=never") == 2
    assert "run.resume is never" in capsys.readouterr().err


@pytest.mark.slow
def test_what_killed_processes_left_is_cleaned_up(place: Path) -> None:
    assert train("run.stop_at_step=4") == 0
    store, data = Remote("s3://bucket/runs/small"), open_checkpoint("runs/small").meta["data_fingerprint"]
    remote.open_mirror(load("small.yaml"), place, data=data)._mark("step-00000003-0123456789ab")
    store.write("step-00000003-0123456789ab/data-00000.safetensors", b"half")
    elsewhere = {"Bucket": "bucket", "Key": "runs/small/step-00000005-0123456789ab/meta.json"}
    store._fs.call_s3("create_multipart_upload", **elsewhere)
    begun = {"Bucket": "bucket", "Key": "runs/small/step-00000003-0123456789ab/data-00001.safetensors"}
    store._fs.call_s3("create_multipart_upload", **begun)
    assert train() == 0
    assert not [path for path in store.files() if path.startswith("step-00000003")]
    assert store.abort_uploads() == 1, "that of somebody else is left"
