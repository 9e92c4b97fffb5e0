"""Saving and reading back, in one process: bits, isolation, errors, replacement."""

import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from hlat.checkpoint import codec, folder, layout
from hlat.checkpoint.store import CheckpointStore, open_checkpoint, rng_from_json, rng_to_json
from hlat.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    nan = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return {
        "model/embed.weight": torch.randn(33, 8, generator=made),
        "model/layers.0.mlp.up.weight": torch.randn(24, 8, generator=made).t(),  # not contiguous
        "optim/exp_avg/embed.weight": torch.randn(33, 8, generator=made).bfloat16(),
        "optim/step": torch.tensor(7, dtype=torch.int64),
        "optim/beta": torch.tensor(0.1, dtype=torch.float64),
        "odd/empty": torch.empty(0, 4),
        "odd/int": torch.arange(5),
        "odd/bool": torch.tensor([True, False]),
        "odd/byte": torch.arange(3, dtype=torch.uint8),
        "odd/special": nan,
    }


def same(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits (NaN included)."""
    bits = [bytes(codec.raw_bytes(t.detach().contiguous())) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and bits[0] == bits[1]


def store_at(root: Path, **options: object) -> CheckpointStore:
    return CheckpointStore(root, **{"keep": 3, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("async_", [False, True])
def test_round_trip_is_bitwise(tmp_path: Path, async_: bool) -> None:
    tensors = state()
    store = store_at(tmp_path, async_=async_)
    store.save(12, tensors, {"guard": {"skipped": 1}, "scale": math.inf}, tokens=3456)
    store.wait()
    checkpoint = store.newest()
    assert checkpoint is not None and (checkpoint.step, checkpoint.tokens) == (12, 3456)
    assert checkpoint.path == tmp_path / "step-00000012" and checkpoint.names() == sorted(tensors)
    assert checkpoint.meta["guard"] == {"skipped": 1} and checkpoint.meta["scale"] == math.inf
    assert checkpoint.meta["step"] == 12 and checkpoint.meta["tokens"] == 3456
    targets = {name: torch.full_like(t, 1).contiguous() for name, t in tensors.items()}
    checkpoint.load_into(targets)
    unchecked = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tensor.shape and checkpoint.dtype(name) == tensor.dtype
        for found in (targets[name], checkpoint.read(name), unchecked.read(name)):
            assert same(found, tensor), name


def test_targets_may_be_parameters_views_and_not_contiguous(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    store_at(tmp_path).save(1, {"a": weight, "b": weight, "c": weight}, {}, tokens=0)
    flat = torch.zeros(24)
    targets = {"a": torch.nn.Parameter(torch.zeros(6, 4)), "b": flat.view(6, 4), "c": torch.zeros(4, 6).t()}
    open_checkpoint(tmp_path).load_into(targets)
    assert all(torch.equal(target, weight) for target in targets.values()) and flat.any()


def test_training_may_go_on_while_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    write = layout.write_tensors

    def slowly(path, entries):
        go.wait(30)
        return write(path, entries)

    monkeypatch.setattr(layout, "write_tensors", slowly)
    tensors = {"a": torch.ones(1000), "view": torch.ones(10, 10).t()}
    store = store_at(tmp_path, async_=True)
    store.save(1, tensors, {}, tokens=0)
    for tensor in tensors.values():
        tensor.fill_(5.0)
    assert store.steps() == [] and not (tmp_path / "step-00000001").exists() and store.busy
    go.set()
    store.save(
        2, tensors, {}, tokens=0
    )  # waits for the first one, and does not disturb it by reusing its memory
    store.wait()
    assert not store.busy
    for step, value in ((1, 1.0), (2, 5.0)):
        assert all((open_checkpoint(tmp_path / f"step-{step:08d}").read(n) == value).all() for n in tensors)


def test_wait_returns_when_it_is_complete(tmp_path: Path) -> None:
    store = store_at(tmp_path, async_=True)
    store.save(1, {"a": torch.ones(3)}, {}, tokens=0, wait=True)
    assert store.steps() == [1]


def test_data_files_are_plain_safetensors(tmp_path: Path) -> None:
    tensors = state()
    store_at(tmp_path).save(1, tensors, {}, tokens=0)
    loaded = load_file(tmp_path / "step-00000001" / "data-00000.safetensors")
    assert loaded.keys() == tensors.keys() and all(same(loaded[n], t) for n, t in tensors.items())


def test_stock_torch_reads_it(tmp_path: Path) -> None:
    """A checkpoint of one process, through torch's own reader, without HLAT."""
    store_at(tmp_path).save(1, {"a": torch.arange(12.0).view(3, 4)}, {}, tokens=0)
    target = {"a": torch.zeros(3, 4)}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "step-00000001")))
    assert torch.equal(target["a"], torch.arange(12.0).view(3, 4))


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    tensors = state()
    for run in ("a", "b"):
        store_at(tmp_path / run).save(
            1, dict(sorted(tensors.items(), reverse=run == "a")), {"x": 1}, tokens=5
        )
    for file in folder.step_folder(tmp_path / "a", 1).iterdir():
        assert file.read_bytes() == (folder.step_folder(tmp_path / "b", 1) / file.name).read_bytes()


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    store = store_at(tmp_path)
    store.save(1, state(), {}, tokens=0)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "load", never)
    checkpoint = store.newest()
    assert checkpoint is not None
    checkpoint.load_into({name: torch.empty_like(tensor) for name, tensor in state().items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"model/embed.weigth": torch.zeros(33, 8)},
            "no tensor 'model/embed.weigth'.*embed.weight",
        ),
        (
            lambda t: t | {"odd/int": torch.zeros(6, dtype=torch.int64)},
            "'odd/int' is 5 int64, the run needs 6 int64",
        ),
        (lambda t: t | {"odd/int": torch.zeros(5)}, "'odd/int' is 5 int64, the run needs 5 float32"),
        (lambda t: {n: x for n, x in t.items() if n != "optim/step"}, "1 tensors that the run .* optim/step"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, change, message: str) -> None:
    store_at(tmp_path).save(1, state(), {}, tokens=0)
    targets = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path).load_into(change(targets))
    assert not targets["model/embed.weight"].any(), "nothing may change before the check"


def test_partial_load(tmp_path: Path) -> None:
    store_at(tmp_path).save(1, state(), {}, tokens=0)
    target = torch.zeros(33, 8)
    open_checkpoint(tmp_path).load_into({"model/embed.weight": target}, partial=True)
    assert torch.equal(target, state()["model/embed.weight"])


def test_only_json_and_tensors_are_taken(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="PosixPath"):
        store_at(tmp_path).save(1, {}, {"path": tmp_path}, tokens=0)
    with pytest.raises(TypeError, match="'step' is a int"):
        store_at(tmp_path).save(1, {"step": 3}, {}, tokens=0)  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"keep": 0}, {"permanent_every_tokens": 0}])
def test_impossible_settings_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(options))}: 0 is too small"):
        store_at(tmp_path, **options)


def test_nothing_is_created_before_the_first_save(tmp_path: Path) -> None:
    store = store_at(tmp_path / "run" / "checkpoints")
    assert store.newest() is None and store.steps() == [] and not (tmp_path / "run").exists()


# -- disk full, not writable


def fails_once_then_works(store: CheckpointStore, root: Path, repair, what: str) -> None:
    """Step 1 is complete, then the disk fails: one error, step 1 intact, no litter, and it recovers."""
    with pytest.raises(UserError, match=what) as caught:
        store.save(2, {"a": torch.ones(400_000)}, {}, tokens=0)
        store.wait()
    line = caught.value.line()
    assert "step 2 was not saved" in line and "step 1 is untouched" in line and str(root) in line
    assert sorted(os.listdir(root)) == ["step-00000001"]
    store.wait()  # the failure is told once
    found = store.newest()
    assert found is not None and found.step == 1 and (found.read("a") == 1).all()
    repair()
    store.save(2, {"a": torch.ones(400_000)}, {}, tokens=0, wait=True)
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("async_", [False, True])
@pytest.mark.parametrize("place", ["data", "index", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, async_: bool
) -> None:
    store = store_at(tmp_path, async_=async_)
    store.save(1, {"a": torch.ones(400_000)}, {}, tokens=0, wait=True)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "data": (codec, "flush_to_disk"),
        "index": (folder, "write_bytes"),
        "rename": (folder.os, "rename"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*target[place], full)
        fails_once_then_works(
            store, tmp_path, patch.undo, r"the disk is full: it takes 1\.6 MB, .* MB are free"
        )


def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(tmp_path)
    store.save(1, {"a": torch.ones(400_000)}, {}, tokens=0)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(layout, "write_tensors", lambda *args: pytest.fail("it was written"))
    with pytest.raises(UserError, match="takes 1.6 MB, 1.0 MB are free"):
        store.save(2, {"a": torch.ones(400_000)}, {}, tokens=0)


@pytest.mark.parametrize("async_", [False, True])
def test_a_really_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_: bool) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small filesystem")
    try:
        root = tmp_path / "checkpoints"
        store = store_at(root, async_=async_)
        store.save(1, {"a": torch.ones(400_000)}, {}, tokens=0, wait=True)
        usage = shutil.disk_usage(root)._replace(free=1 << 40)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)  # not told in time

            def repair() -> None:
                subprocess.run(["mount", "-o", "remount,size=9m", str(tmp_path)], check=True)

            fails_once_then_works(store, root, repair, "the disk is full")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="step 1 was not saved .Not a directory"):
        store_at(tmp_path / "file" / "checkpoints").save(1, {"a": torch.ones(2)}, {}, tokens=0)


def test_a_defect_in_the_background_stays_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(layout, "write_tensors", broken)
    store = store_at(tmp_path, async_=True)
    store.save(1, {"a": torch.ones(2)}, {}, tokens=0)
    with pytest.raises(ZeroDivisionError):
        store.save(2, {"a": torch.ones(2)}, {}, tokens=0)
    assert not list(tmp_path.iterdir())


# -- replacing, moving, finding


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    for value in (1.0, 2.0):
        store.save(5, {"a": torch.full((3,), value)}, {"value": value}, tokens=10)
    assert os.listdir(tmp_path) == ["step-00000005"]
    found = open_checkpoint(tmp_path)
    assert found.meta["value"] == 2.0 and found.read("a")[0] == 2.0


def test_an_interrupted_replacement_loses_nothing(tmp_path: Path) -> None:
    store_at(tmp_path).save(5, {"a": torch.ones(3)}, {}, tokens=10)
    hidden = tmp_path / ".step-00000005.replaced-999999999-elsewhere"
    (tmp_path / "step-00000005").rename(hidden)  # killed between the two renames
    assert open_checkpoint(tmp_path).path == hidden
    hidden.rename(folder.scratch(tmp_path / "step-00000005", "replaced"))
    assert store_at(tmp_path).steps() == [5] and os.listdir(tmp_path) == ["step-00000005"]


def test_the_new_one_counts_while_the_old_one_is_still_there(tmp_path: Path) -> None:
    for value, name in ((1.0, "old"), (2.0, "new")):
        store_at(tmp_path / name).save(5, {"a": torch.full((3,), value)}, {}, tokens=10)
    hidden = tmp_path / "new" / ".step-00000005.replaced-999999999-elsewhere"
    (tmp_path / "old" / "step-00000005").rename(hidden)  # killed after the second rename
    assert open_checkpoint(tmp_path / "new").read("a")[0] == 2.0


def test_newest_is_the_one_saved_last(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    for step in (10, 20, 15):  # went back to 10 and on to 15
        store.save(step, {"a": torch.ones(1)}, {}, tokens=step)
    found = store.newest()
    assert found is not None and found.step == 15 and store.steps() == [10, 15, 20]


def test_a_moved_run_folder_still_opens(tmp_path: Path) -> None:
    store_at(tmp_path / "old" / "checkpoints").save(3, {"a": torch.ones(1)}, {}, tokens=0)
    (tmp_path / "old").rename(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "copy")
    for run in ("new", "copy"):
        for path in (run, f"{run}/checkpoints", f"{run}/checkpoints/step-00000003"):
            assert open_checkpoint(tmp_path / path).step == 3


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="no complete checkpoint here"):
        open_checkpoint(tmp_path)


def test_the_tokenizer_travels_with_it(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_text("weights do not belong here")
    store = store_at(tmp_path / "c")
    store.save(1, {}, {}, tokens=0, tokenizer=source)
    store.save(2, {}, {}, tokens=0, tokenizer=source / "tokenizer.json")
    store.save(3, {}, {}, tokens=0)
    for step in (1, 2):
        checkpoint = open_checkpoint(folder.step_folder(tmp_path / "c", step))
        assert checkpoint.meta["tokenizer"] == "tokenizer" and checkpoint.tokenizer is not None
        assert [f.name for f in checkpoint.tokenizer.iterdir()] == ["tokenizer.json"]
    assert open_checkpoint(tmp_path / "c").tokenizer is None


def test_rng_state_survives_json() -> None:
    torch.manual_seed(11)
    torch.randn(3)
    saved = json.loads(json.dumps(rng_to_json()))
    wanted = torch.randn(5)
    torch.manual_seed(0)
    rng_from_json(saved)
    assert torch.equal(torch.randn(5), wanted)
