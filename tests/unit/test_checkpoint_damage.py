"""A damaged or partial newest checkpoint is reported, and the one before it is used."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hlat.checkpoint import folder
from hlat.checkpoint.codec import seal
from hlat.checkpoint.store import CheckpointStore, open_checkpoint
from hlat.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "model/a": torch.full((50, 7), float(step)),
        "optim/b": torch.arange(40) + step,
        "c": torch.tensor(step),
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20 and 30."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=5)
    (tmp_path / "tokenizer.json").write_text("{}")
    for step in (10, 20, 30):
        store.save(step, tensors(step), {"note": "x"}, tokens=step, tokenizer=tmp_path / "tokenizer.json")
    return tmp_path / "checkpoints"


def newest(root: Path) -> tuple[int | None, list[str]]:
    """Step found, after loading and comparing all of it, and the warnings."""
    warnings: list[str] = []
    checkpoint = CheckpointStore(root, keep=5, warn=warnings.append).newest()
    if checkpoint is None:
        return None, warnings
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    checkpoint.load_into(targets)
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors(checkpoint.step).items())
    return checkpoint.step, warnings


def test_intact(root: Path) -> None:
    assert newest(root) == (30, [])


FILES = ["complete.json", "index.json", "meta.json", "data-00000.safetensors", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_is_noticed(root: Path, name: str) -> None:
    path = root / "step-00000030" / name
    good = path.read_bytes()
    places = range(len(good)) if len(good) < 100 else random.Random(name).sample(range(len(good)), 40)
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 0x11
        path.write_bytes(bad)
        step, warnings = newest(root)
        assert step == 20 and len(warnings) == 1, f"byte {place}"
        assert (
            "step-00000030" in warnings[0] and name.split("/")[0] in warnings[0] and "step 20" in warnings[0]
        )
    path.write_bytes(good)
    assert newest(root) == (30, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer"])
def test_missing_and_truncated_files_are_noticed(root: Path, name: str, damage: str) -> None:
    path = root / "step-00000030" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "longer": data + b"x"}[damage])
    step, warnings = newest(root)
    assert step == 20 and len(warnings) == 1 and "step-00000030" in warnings[0]
    found = open_checkpoint(root)
    assert found.step == 20


def test_several_bad_ones_are_each_reported(root: Path) -> None:
    (root / "step-00000030" / "complete.json").unlink()
    (root / "step-00000020" / "index.json").write_text("{}")
    shutil.rmtree(root / "step-00000010" / "tokenizer")
    step, warnings = newest(root)
    assert step is None and len(warnings) == 3
    assert [
        "step-00000030" in warnings[0],
        "step-00000020" in warnings[1],
        "step-00000010" in warnings[2],
    ] == [True] * 3
    assert "complete.json is missing" in warnings[0] and "index.json" in warnings[1]
    with pytest.raises(UserError, match="no checkpoint here can be used .*step 10: .*step 20: .*step 30: "):
        open_checkpoint(root)


def test_an_old_bad_one_is_not_worth_a_word(root: Path) -> None:
    (root / "step-00000010" / "complete.json").unlink()
    assert newest(root) == (30, [])


def test_damage_found_while_reading_names_file_and_tensor(root: Path) -> None:
    path = root / "step-00000030" / "data-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    checkpoint = open_checkpoint(root / "step-00000030")
    with pytest.raises(UserError, match=r"data-00000.safetensors is damaged: 'model/a'.*earlier checkpoint"):
        checkpoint.load_into({name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()})
    with pytest.raises(UserError, match="'model/a' does not match"):
        checkpoint.read("model/a")
    assert torch.equal(checkpoint.read("optim/b"), tensors(30)["optim/b"]), "the rest can still be read"


def test_naming_a_bad_step_is_an_error(root: Path) -> None:
    (root / "step-00000030" / "complete.json").unlink()
    with pytest.raises(UserError, match="step-00000030: it is not complete: complete.json is missing"):
        open_checkpoint(root / "step-00000030")


def test_a_newer_format_is_not_guessed_at(root: Path) -> None:
    marker = root / "step-00000030" / "complete.json"
    body = {name: value for name, value in json.loads(marker.read_bytes()).items() if name != "checksum"}
    marker.write_bytes(seal({**body, "format": 2}))
    assert newest(root)[0] == 20 and "its format is 2" in newest(root)[1][0]


@pytest.mark.parametrize("name", ["../step-00000020/meta.json", "/etc/hostname"])
def test_a_marker_cannot_lead_outside(root: Path, name: str) -> None:
    marker = root / "step-00000030" / "complete.json"
    body = {key: value for key, value in json.loads(marker.read_bytes()).items() if key != "checksum"}
    body["files"][name] = {"bytes": 1}
    marker.write_bytes(seal(body))
    with pytest.raises(UserError, match="outside the checkpoint"):
        open_checkpoint(root / "step-00000030")


def break_chunk(change: Callable[[dict], None]) -> Callable[[dict], None]:
    return lambda index: change(index["tensors"]["model/a"]["chunks"][0])


@pytest.mark.parametrize(
    "change",
    [
        break_chunk(lambda chunk: chunk.update(file="../../secret.safetensors")),
        break_chunk(lambda chunk: chunk.update(file="meta.json")),
        break_chunk(lambda chunk: chunk.update(shape=[49, 7])),
        break_chunk(lambda chunk: chunk.update(shape=[-50, -7])),
        break_chunk(lambda chunk: chunk.update(offset=[1, 0])),
        break_chunk(lambda chunk: chunk.update(start=-5)),
        break_chunk(lambda chunk: chunk.update(start="5")),
        lambda index: index["tensors"]["model/a"].update(dtype="PICKLE"),
        lambda index: index["tensors"]["model/a"].update(chunks=[]),
        lambda index: index.pop("headers"),
    ],
)
def test_an_index_that_lies_is_refused(root: Path, change: Callable[[dict], None]) -> None:
    """Even with correct checksums, that is by somebody's intent: one clear line, no other file is touched."""
    step = root / "step-00000030"
    index = json.loads((step / "index.json").read_bytes())
    change(index)
    (step / "index.json").unlink()
    body = {
        key: value
        for key, value in json.loads((step / "complete.json").read_bytes()).items()
        if key != "checksum"
    }
    body["files"]["index.json"] = folder.write_bytes(step / "index.json", json.dumps(index).encode())
    (step / "complete.json").write_bytes(seal(body))
    with pytest.raises(UserError, match=r"index\.json"):
        open_checkpoint(step)


# -- what killed processes leave


def leave(root: Path, kind: str, pid: int, owner: str, age: float = 0.0) -> Path:
    path = root / f".step-00000040.{kind}-{pid}-node{owner}"
    path.mkdir()
    (path / "data-00000.safetensors").write_bytes(b"half")
    for item in (path / "data-00000.safetensors", path):
        then = item.stat().st_mtime - age
        os.utime(item, (then, then))
    return path


DEAD = 2**22 + 1  # above the largest process number
PARENT = folder._process_id(os.getppid())
SPACE = PARENT.partition("-")[0]


@pytest.mark.parametrize(
    ("pid", "owner", "age", "goes"),
    [
        (DEAD, f"~{SPACE}-1", 0, True),
        (os.getppid(), f"~{PARENT}", 3600, False),  # somebody is writing it
        (os.getppid(), f"~{SPACE}-1", 0, True),  # a new process with the old number
        (os.getpid(), f"~{folder._process_id(os.getpid())}", 0, True),  # ours, but not by us
        (os.getppid(), "~00000000-1", 60, False),  # the same number in another container means nothing
        (os.getppid(), "~00000000-1", 3600, True),
        (DEAD, "", 60, False),  # of a former version
        (DEAD, "", 3600, True),
    ],
    # Names of their own: process numbers differ between the workers of a parallel test run.
    ids=["dead", "living", "reused", "ours", "elsewhere", "elsewhere, old", "former", "former, old"],
)
@pytest.mark.parametrize("kind", ["partial", "deleted"])
def test_leftovers_of_dead_processes_are_removed(
    root: Path, kind: str, pid: int, owner: str, age: float, goes: bool
) -> None:
    path = leave(root, kind, pid, owner, age)
    warnings: list[str] = []
    CheckpointStore(root, keep=1, warn=warnings.append)
    assert path.exists() != goes
    assert [str(path) in line for line in warnings] == ([True] if goes and kind == "partial" else [])


def test_another_store_leaves_a_save_in_progress_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(root, keep=5)
    seal_folder = folder.seal_folder

    def meanwhile(*args, **kwargs):
        CheckpointStore(root, keep=5)
        return seal_folder(*args, **kwargs)

    monkeypatch.setattr(folder, "seal_folder", meanwhile)
    store.save(40, tensors(40), {}, tokens=40)
    assert newest(root) == (40, [])


def test_other_files_are_left_alone(root: Path) -> None:
    for name in (".keep", "notes.txt", ".step-00000040.partial-x"):
        (root / name).write_text("")
    (root / "step-backup").mkdir()
    store = CheckpointStore(root, keep=1)
    store.save(40, tensors(40), {}, tokens=40)
    assert sorted(os.listdir(root)) == sorted(
        [".keep", ".step-00000040.partial-x", "notes.txt", "step-00000040", "step-backup"]
    )


def test_the_marker_of_another_step_does_not_hide_a_checkpoint(root: Path) -> None:
    shutil.copy(root / "step-00000020/complete.json", root / "step-00000030/complete.json")
    step, warnings = newest(root)
    assert step == 20 and len(warnings) == 1 and "complete.json is that of step 20" in warnings[0]
    with pytest.raises(UserError, match="that of step 20"):
        open_checkpoint(root / "step-00000030")
