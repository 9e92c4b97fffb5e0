"""`hlat doctor` on this machine, which has no Neuron device: facts, both exit codes, JSON and the plan."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hlat.backend.neuron.release import PIP_INDEX
from hlat.cli import main
from hlat.doctor.finding import Finding, healthy
from hlat.doctor.machine import Machine, Output, Package

ROOT = Path(__file__).resolve().parents[2]


def distribution(folder: Path, name: str, size: int, origin: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,,{size}\n{info.name}/LICENSE,,25646\n")
    if origin:
        (info / "direct_url.json").write_text(origin)


def test_placeholders_are_known_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's have one module of 119 bytes, and some a licence."""
    distribution(tmp_path, "hlat-fake-empty", 119)
    distribution(tmp_path, "hlat-fake-real", 500_000)
    distribution(tmp_path, "hlat-fake-editable", 90, '{"url": "file:///src", "dir_info": {"editable": true}}')
    monkeypatch.syspath_prepend(str(tmp_path))
    machine = Machine()
    assert machine.package("hlat-fake-empty") == Package("1.0", empty=True)
    assert machine.package("hlat-fake-real") == Package("1.0")
    assert machine.package("hlat-fake-editable") == Package("1.0")
    assert machine.package("hlat-fake-missing") is None


def test_this_machine_is_asked_without_a_shell(tmp_path: Path) -> None:
    machine = Machine()
    assert machine.run([sys.executable, "-c", "print('$HOME')"]) == Output(0, "$HOME\n")
    assert machine.run(["no-such-command-anywhere"]) is None
    slow = machine.run([sys.executable, "-c", "import time; time.sleep(30)"], timeout=0.2)
    assert slow is not None and slow.code is None
    assert machine.free(tmp_path / "not" / "there") and machine.writable(tmp_path / "not" / "there")
    (tmp_path / "file").touch()
    assert not machine.writable(tmp_path / "file" / "folder")
    assert machine.read("/proc/no-such-file") == "" and machine.find("/no-such-folder", "*") == []
    soft, hard = machine.limit("NOFILE")
    assert 0 < soft <= hard
    error = machine.clock_error()
    assert error is None or error >= 0
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as server:
        server.bind(("", 0))
        server.listen()
        assert not machine.port_free(server.getsockname()[1])


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key not in ("MASTER_PORT", "SLURM_NNODES")}
    command = [sys.executable, "-m", "hlat", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=300)


def test_a_healthy_native_machine_exits_0() -> None:
    done = doctor("--for", "native")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    allreduce.gloo" in done.stdout and "fail  " not in done.stdout


def test_a_machine_without_neuron_exits_1() -> None:
    done = doctor("hlat-7b", "--json", "--nodes", "16")
    assert done.returncode == 1 and done.stderr == ""
    result = json.loads(done.stdout)
    assert list(result) == ["schema", "platform", "nodes", "release", "healthy", "findings"]
    assert (result["schema"], result["platform"], result["healthy"]) == (1, "trn1", False)
    found = {item["check"]: item for item in result["findings"]}
    assert all(list(item) == ["check", "status", "fact", "fix", "advice"] for item in found.values())
    assert found["package.torch-neuronx"]["status"] == "fail"
    assert any(PIP_INDEX in line for line in found["package.torch-neuronx"]["fix"])
    assert found["recipe.layout"]["status"] == found["recipe.variables"]["status"] == "ok"


@pytest.fixture
def here(fake_host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A plain machine in the place of this one."""
    monkeypatch.setattr("hlat.doctor.machine.Machine", lambda: fake_host)
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    return fake_host


def test_the_plan_alone(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--for", "trn1", "--fix-plan"]) == 1
    assert PIP_INDEX in (text := capsys.readouterr().out) and "fail" not in text
    assert main(["doctor", "--fix-plan"]) == 0
    assert capsys.readouterr().out == "# no command to run\n"


def test_the_page_for_people(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "hlat doctor: native\n" in text and text.endswith("checks ok\n")
    assert "neuronx-distributed" in text and "hlat doctor --for trn1" in text
    here.packages.pop("torch")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "fail  package.torch" in text and "$ python -m pip install 'torch==" in text and "1 failed" in text


def test_a_recipe_that_compiles_needs_a_compiler(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    del here.commands["g++ --version"]
    for words, code, status in (["tiny"], 0, "warn"), (["tiny", "compile=true"], 1, "fail"):
        assert main(["doctor", *words, "--json"]) == code
        found = {f["check"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
        assert found["compiler"]["status"] == status and "g++" in found["compiler"]["fix"][0]


def test_what_does_not_fit_the_nodes_is_found(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def findings(*arguments: str) -> dict[str, str]:
        assert main(["doctor", *arguments, "--json"]) == 1
        return {item["check"]: item["status"] for item in json.loads(capsys.readouterr().out)["findings"]}

    found = findings("hlat-7b", "--nodes", "3")
    assert found["recipe.layout"] == "ok" and found["recipe.batch"] == "fail"
    assert findings("hlat-70b", "--nodes", "4")["recipe.layout"] == "fail"
    assert findings("hlat-7b", "parallel.tp=16")["recipe.variables"] == "fail"
    flash = findings("hlat-7b", "model.attention=flash", "data.document_mask=true")
    assert flash["recipe.backend"] == "fail" and found["recipe.backend"] == "ok"
    spread = ["parallel.tp=4", "parallel.pp=2", "data.global_batch=1024", "data.micro_batch=1"]
    assert findings("hlat-7b", *spread, "--nodes", "1")["recipe.layout"] == "fail"
    assert findings("hlat-7b", *spread, "--nodes", "2")["recipe.layout"] == "ok"


def test_paths_that_are_not_here_are_found(
    here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["doctor", "tiny", "data.sources=[{path: nowhere}]", "data.tokenizer=/none/t.model", "--json"])
    found = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["check"] == "recipe.paths"]
    assert [f["status"] for f in found] == ["warn", "warn"]
    assert [f["fact"].partition(":")[0] for f in found] == ["data.sources[0].path", "data.tokenizer"]


@pytest.mark.parametrize(
    "arguments", [["--nodes", "0"], ["no-such-recipe"], ["--for", "trn1", "--port", "x"]]
)
def test_wrong_arguments_exit_2(arguments: list[str]) -> None:
    assert doctor(*arguments).returncode == 2


def test_healthy_means_no_failure() -> None:
    assert healthy([Finding("a", "ok", ""), Finding("b", "warn", "")])
    assert not healthy([Finding("a", "fail", "")])


@pytest.mark.nxd
@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed")
@pytest.mark.parametrize(
    ("ranks", "right"), [pytest.param(1, True, id="xla-mode-1"), pytest.param(2, False, id="xla-mode-2")]
)
def test_the_sum_over_cores_can_fail(ranks: int, right: bool) -> None:
    """XLA's CPU device has no collectives between processes and does not say so: the check must notice."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environ = {**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "hlat.backend.nxd.probe"],
        capture_output=True,
        text=True,
        env=environ,
        timeout=300,
    )
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert (result["ranks"], result["right"], done.returncode == 0) == (ranks, right, right)
