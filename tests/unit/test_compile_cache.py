"""Sharing a Neuron compile cache, as the compiler leaves it: whole modules only, damage, differences."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hlat.cli import main
from hlat.storage import compile_cache as shared
from hlat.storage.remote import Remote, StoreError

VERSION = "2.20.9961.0+0acef03a"
GOOD = f"neuronxcc-{VERSION}/MODULE_56f0d314fda2b6e1e336+617f6939"
OTHER = f"neuronxcc-{VERSION}/MODULE_9444fb607f27a4228c7f+39f12043"
OLD = "neuronxcc-2.15.128.0+56dc5a86/MODULE_5547afe801d40a2e9860+39f12043"
FAILED = f"neuronxcc-{VERSION}/MODULE_7a75d60ddd38ceb6f97d+39f12043"
RUNNING = f"neuronxcc-{VERSION}/MODULE_9e4456593f614fb6253c+39f12043"
RECIPE = """
run: {name: trn, steps: 20}
model: {layers: 2, hidden: 64, heads: 2, kv_heads: 2, ffn: 128, vocab: 512, max_seq_len: 64}
data: {sources: [{path: text}], micro_batch: 1, global_batch: 32}
backend: nxd
"""


def module(cache: Path, name: str, neff: bytes = b"NEFF") -> Path:
    """A folder as neuronx-cc leaves it."""
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / "compile_flags.json").write_text('["--target=trn1", "--model-type=transformer"]')
    (folder / "model.hlo_module.pb").write_bytes(name.encode() * 9)
    (folder / "model.neff").write_bytes(neff)
    (folder / "model.done").touch()
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two graphs of one compiler, one of another, one that failed and one being compiled."""
    cache = tmp_path / "cache"
    for name in (GOOD, OTHER, OLD):
        module(cache, name)
    failed = module(cache, FAILED)
    (failed / "model.neff").unlink()
    (failed / "model.log").write_text("F137")
    running = module(cache, RUNNING)
    (running / "model.done").unlink()
    (running / "model.hlo_module.pb.lock").touch()
    return cache


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def tree(cache: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    files = [file for name in names for file in (cache / name).iterdir() if file.suffix != ".lock"]
    return {str(file.relative_to(cache)): file.read_bytes() for file in files}


def test_push_pull_verify_list(
    cache: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = ["--compiler", VERSION]
    assert main(["cache", "push", url, "--cache", str(cache), *version]) == 0
    out = capsys.readouterr().out
    assert "pushed 2 graphs" in out and f"left out {FAILED}" in out and f"left out {RUNNING}" in out
    assert main(["cache", "push", url, "--cache", str(cache)]) == 0
    assert "pushed 1 graphs" in capsys.readouterr().out, "of the other compiler; the rest is there"
    node = tmp_path / "node"
    assert main(["cache", "verify", url, "--cache", str(node), *version]) == 1
    assert capsys.readouterr().out.count("missing here") == 2
    assert main(["cache", "pull", url, "--cache", str(node), *version]) == 0
    assert tree(node, (GOOD, OTHER)) == tree(cache, (GOOD, OTHER)) and not (node / OLD).exists()
    assert main(["cache", "pull", url, "--cache", str(node), *version]) == 0
    assert "pulled 0 graphs" in capsys.readouterr().out
    assert main(["cache", "verify", url, "--cache", str(node), *version]) == 0
    (node / GOOD / "model.neff").write_bytes(b"NEFX")
    module(node, f"neuronxcc-{VERSION}/MODULE_1+2")
    assert main(["cache", "verify", url, "--cache", str(node), *version]) == 1
    out = capsys.readouterr().out
    assert f"other bytes: {GOOD}" in out and "only here" in out and "MODULE_1+2" in out
    assert main(["cache", "list", url]) == 0
    assert f"neuronxcc-{VERSION}  2 graphs" in capsys.readouterr().out


def test_a_recipe_knows_its_graphs(cache: Path, url: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trn.yaml").write_text(RECIPE)
    version = ["--compiler", VERSION]
    assert main(["cache", "push", url, "trn.yaml", "--cache", str(cache), *version]) == 0
    late = tmp_path / "late"
    module(late, f"neuronxcc-{VERSION}/MODULE_77+88")
    assert main(["cache", "push", url, "--cache", str(late), *version]) == 0
    capsys.readouterr()
    for overrides, count, known in (
        (["run.steps=99", "checkpoint.every=5", "data.sources=[{path: elsewhere}]"], 2, True),
        (["model.layers=4"], 3, False),
        (["data.micro_batch=2"], 3, False),
    ):
        node = tmp_path / f"node-{overrides[0]}"
        assert main(["cache", "pull", url, "trn.yaml", *overrides, "--cache", str(node), *version]) == 0
        out = capsys.readouterr().out
        assert f"pulled {count} graphs" in out and ("does not know this recipe" in out) is not known
    monkeypatch.setenv("NODES", "4")
    assert main(["cache", "pull", url, "trn.yaml", "--cache", str(tmp_path / "four"), *version]) == 0
    assert "does not know this recipe" in capsys.readouterr().out


def test_a_failed_compilation_gives_way_and_a_half_push_is_invisible(
    cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, node = Remote(url), tmp_path / "node"
    failed = module(node, GOOD)
    (failed / "model.neff").unlink()
    upload, sent = Remote.upload, []

    def cut(self: Remote, file: Path, path: str) -> int:
        if len(sent) == 2:
            raise StoreError("cut off")
        sent.append(path)
        return upload(self, file, path)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "upload", cut)
        with pytest.raises(StoreError):
            shared.push(remote, cache)
    assert shared.stored_modules(remote) == []
    shared.push(remote, cache, say=lambda line: None)
    assert shared.pull(remote, node, [GOOD])[0] == 1
    assert tree(node, (GOOD,)) == tree(cache, (GOOD,))
    (node / GOOD / "model.done").unlink()
    (node / GOOD).rename(tmp_path / "elsewhere")  # a folder that is kept on another disk
    (node / GOOD).symlink_to(tmp_path / "elsewhere")
    assert shared.pull(remote, node, [GOOD])[0] == 1 and (node / GOOD).is_symlink()
    assert (node / GOOD / "model.done").is_file()


def test_damage_and_names_that_lead_elsewhere_are_refused(
    cache: Path, url: str, tmp_path: Path, capsys
) -> None:
    remote, node = Remote(url), tmp_path / "node"
    shared.push(remote, cache, say=lambda line: None)
    remote.write(f"{GOOD}/model.neff", b"NEFX")
    arguments = ["--cache", str(node), "--compiler", VERSION]
    assert main(["cache", "pull", url, *arguments]) == 2
    assert "model.neff: does not match its sha256" in capsys.readouterr().err
    assert not (node / GOOD).exists() and not list(node.rglob("*.partial"))
    marker = json.loads(remote.read(f"{OTHER}/{shared.MARKER}"))
    marker["files"]["../../../evil"] = {"bytes": 1, "sha256": "0"}
    remote.write(f"{OTHER}/{shared.MARKER}", json.dumps(marker).encode())
    remote.write(f"sets/{'0' * 24}.json", json.dumps({"modules": ["../../evil", OTHER]}).encode())
    assert shared.wanted(remote, "", "0" * 24) == ([OTHER], True)
    assert main(["cache", "pull", url, *arguments]) == 2
    assert not list(tmp_path.rglob("evil*"))


def test_processes_of_a_node_pull_once(
    cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.push(Remote(url), cache, say=lambda line: None)
    download, seen = Remote.download, []

    def counted(self: Remote, path: str, file: Path) -> None:
        seen.append(path)
        download(self, path, file)

    monkeypatch.setattr(Remote, "download", counted)
    arguments = (Remote(url), tmp_path / "node", [GOOD, OTHER])
    threads = [threading.Thread(target=shared.pull, args=arguments) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == len(set(seen)) == 8


@contextmanager
def compiling(folder: Path) -> Iterator[Path]:
    """A process that compiles in a module's folder; gives its lock's file."""
    lock = folder / "model.hlo_module.pb.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lock
        assert os.path.samestat(os.fstat(file.fileno()), lock.stat()), "the lock is another file now"


def test_a_module_under_compilation_is_left_alone(cache: Path, url: str, tmp_path: Path, capsys: Any) -> None:
    shared.push(Remote(url), cache, say=lambda line: None)
    node = tmp_path / "node"
    folder = node / GOOD
    folder.mkdir(parents=True)
    (folder / "model.hlo_module.pb").write_text("half")
    arguments = ["--cache", str(node), "--compiler", VERSION]
    with compiling(folder) as lock:
        assert main(["cache", "pull", url, *arguments]) == 0
        out = capsys.readouterr().out
        assert f"left {GOOD} as it is: it is being compiled here" in out and "pulled 1 graphs" in out
        assert sorted(file.name for file in folder.iterdir()) == ["model.hlo_module.pb", lock.name]
        assert main(["cache", "verify", url, *arguments]) == 1 and "missing here" in capsys.readouterr().out
    assert lock.exists()  # of a process that was killed
    assert main(["cache", "pull", url, *arguments]) == 0 and "pulled 1 graphs" in capsys.readouterr().out
    assert tree(node, (GOOD, OTHER)) == tree(cache, (GOOD, OTHER)) and lock.exists()


def test_a_dead_lock_stops_neither_push_nor_verify_and_does_not_travel(
    cache: Path, url: str, tmp_path: Path, capsys: Any
) -> None:
    (cache / GOOD / "model.hlo_module.pb.lock").touch()
    arguments = ["--cache", str(cache), "--compiler", VERSION]
    with compiling(cache / OTHER):  # again, as after a change of the compiler's own files
        assert main(["cache", "push", url, *arguments]) == 0
    out = capsys.readouterr().out
    assert "pushed 1 graphs" in out and f"left out {OTHER}" in out
    assert not [path for path in Remote(url).files() if path.endswith(".lock")]
    assert main(["cache", "push", url, *arguments]) == 0
    capsys.readouterr()
    assert main(["cache", "verify", url, *arguments]) == 0


@pytest.mark.parametrize("whole", [False, True])
def test_a_compilation_that_begins_during_the_download(
    cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    remote, node, said = Remote(url), tmp_path / "node", []
    shared.push(remote, cache, say=lambda line: None)
    download = Remote.download

    with ExitStack() as stack:

        def begin(self: Remote, path: str, file: Path) -> None:
            download(self, path, file)
            if not (node / GOOD).exists():
                module(node, GOOD, b"its own")
                if not whole:
                    (node / GOOD / "model.done").unlink()
                    stack.enter_context(compiling(node / GOOD))

        monkeypatch.setattr(Remote, "download", begin)
        monkeypatch.setattr(shared, "side_by_side", lambda work, items: [work(item) for item in items])
        assert shared.pull(remote, node, [GOOD], said.append)[0] == 0
        assert (node / GOOD / "model.neff").read_bytes() == b"its own"
        assert said == ([] if whole else [f"left {GOOD} as it is: it is being compiled here"])
        assert not list(node.rglob("*.partial"))


def test_who_waits_for_the_lock_finds_a_whole_module(
    cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that comes while files are replaced: it waits, and its lock is the one at the path."""
    shared.push(Remote(url), cache, say=lambda line: None)
    folder = tmp_path / "node" / GOOD
    folder.mkdir(parents=True)
    (folder / "model.log").write_text("F137")
    lock, found, waiting = folder / "model.hlo_module.pb.lock", [], threading.Event()

    def compiler() -> None:
        with lock.open("a") as file:
            waiting.set()
            fcntl.flock(file, fcntl.LOCK_EX)
            found.append(sorted(path.name for path in folder.iterdir()))
            found.append(os.path.samestat(os.fstat(file.fileno()), lock.stat()))

    thread = threading.Thread(target=compiler)
    replace = os.replace

    def slowly(source: Path, target: Path) -> None:
        if not waiting.is_set():
            thread.start()
            assert waiting.wait(30)
        replace(source, target)

    monkeypatch.setattr(shared.os, "replace", slowly)
    assert shared.pull(Remote(url), tmp_path / "node", [GOOD])[0] == 1
    thread.join(30)
    assert found == [sorted([*(file.name for file in (cache / GOOD).iterdir()), lock.name]), True]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Any:
    """A neuron_parallel_compile that compiles one graph, and an installed compiler."""
    monkeypatch.chdir(tmp_path)
    made = f"neuronxcc-{VERSION}/MODULE_33+44"
    script = tmp_path / "bin" / "neuron_parallel_compile"
    script.parent.mkdir()
    folder = tmp_path / "compiled" / made
    body = f"mkdir -p '{folder}'; echo NEFF > '{folder}/model.neff'; touch '{folder}/model.done'"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path / "compiled"))
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    monkeypatch.setattr("hlat.commands.cache.metadata.version", lambda name: VERSION)
    Path("trn.yaml").write_text(RECIPE)
    return made


def test_precompile_pushes_and_the_next_node_pulls(
    tool: str, cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    command = ["train", "trn.yaml", f"compile_cache={url}", "--precompile"]
    assert main(command) == 0
    assert "pushed 1 graphs" in capsys.readouterr().err
    assert shared.stored_modules(Remote(url)) == [tool]
    shutil.rmtree(tmp_path / "compiled")
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "first")
    assert main(command) == 0
    error = capsys.readouterr().err
    assert "pulled 1 graphs" in error and "pushed" not in error
    monkeypatch.setattr(Remote, "read", lambda *args: (_ for _ in ()).throw(StoreError("planted")))
    assert main(command) == 0, "a store that fails costs compilations, not the job"
    assert "warning: hlat cache: planted" in capsys.readouterr().err


def test_wrong_uses_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, url: str) -> None:
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", "s3://bucket/cache")
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    assert main(["cache", "pull", url]) == 2
    assert "NEURON_COMPILE_CACHE_URL: the compile cache is s3://bucket/cache" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    Path("trn.yaml").write_text(RECIPE)
    assert main(["recipes", "show", "trn.yaml", "backend=native", f"compile_cache={url}"]) == 2
    assert "compile_cache: only backend nxd" in capsys.readouterr().err
    assert main(["cache", "verify", url, "--cache", str(tmp_path), "--compiler", VERSION]) == 2
    assert "there are no graphs of this compiler" in capsys.readouterr().err
