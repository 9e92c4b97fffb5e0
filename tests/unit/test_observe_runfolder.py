"""The run folder: made only when training starts, one process at a time, no secrets in it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hlat import process
from hlat.errors import SaveFailed, UserError
from hlat.observe import environment, lock
from hlat.observe.lock import Holder, judge
from hlat.observe.runfolder import RunFolder

FACTS = {"host": "here"}


def test_start_writes_everything_and_keeps_the_recipe_verbatim(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a").start(
        "# mine\nrun: {}\n", "run: {seed: 1}\n", description=FACTS
    )
    assert folder.recipe.read_text() == "# mine\nrun: {}\n"
    assert folder.resolved.read_text() == "run: {seed: 1}\n"
    assert json.loads(folder.environment.read_text()) == {"starts": [FACTS], "holder": folder.claim.token}
    names = {path.name for path in folder.path.iterdir()}
    assert names == {
        "recipe.yaml",
        "resolved.yaml",
        "environment.json",
        "logs",
        "checkpoints",
        ".lock",
    }
    folder.close()
    assert not (folder.path / ".lock").exists()


def test_a_second_start_appends_its_environment_and_keeps_a_changed_recipe(tmp_path):
    with RunFolder(tmp_path / "a").start("one", "r1", description={"n": 1}):
        pass
    with RunFolder(tmp_path / "a").start("one", "r2", description={"n": 2}) as folder:
        assert folder.starts() == [{"n": 1}, {"n": 2}]
        assert folder.resolved.read_text() == "r2"
        assert [path.name for path in folder.logs.iterdir()] == ["resolved-until-start-1.yaml"]
        assert (folder.logs / "resolved-until-start-1.yaml").read_text() == "r1"


def test_making_the_object_or_checking_creates_nothing(tmp_path):
    RunFolder(tmp_path / "x" / "y").check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["check", "start"])
def test_a_file_in_the_way_is_a_user_error(tmp_path, method):
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="is not a folder"):
        folder.check() if method == "check" else folder.start("", "")


def test_an_unwritable_parent_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode, **_: path != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match="no permission to write"):
        RunFolder(tmp_path / "run").start("", "", description=FACTS)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_leaves_no_folder(tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hlat.observe.runfolder.replace_file", fail)
    with pytest.raises(SaveFailed, match="No space left"):
        RunFolder(tmp_path / "runs" / "a").start("", "", description=FACTS)
    assert list(tmp_path.iterdir()) == []


def test_abandon_removes_only_what_this_start_made_and_only_untrained(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a").start("", "", description=FACTS)
    folder.abandon()
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "mine").mkdir()
    folder = RunFolder(tmp_path / "mine").start("", "", description=FACTS)
    folder.abandon()
    assert folder.recipe.exists()

    folder = RunFolder(tmp_path / "trained").start("", "", description=FACTS)
    folder.metrics.write_text('{"step":1}\n')
    folder.abandon()
    assert folder.metrics.exists()


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    script = (
        "import sys, time; from hlat.observe.lock import Lock; from pathlib import Path;"
        "Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on .* trains in this folder") as caught:
            RunFolder(tmp_path).start("", "", description=FACTS)
        assert str(tmp_path / ".lock") in caught.value.fix
        assert not (tmp_path / "recipe.yaml").exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with RunFolder(tmp_path).start("", "", description=FACTS):
        assert lock.read_holder(tmp_path / ".lock").pid == os.getpid()


def test_the_same_process_cannot_take_a_folder_twice(tmp_path):
    with (
        RunFolder(tmp_path / "a").start("", "", description=FACTS) as first,
        pytest.raises(UserError, match="trains in this folder"),
    ):
        RunFolder(tmp_path / "a").start("", "", description=FACTS)
    assert first.recipe.exists()


def test_of_many_processes_that_find_a_stale_lock_one_takes_it(tmp_path):
    dead = dataclasses.replace(Holder.this_process(tmp_path), pid=2**22 + 1, birth="1")
    (tmp_path / ".lock").write_text(json.dumps(dataclasses.asdict(dead)))
    script = (
        "import sys; from pathlib import Path\n"
        "from hlat.errors import UserError; from hlat.observe.lock import Lock\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: Lock(Path(sys.argv[1])); print('held', flush=True)\n"
        "except UserError: print('refused', flush=True)\n"
        "sys.stdin.readline()"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for each in processes:
        each.stdout.readline()
    for each in processes:
        each.stdin.write("\n")
        each.stdin.flush()
    answers = [each.stdout.readline().strip() for each in processes]
    for each in processes:
        each.communicate("\n", timeout=30)
    assert sorted(answers) == ["held", "refused", "refused", "refused"]


def test_who_counts_as_alive(tmp_path):
    me = dataclasses.replace(Holder.this_process(tmp_path), job="", restart="0")
    other = dataclasses.replace(me, pid=os.getppid(), birth=process.birth(os.getppid()))
    fresh, stale = 10.0, lock.STALE_SECONDS + 1
    for holder, silence, alive in [
        (other, fresh, True),
        (other, stale, False),  # stopped: it does not refresh its lock, and will find out
        (other, -stale, False),  # refreshed before the clock was put back
        (dataclasses.replace(other, birth="1"), fresh, False),  # process id used again
        (dataclasses.replace(other, pid=2**22 + 1), fresh, False),
        # What cannot be compared is not dead before its time, whether such a process is here or not.
        (dataclasses.replace(other, boot="another machine of that name"), fresh, None),
        (dataclasses.replace(other, namespace="pid:[1]", pid=2**22 + 1), fresh, None),
        (dataclasses.replace(other, namespace="pid:[1]"), stale, False),
        (dataclasses.replace(other, birth="", pid=2**22 + 1), fresh, None),
        (dataclasses.replace(other, host="another name of this machine"), fresh, True),
        (dataclasses.replace(other, inode=1), fresh, True),  # differs from client to client
    ]:
        assert judge(holder, me, silence) is alive, holder
    away = dataclasses.replace(other, boot="b", job="7", restart="1")
    for job, restart, alive in (
        ("7", "2", False),
        ("7", "1", None),
        ("7", "0", None),
        ("8", "2", None),
        ("7", "?", None),
    ):
        assert judge(away, dataclasses.replace(me, job=job, restart=restart), fresh) is alive


def test_a_held_lock_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.01)
    held = lock.Lock(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / ".lock").stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / ".lock").stat().st_mtime > 0
    held.release()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_lock_or_history_does_not_stop_a_run(tmp_path):
    (tmp_path / ".lock").write_text("{")
    (tmp_path / "environment.json").write_text("[1, 2")
    with RunFolder(tmp_path).start("", "", description=FACTS) as folder:
        assert folder.starts() == [FACTS]


def test_variables_hold_no_secret():
    given = {
        "NEURON_CC_FLAGS": "--model-type transformer",
        "NEURON_API_KEY": "a",
        "XLA_AUTH_TOKEN": "b",
        "SLURM_JOB_ID": "7",
        "SLURM_JWT": "c",
        "OMP_NUM_THREADS": "2",
        "NCCL_SECRET": "d",
        "OMP_db_password": "e",
        "NEURON_COMPILE_CACHE_URL": "https://me:pw@host/cache",
        "HOME": "/root",
        "AWS_SECRET_ACCESS_KEY": "f",
    }
    assert environment.variables(given) == {
        "NEURON_CC_FLAGS": "--model-type transformer",
        "NEURON_COMPILE_CACHE_URL": "https://host/cache",
        "OMP_NUM_THREADS": "2",
        "SLURM_JOB_ID": "7",
    }


def test_describe_is_json_and_names_versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = json.loads(json.dumps(environment.describe()))
    assert facts["versions"]["torch"]
    assert facts["git"] is None
    assert facts["threads"]["torch"] >= 1
    assert facts["cpu"]["name"]


def test_git_state_names_the_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "one")
    state = environment.git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert environment.git_state(tmp_path)["dirty"] is True


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "recipe.yaml", "resolved.yaml"])
def test_a_pipe_in_place_of_a_file_is_told_and_never_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"its {name} is a pipe, not a file"):
        RunFolder(tmp_path).check()


def test_a_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/runs/x").path == tmp_path / "runs/x"
